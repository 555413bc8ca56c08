"""Explanations and scores as files of eai-delphi: written from a run, read back by us and by the library itself."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evalkit.cli import main
from evalkit.collect.stage import read_examples
from evalkit.config.run_config import DictionarySpec, RunConfig
from evalkit.delphi.export import Exported, export_delphi, read_scores
from evalkit.errors import BadConfig, BadFile, EvalkitError, MissingFile, UnknownFeature
from evalkit.evaluate.score_stage import Test, score_features
from evalkit.pipeline.stages import run
from evalkit.records import Answer, ExplainExamples, JudgeItem
from evalkit.registry import create, parse_part
from evalkit.sources.dumps.delphi_layout import CARD
from evalkit.store.run_store import RunStore, read_run
from tests.support.delphi_library import use_library
from tests.support.paths import DELPHI_LATENTS, DELPHI_TOKENIZER
from tests.support.run_folders import tiny_options


class ShortJudge:
    """Says yes to texts with many characters, is unsure of some and cannot tell of others."""

    name, version, probabilistic = "short", "1", True

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        found = []
        for item in items:
            size = len(item.text) % 10 / 10
            found.append(Answer(None, reason="no idea") if size == 0.3 else Answer(size > 0.5, size, size))
        return found


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three dictionaries, two of them of one layer, explained, with one judge's judgements, shuffled ones too."""
    folder = tmp_path_factory.mktemp("run")
    dictionaries = []
    for name, hook in (("first", "layers.0"), ("second", "layers.0"), ("third", "layers.1.mlp")):
        cache = shutil.copytree(DELPHI_LATENTS / hook, folder / name / hook)
        config = json.loads((cache / "config.json").read_text())
        (cache / "config.json").write_text(json.dumps({**config, "model_name": str(DELPHI_TOKENIZER)}))
        dictionaries.append(DictionarySpec(path=str(cache), name=f"{name}/{hook}/delphi", model="tiny"))
    options = {
        "model": "none/needed", "dictionaries": tuple(dictionaries), "n_features": 6, "n_explain": 6, "n_positives": 5,
        "n_negatives": 5, "window_length": 12, "controls": ("shuffled",),
    }  # fmt: skip
    run(RunConfig.create(**options), folder / "run", stages=("collect", "explain"))
    judge(folder / "run", "short@model")
    return folder / "run"


def judge(folder: Path, *names: str) -> None:
    with RunStore.create(folder, json.loads((folder / "run.json").read_text())) as store:
        scorers = [create("scorers", name) for name in ("detection", "fuzzing")]
        tests = [Test(scorer.name, scorer, name, ShortJudge()) for name in names for scorer in scorers]
        asyncio.run(score_features(store, read_examples(store, 0), ["words"], tests, shuffled=True, seed=0))


