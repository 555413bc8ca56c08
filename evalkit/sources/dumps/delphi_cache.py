"""Reads the files of one hook point in a latent cache of eai-delphi: stored activations, and tokens.

The folder holds splits ``FIRST_LAST.safetensors``, each with latents FIRST to LAST: ``locations`` (entry, 3), the integers
sequence, position and latent − FIRST; ``activations`` (entry,); ``tokens`` (sequence, position), the same in every split.
A cache stores exactly the activations above 1e-5 in absolute value, in float16.

Splits are read in ranges of entries, and every range is checked before use. The first pass records how often each latent
fires and the lowest and highest latent of each range, so that later passes read only the ranges they need (few, if the file
is sorted by latent). Knows no tokenizer and no windows; does not load torch; writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import BadFile, MissingFile, require

__all__ = ["Entries", "LatentCache", "split_files"]

_NAME = re.compile(r"(0|[1-9]\d{0,9})_(0|[1-9]\d{0,9})\.safetensors", re.ASCII)
_ENTRIES, _TOKENS = 1 << 19, 1 << 20  # read at a time
_MOST_LATENTS, _MOST_SEQUENCES, _LONGEST = 1 << 22, 1 << 28, 1 << 20  # limits; _LONGEST: positions in a sequence
_WHOLE = frozenset({"U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64"})
_REAL = frozenset({"F16", "F32", "F64"})
_LARGEST_HALF = float(np.finfo(np.float16).max)
_FIX = "cache the latents again, or download that file again"


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Stored activations; all arrays are (entry,). ``latents``: indices in the whole dictionary, not in the split."""

    sequences: NDArray[np.int64]
    positions: NDArray[np.int64]
    latents: NDArray[np.int64]
    values: NDArray[np.float32]

    def where(self, kept: NDArray[np.bool_] | slice) -> Entries:
        """The entries selected by a mask or a slice."""
        return Entries(self.sequences[kept], self.positions[kept], self.latents[kept], self.values[kept])


@dataclass(frozen=True, slots=True)
class _Split:
    """The header of one file. ``tokens``: (sequences, positions); None if the file was written without tokens."""

    path: Path
    first: int
    last: int
    n_entries: int
    tokens: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class _Zone:
    """A range of entries in a file, and the lowest and highest latent in it."""

    split: _Split
    start: int
    stop: int
    lowest: int
    highest: int


def split_files(folder: Path) -> list[tuple[int, int, Path]]:
    """The splits in a folder, sorted by first latent: (first latent, last latent, path)."""
    names = ((_NAME.fullmatch(path.name), path) for path in folder.glob("*.safetensors"))
    return sorted((int(name[1]), int(name[2]), path) for name, path in names if name)


