"""Lazy partial reads of tensors in untrusted files: reading a few columns of a large matrix reads little more than those.

Opens .safetensors and torch files (weights only, so no file can run code); ``evalkit.util.npz_files`` opens .npz. Shapes
are known once a file is open. Values are read on demand, returned as float32, and rejected where they are not finite.
Claimed sizes are checked against its length before memory is allocated. Writes nothing. Knows nothing of dictionaries.
"""

from __future__ import annotations

import os
import pickle
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.errors import BadFile, BadShape, MissingFile, require

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Index", "Matrix", "Stored", "open_safetensors", "open_torch", "take", "whole"]

Index: TypeAlias = "slice | NDArray[np.int64]"
Matrix: TypeAlias = "Tensor | Stored"

# Columns whose gap in the file is at most this many bytes are read with one call, as a second call costs as much.
_GAP = 512
_UNREADABLE = (  # errors that numpy, zipfile, torch and safetensors raise on damaged and malicious files
    ValueError,
    TypeError,
    OSError,
    EOFError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    MemoryError,
    OverflowError,
    RecursionError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)
OTHER_DTYPE = "other "  # prefix that marks the name of an unsupported dtype
_SAFETENSORS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bf16"}
_WRAPPERS = ("_orig_mod.", "module.", "_forward_module.")
_STATE_KEYS = ("state_dict", "model_state_dict")
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class Stored:
    """A floating-point tensor of one or two dimensions in a file, row by row. ``what`` names file and tensor in errors."""

    what: str
    shape: tuple[int, ...]
    path: Path
    offset: int = 0
    dtype: str = "<f4"  # numpy's, or bf16
    transposed: bool = False
    loaded: Tensor | None = None  # a tensor that torch has memory-mapped

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def file(self) -> Path:
        """The file that was opened. ``path`` is where the numbers are: in the cache for a compressed .npz."""
        return Path(self.what.rpartition(": ")[0] or self.path)

    @property
    def T(self) -> Stored:
        """The transpose; nothing is read."""
        return replace(self, shape=self.shape[::-1], transposed=not self.transposed)

    def read(self) -> Tensor:
        """The whole tensor, float32. Raises BadFile."""
        return self.take(slice(None), 0)

    def take(self, index: Index, axis: int) -> Tensor:
        """The chosen rows (``axis`` 0) or columns (1), float32. Raises BadFile (not finite, file cut), MissingFile."""
        self.check_dtype()
        if self.transposed and self.ndim == 2:
            return replace(self, shape=self.shape[::-1], transposed=False).take(index, 1 - axis).T
        if self.loaded is not None:
            chosen = index if isinstance(index, slice) else torch.from_numpy(index)
            found = self.loaded[chosen] if axis == 0 else self.loaded[:, chosen]
            return self._checked(found.to(torch.float32, copy=True).contiguous())
        with reading(self.path, self.what), self.path.open("rb", buffering=0) as stream:
            values = self._rows(stream.fileno(), index) if axis == 0 else self._columns(stream.fileno(), index)
        return self._checked(torch.from_numpy(values))

    def check_dtype(self) -> None:
        """Raise BadShape if the dtype is not floating point. Only arrays of .npz files can have such a dtype."""
        if self.dtype.startswith(OTHER_DTYPE):
            raise BadShape(
                self.what,
                expected="float16, float32 or float64",
                seen=self.dtype.removeprefix(OTHER_DTYPE),
                fix="save the dictionary again in floating point",
            )

    @property
    def _itemsize(self) -> int:
        return 2 if self.dtype == "bf16" else np.dtype(self.dtype).itemsize

    def _rows(self, file: int, index: Index) -> NDArray[np.float32]:
        length = prod(self.shape[1:])
        wanted = np.arange(self.shape[0])[index]
        out = np.empty((len(wanted), *self.shape[1:]), np.float32)
        flat = out.reshape(len(wanted), length)
        for first, last in _runs(wanted):
            start = int(wanted[first]) * length
            flat[first:last] = self._span(file, start, (last - first) * length).reshape(last - first, length)
        return out

    def _columns(self, file: int, index: Index) -> NDArray[np.float32]:
        rows, length = self.shape
        wanted = np.arange(length)[index]
        order = np.argsort(wanted, kind="stable")
        rising = wanted[order]
        out = np.empty((rows, len(wanted)), np.float32)
        if not len(wanted):
            return out
        edges = np.flatnonzero(np.diff(rising) * self._itemsize > _GAP) + 1
        spans = [(part[0], part[-1] + 1, part) for part in np.split(rising, edges)]
        found = np.empty(len(wanted), np.float32)
        if hasattr(os, "posix_fadvise"):  # not on every system; it stops the read-ahead of bytes that are not needed
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        for row in range(rows):
            at = 0
            for low, high, part in spans:
                values = self._span(file, row * length + int(low), int(high - low))
                found[at : at + len(part)] = values[part - low]
                at += len(part)
            out[row, order] = found
        return out

    def _span(self, file: int, start: int, count: int) -> NDArray[np.float32]:
        """``count`` neighbouring numbers, as float32."""
        wanted = count * self._itemsize
        data = os.pread(file, wanted, self.offset + start * self._itemsize)
        while len(data) < wanted:  # a read of more than 2 GB comes in pieces
            more = os.pread(file, wanted - len(data), self.offset + start * self._itemsize + len(data))
            if not more:
                raise EOFError("the file ends inside this tensor")
            data += more
        if self.dtype == "bf16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            return np.frombuffer(data, self.dtype).astype(np.float32, copy=False)

    def _checked(self, values: Tensor) -> Tensor:
        bad = int(values.numel() - torch.isfinite(values).sum())
        if bad:
            raise BadFile(
                self.what,
                expected="finite numbers",
                seen=f"{bad} of {values.numel()} are NaN or infinite",
                fix="download or train the dictionary again",
            )
        return values


