"""Shared code of the format readers: finding folders, reading configs, checking tensors and options, resolving sites.

Every error names the file and the tensor or key. Knows no format itself; writes nothing.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.errors import BadConfig, BadFile, BadShape, MissingFile, json_problem
from evalkit.records import Site
from evalkit.subject.sites import site_of_hook

if TYPE_CHECKING:
    from torch import Tensor

    from evalkit.sources.sae.source import SaeSource
    from evalkit.util.tensor_files import Stored

__all__ = [
    "COMMON",
    "FolderReader",
    "bad_key",
    "check_one",
    "check_options",
    "find_beside",
    "is_number",
    "matrix",
    "positive",
    "read_card",
    "read_json",
    "site_from",
    "vector",
    "whole_number",
]

COMMON = frozenset({"model", "site", "l0", "name", "subject"})  # options of every SAE reader
_DEEPEST = 4  # levels of subfolders that are searched
_LONGEST_JSON = 16_000_000  # bytes


class FolderReader(ABC):
    """Base of the readers of formats with one folder per dictionary: finds the folders and rejects unknown options.

    A subclass sets ``format``, the ``files`` in such a folder (weights and config) and, to add options, ``options``; and
    implements ``open``.
    """

    format: str
    files: tuple[str, ...]
    options: frozenset[str] = COMMON

    def matches(self, path: Path) -> bool:
        """Whether there is such a folder at or (up to four folders) below ``path``."""
        try:
            return bool(find_beside(path, self.files))
        except OSError:
            return False

    def read(self, path: Path, **options: Any) -> Sequence[SaeSource]:
        """Every dictionary at or below ``path``, sorted by folder; ``path`` may be one of a folder's files.

        ``options``: ``site``; ``model``; ``subject`` (the model's name if neither options nor files give it); ``l0`` and
        ``name`` (only for a single dictionary); and the format's own. Raises MissingFile, BadFile, BadShape (naming file
        and tensor), BadConfig.
        """
        check_options(path, options, self.options)
        found = find_beside(path, self.files)
        check_one(path, found, options, " and ".join(self.files))
        return [self.open(folder.absolute(), options) for folder in found]

    @abstractmethod
    def open(self, folder: Path, options: Mapping[str, Any]) -> SaeSource:
        """Open the dictionary in one folder."""


def check_options(path: Path, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise BadConfig for an option that the reader does not have."""
    names = sorted(known)
    if unknown := sorted(options.keys() - set(names)):
        raise BadConfig(
            str(path), expected=f"the options {', '.join(names)}", seen=unknown[0], fix="remove or rename that option"
        )


def check_one(path: Path, found: Sequence[Path], options: Mapping[str, Any], marker: str) -> None:
    """Raise MissingFile if nothing was found, BadConfig if several were found but an option is for one dictionary."""
    if not found:
        raise MissingFile(
            str(path),
            expected=f"a folder with {marker}, or a folder above several",
            seen=f"no {marker} in this folder" if path.exists() else "no such file or folder",
            fix="check the path, or download the folder again",
        )
    if len(found) > 1 and (single := sorted({"name", "l0"} & options.keys())):
        raise BadConfig(
            str(path),
            expected=f"one dictionary, because the option {single[0]}= is given",
            seen=f"{len(found)} dictionaries",
            fix="give the path of one dictionary",
        )


def find_beside(path: Path, files: Sequence[str]) -> list[Path]:
    """Folders that hold all of ``files``, at ``path`` or up to four levels below, sorted; ``path`` may be such a file."""
    if path.name in files and path.is_file():
        path = path.parent
    found = []
    for depth in range(_DEEPEST + 1):
        for first in path.glob("/".join([*"*" * depth, files[0]])):
            if all((first.parent / name).is_file() for name in files):
                found.append(first.parent)
    return sorted(found)


