"""Opens dictionaries by path: finds them on disk, in the package or on the hub, and picks the reader of their format.

``bundled:NAME`` is a dictionary in the package, ``saelens:RELEASE/ID`` one in sae-lens's registry, ``owner/name/path`` one
on the hub; a glob may match several. A path that exists on disk takes precedence over the hub. Knows no format itself: the
readers read the files, and ``hub`` downloads them. Writes nothing.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from evalkit import registry
from evalkit.errors import BadConfig, BadFile, MissingFile
from evalkit.protocols import FeatureSource, SourceReader

__all__ = ["BUNDLED", "load_source", "open_dictionaries", "open_dictionary"]

BUNDLED = Path(__file__).parent.parent / "data" / "dictionaries"
_EXPECTED = "a dictionary: a file, a folder, a glob of these, bundled:NAME, or OWNER/NAME/PATH on the hub"
_BUNDLED, _REGISTERED = "bundled:", "saelens:"
_WEIGHTS = frozenset({".npz", ".safetensors", ".pt", ".pth", ".bin"})
_DEEPEST, _MOST = 6, 500  # limits of the search for dictionaries: levels below the path, folders with weights


def open_dictionary(path: str | Path, *, format: str | None = None, **options: Any) -> list[FeatureSource]:
    """Every feature source at ``path``, sorted.

    ``path``: a file, a folder, a glob of these, ``bundled:NAME``, ``saelens:RELEASE/ID``, or a hub address
    (``owner/name/path``, ``gemma-scope:2b/path``; with the prefix ``hub:``, the disk is not searched).
    ``format``: the name of a reader; None: the reader that recognises the files.
    ``options``: ``revision`` of the hub repository; ``transform``, which replaces the input transform declared by an SAE;
    and the reader's options (``site``, ``model``, ``name`` for all; ``depths``, ``density`` for an RQAE). Options that a
    reader does not know are ignored.

    Raises MissingFile, BadFile, BadShape, BadConfig, StorageError.
    """
    return open_dictionaries([(path, {**options, "format": format})])


def open_dictionaries(wanted: Iterable[tuple[str | Path, Mapping[str, Any]]]) -> list[FeatureSource]:
    """``open_dictionary`` for several paths, each with its options; every source gets a unique name.

    Sources with equal names get a suffix: the shortest end of their folder paths that differs, as in
    ``…/l0-9@trainer_1``. Raises the errors of ``open_dictionary``, and BadConfig if one dictionary is given twice.
    """
    opened: list[tuple[FeatureSource, Path]] = []
    for path, options in wanted:
        further = dict(options)
        opened += _open(str(path), further.pop("format", None), further)
    return _told_apart(opened)


def load_source(path: str | Path, **options: Any) -> FeatureSource:
    """The only feature source at ``path``. Raises BadConfig if there are several, and as ``open_dictionary``."""
    sources = open_dictionary(path, **options)
    if len(sources) != 1:
        raise BadConfig(
            str(path),
            expected="one dictionary",
            seen=f"{len(sources)}: {', '.join(source.name for source in sources[:4])}",
            fix="give the path of one dictionary; for an RQAE also give one depth, such as depths=(64,)",
        )
    return sources[0]


def _open(path: str, format: str | None, options: dict[str, Any]) -> list[tuple[FeatureSource, Path]]:
    """The sources at a path, each with the file or folder it was read from."""
    transform = options.pop("transform", None)
    if transform is not None:
        from evalkit.sources.sae.source import with_transform

        return [(with_transform(source, transform), place) for source, place in _open(path, format, options)]
    if path.startswith(_REGISTERED):
        from evalkit.sources.formats.saelens import SaeLensReader
        from evalkit.sources.formats.saelens_registry import open_registered, split_registered

        known = _known(options, SaeLensReader.options | {"folder"})
        return [(open_registered(*split_registered(path.removeprefix(_REGISTERED)), **known), Path(path))]
    opened = []
    for found in _resolve(path, options.get("revision")):
        reader, places = _reader(found, format)
        known = _known(options, reader.options)
        opened += [(source, place) for place in places for source in reader.read(place, **known)]
    return opened


def _known(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if options.get(name) is not None}


def _resolve(path: str, revision: str | None) -> Sequence[Path]:
    from evalkit.sources.hub import HUB, fetch, looks_like_address

    if path.startswith(HUB):
        return sorted(fetch(path, revision=revision), key=_natural)
    name = path.removeprefix(_BUNDLED)
    pattern = BUNDLED / name if name != path else Path(path).expanduser()
    if path and pattern.exists():
        return [pattern]
    found = _glob(pattern) if path else []
    if found:
        return found
    if name == path and looks_like_address(path):
        try:
            return sorted(fetch(path, revision=revision), key=_natural)
        except MissingFile as error:
            seen = f"no such path on disk; on the hub: {error.seen}"
            raise MissingFile(path, expected=f"{_EXPECTED}; {error.expected}", seen=seen, fix=error.fix) from error
    there = sorted(str(card.parent.relative_to(BUNDLED)) for card in BUNDLED.rglob("card.json"))
    raise MissingFile(
        path,
        expected=_EXPECTED,
        seen="no such path",
        fix=f"check the path; bundled dictionaries: {', '.join(there)}",
    )


def _glob(pattern: Path) -> list[Path]:
    anchor = Path(pattern.anchor)
    try:
        return sorted(anchor.glob(str(pattern.relative_to(anchor))), key=_natural)
    except (ValueError, NotImplementedError):
        return []


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key that orders numbers in names by value: ``average_l0_9`` before ``average_l0_20``."""
    parts = re.split(r"(\d+)", str(path))
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _reader(path: Path, format: str | None) -> tuple[SourceReader, list[Path]]:
    """The reader for ``path``, and the paths to pass to it: ``path`` itself if the reader accepts it, else folders below.

    If several readers recognise a folder, the first one is used. Raises BadFile if no reader recognises anything, or if
    the folders have several formats.
    """
    if format is not None:
        return registry.create("sources", format), [path]
    readers: dict[str, SourceReader] = {name: registry.create("sources", name) for name in registry.names("sources")}
    above = [name for name, reader in readers.items() if reader.matches(path)]
    by_format: dict[str, list[Path]] = defaultdict(list)
    shadowed = set()
    for leaf in _leaves(path):
        knowing = [name for name, reader in readers.items() if reader.matches(leaf)]
        shadowed.update(knowing[1:])
        if knowing:
            by_format[knowing[0]].append(leaf)
    for name in above:
        if name not in shadowed or not by_format:
            by_format.setdefault(name, [path])
    if not by_format:
        raise _unknown(path, list(readers))
    if len(by_format) > 1:
        raise BadFile(
            str(path),
            expected="dictionaries of one format",
            seen=" and ".join(f"{name} ({_within(path, places[0])})" for name, places in by_format.items()),
            fix="open each folder separately, or set the format",
        )
    (name, places), *_ = by_format.items()
    return readers[name], [path] if name in above else places


