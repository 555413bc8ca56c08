"""Turns drawn windows into example records, stored as parquet: one file per source, one for the text of the windows.

Knows the layout of these files; knows nothing of how windows are drawn or used. Writes
``examples/source-N.parquet`` (source, feature, role, rank, window, decile, activations) and ``examples/windows.parquet``
(window, document, tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evalkit.collect.sampling import Draw, FeatureWindows
from evalkit.corpus.windows import Grid
from evalkit.errors import BadFile
from evalkit.records import Example, ExplainExamples, FeatureExamples, FeatureId, ScoreExamples, TestExamples
from evalkit.seeds import derive
from evalkit.util.sealed_files import open_sealed, sealed_path

__all__ = ["ExampleRow", "ExampleStore", "rows_of"]

Role: TypeAlias = Literal[
    "explain.shown",
    "explain.negative",
    "calibration.positive",
    "calibration.decoy",
    "calibration.negative",
    "test.positive",
    "test.decoy",
    "test.negative",
]
_SCHEMA = pa.schema(
    [
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("feature", pa.string()),
        ("role", pa.dictionary(pa.int32(), pa.string())),
        ("rank", pa.int32()),
        ("window", pa.int64()),
        ("decile", pa.int8()),
        ("activations", pa.list_(pa.float32())),
    ]
)
_REDO = "delete it and run again"
_WINDOW_SCHEMA = pa.schema([("window", pa.int64()), ("document", pa.int64()), ("tokens", pa.list_(pa.string()))])


@dataclass(frozen=True, slots=True, eq=False)
class ExampleRow:
    """One line of a source's file. ``row`` is the window's row in the grid; ``window`` its id."""

    feature: FeatureId
    role: Role
    rank: int
    row: int
    window: int
    decile: int | None
    activations: NDArray[np.float32]


def rows_of(feature: FeatureId, windows: FeatureWindows, draw: Draw, grid: Grid) -> list[ExampleRow]:
    """The example lines of one eligible feature."""
    if draw.explain is None or draw.score is None:
        return []
    silent = np.zeros(grid.window_length, dtype=np.float32)

    def active(role: Role, picked: NDArray[np.int64], deciles: NDArray[np.int64]) -> Iterable[ExampleRow]:
        for rank, index in enumerate(picked):
            row = int(windows.rows[index])
            decile = int(deciles[index])
            yield ExampleRow(feature, role, rank, row, int(grid.ids[row]), decile, windows.activations[index])

    def inactive(role: Role, picked: NDArray[np.int64]) -> Iterable[ExampleRow]:
        for rank, row in enumerate(picked):
            yield ExampleRow(feature, role, rank, int(row), int(grid.ids[row]), None, silent)

    explain, score = draw.explain, draw.score
    return [
        *active("explain.shown", explain.shown, explain.deciles),
        *inactive("explain.negative", explain.shown_negatives),
        *active("calibration.positive", explain.positives, explain.deciles),
        *active("calibration.decoy", explain.decoys, explain.deciles),
        *inactive("calibration.negative", explain.negatives),
        *active("test.positive", score.positives, score.deciles),
        *active("test.decoy", score.decoys, score.deciles),
        *inactive("test.negative", score.negatives),
    ]


class ExampleStore:
    """The ``examples`` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, source_index: int) -> Path:
        return self.folder / f"source-{source_index:03d}.parquet"

    @property
    def windows_path(self) -> Path:
        return self.folder / "windows.parquet"

    def write_source(self, source_index: int, source: str, rows: Sequence[ExampleRow]) -> None:
        """Write one source's examples, atomically. Raises StorageError."""
        table = pa.table(
            {
                "source": [source] * len(rows),
                "feature": [row.feature for row in rows],
                "role": [row.role for row in rows],
                "rank": [row.rank for row in rows],
                "window": [row.window for row in rows],
                "decile": [row.decile for row in rows],
                "activations": [row.activations for row in rows],
            },
            schema=_SCHEMA,
        )
        with sealed_path(self.path(source_index)) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def write_windows(self, grid: Grid, rows: NDArray[np.int64], pieces: Callable[[int], tuple[str, ...]]) -> None:
        """Write the text of the windows at these grid rows; ``pieces`` returns the text of a window's tokens."""
        table = pa.table(
            {
                "window": grid.ids[rows],
                "document": grid.documents[rows],
                "tokens": [list(pieces(int(row))) for row in rows],
            },
            schema=_WINDOW_SCHEMA,
        )
        with sealed_path(self.windows_path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def windows(self) -> dict[int, tuple[int, tuple[str, ...]]]:
        """Document and tokens of every window that some example uses, by window id."""
        table = _read(self.windows_path, _WINDOW_SCHEMA).to_pydict()
        return {
            window: (document, tuple(tokens))
            for window, document, tokens in zip(table["window"], table["document"], table["tokens"], strict=True)
        }

    def read_source(
        self,
        source_index: int,
        windows: Mapping[int, tuple[int, tuple[str, ...]]],
        peaks: Mapping[FeatureId, float],
        seed: int,
        promoted: Mapping[FeatureId, tuple[str, ...]],
    ) -> dict[FeatureId, FeatureExamples]:
        """Examples by feature, with its peak and promoted tokens. Raises BadFile for a damaged file."""
        table = _read(self.path(source_index), _SCHEMA)
        source = table["source"][0].as_py() if len(table) else ""
        grouped: dict[FeatureId, dict[str, list[Example]]] = {}
        columns = (table[name].to_pylist() for name in ("feature", "role", "window", "decile", "activations"))
        for feature, role, window, decile, activations in zip(*columns, strict=True):
            if window not in windows or feature not in peaks:
                raise _damaged(
                    self.path(source_index), f"a window {window} of feature {feature}, which is nowhere else"
                )
            document, tokens = windows[window]
            example = Example(window, document, tokens, tuple(activations), decile)
            grouped.setdefault(feature, {}).setdefault(role, []).append(example)
        return {
            feature: _assemble(source, feature, roles, peaks[feature], seed, promoted.get(feature, ()))
            for feature, roles in grouped.items()
        }


def _assemble(
    source: str,
    feature: FeatureId,
    roles: Mapping[str, list[Example]],
    peak: float,
    seed: int,
    promoted: tuple[str, ...],
) -> FeatureExamples:
    def of(role: Role) -> tuple[Example, ...]:
        return tuple(roles.get(role, ()))

    return FeatureExamples(
        ExplainExamples(source, feature, 0.0, peak, of("explain.shown"), of("explain.negative"), promoted),
        ScoreExamples(
            source,
            feature,
            0.0,
            derive(seed, "score", source, feature),
            test=TestExamples(of("test.positive"), of("test.decoy"), of("test.negative")),
            calibration=TestExamples(of("calibration.positive"), of("calibration.decoy"), of("calibration.negative")),
        ),
    )


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        with open_sealed(path, fix=_REDO) as stream:
            return pq.read_table(stream, schema=schema)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:  # of a file without checksums
        raise _damaged(path, str(error).strip().partition("\n")[0]) from error


def _damaged(path: Path, seen: str) -> BadFile:
    return BadFile(str(path), expected="an examples file of this run", seen=seen, fix=_REDO)
