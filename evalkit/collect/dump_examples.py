"""Makes a run's examples from sources that have theirs ready (a dump of another tool): no corpus and no subject model.

Texts are cut to windows: round the peak for a feature that is active (the peak's place in the window is hashed, so that
marks lie anywhere), at a hashed place for negatives. Negatives are windows of texts that are recorded of other features
and not of this one: nothing verifies that it is silent there, unless the source stores every activation
(``verifies_negatives``): then they are windows in which it is silent, apart from the feature's own window of that text.
A text is in the explain or the score pool by its hash,
whatever features and sources it is recorded of; windows of the same tokens count once. From there on the draw, the files
and the tables are those of a corpus. Writes ``examples/`` and the tables ``sources`` and ``features``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.collect.example_files import ExampleRow, ExampleStore, rows_of
from evalkit.collect.sampling import Counts, FeatureWindows, draw_windows
from evalkit.config.run_config import NULL_SOURCES, RunConfig
from evalkit.corpus.windows import Grid
from evalkit.errors import BadConfig, CorpusError, UnknownFeature
from evalkit.protocols import ExampleSource, Progress, ReadyExamples, ReadyText
from evalkit.records import FeatureId
from evalkit.seeds import derive, hash_priorities
from evalkit.store.run_store import FeatureRow, RunStore
from evalkit.util.progress import SILENT

__all__ = ["ReadyMaterial", "check_ready", "gather_ready", "write_ready"]

_LOG = logging.getLogger(__name__)
_NEITHER = 2  # pool of windows that are not this feature's business


@dataclass(frozen=True, slots=True)
class _Window:
    """A cut of a text: where it starts, and its id, a 63-bit hash of its tokens."""

    window: int
    start: int


@dataclass(frozen=True, slots=True)
class _Material:
    """One source: its chosen features, its texts, and the windows cut from them.

    ``positives``: by feature and text; ``negatives``: by text, of those that may serve as negatives.
    """

    source: ExampleSource
    features: tuple[FeatureId, ...]
    examples: ReadyExamples
    texts: Mapping[int, ReadyText]
    positives: Mapping[FeatureId, Mapping[int, _Window]]
    negatives: Mapping[int, _Window]


@dataclass(frozen=True, slots=True)
class ReadyMaterial:
    """Everything cut and numbered, before a window is drawn."""

    sources: tuple[_Material, ...]
    grid: Grid
    tokens: Mapping[int, tuple[str, ...]]  # by window id

    def manifest(self) -> list[dict[str, Any]]:
        """What tells that a resumed run has the same dump: per source, a hash of its features and texts."""
        return [
            {"source": one.source.name, "texts": derive(0, *one.features, *sorted(one.texts), *_sums(one.examples))}
            for one in self.sources
        ]


def check_ready(sources: Sequence[Any]) -> list[ExampleSource]:
    """The sources with ready examples: all of them or none. Raises BadConfig for a mixture, and for a shared name."""
    ready = [source for source in sources if isinstance(source, ExampleSource)]
    if not ready:
        return []
    if others := [source.name for source in sources if not isinstance(source, ExampleSource)]:
        raise BadConfig(
            "dictionaries",
            expected="either dictionaries, which a model reads a corpus for, or dumps with ready examples",
            seen=f"{others[0]} beside {ready[0].name}",
            fix="make two runs with two --out folders",
        )
    names = [source.name for source in ready]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise BadConfig(repeated, expected="a name of its own for every dump", seen="two", fix="pass each dump once")
    return ready


def gather_ready(config: RunConfig, sources: Sequence[ExampleSource], progress: Progress = SILENT) -> ReadyMaterial:
    """Read the dumps, choose features by hash, cut windows. Raises what the sources raise, CorpusError."""
    missing = [control for control in config.controls if control in NULL_SOURCES]
    if missing:
        _LOG.warning("no %s control: ready examples come without activations to make it from", ", ".join(missing))
    task = progress.start("read examples", len(sources), "dumps")
    material = []
    for source in sources:
        material.append(_read(config, source))
        progress.advance(task)
    progress.finish(task)
    return ReadyMaterial(tuple(material), *_grid(config, material))


def _read(config: RunConfig, source: ExampleSource) -> _Material:
    ids = source.features()
    if not ids:
        raise CorpusError(
            source.name,
            expected="features with an activating text",
            seen="none",
            fix="download all batches of activations/",
        )
    chosen = _choose(config, source.name, ids)
    known = set(ids)
    examples = source.examples([feature for feature in chosen if feature in known])
    texts = {text.text: text for text in examples.texts}
    length, skip = config.window_length, config.skip_first
    positives: dict[FeatureId, dict[int, _Window]] = {feature: {} for feature in chosen}
    negatives = {}
    for number, text in sorted(texts.items()):
        starts = _starts(text, length, skip)
        if not len(starts):
            continue
        for feature, values in text.activations.items():
            if feature in positives and (cut := _around_peak(config.seed, text, values, starts, length)):
                positives[feature][number] = cut
        if text.complete:
            key = derive(config.seed, "negative window", number)
            negatives[number] = _window(text, int(starts[key % len(starts)]), length)
    too_short = sum(not len(_starts(text, length, skip)) for text in texts.values())
    if not _verifies(source):
        _LOG.warning("%s: negatives: texts of other features, not verified", source.name)
    if too_short:
        _LOG.warning("%s: %d of %d texts are too short for a window", source.name, too_short, len(texts))
    return _Material(source, chosen, examples, texts, positives, negatives)


def _choose(config: RunConfig, name: str, ids: Sequence[FeatureId]) -> tuple[FeatureId, ...]:
    """The named features (one without a text will be ineligible), else some by hash. Raises BadConfig, UnknownFeature."""
    if config.density_band is not None:
        raise BadConfig(
            "density_band",
            expected="features of a dump by number or by id",
            seen=f"a band of densities, {config.density_band}, which dumps need not have",
            fix="use --features N or --features ids:…",
        )
    if config.feature_ids is None:
        order = sorted(ids, key=lambda feature: derive(config.seed, "features", name, feature))
        return tuple(order[: config.n_features])
    if config.feature_ids and not set(config.feature_ids) & set(ids):
        raise UnknownFeature(
            f"feature {config.feature_ids[0]!r} of {name}",
            expected=f"one of its {len(ids)} features with activating texts, such as {', '.join(ids[:3])}",
            seen=repr(config.feature_ids[0]),
            fix="name other ids in --features",
        )
    return config.feature_ids


def _starts(text: ReadyText, length: int, skip: int) -> NDArray[np.int64]:
    """Where a window can start: nothing in it is masked, nor one of the text's first positions."""
    masked = ~np.asarray(text.valid, dtype=bool)
    masked[:skip] = True
    before = np.concatenate(([0], np.cumsum(masked)))
    return np.flatnonzero(before[length:] == before[:-length]) if len(masked) >= length else np.zeros(0, np.int64)


