"""Writes a run's examples from dumps that contain their own texts, without a corpus or a subject model.

Negatives are windows of texts recorded for other features but not for this one. Whether the feature is silent there is
not verified, unless the source stores every activation (``verifies_negatives``); then negatives are windows in which it
is silent and which do not overlap the feature's own window of the same text. Windows are drawn and stored as those of a
corpus. Writes ``examples/`` and the tables ``sources`` and ``features``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.abilities import verifies_negatives
from evalkit.collect.dump_windows import DumpMaterial, ReadyMaterial
from evalkit.collect.example_files import ExampleRow, ExampleStore, rows_of
from evalkit.collect.sampling import Counts, FeatureWindows, draw_windows
from evalkit.config.run_config import RunConfig
from evalkit.corpus.windows import Grid
from evalkit.errors import CorpusError
from evalkit.records import FeatureId
from evalkit.sources.control_marks import as_dictionary
from evalkit.store.run_store import RunStore
from evalkit.store.tables import FeatureRow

__all__ = ["write_ready"]

_NEITHER = 2  # the pool of windows that can be neither a positive nor a negative of this feature


def write_ready(config: RunConfig, store: RunStore, material: ReadyMaterial) -> dict[str, Any]:
    """Draw and write the examples of every source; returns the detail of the stage. Raises CorpusError."""
    drawn = [_draw(config, one, material.grid) for one in material.sources]
    _check_some_eligible(config, material, drawn)
    store.write_sources(
        [as_dictionary(one.source.info) for one in material.sources],
        [
            {"n_texts": len(one.texts), "negatives_unverified": not verifies_negatives(one.source)}
            for one in material.sources
        ],
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


def _draw(config: RunConfig, one: DumpMaterial, grid: Grid) -> tuple[list[ExampleRow], list[FeatureRow]]:
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


def _windows_of(one: DumpMaterial, feature: FeatureId, grid: Grid) -> FeatureWindows:
    """The feature's distinct windows; of two texts with the same window, the one with the smaller hash counts."""
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


def _pools_for(one: DumpMaterial, feature: FeatureId, windows: FeatureWindows, grid: Grid) -> NDArray[np.uint8]:
    """The pools of the grid, with ``_NEITHER`` for windows that are neither the feature's own nor possible negatives."""
    silent = np.full(len(grid), _NEITHER, dtype=np.uint8)
    rows = _rows_of_cuts(one, grid)
    mine = one.positives[feature]
    if verifies_negatives(one.source):
        length = grid.window_length
        beside = [n in mine and abs(mine[n].start - cut.start) < length for n, cut in one.negatives.items()]
        barred = _fires(one, feature, length) | np.array(beside, dtype=bool)
    else:
        barred = np.array([feature in one.texts[number].activations for number in one.negatives], dtype=bool)
    silent[rows] = grid.pools[rows]
    silent[rows[barred]] = _NEITHER
    silent[windows.rows] = grid.pools[windows.rows]
    return silent


def _rows_of_cuts(one: DumpMaterial, grid: Grid) -> NDArray[np.int64]:
    return np.searchsorted(grid.ids, np.array([cut.window for cut in one.negatives.values()], dtype=np.int64))


def _fires(one: DumpMaterial, feature: FeatureId, length: int) -> NDArray[np.bool_]:
    """(possible negative,) bool: whether the feature is active in that window."""
    found = np.zeros(len(one.negatives), dtype=bool)
    for place, (number, cut) in enumerate(one.negatives.items()):
        if (values := one.texts[number].activations.get(feature)) is not None:
            found[place] = bool((values[cut.start : cut.start + length] > 0).any())
    return found


def _window_share(one: DumpMaterial, feature: FeatureId, grid: Grid) -> float | None:
    """The share of windows of the score pool in which the feature is active; None if the source does not store it."""
    mine = grid.pools[_rows_of_cuts(one, grid)] == 1
    if not verifies_negatives(one.source) or not mine.any():
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
        expected=f"a feature with {config.n_positives} activating texts and {config.n_negatives} others in each pool",
        seen=f"at most {max(there)} of each among {len(there)} features",
        fix=f"use --positives {half} --negatives {half}, which half of the features have"
        if half >= 2
        else "download more batches of activations/, or use a shorter --window-length",
    )
