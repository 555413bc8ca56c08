"""Opens arrays in untrusted .npz files, never pickled ones, for lazy partial reads (see ``evalkit.util.tensor_files``).

The size that an array claims is checked against its member's length before it is used. A compressed array is unpacked once
into the cache folder, $EVALKIT_CACHE; nothing else is written. Knows nothing of dictionaries.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from evalkit.util.atomic_files import atomic_path
from evalkit.util.tensor_files import OTHER_DTYPE, Stored, reading

__all__ = ["open_npz"]

# Weights do not compress this well, so a member above both limits is treated as a decompression bomb.
_BOMB_BYTES = 1 << 30
_BOMB_RATIO = 100


def open_npz(path: Path) -> dict[str, Stored]:
    """The floating-point arrays of an .npz file. A compressed array is unpacked once into the cache folder.

    Raises MissingFile, BadFile (pickled objects among other things), BadShape (integers), StorageError.
    """
    found = {}
    with reading(path, str(path)), _archive(path) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".npy")]
        if not members:
            raise ValueError("an archive without arrays")
        for member in members:
            name = member.filename.removesuffix(".npy")
            found[name] = _npz_member(path, archive, member, f"{path}: {name}")
    return found


def _archive(path: Path) -> zipfile.ZipFile:
    with path.open("rb") as stream:
        if stream.read(6) == b"\x93NUMPY":
            raise ValueError("a single array instead of an archive of arrays")
    return zipfile.ZipFile(path)


def _npz_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, what: str) -> Stored:
    with archive.open(member) as stream:
        shape, fortran, dtype = _npy_header(stream)
        begin = stream.tell()
    if dtype.hasobject:
        raise ValueError(f"pickled objects in {member.filename}")
    if begin + prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename} claims shape {shape} but has {member.file_size - begin} bytes")
    plain = dtype.kind == "f" and dtype.itemsize <= 8 and dtype.byteorder != ">" and not (fortran and len(shape) > 2)
    kind = dtype.newbyteorder("<").str if plain else f"{OTHER_DTYPE}{dtype}"
    order = shape[::-1] if fortran else shape
    if member.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as stream:
            stream.seek(member.header_offset)
            local = stream.read(30)
            if local[:4] != b"PK\x03\x04":
                raise ValueError("a damaged archive")
            begin += member.header_offset + 30 + int.from_bytes(local[26:28], "little")
            begin += int.from_bytes(local[28:30], "little")
        place = path
    else:
        place = _unpacked(path, archive, member)
    stored = Stored(what, order, place, begin, kind)
    return stored.T if fortran and len(shape) == 2 else stored


def _npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
    known: dict[Any, Any] = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    read = known.get(version)
    if read is None:
        raise ValueError(f"an .npy of version {version}")
    shape, fortran, dtype = read(stream)
    return shape, fortran, dtype


def cache_folder() -> Path:
    """Where unpacked files are kept: $EVALKIT_CACHE, else the user's cache folder."""
    given = os.environ.get("EVALKIT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "evalkit"
    return Path(given).expanduser() if given else base


def _unpacked(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Path:
    if member.file_size > _BOMB_BYTES and member.file_size > _BOMB_RATIO * member.compress_size:
        raise ValueError(f"{member.filename} has {member.compress_size} bytes and would unpack to {member.file_size}")
    state = path.stat()
    key = f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}\0{member.filename}\0{member.CRC}"
    target = cache_folder() / "unpacked" / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.npy"
    if not target.exists():
        with atomic_path(target) as temporary, temporary.open("wb") as out, archive.open(member) as packed:
            while block := packed.read(1 << 22):
                out.write(block)
    return target