def _around_peak(
    seed: int, text: ReadyText, values: NDArray[np.float32], starts: NDArray[np.int64], length: int
) -> _Window | None:
    """The window of the strongest token that some window can hold, None where none is active."""
    reach = np.zeros(len(values) + 1, dtype=np.int64)
    np.add.at(reach, starts, 1)
    np.add.at(reach, starts + length, -1)
    held = np.where(np.cumsum(reach[:-1]) > 0, values, -np.inf)
    peak = int(held.argmax())
    if not held[peak] > 0:
        return None
    fitting = starts[(starts <= peak) & (peak < starts + length)]
    return _window(text, int(fitting[derive(seed, "window", text.text, peak) % len(fitting)]), length)


def _window(text: ReadyText, start: int, length: int) -> _Window:
    return _Window(derive(0, "window", *text.tokens[start : start + length]), start)


def _grid(config: RunConfig, material: Sequence[_Material]) -> tuple[Grid, dict[int, tuple[str, ...]]]:
    """One grid of all windows of all sources; of several texts with one window the one with the smallest hash has it."""
    length = config.window_length
    documents: dict[int, int] = {}
    tokens: dict[int, tuple[str, ...]] = {}
    starts: dict[int, int] = {}
    cuts: set[tuple[int, int]] = set()
    for one in material:
        for windows in (*one.positives.values(), one.negatives):
            for number, cut in windows.items():
                cuts.add((number, cut.start))
                if number <= documents.get(cut.window, number):
                    documents[cut.window], starts[cut.window] = number, cut.start
                    tokens[cut.window] = one.texts[number].tokens[cut.start : cut.start + length]
    if not documents:
        raise CorpusError(
            ", ".join(one.source.name for one in material),
            expected=f"texts with {length} tokens in a row and no BOS among them",
            seen="none",
            fix="use a shorter --window-length",
        )
    ids = np.array(sorted(documents), dtype=np.int64)
    owners = np.array([documents[window] for window in ids.tolist()], dtype=np.int64)
    pools = (hash_priorities(derive(config.seed, "pools"), owners) >> np.uint64(63)).astype(np.uint8)
    grid = Grid(
        ids=ids,
        contexts=owners,
        starts=np.array([starts[window] for window in ids.tolist()], dtype=np.int64),
        documents=owners,
        pools=pools,
        window_length=length,
        context_length=length,
        offsets=np.zeros(0, dtype=np.int64),
        context_pools=pools,
        n_duplicates=len(cuts) - len(ids),
    )
    return grid, tokens