def read_json(path: Path) -> dict[str, Any]:
    """Read a config, a JSON object. Raises MissingFile, BadFile."""
    try:
        if path.stat().st_size > _LONGEST_JSON or not path.is_file():
            raise ValueError(f"{path.stat().st_size} bytes" if path.is_file() else "not a regular file")
        held = json.loads(path.read_text("utf-8"))
        if not isinstance(held, dict):
            raise ValueError(f"a {type(held).__name__}")
    except FileNotFoundError as error:
        raise MissingFile(
            str(path), expected="a config file", seen="no such file", fix="download the folder again"
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        raise BadFile(
            str(path), expected="a JSON object", seen=json_problem(error), fix="download that file again, or repair it"
        ) from error
    return held


def read_card(folder: Path) -> dict[str, Any]:
    """``card.json`` in the weights' folder (``model``, ``site``, ``name``, ``fvu``, ``l0``); empty without such a file."""
    path = folder / "card.json"
    return read_json(path) if path.exists() else {}


def matrix(file: Path, tensors: Mapping[str, Stored], name: str, shape: tuple[int | None, ...]) -> Stored:
    """The tensor ``name``, unread. ``shape``: None for any length. Raises BadFile (missing), BadShape."""
    if name not in tensors:
        raise BadFile(
            f"{file}: {name}",
            expected="a floating-point tensor with this name",
            seen=f"only {', '.join(sorted(tensors)) or 'no tensors'}"[:300],
            fix="download or save the dictionary again",
        )
    found = tensors[name]
    fits = len(found.shape) == len(shape) and all(
        want in (None, have) for have, want in zip(found.shape, shape, strict=True)
    )
    if not fits or 0 in found.shape:
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise BadShape(
            f"{file}: {name}",
            expected=f"shape ({wanted})",
            seen=f"shape {tuple(found.shape)}",
            fix="check that the tensor is not transposed or truncated, and that the config belongs to these weights",
        )
    return found


def vector(file: Path, tensors: Mapping[str, Stored], name: str, length: int) -> Tensor:
    """The values of a vector. Raises BadFile (missing, not finite), BadShape."""
    return matrix(file, tensors, name, (length,)).read()


def site_from(
    file: Path,
    options: Mapping[str, Any],
    *,
    hook: str | None = None,
    model: str | None = None,
    out: str | None = None,
    card: Mapping[str, Any] | None = None,
) -> Site:
    """The site of a dictionary: path and model from the options, else from the card, else from ``hook`` and ``model``.

    ``hook``, ``out``: where the dictionary reads, and what it reconstructs if that is another place: names of hooks or
    modules as in the dictionary's metadata. The option ``subject`` is used if nothing else gives a model. Raises BadConfig.
    """
    card = card or {}
    given = options.get("site") or card.get("site") or hook
    path = None if given is None else site_of_hook(str(given).split("/")[-1]) or (str(given) if given != hook else None)
    if path is None:
        raise BadConfig(
            str(file),
            expected="metadata with the hook that it reads, a card.json with a site, or the option site=",
            seen=f"the hook {hook!r}, which matches no known module" if hook else "none of these",
            fix="give the path of the module that it reads, such as --site layers.12 (residual stream after block 12)",
        )
    owner = options.get("model") or card.get("model") or (model or "").split("/")[-1] or options.get("subject")
    if not owner:
        raise BadConfig(
            str(file),
            expected="metadata with the model it was trained on, a card.json with a model, or the option model=",
            seen="none of these",
            fix="give the subject model, such as model=gemma-2-2b",
        )
    target = None if out is None else site_of_hook(out) or out
    return Site(str(owner), path, None if target == path else target)


def whole_number(where: str, config: Mapping[str, Any], key: str, least: int = 1) -> int | None:
    """An integer of at least ``least`` in a config; None without the key. ``where`` prefixes the key in errors.

    Raises BadConfig.
    """
    value = config.get(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        return value
    raise BadConfig(
        f"{where}{key}",
        expected=f"a whole number of at least {least}",
        seen=repr(value)[:80],
        fix="check that the config belongs to the weights",
    )


def positive(where: Path, key: str, number: Any) -> float:
    """Check that an option or config value is above 0, and return it. Raises BadConfig."""
    if not is_number(number) or number <= 0:
        raise BadConfig(
            f"{where}: {key}", expected="a number above 0", seen=repr(number)[:80], fix="correct that number"
        )
    return float(number)


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def bad_key(where: Path, key: str, expected: str, seen: Any) -> BadFile:
    """The error for an invalid key in a config."""
    return BadFile(
        f"{where}: {key}",
        expected=expected,
        seen=repr(seen)[:200],
        fix="check that the config belongs to these weights",
    )
