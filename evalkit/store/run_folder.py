"""The lock and the configuration of a run folder: ``run.lock`` and ``run.json``.

One process at a time may write a folder. Once something was computed in it, its configuration may not change. Knows nothing
of records.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from evalkit.errors import BadFile, RunLocked, RunMismatch
from evalkit.util.atomic_files import storage_errors, write_bytes

__all__ = ["acquire", "bind_identity", "sweep"]

# half-written files of a killed process (see atomic_files.atomic_path, corpus.storage.CorpusWriter)
_LEFT_OVERS = (".corpus.partial-*", ".run.json.*.part", ".calibration.*.part", "collected/.*.part", "examples/.*.part")


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


def bind_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write the configuration, or check that it equals the one in the folder. Raises RunMismatch, BadFile."""
    path = folder / "run.json"
    wanted = json.loads(json.dumps(identity))
    if not path.exists():
        write_bytes(path, (json.dumps(wanted, indent=2, sort_keys=True) + "\n").encode())
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadFile(
            str(path), expected="a run's configuration", seen="not valid JSON", fix="use another --out"
        ) from error
    differing = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if differing and not (folder / "calibration.safetensors").exists() and not (folder / "collected").exists():
        # nothing was computed yet, so the configuration may change
        shutil.rmtree(folder / "corpus", ignore_errors=True)
        write_bytes(path, (json.dumps(wanted, indent=2, sort_keys=True) + "\n").encode())
        return
    if differing:
        key = sorted(differing)[0]
        raise RunMismatch(
            str(folder),
            expected=f"a run with {key} = {wanted.get(key)!r}",
            seen=f"{key} = {found.get(key)!r}",
            fix="use another --out, or delete the folder to start over",
        )
