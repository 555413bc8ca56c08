"""Cuts the texts in dumps of other tools into windows, and selects their features.

An active feature's window contains its peak, at a hashed offset so that it may be anywhere in the window; a negative window
is cut at a hashed position. The hash of a text decides whether it is in the explain or the score pool, for all features and
sources alike. Windows of equal tokens count once. Reads through the sources; writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.abilities import verifies_negatives
from evalkit.config.run_config import NULL_SOURCES, RunConfig
from evalkit.corpus.windows import Grid
from evalkit.errors import BadConfig, CorpusError, UnknownFeature
from evalkit.protocols import ExampleSource, Progress, ReadyExamples, ReadyText
from evalkit.records import FeatureId
from evalkit.seeds import derive, hash_priorities
from evalkit.util.progress import SILENT

__all__ = ["DumpMaterial", "ReadyMaterial", "WindowCut", "check_ready", "gather_ready"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WindowCut:
    """A window of a text: its start, and its id, a 63-bit hash of its tokens."""

    window: int
    start: int


@dataclass(frozen=True, slots=True)
class DumpMaterial:
    """One source: its selected features, its texts, and the windows cut from them.

    positives: the window around the peak, by feature and text
    negatives: the possible negative window, by text
    """

    source: ExampleSource
    features: tuple[FeatureId, ...]
    examples: ReadyExamples
    texts: Mapping[int, ReadyText]
    positives: Mapping[FeatureId, Mapping[int, WindowCut]]
    negatives: Mapping[int, WindowCut]


@dataclass(frozen=True, slots=True)
class ReadyMaterial:
    """The texts of all sources, cut into windows on one grid; nothing is drawn yet."""

    sources: tuple[DumpMaterial, ...]
    grid: Grid
    tokens: Mapping[int, tuple[str, ...]]  # by window id

    def manifest(self) -> list[dict[str, Any]]:
        """Per source a hash of its features and texts, to check that a resumed run has the same dump."""
        return [
            {"source": one.source.name, "texts": derive(0, *one.features, *sorted(one.texts), *_sums(one.examples))}
            for one in self.sources
        ]


def check_ready(sources: Sequence[Any]) -> list[ExampleSource]:
    """The sources if they are dumps, [] if none is. Raises BadConfig for a mixture, and for two dumps of the same name."""
    ready = [source for source in sources if isinstance(source, ExampleSource)]
    if not ready:
        return []
    if others := [source.name for source in sources if not isinstance(source, ExampleSource)]:
        raise BadConfig(
            "dictionaries",
            expected="either dictionaries, which need a corpus, or dumps, which contain their examples",
            seen=f"both: the dictionary {others[0]} and the dump {ready[0].name}",
            fix="make two runs with two --out folders",
        )
    names = [source.name for source in ready]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise BadConfig(repeated, expected="a different name for every dump", seen="two", fix="pass each dump once")
    return ready


def gather_ready(config: RunConfig, sources: Sequence[ExampleSource], progress: Progress = SILENT) -> ReadyMaterial:
    """Read the dumps, select features by hash, cut windows. Raises CorpusError and the errors of the sources."""
    missing = [control for control in config.controls if control in NULL_SOURCES]
    if missing:
        _LOG.warning("no %s control: it needs activations on a corpus, which dumps do not contain", ", ".join(missing))
    task = progress.start("read examples", len(sources), "dumps")
    material = []
    for source in sources:
        material.append(_read(config, source))
        progress.advance(task)
    progress.finish(task)
    return ReadyMaterial(tuple(material), *_grid(config, material))


def _read(config: RunConfig, source: ExampleSource) -> DumpMaterial:
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
    positives: dict[FeatureId, dict[int, WindowCut]] = {feature: {} for feature in chosen}
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
    if not verifies_negatives(source):
        _LOG.warning("%s: negatives are texts of other features, not verified to be silent", source.name)
    if too_short:
        _LOG.warning("%s: %d of %d texts are too short for a window", source.name, too_short, len(texts))
    return DumpMaterial(source, chosen, examples, texts, positives, negatives)


def _choose(config: RunConfig, name: str, ids: Sequence[FeatureId]) -> tuple[FeatureId, ...]:
    """The features named in the configuration, else ``n_features`` chosen by hash. Raises BadConfig, UnknownFeature.

    A named feature without a text is kept: it is recorded as ineligible.
    """
    if config.density_band is not None:
        raise BadConfig(
            "density_band",
            expected="features of a dump by number or by id",
            seen=f"a band of densities, {config.density_band}; a dump may lack densities",
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
    """Starts of the windows that contain no masked token and none of the first ``skip`` positions."""
    masked = ~np.asarray(text.valid, dtype=bool)
    masked[:skip] = True
    before = np.concatenate(([0], np.cumsum(masked)))
    return np.flatnonzero(before[length:] == before[:-length]) if len(masked) >= length else np.zeros(0, np.int64)


def _around_peak(
    seed: int, text: ReadyText, values: NDArray[np.float32], starts: NDArray[np.int64], length: int
) -> WindowCut | None:
    """A window that contains the strongest active token; None if no active token lies in any window."""
    reach = np.zeros(len(values) + 1, dtype=np.int64)
    np.add.at(reach, starts, 1)
    np.add.at(reach, starts + length, -1)
    held = np.where(np.cumsum(reach[:-1]) > 0, values, -np.inf)
    peak = int(held.argmax())
    if not held[peak] > 0:
        return None
    fitting = starts[(starts <= peak) & (peak < starts + length)]
    return _window(text, int(fitting[derive(seed, "window", text.text, peak) % len(fitting)]), length)


def _window(text: ReadyText, start: int, length: int) -> WindowCut:
    return WindowCut(derive(0, "window", *text.tokens[start : start + length]), start)


def _grid(config: RunConfig, material: Sequence[DumpMaterial]) -> tuple[Grid, dict[int, tuple[str, ...]]]:
    """One grid of all windows of all sources; a window in several texts belongs to the text with the smallest hash."""
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
            expected=f"texts with {length} successive tokens without a BOS",
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


def _sums(examples: ReadyExamples) -> list[str]:
    """The strength of every recorded activation, as it enters the manifest."""
    return [
        f"{text.text}:{f}:{float(v.max()):.6g}" for text in examples.texts for f, v in sorted(text.activations.items())
    ]
