"""The saved state of an inspection: one JSON file per part with its arguments, and the identity of the folder's codes.

A part that was saved with the same arguments is loaded instead of measured again. Does not interpret the contents of
parts. Reads and writes ``PART.json`` and ``inspect.json`` in one folder, atomically.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from evalkit.errors import BadFile, MissingFile, RunMismatch
from evalkit.util.atomic_files import write_bytes
from evalkit.util.sealed_files import read_sealed_json, write_sealed
from evalkit.util.tensor_files import Stored

__all__ = ["Part", "bind", "digest", "load_part", "save_part"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One part of an inspection. Holds JSON values only; NaN is stored as None.

    ``arguments``: everything that the numbers depend on.
    ``rows``: the rows of its table.
    ``further``: other data that its figure needs.
    ``notes``: lines to print below the table.
    ``seconds``: the time that the measurement took.
    """

    name: str
    arguments: dict[str, Any]
    rows: list[dict[str, Any]]
    further: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def save_part(folder: Path, part: Part) -> Part:
    """Write the part and return it in the form in which it will be loaded. Raises StorageError."""
    values = _plain(asdict(part))
    write_sealed(folder / f"{part.name}.json", (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
    return Part(**values)


def load_part(folder: Path, name: str, arguments: dict[str, Any]) -> Part | None:
    """The saved part if it has these arguments, otherwise None. A damaged file counts as missing."""
    try:
        part = Part(
            **read_sealed_json(folder / f"{name}.json", expected="a part of an inspection", fix="measure it again")
        )
    except (MissingFile, BadFile, OSError, TypeError):
        return None
    return part if part.arguments == _plain(arguments) else None


def bind(folder: Path, identity: dict[str, Any]) -> None:
    """Record the identity of the tokens and codes in the folder, or compare it with the recorded one.

    Raises RunMismatch if the folder holds codes with another identity, and BadFile if the record cannot be read.
    """
    path, wanted = folder / "inspect.json", _plain(identity)
    found: dict[str, Any] | None = None
    if path.exists():
        try:
            found = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise BadFile(
                str(path),
                expected="a JSON object that identifies an inspection",
                seen="something else",
                fix="use another --out",
            ) from error
    if found == wanted:
        return
    if found is not None and (folder / "codes").exists():
        key = next(key for key in {**wanted, **found} if wanted.get(key) != found.get(key))
        raise RunMismatch(
            str(folder),
            expected=f"an inspection with {key} = {wanted.get(key)!r}",
            seen=f"{key} = {found.get(key)!r}",
            fix="use another --out, or delete the folder to start over",
        )
    if found is not None:  # nothing is encoded yet, so the files of an attempt with other options can be deleted
        for name in ("corpus", "latents"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for limit in folder.glob("norm_limit*.json"):
            limit.unlink(missing_ok=True)
    write_bytes(path, (json.dumps(wanted, indent=2) + "\n").encode())


def digest(parts: Iterable[Any]) -> str:
    """A hash of everything that defines a dictionary; equal parts in the same order give the same hash.

    A tensor enters with its shape and values; a tensor on disk, which may have gigabytes, with the path, size and
    modification time of its file; a dataclass with its fields; anything else with its repr. None is skipped.
    """
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        for piece in _pieces(part):
            total.update(piece)
    return total.hexdigest()


def _pieces(part: Any) -> Iterator[Any]:
    """The bytes that represent a value in the hash."""
    if part is None:
        return
    if isinstance(part, torch.Tensor):
        yield str(tuple(part.shape)).encode()
        yield part.detach().float().cpu().contiguous().numpy().data
    elif isinstance(part, Stored):
        try:
            state = part.path.stat()
        except OSError as error:
            raise MissingFile(
                str(part.path), expected="a file of weights", seen=error.strerror or str(error), fix="check the path"
            ) from error
        place = (str(part.path.resolve()), state.st_size, state.st_mtime_ns, part.what.rsplit(": ", 1)[-1])
        yield repr((*place, part.offset, part.dtype, tuple(part.shape), part.transposed)).encode()
    elif is_dataclass(part) and not isinstance(part, type):
        yield type(part).__name__.encode()
        for one in fields(part):
            value = getattr(part, one.name)
            if value is not None:
                yield one.name.encode()
                yield from _pieces(value)
    elif isinstance(part, tuple):
        yield str(len(part)).encode()
        for value in part:
            yield from _pieces(value)
    else:
        yield repr(part).encode()


def _plain(value: Any) -> Any:
    """The value after a round trip through JSON; NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