def write_ready(config: RunConfig, store: RunStore, material: ReadyMaterial) -> dict[str, Any]:
    """Draw and write the examples of every source; returns what the stage's record says. Raises CorpusError."""
    drawn = [_draw(config, one, material.grid) for one in material.sources]
    _check_some_eligible(config, material, drawn)
    store.write_sources(
        [one.source.info for one in material.sources],
        [{"n_texts": len(one.texts), "negatives_unverified": not _verifies(one.source)} for one in material.sources],
    )
    examples = ExampleStore(store.folder / "examples")
    used: set[int] = set()
    for index, (one, (rows, records)) in enumerate(zip(material.sources, drawn, strict=True)):
        examples.write_source(index, one.source.name, rows)
        store.write_features(one.source.name, records)
        used.update(row.row for row in rows)
    ids = material.grid.ids
    kept = np.array(sorted(used), dtype=np.int64)
    examples.write_windows(material.grid, kept, lambda row: material.tokens[int(ids[row])])
    return {"tokens": None, "windows": len(material.grid), "duplicate_windows": material.grid.n_duplicates}


def _draw(config: RunConfig, one: _Material, grid: Grid) -> tuple[list[ExampleRow], list[FeatureRow]]:
    counts = Counts(**config.counts())
    name = one.source.name
    rows: list[ExampleRow] = []
    records = []
    for position, feature in enumerate(one.features):
        windows = _windows_of(one, feature, grid)
        mine = replace(grid, pools=_pools_for(one, feature, windows, grid))
        draw = draw_windows(windows, mine, counts, source=name, feature=feature, seed=config.seed)
        rows += rows_of(feature, windows, draw, mine)
        records.append(
            FeatureRow(
                source=name,
                feature=feature,
                position=position,
                status="ok" if draw.reason is None else "ineligible",
                reason=draw.reason,
                density=one.examples.densities.get(feature, float("nan")),
                threshold=0.0,
                peak=windows.maximum,
                explain_peak=float(windows.peaks[grid.pools[windows.rows] == 0].max(initial=0.0)),
                window_share=_window_share(one, feature, grid),
            )
        )
    return rows, records