@pytest.fixture(scope="module")
def exported(judged: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    out = tmp_path_factory.mktemp("exported") / "out"
    return out, export_delphi(judged, out)


def test_every_explanation_and_score_is_written_once(judged: Path, exported: tuple[Path, Exported]) -> None:
    """A dictionary is called by its site; two of one layer have their whole names, so that they stay apart."""
    out, done = exported
    frames = read_run(judged)
    assert done.modules == {
        "first--layers.0--delphi": "first/layers.0/delphi",
        "second--layers.0--delphi": "second/layers.0/delphi",
        "layers.1.mlp": "third/layers.1.mlp/delphi",
    }
    assert (done.explainer, done.judge) == ("words", "short@model")
    card = json.loads((out / CARD).read_text())
    explained = frames.explanations.set_index(["source", "feature"])
    texts = {}
    for module, one in card["modules"].items():
        for number, feature in one["features"].items():
            path = out / "explanations" / f"{module}_latent{number}.txt"
            texts[one["source"], feature] = json.loads(path.read_text())
    assert texts == explained["text"].to_dict()
    assert len(list((out / "explanations").iterdir())) == done.n_explanations == len(explained)
    assert sorted(path.name for path in (out / "scores").iterdir()) == ["detection", "fuzz"]
    assert len(list((out / "scores").glob("*/*"))) == done.n_scores == 2 * len(explained)


def test_the_entries_are_the_judgements_on_their_windows(judged: Path, exported: tuple[Path, Exported]) -> None:
    out, _ = exported
    card = json.loads((out / CARD).read_text())
    found = read_run(judged).judgements
    with RunStore.open(judged) as store:
        examples = read_examples(store, 0)
    n_null = 0
    for module, one in card["modules"].items():
        for number, feature in one["features"].items():
            for scorer, kind in (("detection", "detection"), ("fuzzing", "fuzz")):
                entries = json.loads((out / "scores" / kind / f"{module}_latent{number}.txt").read_text())
                of = (found["source"] == one["source"]) & (found["feature"] == feature) & (found["scorer"] == scorer)
                mine = found.loc[of & (found["control"] == "")].sort_values("item")
                assert len(entries) == len(mine)
                test = examples[one["source"]][feature].score.test
                windows = {w.window: w for w in (*test.positives, *test.decoys, *test.negatives)}
                for entry, row in zip(entries, mine.to_dict("records"), strict=True):
                    window = windows[row["window"]]
                    assert tuple(entry["str_tokens"]) == window.tokens
                    assert tuple(entry["activations"]) == window.activations
                    assert entry["activating"] is bool(row["label"])
                    assert entry["distance"] == (window.decile if row["label"] else -1)
                    if pd.isna(row["match"]):
                        n_null += 1
                        assert (entry["prediction"], entry["probability"], entry["correct"]) == (None, None, None)
                    else:
                        assert entry["prediction"] is bool(row["match"]) and entry["probability"] == row["probability"]
                        assert entry["correct"] is (entry["prediction"] is entry["activating"])
    assert n_null > 5


def test_scores_read_back_are_those_that_were_written(judged: Path, exported: tuple[Path, Exported]) -> None:
    out, done = exported
    found = read_scores(out)
    pd.testing.assert_frame_equal(found, read_scores(out / "scores"))
    written = read_run(judged).judgements.query("control == '' and source in @done.modules.values()")
    assert len(found) == len(written)
    found["source"] = found["module"].map(dict(done.modules))
    for scorer, kind in (("detection", "detection"), ("fuzzing", "fuzz")):
        for source in done.modules.values():
            mine = found.loc[(found["scorer"] == kind) & (found["source"] == source)]
            theirs = written.loc[(written["scorer"] == scorer) & (written["source"] == source)]
            for column in ("label", "match"):
                assert mine[column].value_counts(dropna=False).to_dict() == (
                    theirs[column].value_counts(dropna=False).to_dict()
                )
    assert found["match"].isna().any() and found.loc[found["match"].isna(), "confidence"].isna().all()
    assert (found["text"] == found["tokens"].map("".join)).all()


def explain(explainer: Any, source: str, feature: str) -> str:
    examples = ExplainExamples(source, feature, 0.0, 1.0, ())
    return str(asyncio.run(explainer.explain(feature, examples, None)).text)


def test_its_explanations_explain_again(judged: Path, exported: tuple[Path, Exported]) -> None:
    """As the explainer of another command on the same run: every dictionary its own, whatever its features are called."""
    out, _ = exported
    part = parse_part("explainers", f"delphi:{out}")
    explainer = create("explainers", part.name, **part.options)
    explained = read_run(judged).explanations
    assert len(explained) > 10
    for row in explained.to_dict("records"):
        assert explain(explainer, row["source"], row["feature"]) == row["text"]


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, held in files.items():
        text = held if isinstance(held, str) else json.dumps(held[0])
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_modules_are_told_by_the_name_of_the_dictionary(tmp_path: Path) -> None:
    """layers.1 is not layers.10; where no part of the name is a module, the option says which."""
    folder = write(
        tmp_path / "run" / "explanations",
        **{"layers.1_latent5": ["one"], "layers.10_latent5": ["ten"], "h.2--mlp_latent05": [" two\n words "]},
    )
    for path in (folder, folder.parent):
        explainer = create("explainers", "delphi", path=str(path))
        assert explain(explainer, "model/layers.1/sae/width-64", "5") == "one"
        assert explain(explainer, "model/layers.10/sae/width-64", "5") == "ten"
        with pytest.raises(BadConfig) as caught:
            explain(explainer, "model/layers.2.mlp/sae", "5")
        assert str(caught.value) == (
            "explainer 'delphi' for model/layers.2.mlp/sae: expected a module of "
            f"{folder}: h.2--mlp, layers.1, layers.10; seen none that is part of the dictionary's name; "
            "fix: name the module: --explainer delphi:FOLDER,module=MODULE"
        )
    part = parse_part("explainers", f"delphi:{folder},module=h.2/mlp")
    explainer = create("explainers", "delphi", **part.options)
    assert explain(explainer, "model/layers.2.mlp/sae", "5") == "two words"
    with pytest.raises(UnknownFeature, match=r"model/x feature 6: expected h\.2--mlp_latent6\.txt in "):
        explain(explainer, "model/x", "6")
    with pytest.raises(BadConfig, match="seen 'other'"):
        explain(create("explainers", "delphi", path=str(folder), module="other"), "model/x", "5")
    for empty in (tmp_path, tmp_path / "none"):
        with pytest.raises(MissingFile, match=r"expected a folder with explanations/MODULE_latentN\.txt"):
            create("explainers", "delphi", path=str(empty))


def test_no_explanation_goes_to_a_dictionary_it_is_not_of(tmp_path: Path) -> None:
    """Nor to a control, which has the layer in its name too."""
    folder = write(tmp_path / "explanations", **{"layers.15_latent5": ["one"], "layers.15_latent6": ["\ud800 dogs"]})
    sae, other, null = "m/layers.15/sae/width-64", "m/layers.15/sae/width-128", "m/layers.15/null-planted"
    made = create("explainers", "delphi", path=str(folder))
    asyncio.run(made.prepare([sae, null, "m/layers.20/sae/width-64"]))
    assert [made.explains(name) for name in (sae, null, "m/layers.20/sae/width-64")] == [True, False, False]
    with pytest.raises(BadConfig, match=r"expected exactly one dictionary per module; seen 2: .*source=NAME"):
        asyncio.run(made.prepare([sae, other]))
    with pytest.raises(BadConfig, match="none that is part of the dictionary's name"):
        asyncio.run(made.prepare(["m/layers.20/sae/width-64", null]))
    told = create("explainers", "delphi", path=str(folder), source="*/width-128")
    asyncio.run(told.prepare([sae, other]))
    assert [told.explains(name) for name in (sae, other)] == [False, True]
    named = create("explainers", "delphi", path=str(folder), module="layers.15")
    with pytest.raises(BadConfig, match="expected exactly one dictionary per module"):
        asyncio.run(named.prepare([sae, "m/layers.20/sae/width-64"]))
    with pytest.raises(BadFile, match="expected a phrase of at most"):
        explain(made, sae, "6")


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ('"Explanation could not be parsed."', UnknownFeature, "seen 'Explanation could not be parsed.'"),
        ('"No explanation found"', UnknownFeature, "seen 'No explanation found'"),
        ('""', UnknownFeature, "seen ''"),
        (
            "words without quotes",
            BadFile,
            "expected an explanation as a JSON string; seen invalid JSON (line 1, column 1)",
        ),
        ('{"explanation": "a"}', BadFile, "seen JSON of type dict"),
        ("[" * 100_000, BadFile, "expected an explanation as a JSON string"),
        ('"' + "a" * 1_000_001 + '"', BadFile, "seen 1000003 bytes"),
    ],
)
def test_what_is_no_explanation_is_refused(tmp_path: Path, text: str, kind: type[EvalkitError], message: str) -> None:
    folder = write(tmp_path, **{"layers.1_latent5": text})
    with pytest.raises(kind) as caught:
        explain(create("explainers", "delphi", path=str(folder)), "model/layers.1/sae", "5")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_one_explainer_and_one_judge_are_chosen(judged: Path, tmp_path: Path) -> None:
    """The lexical control does not count; of two others one must be named."""
    with pytest.raises(BadConfig, match=r"expected exactly one explainer: .* \(recorded: words\); seen 'none such'"):
        export_delphi(judged, tmp_path / "out", explainer="none such")
    run = shutil.copytree(judged, tmp_path / "run")
    judge(run, "lexical")
    assert export_delphi(run, tmp_path / "out").judge == "short@model"
    judge(run, "other@model")
    with pytest.raises(BadConfig) as caught:
        export_delphi(run, tmp_path / "none")
    assert str(caught.value) == (
        "judge: expected exactly one judge: the format has room for only one (recorded: lexical, other@model, "
        "short@model); seen several; fix: choose it with --judge"
    )
    assert not (tmp_path / "none").exists()
    assert export_delphi(run, tmp_path / "other", judge="other").judge == "other@model"


