"""Exports explanations and scores of a run to files of eai-delphi, and reads score files of eai-delphi into a table.

``explanations/MODULE_latentN.txt``: an explanation as a JSON string.
``scores/SCORER/MODULE_latentN.txt``: a JSON list with one object per text shown. Keys: ``str_tokens``, ``activations``,
``distance`` (quantile of an activating text, -1 for others), ``activating``; and ``prediction``, ``probability`` and
``correct``, which may be null.
``evalkit.json``: the dictionary of each module, and the feature of each number N. Features whose ids are not numbers are
numbered by their position in the run.

Module names have "--" in place of "/". The format has no place for further explainers and judges, controls, repeats,
reasons, and tests whose questions are not single texts; these are not exported. Reads the records and examples of a run;
does not know judges and does not import the library.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.errors import BadConfig, BadFile, MissingFile, json_problem
from evalkit.records import BASELINE, CONTROL_KIND, Example, FeatureExamples, FeatureId
from evalkit.sources.dumps.delphi_layout import CARD, LATENT_FILE, module_name
from evalkit.util.atomic_files import write_bytes

if TYPE_CHECKING:
    import pandas as pd


__all__ = ["SCORERS", "Exported", "export_delphi", "read_scores"]

_LOG = logging.getLogger(__name__)
SCORERS = {"detection": "detection", "fuzzing": "fuzz", "delphi-detection": "detection", "delphi-fuzz": "fuzz"}
_LARGEST = 64_000_000  # bytes; larger files of scores are rejected
_KEYS = frozenset({"str_tokens", "activations", "distance", "activating", "prediction", "probability", "correct"})


@dataclass(frozen=True, slots=True)
class Exported:
    """A summary of an export.

    ``explainer``, ``judge``: the recorded names that were exported.
    ``modules``: the dictionary of each module.
    ``n_explanations``, ``n_scores``: the number of files written.
    """

    explainer: str
    judge: str
    modules: Mapping[str, str]
    n_explanations: int
    n_scores: int


def export_delphi(
    run: Path, out: Path, *, explainer: str | None = None, judge: str | None = None, controls: bool = False
) -> Exported:
    """Write the explanations of one explainer, and the scores that one judge gave them, below the folder ``out``.

    ``explainer``, ``judge``: a recorded name, with or without the client; may be omitted if the run has only one. The judge
    of the control "lexical" does not count.
    ``controls``: whether to export dictionaries that are controls.

    Raises MissingFile, BadFile, StorageError, and BadConfig if several explainers or judges could be meant.
    """
    from evalkit.collect.stage import read_examples
    from evalkit.store.run_store import RunStore

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadConfig(str(out), expected="a new or empty folder", seen="existing files", fix="choose another --out")
    with RunStore.open(run) as store:
        frames = store.frames()
        examples = read_examples(store, int(store.identity().get("seed", 0)))
    explanations, judged = frames.explanations, frames.judgements
    explanations = explanations.loc[explanations["text"].notna()]
    chosen = _choose("explainer", explanations["explainer"], explainer)
    judged = judged.loc[(judged["explainer"] == chosen) & (judged["control"] == "") & (judged["repeat"] == 0)]
    asked = _choose("judge", judged["judge"], judge, spare=BASELINE[1])
    sources = frames.sources
    kept = sources if controls else sources.loc[~sources["kind"].astype(str).str.startswith(CONTROL_KIND)]
    places = _Places(_modules(kept), {name: _numbers(list(found)) for name, found in examples.items()})
    n_explanations = _write_explanations(explanations.loc[explanations["explainer"] == chosen], places, out)
    n_scores = _write_scores(judged.loc[judged["judge"] == asked], examples, places, out)
    card = {"explainer": chosen, "judge": asked, "modules": places.card()}
    write_bytes(out / CARD, (json.dumps(card, indent=1, ensure_ascii=False) + "\n").encode())
    return Exported(chosen, asked, places.modules, n_explanations, n_scores)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where features are exported.

    ``modules``: the dictionary of each module.
    ``numbers``: per dictionary, the number of each feature.
    """

    modules: Mapping[str, str]
    numbers: Mapping[str, Mapping[FeatureId, int]]

    def file(self, source: str, feature: FeatureId) -> str | None:
        """The file name of a feature; None if the feature is not exported."""
        module = next((module for module, name in self.modules.items() if name == source), None)
        number = self.numbers.get(source, {}).get(feature)
        return None if module is None or number is None else f"{module}_latent{number}.txt"

    def card(self) -> dict[str, Any]:
        """The content of ``evalkit.json`` under "modules"."""
        return {
            module: {"source": name, "features": {str(n): feature for feature, n in self.numbers[name].items()}}
            for module, name in self.modules.items()
        }