class LatentCache:
    """The cache of one hook point. Opening it reads headers only. Raises MissingFile, BadFile."""

    def __init__(self, folder: Path) -> None:
        require("safetensors", "model")
        self.folder = folder
        self._splits = [_opened(*file) for file in split_files(folder)]
        if not self._splits:
            raise MissingFile(
                str(folder),
                expected="splits such as 0_4095.safetensors",
                seen="no such file",
                fix="give the folder of a hook point",
            )
        for one, other in pairwise(self._splits):
            if one.last >= other.first:
                raise BadFile(
                    str(folder),
                    expected="splits that do not overlap",
                    seen=f"{one.path.name} and {other.path.name}",
                    fix="delete the files of the older cache, which a new cache with other splits does not overwrite",
                )
        with_tokens = [split for split in self._splits if split.tokens is not None]
        if not with_tokens:
            raise _bad(self._splits[0].path, "tokens", "tokens in at least one split", "none", "save_tokens=True")
        self._holder = with_tokens[0]
        for split in with_tokens:
            if split.tokens != self._holder.tokens:
                seen = f"{_shape(split.tokens)}, and {_shape(self._holder.tokens)} in {self._holder.path.name}"
                raise _bad(split.path, "tokens", "the same tokens in every split", seen)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the tokens: (sequences, positions)."""
        assert self._holder.tokens is not None
        return self._holder.tokens

    @property
    def width(self) -> int:
        """Number of latents: one more than the last latent of the last split."""
        return self._splits[-1].last + 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """The number of tokens on which each latent fires, (latent,). Reads all files, once. Raises BadFile."""
        return self._read_once[0]

    @cached_property
    def _read_once(self) -> tuple[NDArray[np.int64], list[_Zone]]:
        counts, zones = np.zeros(self.width, dtype=np.int64), []
        for zone, entries in self._zones():
            fired, times = np.unique(entries.latents[entries.values > 0], return_counts=True)
            counts[fired] += times
            zones.append(zone)
        return counts, zones

    def entries(self, latents: Sequence[int]) -> Iterator[Entries]:
        """The positive activations of these latents, in file order. Raises BadFile."""
        wanted = np.unique(np.asarray(latents, dtype=np.int64))
        for zone in self._read_once[1]:
            if np.searchsorted(wanted, zone.lowest) == np.searchsorted(wanted, zone.highest, side="right"):
                continue
            with _reading(zone.split.path) as file:
                found = _checked(zone.split, file, zone.start, zone.stop, self.shape)
            yield found.where(np.isin(found.latents, wanted) & (found.values > 0))

    def _zones(self) -> Iterator[tuple[_Zone, Entries]]:
        for split in self._splits:
            with _reading(split.path) as file:
                for start in range(0, split.n_entries, _ENTRIES):
                    stop = min(start + _ENTRIES, split.n_entries)
                    found = _checked(split, file, start, stop, self.shape)
                    yield _Zone(split, start, stop, int(found.latents.min()), int(found.latents.max())), found

    def token_blocks(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """All token ids in blocks of sequences: (index of the first sequence, ids). Raises BadFile."""
        path, (sequences, length) = self._holder.path, self.shape
        step = max(1, _TOKENS // length)
        with _reading(path) as file:
            for first in range(0, sequences, step):
                rows = file.get_slice("tokens")[first : min(first + step, sequences)].astype(np.int64)
                if rows.min() < 0:
                    raise _bad(path, "tokens", "token ids of 0 or more", f"{rows.min()}")
                yield first, rows


def _opened(first: int, last: int, path: Path) -> _Split:
    """Read and check the header of a file."""
    if not first <= last < _MOST_LATENTS:
        raise BadFile(
            str(path),
            expected=f"a file name FIRST_LAST with FIRST at most LAST, and LAST below {_MOST_LATENTS}",
            seen=path.name,
            fix="rename the file, or cache the latents again",
        )
    with _reading(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
        kinds = {name: str(one.get_dtype()) for name, one in slices.items()}
    for name, allowed in (("locations", _WHOLE), ("activations", _REAL), ("tokens", _WHOLE)):
        if name not in shapes:
            if name == "tokens":
                continue
            seen = f"only these tensors: {', '.join(sorted(shapes)) or 'none'}"[:200]
            raise _bad(path, name, "a tensor with this name", seen)
        if kinds[name] not in allowed:
            raise _bad(path, name, f"dtype {', '.join(sorted(allowed))}", f"dtype {kinds[name]}")
    entries = shapes["activations"]
    if len(entries) != 1:
        raise _bad(path, "activations", "shape (entries)", _shape(entries))
    if shapes["locations"] != (entries[0], 3):
        raise _bad(path, "locations", f"shape ({entries[0]}, 3)", _shape(shapes["locations"]))
    tokens = shapes.get("tokens")
    if tokens is None:
        return _Split(path, first, last, entries[0], None)
    if len(tokens) != 2 or not (0 < tokens[0] <= _MOST_SEQUENCES and 0 < tokens[1] <= _LONGEST):
        raise _bad(path, "tokens", "shape (sequences, positions)", _shape(tokens))
    return _Split(path, first, last, entries[0], (tokens[0], tokens[1]))


def _checked(split: _Split, file: Any, start: int, stop: int, shape: tuple[int, int]) -> Entries:
    """Read a range of entries; check that they lie inside the tokens and the split, and are finite."""
    locations = file.get_slice("locations")[start:stop]
    limits = (*shape, split.last - split.first + 1)
    for column, (limit, what) in enumerate(zip(limits, ("sequences", "positions", "latents"), strict=True)):
        worst = locations[:, column]
        if int(worst.max()) >= limit or int(worst.min()) < 0:
            place = int(np.argmax((worst >= limit) | (worst < 0)))
            seen = f"{int(worst[place])} in entry {start + place}"
            raise _bad(split.path, "locations", f"{what} from 0 to {limit - 1}", seen)
    stored = file.get_slice("activations")[start:stop]
    if np.isnan(stored).any() or (stored.dtype != np.float16 and np.isinf(stored).any()):
        place = int(np.argmin(np.isfinite(stored)))
        raise _bad(split.path, "activations", "finite numbers", f"{stored[place]} in entry {start + place}")
    with np.errstate(over="ignore"):
        values = stored.astype(np.float32)
    if stored.dtype != np.float16 and np.isinf(values).any():
        place = int(np.argmax(np.isinf(values)))
        raise _bad(
            split.path,
            "activations",
            "numbers within the range of float32",
            f"{stored[place]} in entry {start + place}",
        )
    if stored.dtype == np.float16:  # activations beyond the range of float16 were stored as infinity
        values = values.clip(-_LARGEST_HALF, _LARGEST_HALF)
    latents = locations[:, 2].astype(np.int64) + split.first
    return Entries(locations[:, 0].astype(np.int64), locations[:, 1].astype(np.int64), latents, values)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a safetensors file; any error while it is open becomes MissingFile or BadFile."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            yield file
    except FileNotFoundError as error:
        raise MissingFile(str(path), expected="a split of the cache", seen="no such file", fix=_FIX) from error
    except (SafetensorError, OSError, ValueError, TypeError, OverflowError, MemoryError) as error:
        seen = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise BadFile(str(path), expected="plain tensors in a .safetensors file", seen=seen, fix=_FIX) from error


def _shape(shape: Sequence[int] | None) -> str:
    return f"shape {tuple(shape or ())}"


def _bad(path: Path, tensor: str, expected: str, seen: str, how: str = "") -> BadFile:
    return BadFile(
        f"{path}: {tensor}", expected=expected, seen=seen, fix=f"cache the latents again with {how}" if how else _FIX
    )
