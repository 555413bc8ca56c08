"""Atomic writes: a temporary file beside the target, flushed to disk, then renamed over it.

Knows nothing of the content. A full or read-only disk becomes a StorageError and leaves no temporary file behind.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from evalkit.errors import StorageError

__all__ = ["atomic_path", "storage_errors", "write_bytes"]


@contextlib.contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn an operating-system error on ``target`` into a StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            str(target),
            expected="a file that can be written",
            seen=error.strerror or str(error),
            fix="free space or choose another folder, then run the same command again; finished work is kept",
        ) from error


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path to write; it is renamed to ``target`` when the block succeeds. Raises StorageError."""
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(0o644)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(target: Path, data: bytes) -> None:
    """Write a whole file atomically. Raises StorageError."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(data)
