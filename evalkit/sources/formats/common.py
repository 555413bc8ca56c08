"""What the readers of on-disk formats share: configs, named tensors of the right shape, options, sites.

Every error names the file and the tensor or key, what was expected and what was seen. Knows no format itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.errors import BadConfig, BadFile, BadShape, MissingFile
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

COMMON = frozenset({"model", "site", "l0", "name", "subject"})  # options of every reader of SAEs
_DEEPEST = 4  # folders below the one named
_LONGEST_JSON = 16_000_000  # bytes


class FolderReader:
    """What readers of formats with a folder per dictionary share: finding the folders, refusing options of other formats.

    A reader names its ``format``, the ``files`` that such a folder holds, weights and config, and makes a source of one.
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

        ``options``: ``site``, ``model``, ``subject`` (the model's name where nothing else says it), ``l0`` and ``name``
        (one dictionary only), and what the format adds. Raises MissingFile, BadFile, BadShape (naming file and tensor),
        BadConfig.
        """
        check_options(path, options, self.options)
        found = find_beside(path, self.files)
        check_one(path, found, options, " and ".join(self.files))
        return [self.open(folder.absolute(), options) for folder in found]

    def open(self, folder: Path, options: Mapping[str, Any]) -> SaeSource:
        """The dictionary of one folder."""
        raise NotImplementedError


def check_options(path: Path, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises BadConfig for an option that the reader does not know."""
    names = sorted(known)
    if unknown := sorted(options.keys() - set(names)):
        raise BadConfig(
            str(path), expected=f"the options {', '.join(names)}", seen=unknown[0], fix="remove or rename that option"
        )


def check_one(path: Path, found: Sequence[Path], options: Mapping[str, Any], marker: str) -> None:
    """Raises MissingFile for none, BadConfig for options of one dictionary where there are several."""
    if not found:
        raise MissingFile(
            str(path),
            expected=f"a folder with {marker}, or one above several",
            seen=f"no {marker} there" if path.exists() else "no such file or folder",
            fix="check the path, or download the folder again",
        )
    if len(found) > 1 and (single := sorted({"name", "l0"} & options.keys())):
        raise BadConfig(
            str(path),
            expected=f"one dictionary with the option {single[0]}=",
            seen=f"{len(found)}",
            fix="name one folder",
        )


def find_beside(path: Path, files: Sequence[str]) -> list[Path]:
    """Folders at ``path`` or up to four below that hold all of ``files``, sorted; ``path`` may be one of the files."""
    if path.name in files and path.is_file():
        path = path.parent
    found = []
    for depth in range(_DEEPEST + 1):
        for first in path.glob("/".join([*"*" * depth, files[0]])):
            if all((first.parent / name).is_file() for name in files):
                found.append(first.parent)
    return sorted(found)


def read_json(path: Path) -> dict[str, Any]:
    """A config. Raises MissingFile, BadFile."""
    try:
        if path.stat().st_size > _LONGEST_JSON or not path.is_file():
            raise ValueError(f"{path.stat().st_size} bytes" if path.is_file() else "no regular file")
        held = json.loads(path.read_text("utf-8"))
        if not isinstance(held, dict):
            raise ValueError(f"a {type(held).__name__}")
    except FileNotFoundError as error:
        raise MissingFile(
            str(path), expected="a config", seen="no such file", fix="download the folder again"
        ) from error
    except (ValueError, OSError, RecursionError) as error:
        raise BadFile(
            str(path), expected="a JSON object", seen=str(error)[:200], fix="download or repair that file"
        ) from error
    return held


def read_card(folder: Path) -> dict[str, Any]:
    """``card.json`` beside the weights, empty where there is none: ``model``, ``site``, ``name``, ``fvu``, ``l0``."""
    path = folder / "card.json"
    return read_json(path) if path.exists() else {}


def matrix(file: Path, tensors: Mapping[str, Stored], name: str, shape: tuple[int | None, ...]) -> Stored:
    """A tensor of the given shape, None for any length. Raises BadFile where it is missing, BadShape."""
    if name not in tensors:
        raise BadFile(
            f"{file}: {name}",
            expected="a floating-point tensor of that name",
            seen=f"only {', '.join(sorted(tensors)) or 'none at all'}"[:300],
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
            fix="check that the tensor is not transposed or cut, and that the config belongs to it",
        )
    return found


def vector(file: Path, tensors: Mapping[str, Stored], name: str, length: int) -> Tensor:
    """A vector, read. Raises BadFile (missing, not finite), BadShape."""
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
    """The site: the option ``site`` and ``model``, else the card, else the metadata's hook and model. Raises BadConfig.

    ``hook`` and ``out`` are hook or module names as the dictionary's makers wrote them.
    """
    card = card or {}
    given = options.get("site") or card.get("site") or hook
    path = None if given is None else site_of_hook(str(given).split("/")[-1]) or (str(given) if given != hook else None)
    if path is None:
        raise BadConfig(
            str(file),
            expected="metadata with the hook it reads, a card.json with a site, or the option site=",
            seen=f"the hook {hook!r}, which stands for no known module" if hook else "none of these",
            fix="name the module path it reads, such as --site layers.12 (the residual stream after block 12)",
        )
    owner = options.get("model") or card.get("model") or (model or "").split("/")[-1] or options.get("subject")
    if not owner:
        raise BadConfig(
            str(file),
            expected="metadata with the model it was trained on, a card.json with a model, or the option model=",
            seen="none of these",
            fix="name the subject model, such as model=gemma-2-2b",
        )
    target = None if out is None else site_of_hook(out) or out
    return Site(str(owner), path, None if target == path else target)


def whole_number(where: str, config: Mapping[str, Any], key: str, least: int = 1) -> int | None:
    """A whole number of a config, None where it has none; ``where`` comes before the key in errors. Raises BadConfig."""
    value = config.get(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least):
        return value
    raise BadConfig(
        f"{where}{key}",
        expected=f"a whole number from {least}",
        seen=repr(value)[:80],
        fix="check that the config belongs to the weights",
    )


def positive(where: Path, key: str, number: Any) -> float:
    """An option or config value that must be above 0. Raises BadConfig."""
    if not is_number(number) or number <= 0:
        raise BadConfig(
            f"{where}: {key}", expected="a number above 0", seen=repr(number)[:80], fix="correct that number"
        )
    return float(number)


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def bad_key(where: Path, key: str, expected: str, seen: Any) -> BadFile:
    """The error for a key of a config."""
    return BadFile(
        f"{where}: {key}",
        expected=expected,
        seen=repr(seen)[:200],
        fix="check that the config belongs to these weights",
    )