def _leaves(path: Path) -> list[Path]:
    """Folders with weight files at and below ``path``; ``path`` itself if it is a file."""
    if path.is_file():
        return [path]
    found: list[Path] = []
    for above, folders, names in os.walk(path):
        here = Path(above)
        deep = len(here.relative_to(path).parts) >= _DEEPEST
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        if any(Path(name).suffix in _WEIGHTS for name in names):
            found.append(here)
        if len(found) >= _MOST:
            break
    return found


def _within(path: Path, leaf: Path) -> str:
    return str(leaf.relative_to(path)) if leaf != path else path.name


def _unknown(path: Path, formats: Sequence[str]) -> BadFile:
    inside = [path.name]
    if path.is_dir():
        below = sorted(file for leaf in _leaves(path)[:5] for file in leaf.iterdir() if file.suffix in _WEIGHTS)
        inside = [str(file.relative_to(path)) for file in below] or sorted(found.name for found in path.glob("*"))
    return BadFile(
        str(path),
        expected=f"a dictionary in one of the formats {', '.join(formats)}",
        seen=", ".join(inside[:5]) or "an empty folder",
        fix="give the path of the folder that holds the weights, or set the format",
    )


def _told_apart(opened: Sequence[tuple[FeatureSource, Path]]) -> list[FeatureSource]:
    by_name: dict[str, list[int]] = defaultdict(list)
    for index, (source, _) in enumerate(opened):
        by_name[source.name].append(index)
    sources = [source for source, _ in opened]
    for name, twins in by_name.items():
        if len(twins) > 1:
            ends = _ends(name, [_file(*opened[index]) for index in twins])
            for index, end in zip(twins, ends, strict=True):
                sources[index] = _renamed(sources[index], end)
    return sources


def _file(source: FeatureSource, path: Path) -> Path:
    """The source's weights file if it is known, otherwise the path that was opened."""
    from evalkit.util.tensor_files import Stored

    encoder = getattr(getattr(source, "weights", None), "w_enc", None)
    return (encoder.file if isinstance(encoder, Stored) else path).absolute()


def _ends(name: str, files: Sequence[Path]) -> list[str]:
    """The shortest distinct ends of the folders' paths, or of the files' paths if two share a folder. Raises BadConfig."""
    folders = [file.parent if file.is_file() else file for file in files]
    paths = [path.parts for path in (folders if len(set(folders)) == len(folders) else files)]
    if len(set(paths)) < len(paths):
        raise BadConfig(
            name,
            expected="different dictionaries",
            seen=f"{'/'.join(paths[0][1:])} more than once",
            fix="give each dictionary once",
        )
    length = 1
    while len({path[-length:] for path in paths}) < len(paths):
        length += 1
    return ["/".join(path[-length:]) for path in paths]


def _renamed(source: FeatureSource, end: str) -> FeatureSource:
    known: set[str] = {each.name for each in fields(source)} if is_dataclass(source) else set()
    for field in ("label", "name"):
        if field in known:
            return replace(source, **{field: f"{getattr(source, field) or source.name}@{end}"})  # type: ignore[type-var]
    raise BadConfig(
        source.name,
        expected="dictionaries with different names",
        seen="two with this name",
        fix="give one of them another name with the option name=, or use separate runs",
    )