def take(matrix: Matrix, index: Index, axis: int) -> Tensor:
    """The chosen rows (``axis`` 0) or columns (1) of a matrix in memory or on disk."""
    if isinstance(matrix, Stored):
        return matrix.take(index, axis)
    chosen = index if isinstance(index, slice) else torch.from_numpy(index).to(matrix.device)
    return matrix[chosen] if axis == 0 else matrix[:, chosen]


def whole(matrix: Matrix) -> Tensor:
    """All of a tensor in memory or on disk."""
    return matrix.read() if isinstance(matrix, Stored) else matrix


def open_safetensors(path: Path) -> dict[str, Stored]:
    """The floating-point tensors of a .safetensors file. Raises MissingFile, BadFile."""
    require("safetensors", "model")
    import json

    from safetensors import SafetensorError, safe_open

    with reading(path, str(path)):
        try:
            with safe_open(path, framework="pt"):
                pass  # checks the header: offsets inside the file, sizes that agree with shapes
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(length, _LONGEST_HEADER)))
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        what = f"{path}: {name}"
        kind = _SAFETENSORS.get(entry["dtype"])
        found[name] = Stored(
            what, tuple(entry["shape"]), path, 8 + length + entry["data_offsets"][0], kind or OTHER_DTYPE
        )
    return only_floats(unwrapped(found))


def unwrapped(named: Mapping[str, Any]) -> dict[str, Any]:
    """The entries without the prefix that a wrapper module gave to all of their names.

    ``torch.compile`` writes ``_orig_mod.``, data-parallel wrappers write ``module.`` or ``_forward_module.``; they nest.
    """
    found = dict(named)
    while prefix := next((one for one in _WRAPPERS if found and all(name.startswith(one) for name in found)), None):
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _state_of(held: Any) -> Any:
    """The state dict in the object of a checkpoint: the object itself, or its entry ``state_dict`` or alike."""
    while isinstance(held, Mapping) and not any(isinstance(value, torch.Tensor) for value in held.values()):
        inner = next((held[key] for key in _STATE_KEYS if isinstance(held.get(key), Mapping)), None)
        if inner is None:
            break
        held = inner
    return unwrapped(held) if isinstance(held, Mapping) and all(isinstance(name, str) for name in held) else held


def open_torch(path: Path, *, select: Callable[[Any], Mapping[str, Any]] | None = None) -> dict[str, Stored]:
    """The floating-point tensors of a state dict that torch wrote, without its other entries. Raises MissingFile, BadFile.

    ``select`` returns the mapping of names to tensors from the object in the file, read with ``weights_only=True``.
    """
    with reading(path, str(path)):
        held = _state_of(_load_torch(path))
        state = held if select is None else select(held)
        if not isinstance(state, Mapping):
            raise TypeError(f"a {type(state).__name__} instead of named tensors")
        tensors = {str(name): value.detach() for name, value in state.items() if isinstance(value, torch.Tensor)}
    found = {}
    for name, value in tensors.items():
        plain = value.is_floating_point() and value.layout == torch.strided and not value.is_meta
        kind = "<f4" if plain else OTHER_DTYPE
        if plain and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            with reading(path, str(path)):
                raise ValueError(f"{name} claims shape {tuple(value.shape)} but has fewer numbers")
        found[name] = Stored(f"{path}: {name}", tuple(value.shape), path, dtype=kind, loaded=value)
    return only_floats(found)


def _load_torch(path: Path) -> Any:
    with path.open("rb") as stream:
        zipped = stream.read(4) == b"PK\x03\x04"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped or None)


def _runs(wanted: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers in ``wanted``, as (first, last + 1) positions."""
    for first, last in pairwise([0, *(np.flatnonzero(np.diff(wanted) != 1) + 1).tolist(), len(wanted)]):
        if first < last:
            yield first, last


def only_floats(found: dict[str, Stored]) -> dict[str, Stored]:
    return {name: stored for name, stored in found.items() if not stored.dtype.startswith(OTHER_DTYPE)}


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn the errors of a reader on a missing, damaged or malicious file into BadFile or MissingFile."""
    try:
        yield
    except (BadFile, BadShape, MissingFile):
        raise
    except FileNotFoundError as error:
        raise MissingFile(str(path), expected="a file of weights", seen="no such file", fix="check the path") from error
    except _UNREADABLE as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        lower = str(error).lower()
        hostile = "pickle" in lower or "weights_only" in lower or "weightsunpickler" in lower or "global" in lower
        raise BadFile(
            what,
            expected=_kind(path),
            seen="pickled objects, which could run code" if hostile else first[:200],
            fix="download or save the dictionary again" + (" as safetensors" if hostile else ""),
        ) from error


def _kind(path: Path) -> str:
    known = {".npz": "an .npz archive of plain arrays", ".safetensors": "plain tensors in a .safetensors file"}
    return known.get(path.suffix, "plain tensors in a file that torch wrote")