def _windows_of(one: _Material, feature: FeatureId, grid: Grid) -> FeatureWindows:
    """The feature's windows, each once; of two texts with the same window the smaller hash says how active it is."""
    held: dict[int, NDArray[np.float32]] = {}
    count, maximum = 0, 0.0
    for number, cut in one.positives[feature].items():  # texts are in the order of their hashes
        values = one.texts[number].activations[feature].clip(min=0)
        count += int((values > 0).sum())
        maximum = max(maximum, float(values.max()))
        held.setdefault(cut.window, values[cut.start : cut.start + grid.window_length])
    ids = np.array(sorted(held), dtype=np.int64)
    dense = np.array([held[window] for window in ids.tolist()], dtype=np.float32).reshape(len(ids), grid.window_length)
    return FeatureWindows(np.searchsorted(grid.ids, ids), dense.max(axis=1, initial=0.0), dense, count, maximum)


def _pools_for(one: _Material, feature: FeatureId, windows: FeatureWindows, grid: Grid) -> NDArray[np.uint8]:
    """The grid's pools, less every window that is neither the feature's own nor may be a negative of it."""
    silent = np.full(len(grid), _NEITHER, dtype=np.uint8)
    rows = _rows_of_cuts(one, grid)
    mine = one.positives[feature]
    if _verifies(one.source):
        length = grid.window_length
        beside = [n in mine and abs(mine[n].start - cut.start) < length for n, cut in one.negatives.items()]
        barred = _fires(one, feature, length) | np.array(beside, dtype=bool)
    else:
        barred = np.array([feature in one.texts[number].activations for number in one.negatives], dtype=bool)
    silent[rows] = grid.pools[rows]
    silent[rows[barred]] = _NEITHER
    silent[windows.rows] = grid.pools[windows.rows]
    return silent


def _verifies(source: ExampleSource) -> bool:
    """Whether a source stores every activation of its texts, so that where none is stored there was none."""
    return bool(getattr(source, "verifies_negatives", False))


def _rows_of_cuts(one: _Material, grid: Grid) -> NDArray[np.int64]:
    return np.searchsorted(grid.ids, np.array([cut.window for cut in one.negatives.values()], dtype=np.int64))


def _fires(one: _Material, feature: FeatureId, length: int) -> NDArray[np.bool_]:
    """Whether the feature is active in the window of each of the texts that may serve as negatives."""
    found = np.zeros(len(one.negatives), dtype=bool)
    for place, (number, cut) in enumerate(one.negatives.items()):
        if (values := one.texts[number].activations.get(feature)) is not None:
            found[place] = bool((values[cut.start : cut.start + length] > 0).any())
    return found


def _window_share(one: _Material, feature: FeatureId, grid: Grid) -> float | None:
    """The share of windows of the score pool in which the feature is active, where the source can tell."""
    mine = grid.pools[_rows_of_cuts(one, grid)] == 1
    if not _verifies(one.source) or not mine.any():
        return None
    return float(_fires(one, feature, grid.window_length)[mine].mean())


def _check_some_eligible(
    config: RunConfig, material: ReadyMaterial, drawn: Sequence[tuple[list[ExampleRow], list[FeatureRow]]]
) -> None:
    records = [record for _, features in drawn for record in features]
    if any(record.status == "ok" for record in records):
        return
    pools = material.grid.pools
    there = []
    for one in material.sources:
        for feature in one.features:
            windows = _windows_of(one, feature, material.grid)
            mine = np.delete(_pools_for(one, feature, windows, material.grid), windows.rows)
            counts = [min(int((pools[windows.rows] == pool).sum()), int((mine == pool).sum())) for pool in (0, 1)]
            there.append(min(counts))
    half = sorted(there)[len(there) // 2]
    raise CorpusError(
        ", ".join(one.source.name for one in material.sources),
        expected=f"a feature with {config.n_positives} activating texts and {config.n_negatives} others in either pool",
        seen=f"at most {max(there)}, in {len(there)} features",
        fix=f"use --positives {half} --negatives {half}: half of the features have so many"
        if half >= 2
        else "download more batches of activations/, or use a shorter --window-length",
    )


def _sums(examples: ReadyExamples) -> list[str]:
    """The strength of every recorded activation, as it enters the manifest."""
    return [
        f"{text.text}:{f}:{float(v.max()):.6g}" for text in examples.texts for f, v in sorted(text.activations.items())
    ]