def _write_explanations(explanations: pd.DataFrame, places: _Places, out: Path) -> int:
    count = 0
    for row in explanations.to_dict("records"):
        if file := places.file(row["source"], row["feature"]):
            write_bytes(out / "explanations" / file, json.dumps(row["text"], ensure_ascii=False).encode())
            count += 1
    return count


def _write_scores(
    judged: pd.DataFrame, examples: Mapping[str, Mapping[FeatureId, FeatureExamples]], places: _Places, out: Path
) -> int:
    count = 0
    for key, group in judged.groupby(["source", "feature", "scorer"]):
        source, feature, scorer = map(str, key)
        file = places.file(source, feature)
        if file is None or group["moments"].notna().any() or group["label"].all():
            continue  # simulations, and tests with one label only: the format has other files for these
        folder = SCORERS.get(scorer.partition(":")[0], re.sub(r"[^\w.,=-]", "-", scorer))
        target = out / "scores" / folder / file
        if target.exists():
            raise BadConfig(
                scorer,
                expected=f"at most one scorer for the folder {folder}",
                seen="several",
                fix="export a run with only one of these scorers",
            )
        lines = [*_lines(group, examples[source][feature])]
        write_bytes(target, json.dumps(lines, ensure_ascii=False).encode())
        count += 1
    return count


def _choose(kind: str, recorded: pd.Series[Any], asked: str | None, spare: str | None = None) -> str:
    """The recorded name that ``asked`` refers to. Raises BadConfig unless it is exactly one.

    ``spare``: without ``asked``, this name is chosen only if there is no other.
    """
    there = sorted(str(name) for name in recorded.unique())
    if asked is None:
        fitting = [name for name in there if name != spare] or there
    else:
        fitting = [name for name in there if name == asked] or [
            name for name in there if name.partition("@")[0] == asked
        ]
    if len(fitting) != 1:
        raise BadConfig(
            kind,
            expected=f"exactly one {kind}: the format has room for only one (recorded: {', '.join(there) or 'none'})",
            seen="several" if fitting else repr(asked) if asked else "none",
            fix=f"choose it with --{kind}" if there else "let `evalkit run` finish first",
        )
    return fitting[0]


def _modules(sources: pd.DataFrame) -> dict[str, str]:
    """The dictionary of each module. A module is named by the site, or by the whole name of the dictionary if sites repeat.

    Raises BadConfig if two dictionaries get the same module name.
    """
    sites = sources["site"].astype(str).map(module_name)
    names = sources["name"].astype(str)
    twice = sites.duplicated(keep=False)
    modules = [
        module_name(name) if repeated else site for site, name, repeated in zip(sites, names, twice, strict=True)
    ]
    if same := next((module for module in modules if modules.count(module) > 1), None):
        both = [name for module, name in zip(modules, names, strict=True) if module == same]
        raise BadConfig(
            "export",
            expected="a different module name for every dictionary",
            seen=f"the same name for {', '.join(both)}",
            fix="rename one of these dictionaries",
        )
    return dict(zip(modules, names, strict=True))


def _numbers(features: Sequence[FeatureId]) -> dict[FeatureId, int]:
    """The number of every feature: its id if all ids are numbers, else its position in the run."""
    if all(re.fullmatch(r"0|[1-9]\d{0,11}", feature, re.ASCII) for feature in features):
        return {feature: int(feature) for feature in features}
    return {feature: place for place, feature in enumerate(features)}


def _lines(judgements: pd.DataFrame, examples: FeatureExamples) -> Iterator[dict[str, Any]]:
    """One object per judgement, in the order in which they were asked."""
    test = examples.score.test
    windows: dict[int, Example] = {e.window: e for e in (*test.positives, *test.decoys, *test.negatives)}
    for row in judgements.sort_values("item").to_dict("records"):
        example = windows[int(row["window"])]
        label, match = bool(row["label"]), _known(row["match"])
        yield {
            "str_tokens": list(example.tokens),
            "activations": list(example.activations),
            "distance": (example.decile or 0) if label else -1.0,
            "activating": label,
            "prediction": None if match is None else bool(match),
            "probability": _known(row["probability"]),
            "correct": None if match is None else bool(match) == label,
        }


