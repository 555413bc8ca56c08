"""Batches of training rows, from an array that is sampled or from a stream that passes through a shuffle buffer.

Both give the same batches for the same seed and step on every machine, so training can resume. Knows no RQAE; reads and
writes no files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rqae.errors import RqaeError

__all__ = ["Activations", "ArrayBatches", "Batches", "StreamBatches", "batches_of", "derived_generator"]

Activations: TypeAlias = Tensor | NDArray[np.floating] | Iterable[Tensor]


def derived_generator(seed: int, *names: object) -> np.random.Generator:
    """A random generator for one purpose, derived from the run's seed and the names of the purpose."""
    text = "/".join(str(name) for name in (seed, *names))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


class Batches(Protocol):
    """Rows for training. ``batch`` is called with steps 0, 1, 2, … in order."""

    def sample(self, count: int) -> Tensor:
        """Up to ``count`` rows for initialisation, (n, d) float32."""

    def batch(self, step: int, size: int) -> Tensor:
        """The rows of one step, (size, d) float32."""

    def skip(self, step: int, size: int) -> None:
        """Skip the rows of one step."""


def _checked(rows: Tensor, dim: int) -> Tensor:
    rows = rows.detach().to(torch.float32)
    if rows.ndim != 2 or rows.shape[1] != dim:
        raise RqaeError(
            "training activations", expected=f"rows of {dim} numbers", seen=f"shape {list(rows.shape)}",
            fix="flatten batch and position, and drop masked tokens",
        )  # fmt: skip
    if not bool(rows.isfinite().all()):
        raise RqaeError(
            "training activations", expected="finite numbers", seen="NaN or infinity", fix="collect them in float32"
        )
    return rows


class ArrayBatches:
    """Rows of a tensor, array or memory map (N, d), in a new random order each epoch."""

    def __init__(self, array: Tensor | NDArray[np.floating], dim: int, seed: int) -> None:
        if len(array) == 0:
            raise RqaeError("training activations", expected="at least one row", seen="none", fix="give more text")
        self._array, self._dim, self._seed = array, dim, seed
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def _rows(self, indices: NDArray[np.int64]) -> Tensor:
        if isinstance(self._array, Tensor):
            return _checked(self._array[torch.from_numpy(indices)], self._dim)
        return _checked(torch.from_numpy(np.ascontiguousarray(self._array[indices])), self._dim)

    def sample(self, count: int) -> Tensor:
        """Distinct rows, drawn from the whole array."""
        count = min(count, len(self._array))
        chosen = derived_generator(self._seed, "sample").choice(len(self._array), count, replace=False)
        return self._rows(np.sort(chosen))

    def batch(self, step: int, size: int) -> Tensor:
        """Rows drawn without replacement within an epoch; an incomplete batch at the end of an epoch is dropped."""
        size = min(size, len(self._array))
        per_epoch = len(self._array) // size
        epoch, place = divmod(step, per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, derived_generator(self._seed, "epoch", epoch).permutation(len(self._array))
        return self._rows(self._order[1][place * size : (place + 1) * size])

    def skip(self, step: int, size: int) -> None:
        """Nothing to do, because a batch depends on its step only."""


class StreamBatches:
    """Rows of a stream of (n_i, d) tensors, shuffled in a buffer. When the stream ends, batches come from the buffer."""

    def __init__(self, stream: Iterable[Tensor], dim: int, seed: int, buffer_rows: int) -> None:
        self._stream: Iterator[Tensor] = iter(stream)
        self._dim, self._seed = dim, seed
        self._waiting = torch.empty(0, dim)
        self._buffer = self._take(buffer_rows)
        if len(self._buffer) == 0:
            raise RqaeError("training activations", expected="at least one row", seen="none", fix="give more text")

    def _take(self, count: int) -> Tensor:
        """The next ``count`` rows of the stream, fewer at its end."""
        parts, have = [self._waiting], len(self._waiting)
        while have < count and (chunk := next(self._stream, None)) is not None:
            parts.append(_checked(chunk, self._dim))
            have += len(parts[-1])
        rows = torch.cat(parts)
        self._waiting = rows[count:]
        return rows[:count]

    def sample(self, count: int) -> Tensor:
        """The first rows of the stream."""
        return self._buffer[:count].clone()

    def batch(self, step: int, size: int) -> Tensor:
        """Random rows of the buffer; each is then replaced by the next row of the stream."""
        size = min(size, len(self._buffer))
        places = torch.from_numpy(
            derived_generator(self._seed, "batch", step).choice(len(self._buffer), size, replace=False)
        )
        rows = self._buffer[places]
        fresh = self._take(size)
        self._buffer[places[: len(fresh)]] = fresh
        return rows

    def skip(self, step: int, size: int) -> None:
        """Advance the stream by one batch."""
        self.batch(step, size)


def batches_of(activations: Activations, dim: int, seed: int, buffer_rows: int) -> Batches:
    """``ArrayBatches`` for an array or tensor, ``StreamBatches`` for anything else that yields tensors."""
    if isinstance(activations, Tensor | np.ndarray):
        return ArrayBatches(activations, dim, seed)
    return StreamBatches(activations, dim, seed, buffer_rows)
