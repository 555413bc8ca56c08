"""The lock and the configuration of a run folder, ``run.lock`` and ``run.json``, and which of its files have checksums.

One process at a time may write a folder. Once something was computed in it, its configuration may not change. Knows nothing
of records.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evalkit.errors import BadFile, MissingFile, RunLocked, RunMismatch
from evalkit.util.atomic_files import storage_errors
from evalkit.util.sealed_files import is_sealed, read_sealed_json, seal, sidecar, write_sealed

__all__ = ["acquire", "bind_identity", "check_sealed", "computed", "read_identity", "seal_all", "sweep"]

# half-written files of a killed process (see atomic_files.atomic_path, corpus.storage.CorpusWriter)
_LEFT_OVERS = (".corpus.partial-*", ".*.part", "collected/.*.part", "examples/.*.part")
# what is written once, each file with its checksums; SQLite files have theirs inside
_SEALED = (
    *("run.json", "fit.json", "calibration.safetensors", "corpus/corpus.json", "corpus/*.npy"),
    *("collected/manifest.json", "collected/shard-*.npz", "examples/*.parquet"),
)
_REDO = "delete it and repeat the command that made this run, with all its options"
_START_OVER = "use another --out, or delete the folder to start over"


def acquire(path: Path) -> int:
    """Acquire the lock and return its file descriptor; closing it releases the lock. Raises RunLocked, StorageError."""
    with storage_errors(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise RunLocked(
            str(path.parent),
            expected="no other process writing this run",
            seen=f"process {holder} writing it",
            fix="wait for it, or use another --out",
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle


def sweep(folder: Path) -> None:
    """Remove half-written files of a killed process. Call it only while holding the lock."""
    for pattern in _LEFT_OVERS:
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def computed(folder: Path) -> bool:
    """Whether anything was computed in the folder, so that it belongs to its configuration."""
    return (folder / "calibration.safetensors").exists() or (folder / "collected").exists()


def read_identity(folder: Path) -> dict[str, Any]:
    """The configuration in ``run.json``. Raises MissingFile, BadFile."""
    path = folder / "run.json"
    if not path.is_file():
        raise MissingFile(
            str(path), expected="a run folder", seen="no run.json", fix="start with `evalkit collect` or `evalkit run`"
        )
    found = read_sealed_json(path, expected="a run's configuration", fix=_REDO)
    if not isinstance(found, dict):
        raise BadFile(str(path), expected="a run's configuration", seen="JSON of another kind", fix=_REDO)
    return found


def bind_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write the configuration, or check that it equals the one in the folder. Raises RunMismatch, BadFile."""
    path = folder / "run.json"
    wanted = json.loads(json.dumps(identity))
    if not path.exists():
        _write_identity(path, wanted)
        return
    found = read_identity(folder)
    differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if differing and not computed(folder):
        # nothing was computed yet, so the configuration may change
        shutil.rmtree(folder / "corpus", ignore_errors=True)
        _write_identity(path, wanted)
        return
    if differing:
        key = sorted(differing)[0]
        raise RunMismatch(
            str(folder),
            expected=f"a run with {key} = {wanted.get(key)!r}",
            seen=f"{key} = {found.get(key)!r}",
            fix=_START_OVER,
        )


def _write_identity(path: Path, identity: dict[str, Any]) -> None:
    write_sealed(path, (json.dumps(identity, indent=2, sort_keys=True) + "\n").encode())


def _sealed_files(folder: Path) -> Iterator[Path]:
    for pattern in _SEALED:
        yield from sorted(folder.glob(pattern))


def check_sealed(folder: Path) -> None:
    """Raise BadFile for the first file that has lost its checksums."""
    for path in _sealed_files(folder):
        if not is_sealed(path):
            raise BadFile(
                str(path),
                expected=f"its checksums in {sidecar(path).name}",
                seen="no such file",
                fix=_REDO if path.name == "run.json" else "delete the file and run again",
            )


def seal_all(folder: Path) -> None:
    """Write checksums of the files of an older run, taking them as they are. Raises StorageError."""
    for path in _sealed_files(folder):
        if not is_sealed(path):
            seal(path)
