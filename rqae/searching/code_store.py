"""Stores the codes of a corpus on disk: written in one pass that can be resumed, read through a memory map.

The folder holds ``codes.u16`` (N rows of k codes, uint16 little-endian), ``places.i32`` (N rows of context and position)
and ``codes.json``, which records how many rows of both files are complete. Sizes are checked on opening; nothing is
unpickled. Hidden states come from a callable, so this module needs neither text nor language models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rqae.errors import RqaeError
from rqae.model import RQAE
from rqae.progress import SILENT, Progress

__all__ = ["CodeStore", "StoredCodes"]

RECORD, CODES, PLACES = "codes.json", "codes.u16", "places.i32"
_FLUSH_TOKENS = 20_000  # tokens between two flushes; if the process dies, at most these and one batch are lost
Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """The contents of ``codes.json``. ``identity``: free text that names corpus and model."""

    identity: str
    depth: int
    num_codes: int
    rows: int = 0
    batches: int = 0
    complete: bool = False


class CodeStore:
    """A complete store: ``codes`` (N, k) uint16, and ``places`` (N, 2) int32, the context and position of each token.

    Raises RqaeError if the folder does not hold a complete store.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.record = _read(self.folder)
        if not self.record.complete:
            raise RqaeError(
                str(self.folder),
                expected="a complete store of codes",
                seen=f"an interrupted build with {self.record.rows} tokens",
                fix="build it again with the same arguments; it resumes where it stopped",
            )
        self.codes: NDArray[np.uint16] = self._map(CODES, np.dtype("<u2"), self.record.depth)
        self.places: NDArray[np.int32] = self._map(PLACES, np.dtype("<i4"), 2)

    def __len__(self) -> int:
        return self.record.rows

    @property
    def contexts(self) -> NDArray[np.int32]:
        """The context of each token, (N,), in ascending order."""
        return self.places[:, 0]

    def _map(self, name: str, dtype: np.dtype[Any], width: int) -> NDArray[Any]:
        path, shape = self.folder / name, (self.record.rows, width)
        expected = self.record.rows * width * dtype.itemsize
        seen = path.stat().st_size if path.is_file() else -1
        if seen != expected:
            raise RqaeError(
                str(path),
                expected=f"{shape[0]} rows of {width} numbers, {expected} bytes",
                seen=f"{seen} bytes" if seen >= 0 else "no such file",
                fix="delete the folder and build it again",
            )
        return np.memmap(path, dtype, "r", shape=shape) if expected else np.empty(shape, dtype)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        model: RQAE,
        batches: Iterable[Batch],
        hidden: Callable[[Batch], tuple[Tensor, NDArray[np.integer]]],
        *,
        identity: str,
        depth: int | None = None,
        total: int | None = None,
        progress: Progress = SILENT,
    ) -> CodeStore:
        """Encode a corpus, resume an interrupted build, or open the store if it is complete.

        batches: must be the same in every call.
        hidden: returns a batch's final-normed hidden states (n, d) and their places (n, 2), with contexts ascending from
            batch to batch. It is not called for batches that are already stored.
        identity: free text that names corpus and model.
        depth: number of quantizers to encode; None: all.
        total: expected number of tokens, for the progress bar.

        Raises RqaeError if the folder holds another store, OSError on a full disk; flushed rows stay valid.
        """
        folder = Path(folder)
        depth = model.config.num_quantizers if depth is None else depth
        wanted = StoredCodes(identity, depth, model.config.num_codes)
        record = _read(folder) if (folder / RECORD).exists() else wanted
        if replace(record, rows=0, batches=0, complete=False) != wanted:
            raise RqaeError(
                str(folder),
                expected=f"a store of {wanted.identity}, depth {wanted.depth}",
                seen=f"a store of {record.identity}, depth {record.depth}",
                fix="choose another folder, or delete this one",
            )
        if not record.complete:
            folder.mkdir(parents=True, exist_ok=True)
            _fill(folder, model, batches, hidden, record, total, progress)
        return cls(folder)


def _fill(
    folder: Path,
    model: RQAE,
    batches: Iterable[Batch],
    hidden: Callable[[Batch], tuple[Tensor, NDArray[np.integer]]],
    record: StoredCodes,
    total: int | None,
    progress: Progress,
) -> None:
    task = progress.start("encoding", total, "tokens")
    progress.advance(task, record.rows)
    with (folder / CODES).open("ab") as codes, (folder / PLACES).open("ab") as places:
        kept = record.rows
        for stream, size in ((codes, record.rows * record.depth * 2), (places, record.rows * 8)):
            if os.fstat(stream.fileno()).st_size < size:
                raise RqaeError(
                    stream.name,
                    expected=f"{size} bytes of {record.rows} stored tokens",
                    seen=f"{os.fstat(stream.fileno()).st_size} bytes",
                    fix="delete the folder and build it again",
                )
            stream.truncate(size)
        for batch in islice(batches, record.batches, None):
            rows, where = hidden(batch)
            found = model.encode(rows, record.depth, torch.uint16).cpu()
            codes.write(found.numpy().astype("<u2", copy=False).tobytes())
            places.write(np.ascontiguousarray(where, dtype="<i4").tobytes())
            record = replace(record, rows=record.rows + len(rows), batches=record.batches + 1)
            progress.advance(task, len(rows))
            if record.rows - kept >= _FLUSH_TOKENS:
                _keep(folder, record, codes, places)
                kept = record.rows
        _keep(folder, replace(record, complete=True), codes, places)
    progress.finish(task)


def _keep(folder: Path, record: StoredCodes, *streams: Any) -> None:
    """Flush the rows to disk first, then update the record that counts them."""
    for stream in streams:
        stream.flush()
        os.fsync(stream.fileno())
    partial = folder / f".{RECORD}.part"
    partial.write_text(json.dumps(asdict(record), indent=1), "utf-8")
    partial.replace(folder / RECORD)


def _read(folder: Path) -> StoredCodes:
    path = folder / RECORD
    try:
        record = StoredCodes(**json.loads(path.read_text("utf-8")))
        counts = (record.depth, record.num_codes, record.rows, record.batches)
        if not isinstance(record.identity, str) or not all(type(count) is int and count >= 0 for count in counts):
            raise TypeError("values of the wrong type")
    except OSError as error:
        raise RqaeError(
            str(path), expected="a store of codes", seen=str(error), fix="build one, or check the folder"
        ) from error
    except (ValueError, TypeError, RecursionError) as error:
        raise RqaeError(
            str(path),
            expected="the record of a store of codes",
            seen=str(error)[:120],
            fix="delete the folder and build it again",
        ) from error
    return record
