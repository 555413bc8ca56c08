"""What an inspection keeps in its folder: a JSON file per part with its arguments, and whose codes the folder holds.

A part that is there for the same arguments is read, not computed again. Knows neither how parts are computed nor what is in
them. Reads and writes ``PART.json`` and ``inspect.json`` in one folder, each whole or not at all.
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
from evalkit.util.tensor_files import Stored

__all__ = ["Part", "bind", "digest", "keep", "kept"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One part: ``rows`` of its table, ``further`` what its figure needs besides, ``arguments`` what decides both.

    JSON values only; NaN is None. ``notes`` are for below the table.
    """

    name: str
    arguments: dict[str, Any]
    rows: list[dict[str, Any]]
    further: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def keep(folder: Path, part: Part) -> Part:
    """Write the part; returns it as it will be read. Raises StorageError."""
    values = _plain(asdict(part))
    write_bytes(folder / f"{part.name}.json", (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode())
    return Part(**values)


def kept(folder: Path, name: str, arguments: dict[str, Any]) -> Part | None:
    """The part if it is there for these arguments, None otherwise. A file that cannot be read counts as not there."""
    try:
        part = Part(**json.loads((folder / f"{name}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return part if part.arguments == _plain(arguments) else None


def bind(folder: Path, identity: dict[str, Any]) -> None:
    """Say whose tokens and codes the folder holds, or check that they are these. Raises RunMismatch, BadFile."""
    path, wanted = folder / "inspect.json", _plain(identity)
    found: dict[str, Any] | None = None
    if path.exists():
        try:
            found = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise BadFile(
                str(path), expected="what an inspection is of", seen=str(error)[:200], fix="use another --out"
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
    if found is not None:  # nothing was encoded: a first try with a mistake in it
        for name in ("corpus", "latents"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for limit in folder.glob("norm_limit*.json"):
            limit.unlink(missing_ok=True)
    write_bytes(path, (json.dumps(wanted, indent=2) + "\n").encode())


def digest(parts: Iterable[Any]) -> str:
    """A name for what decides a dictionary: the same parts in the same order give the same one.

    Tensors count by shape and values, wherever they are stored; tensors on disk, which may have gigabytes, by their place,
    size and time of change; dataclasses by their fields, anything else by its repr. None is left out.
    """
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        for piece in _pieces(part):
            total.update(piece)
    return total.hexdigest()


def _pieces(part: Any) -> Iterator[Any]:
    """The bytes that stand for a value."""
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
    """The value as JSON would give it back; NaN and infinities are None."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
