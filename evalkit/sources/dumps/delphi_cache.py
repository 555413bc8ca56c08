"""The files of one hook point in a latent cache of eai-delphi: the activations that are stored, and the tokens.

A folder of splits ``FIRST_LAST.safetensors``, latents FIRST to LAST each: ``locations`` (entry, 3), whole numbers of
sequence, position and latent − FIRST; ``activations`` (entry,); ``tokens`` (sequence, position), the same in every split.
Every activation above 1e-5 in size is there, in float16, and nothing else.

Splits are read in ranges of entries, and every range is checked before it is used; what is kept of the first reading is how
often each latent fires and which latents a range holds, so that where a file is sorted by latent only their ranges are read
again. Knows no tokenizer and no windows; loads no torch; writes nothing.
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
_MOST_LATENTS, _MOST_SEQUENCES, _LONGEST = 1 << 22, 1 << 28, 1 << 20
_WHOLE = frozenset({"U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64"})
_REAL = frozenset({"F16", "F32", "F64"})
_LARGEST_HALF = float(np.finfo(np.float16).max)
_FIX = "cache the latents again, or download that file again"


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Stored activations; all arrays are (entry,). ``latents`` are those of the dictionary."""

    sequences: NDArray[np.int64]
    positions: NDArray[np.int64]
    latents: NDArray[np.int64]
    values: NDArray[np.float32]

    def where(self, kept: NDArray[np.bool_] | slice) -> Entries:
        """Some of them."""
        return Entries(self.sequences[kept], self.positions[kept], self.latents[kept], self.values[kept])


@dataclass(frozen=True, slots=True)
class _Split:
    """A file, what its header says. ``tokens``: (sequences, positions), None where it was written without them."""

    path: Path
    first: int
    last: int
    n_entries: int
    tokens: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class _Zone:
    """A range of entries of a file, and the smallest and largest latent in it."""

    split: _Split
    start: int
    stop: int
    lowest: int
    highest: int


def split_files(folder: Path) -> list[tuple[int, int, Path]]:
    """The splits in a folder by their first latent: first, last, path."""
    names = ((_NAME.fullmatch(path.name), path) for path in folder.glob("*.safetensors"))
    return sorted((int(name[1]), int(name[2]), path) for name, path in names if name)


class LatentCache:
    """The cache of one hook point. Only headers are read at first. Raises MissingFile, BadFile."""

    def __init__(self, folder: Path) -> None:
        require("safetensors", "model")
        self.folder = folder
        self._splits = [_opened(*file) for file in split_files(folder)]
        if not self._splits:
            raise MissingFile(
                str(folder),
                expected="splits such as 0_4095.safetensors",
                seen="none",
                fix="name the hook point's folder",
            )
        for one, other in pairwise(self._splits):
            if one.last >= other.first:
                raise BadFile(
                    str(folder),
                    expected="splits of different latents",
                    seen=f"{one.path.name} and {other.path.name}",
                    fix="delete the files of the older cache: a new one with other splits does not replace them",
                )
        with_tokens = [split for split in self._splits if split.tokens is not None]
        if not with_tokens:
            raise _bad(self._splits[0].path, "tokens", "the tokens beside the activations", "none", "save_tokens=True")
        self._holder = with_tokens[0]
        for split in with_tokens:
            if split.tokens != self._holder.tokens:
                seen = f"{_shape(split.tokens)}, and {_shape(self._holder.tokens)} in {self._holder.path.name}"
                raise _bad(split.path, "tokens", "the same tokens in every split", seen)

    @property
    def shape(self) -> tuple[int, int]:
        """Sequences and positions of the tokens."""
        assert self._holder.tokens is not None
        return self._holder.tokens

    @property
    def width(self) -> int:
        """One more than the last latent of the last split."""
        return self._splits[-1].last + 1

    @property
    def counts(self) -> NDArray[np.int64]:
        """(latent,) On how many tokens each latent fires. Reads all files once. Raises BadFile."""
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
        """The positive activations of these latents, in the order of the files. Raises BadFile."""
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
        """All tokens, some sequences at a time, each with the number of the first. Raises BadFile."""
        path, (sequences, length) = self._holder.path, self.shape
        step = max(1, _TOKENS // length)
        with _reading(path) as file:
            for first in range(0, sequences, step):
                rows = file.get_slice("tokens")[first : min(first + step, sequences)].astype(np.int64)
                if rows.min() < 0:
                    raise _bad(path, "tokens", "token ids from 0", f"{rows.min()}")
                yield first, rows


def _opened(first: int, last: int, path: Path) -> _Split:
    """What the header of a file says, checked."""
    if not first <= last < _MOST_LATENTS:
        raise BadFile(
            str(path),
            expected=f"a name FIRST_LAST of latents below {_MOST_LATENTS}",
            seen=path.name,
            fix="rename it, or cache the latents again",
        )
    with _reading(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
        kinds = {name: str(one.get_dtype()) for name, one in slices.items()}
    for name, allowed in (("locations", _WHOLE), ("activations", _REAL), ("tokens", _WHOLE)):
        if name not in shapes:
            if name == "tokens":
                continue
            raise _bad(path, name, "a tensor of that name", f"only {', '.join(sorted(shapes)) or 'none at all'}"[:200])
        if kinds[name] not in allowed:
            raise _bad(path, name, f"one of {', '.join(sorted(allowed))}", kinds[name])
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
    """A range of entries that lie inside the tokens and the split."""
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
            "numbers that single precision holds",
            f"{stored[place]} in entry {start + place}",
        )
    if stored.dtype == np.float16:  # what was larger than that is stored as infinite
        values = values.clip(-_LARGEST_HALF, _LARGEST_HALF)
    latents = locations[:, 2].astype(np.int64) + split.first
    return Entries(locations[:, 0].astype(np.int64), locations[:, 1].astype(np.int64), latents, values)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """A file of plain tensors, open. Whatever is wrong with it becomes one of our errors."""
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
