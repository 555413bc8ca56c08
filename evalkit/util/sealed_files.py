"""Checksums of files that are written once: every block of a file is verified when it is read.

Beside FILE stands FILE.checksums, JSON with the size of the file, a BLAKE2b hash of every MiB and a hash of these. It is
written before the file gets its name, so a killed process leaves both, or checksums alone, which are written again with
the file. An .npz archive, of which a run has many, may hold the same JSON as its comment instead. A file without
checksums is read unverified (``evalkit.store`` says which folders may hold such files). Knows no other file format.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from evalkit.errors import DamagedFile, MissingFile, json_problem
from evalkit.util.atomic_files import atomic_path, write_bytes

__all__ = [
    "BlockChecks",
    "is_sealed",
    "open_sealed",
    "read_sealed",
    "read_sealed_json",
    "seal",
    "sealed_npz",
    "sealed_path",
    "sidecar",
    "verify",
    "write_sealed",
]

_BLOCK = 1 << 20  # bytes; a read of one row verifies this much
_HASH_BYTES = 8
_SUFFIX = ".checksums"
_WRITTEN = "the bytes that were written"
_LONGEST_COMMENT = (1 << 16) - 1  # of an archive: the checksums of 3 GiB
_END_OF_ARCHIVE, _END_BYTES = b"PK\x05\x06", 22  # the last record of an archive, and its length without the comment


def sidecar(path: Path) -> Path:
    """Where the checksums of a file are."""
    return path.with_name(path.name + _SUFFIX)


def is_sealed(path: Path) -> bool:
    """Whether the file has checksums."""
    return sidecar(path).exists() or _comment(path) is not None


@contextlib.contextmanager
def sealed_path(target: Path) -> Iterator[Path]:
    """As ``atomic_path``, with checksums. A file that is replaced is absent for a moment, never beside other checksums."""
    with atomic_path(target) as temporary:
        yield temporary
        with atomic_path(sidecar(target)) as sums:
            sums.write_bytes(_description_of(temporary, target.name))
            target.unlink(missing_ok=True)


def write_sealed(target: Path, data: bytes) -> None:
    """Write a whole file and its checksums. Raises StorageError."""
    with sealed_path(target) as temporary:
        temporary.write_bytes(data)


def seal(path: Path) -> None:
    """Write the checksums of a file that has none, taking it as it is. Raises StorageError."""
    write_bytes(sidecar(path), _description_of(path, path.name))


@contextlib.contextmanager
def sealed_npz(target: Path) -> Iterator[BinaryIO]:
    """A stream to write an archive to; the file gets its checksums as the archive's comment. Raises StorageError."""
    with atomic_path(target) as temporary:
        with temporary.open("w+b") as stream:
            yield stream
        size = temporary.stat().st_size
        empty = _description([_hash(b"")] * -(-size // _BLOCK), size, target.name)
        if len(empty) > _LONGEST_COMMENT:
            write_bytes(sidecar(target), _description_of(temporary, target.name))
            return
        with temporary.open("r+b") as stream:
            stream.seek(size - 2)  # the length of the comment ends the archive
            stream.write(len(empty).to_bytes(2, "little"))
            stream.seek(0)
            blocks, _ = _hashes(stream)
            stream.write(_description(blocks, size, target.name))


def open_sealed(path: Path, *, fix: str, expected: str = _WRITTEN) -> BinaryIO:
    """The file to read from; every block is verified before any of its bytes are returned.

    fix, expected: of the message about a damaged file

    Raises MissingFile and DamagedFile, the latter also while it is read.
    """
    return io.BufferedReader(_VerifiedFile(BlockChecks.of(path, fix=fix, expected=expected)), _BLOCK)


def read_sealed(path: Path, *, fix: str) -> bytes:
    """The whole file. Raises MissingFile, DamagedFile."""
    with open_sealed(path, fix=fix) as stream:
        return stream.read()


def read_sealed_json(path: Path, *, expected: str, fix: str) -> Any:
    """The value in a JSON file. Raises MissingFile, DamagedFile."""
    try:
        return json.loads(read_sealed(path, fix=fix))
    except (ValueError, RecursionError) as error:
        raise DamagedFile(str(path), expected=expected, seen=json_problem(error), fix=fix) from error


def verify(path: Path, *, fix: str) -> None:
    """Verify every block of a file. Raises MissingFile, DamagedFile."""
    checks = BlockChecks.of(path, fix=fix)
    checks.check(0, checks.size)


@dataclass
class BlockChecks:
    """The blocks of one file; each is verified once. Made by ``BlockChecks.of``.

    size: of the file
    covered: bytes that have checksums; after them stand those of an archive
    sums: of the blocks, None for a file without checksums
    """

    path: Path
    size: int
    covered: int
    sums: list[str] | None
    fix: str
    expected: str = _WRITTEN
    _verified: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, path: Path, *, fix: str, expected: str = _WRITTEN) -> BlockChecks:
        """The checks of a file, whose size is verified at once. Raises MissingFile, DamagedFile."""
        try:
            size = path.stat().st_size
        except OSError as error:
            raise MissingFile(str(path), expected="a file of this run", seen="no such file", fix=fix) from error
        if sidecar(path).exists():
            held = _read_description(path, sidecar(path).read_bytes(), fix)
            if held["bytes"] != size:
                raise DamagedFile(
                    str(path), expected=f"{held['bytes']} bytes, as written", seen=f"{size} bytes", fix=fix
                )
        elif (comment := _comment(path)) is not None:
            held = _read_description(path, comment, fix)
            if held["bytes"] != size - len(comment):
                seen = f"{size - len(comment)} bytes instead of {held['bytes']}"
                raise DamagedFile(str(path), expected=expected, seen=seen, fix=fix)
        else:
            return cls(path, size, 0, None, fix, expected)
        return cls(path, size, held["bytes"], held["blocks"], fix, expected)

    def check(self, start: int, stop: int) -> None:
        """Verify the blocks that hold the bytes from ``start`` up to ``stop``. Raises DamagedFile."""
        stop = min(stop, self.covered)
        if self.sums is None or start >= stop:
            return
        wanted = set(range(start // _BLOCK, (stop - 1) // _BLOCK + 1)) - self._verified
        if wanted:
            with self.path.open("rb") as stream:
                for block in sorted(wanted):
                    stream.seek(block * _BLOCK)
                    self.verified(block, stream.read(_BLOCK))

    def verified(self, block: int, data: bytes) -> bytes:
        """The bytes of a block, if they are those that were written. Raises DamagedFile."""
        start = block * _BLOCK
        if self.sums is None or start >= self.covered:
            return data
        if _hash(data[: self.covered - start]) != self.sums[block]:
            end = min(start + _BLOCK, self.covered)
            raise DamagedFile(
                str(self.path),
                expected=self.expected,
                seen=f"other bytes between byte {start} and byte {end}",
                fix=self.fix,
            )
        self._verified.add(block)
        return data


class _VerifiedFile(io.RawIOBase):
    """A file that is read in whole blocks, the last of which is kept."""

    def __init__(self, checks: BlockChecks) -> None:
        self._checks = checks
        self._stream = checks.path.open("rb")
        self._place = 0
        self._held: tuple[int, bytes] = (-1, b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._checks.size}[whence]
        if base + offset < 0:
            raise OSError("a place before the beginning of the file")
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        block, skipped = divmod(self._place, _BLOCK)
        if block != self._held[0]:
            self._stream.seek(block * _BLOCK)
            data = self._stream.read(_BLOCK)
            self._held = (block, self._checks.verified(block, data) if data else b"")
        part = self._held[1][skipped : skipped + len(buffer)]
        buffer[: len(part)] = part
        self._place += len(part)
        return len(part)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_HASH_BYTES).hexdigest()


def _hashes(stream: BinaryIO) -> tuple[list[str], int]:
    """The hashes of all blocks of a file, and its size."""
    blocks, size = list[str](), 0
    while data := stream.read(_BLOCK):
        blocks.append(_hash(data))
        size += len(data)
    return blocks, size


def _description_of(path: Path, name: str) -> bytes:
    with path.open("rb") as stream:
        return _description(*_hashes(stream), name)


def _description(blocks: list[str], size: int, name: str) -> bytes:
    held = {"bytes": size, "blocks": blocks}
    return (json.dumps(held | {"own": _own(name, held)}) + "\n").encode()


def _own(name: str, held: dict[str, Any]) -> str:
    """The hash of the checksums themselves and of the name of their file."""
    return _hash(json.dumps([name, held["bytes"], held["blocks"]]).encode())


def _comment(path: Path) -> bytes | None:
    """What follows the last record of an .npz archive; None where nothing does."""
    if path.suffix != ".npz":
        return None
    with path.open("rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(max(0, size - _END_BYTES - (1 << 16)))
        _, found, rest = stream.read().rpartition(_END_OF_ARCHIVE)
    comment = rest[_END_BYTES - len(_END_OF_ARCHIVE) :]
    return comment if found and comment else None


def _read_description(path: Path, text: bytes, fix: str) -> dict[str, Any]:
    try:
        held: dict[str, Any] = json.loads(text)
        if held["own"] == _own(path.name, held) and len(held["blocks"]) == -(-held["bytes"] // _BLOCK):
            return held
        seen = "others"
    except (ValueError, KeyError, TypeError, RecursionError):
        seen = "text that cannot be read"
    where = sidecar(path) if sidecar(path).exists() else path
    raise DamagedFile(str(where), expected=f"the checksums of {path.name}, as written", seen=seen, fix=fix)