def test_the_command(judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evalkit", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    out = tmp_path / "out"
    code, said, _ = call(judged, "--format", "delphi", "--out", out)
    assert code == 0 and re.fullmatch(rf"{out}/explanations\t\d+\n{out}/scores\t\d+\n", said)
    code, said, error = call(judged, "--format", "delphi", "--out", out)
    assert (code, said) == (2, "") and error.startswith(f"error: {out}: expected a new or empty folder")
    code, _, error = call(judged, "--format", "csv", "--out", tmp_path / "csv")
    assert code == 2 and error == "error: --format: expected delphi; seen 'csv'; fix: use --format delphi\n"
    code, _, error = call(tmp_path, "--format", "delphi", "--out", tmp_path / "csv")
    assert code == 2 and "expected a run folder" in error


ENTRY = {
    "str_tokens": ["a", " b"],
    "activations": [0.0, 1],
    "distance": 3,
    "activating": True,
    "prediction": None,
    "probability": None,
    "correct": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"str_tokens": ["a", 1]}, "entry 1: expected str_tokens, a list of strings; seen ['a', 1]"),
        ({"activations": [0.0]}, "entry 1: expected activations, a number for every token; seen [0.0]"),
        ({"activations": [0.0, float("nan")]}, "expected activations, a number for every token; seen [0.0, nan]"),
        ({"activations": [0.0, None]}, "expected activations, a number for every token"),
        ({"activating": 1}, "entry 1: expected activating, true or false; seen 1"),
        ({"prediction": "yes"}, "entry 1: expected prediction, true, false or null; seen 'yes'"),
        ({"probability": 1.5}, "entry 1: expected probability from 0 to 1, or null; seen 1.5"),
        ({"distance": None}, "entry 1: expected distance, a number; seen None"),
        (None, "entry 1: expected an object with activating, activations, "),
    ],
)
def test_a_bad_entry_is_one_line(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    entries = [ENTRY, {"text": "x"} if change is None else {**ENTRY, **change}]
    folder = write(tmp_path / "scores" / "fuzz", **{"layers.1_latent5": [entries]})
    with pytest.raises(BadFile) as caught:
        read_scores(tmp_path)
    assert str(folder / "layers.1_latent5.txt") in str(caught.value)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_other_kinds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "scores" / "simulation", **{"layers.1_latent5": [[{"ev_correlation_score": 0.3}]]})
    write(tmp_path / "scores" / "fuzz", **{"layers.1_latent5": [[ENTRY]], "notes": ["not of a latent"]})
    with caplog.at_level(logging.WARNING):
        found = read_scores(tmp_path)
    assert found["scorer"].tolist() == ["fuzz"] and found["text"].tolist() == ["a b"]
    assert f"{tmp_path}: scores/simulation is skipped: its entries are not texts with predictions" in caplog.messages
    for text in ("[{", "[" * 100_000):
        write(tmp_path / "scores" / "fuzz", **{"layers.1_latent5": text})
        with pytest.raises(BadFile, match="expected a JSON list with one object per text shown"):
            read_scores(tmp_path)
    for empty in (tmp_path / "none", tmp_path / "scores" / "fuzz"):
        with pytest.raises(MissingFile, match=r"expected a folder with scores/SCORER/MODULE_latentN\.txt"):
            read_scores(empty)