def _known(value: Any) -> Any:
    import pandas as pd

    return None if pd.isna(value) else value


def read_scores(folder: str | Path) -> pd.DataFrame:
    """Every text shown, one per row, from score files of the library or of an export.

    ``folder``: the folder that contains ``scores/``, or ``scores/`` itself.

    Columns: module, latent, scorer, item (position in its file), text, tokens, activations, label (activating), match (the
    prediction; null if none was parsed), confidence and probability (may be null), distance (the quantile of an activating
    text). Folders with scores of other kinds (simulation, embedding …) are skipped, with a warning. Raises MissingFile, or
    BadFile with the file and the entry.
    """
    import pandas as pd

    root = Path(folder) / "scores" if (Path(folder) / "scores").is_dir() else Path(folder)
    rows: list[dict[str, Any]] = []
    others = set()
    files = sorted(path for path in root.glob("*/*") if LATENT_FILE.fullmatch(path.name)) if root.is_dir() else []
    for path in files:
        entries = _entries(path)
        if entries and not (isinstance(entries[0], dict) and "activating" in entries[0]):
            others.add(path.parent.name)
            continue
        found = LATENT_FILE.fullmatch(path.name)
        assert found is not None
        where = {"module": found["module"], "latent": int(found["latent"]), "scorer": path.parent.name}
        rows += [{**where, "item": item, **_row(path, item, entry)} for item, entry in enumerate(entries)]
    if not files:
        raise MissingFile(
            str(folder),
            expected="a folder with scores/SCORER/MODULE_latentN.txt",
            seen="no such file" if Path(folder).exists() else "no such folder",
            fix="give the folder of a run of eai-delphi, or the output of `evalkit export --format delphi`",
        )
    for name in sorted(others):
        _LOG.warning("%s: scores/%s is skipped: its entries are not texts with predictions", folder, name)
    columns = [
        *("module", "latent", "scorer", "item", "text", "tokens", "activations", "label", "match"),
        *("confidence", "probability", "distance"),
    ]
    frame = pd.DataFrame(rows, columns=columns)
    frame["label"] = frame["label"].astype(bool)
    frame["match"] = frame["match"].astype("boolean")
    for column in ("confidence", "probability", "distance"):
        frame[column] = frame[column].astype("float64")
    return frame


def _entries(path: Path) -> list[Any]:
    try:
        if path.stat().st_size > _LARGEST or not path.is_file():
            raise ValueError(f"{path.stat().st_size} bytes, too large" if path.is_file() else "not a regular file")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _bad(str(path), "a JSON list with one object per text shown", json_problem(error)[:200]) from error
    return found if isinstance(found, list) else [found]


def _row(path: Path, item: int, entry: Any) -> dict[str, Any]:
    place = f"{path} entry {item}"
    if not isinstance(entry, dict) or not entry.keys() >= _KEYS:
        seen = f"no {min(_KEYS - entry.keys())}" if isinstance(entry, dict) else f"JSON of type {type(entry).__name__}"
        raise _bad(place, f"an object with {', '.join(sorted(_KEYS))}", seen)
    tokens, values, label = entry["str_tokens"], entry["activations"], entry["activating"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise _bad(place, "str_tokens, a list of strings", repr(tokens)[:60])
    if not isinstance(values, list) or not all(_is_number(value) for value in values) or len(values) != len(tokens):
        raise _bad(place, "activations, a number for every token", repr(values)[:60])
    if not isinstance(label, bool):
        raise _bad(place, "activating, true or false", repr(label)[:40])
    match, probability, distance = entry["prediction"], entry["probability"], entry["distance"]
    if match is not None and not isinstance(match, bool):
        raise _bad(place, "prediction, true, false or null", repr(match)[:40])
    if probability is not None and not (_is_number(probability) and 0 <= probability <= 1):
        raise _bad(place, "probability from 0 to 1, or null", repr(probability)[:40])
    if not _is_number(distance):
        raise _bad(place, "distance, a number", repr(distance)[:40])
    return {
        "text": "".join(tokens),
        "tokens": tuple(tokens),
        "activations": tuple(map(float, values)),
        "label": label,
        "match": match,
        "confidence": probability if probability is not None else None if match is None else float(match),
        "probability": probability,
        "distance": float(distance),
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _bad(place: str, expected: str, seen: str) -> BadFile:
    return BadFile(place, expected=expected, seen=seen, fix="write the file again, or remove it from the folder")