@pytest.mark.slow
def test_features_that_are_no_numbers_and_controls(tmp_path: Path, tiny_llama: Path) -> None:
    """Features of an RQAE are numbered by their place in the run, and explained again under their own names."""
    options = {**tiny_options(tmp_path, tiny_llama), "controls": ("shuffled", "random-directions")}
    run(RunConfig.create(**options), tmp_path / "run", stages=("collect", "explain"))
    judge(tmp_path / "run", "short@model")
    done = export_delphi(tmp_path / "run", tmp_path / "out")
    explainer = create("explainers", "delphi", path=str(tmp_path / "out"))
    frames = read_run(tmp_path / "run")
    kinds = frames.sources.set_index("name")["kind"].to_dict()
    assert {kinds[name] for name in done.modules.values()} == {"sae", "rqae"} and len(done.modules) == 3
    for row in frames.explanations.to_dict("records"):
        if kinds[row["source"]] in ("sae", "rqae"):
            assert explain(explainer, row["source"], row["feature"]) == row["text"]
    card = json.loads((tmp_path / "out" / CARD).read_text())
    (rqae,) = (one for one in card["modules"].values() if one["source"].endswith("depth-8"))
    assert [*rqae["features"]] == [str(place) for place in range(len(rqae["features"]))]
    assert all("@" in feature for feature in rqae["features"].values())
    assert {path.parent.name for path in (tmp_path / "out" / "scores").glob("*/*")} == {"detection", "fuzz"}
    every = export_delphi(tmp_path / "run", tmp_path / "all", controls=True)
    assert {kinds[name] for name in every.modules.values()} == {"sae", "rqae", "null-random-directions"}


@pytest.mark.slow
def test_the_library_reads_what_is_written(
    exported: tuple[Path, Exported], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its loader of explanations and its table of scores, against ours."""
    use_library(tmp_path_factory)
    from delphi.explainers import explanation_loader
    from delphi.latents import Latent, LatentRecord
    from delphi.log.result_analysis import load_data

    out, done = exported
    card = json.loads((out / CARD).read_text())
    explainer = create("explainers", "delphi", path=str(out))
    for module, one in card["modules"].items():
        for number, feature in one["features"].items():
            record = LatentRecord(Latent(module, int(number)))
            read = asyncio.run(explanation_loader(record, str(out / "explanations"))).explanation
            assert read == explain(explainer, one["source"], feature)
    theirs, _ = load_data(out / "scores", list(done.modules))
    ours = read_scores(out)
    keys = ["module", "scorer", "latent"]
    theirs = theirs.rename(columns={"score_type": "scorer", "latent_idx": "latent", "activating": "label"})
    theirs = theirs.sort_values(keys, kind="stable").reset_index(drop=True)
    ours = ours.sort_values([*keys, "item"]).reset_index(drop=True)
    assert len(theirs) == len(ours) > 100
    for column in (*keys, "text", "label", "distance"):
        assert theirs[column].tolist() == ours[column].tolist()
    assert [None if value is None else bool(value) for value in theirs["prediction"]] == [
        None if pd.isna(value) else bool(value) for value in ours["match"]
    ]
    assert theirs["probability"].astype(float).equals(ours["probability"])
    assert [tuple(map(float, values)) for values in theirs["activations"]] == ours["activations"].tolist()
