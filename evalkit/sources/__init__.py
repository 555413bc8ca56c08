"""Opens a dictionary by path: finds the reader of its format in the registry.

Knows no format itself. ``bundled:NAME`` is a dictionary in the package; globs give several. Reads nothing but what the
readers read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit import registry
from evalkit.errors import BadConfig, BadFile, MissingFile
from evalkit.protocols import FeatureSource, SourceReader

__all__ = ["BUNDLED", "load_source", "open_dictionary"]

BUNDLED = Path(__file__).parent.parent / "data" / "dictionaries"


def open_dictionary(path: str | Path, *, format: str | None = None, **options: Any) -> list[FeatureSource]:
    """Every feature source at ``path`` (a file, a folder, a glob of these, or ``bundled:NAME``), sorted.

    Each reader takes of ``options`` what it knows (``depths`` and ``density`` for an RQAE; ``site``, ``model``, ``name``
    for all). Raises MissingFile, BadFile, BadShape, BadConfig.
    """
    sources: list[FeatureSource] = []
    for found in _resolve(str(path)):
        reader = _reader(found, format)
        known = {name: value for name, value in options.items() if name in reader.options and value is not None}
        sources += reader.read(found, **known)
    return sources


def load_source(path: str | Path, **options: Any) -> FeatureSource:
    """The one feature source at ``path``. Raises BadConfig when there are several."""
    sources = open_dictionary(path, **options)
    if len(sources) != 1:
        raise BadConfig(
            str(path),
            expected="one dictionary",
            seen=f"{len(sources)}: {', '.join(source.name for source in sources[:4])}",
            fix="name one folder, and for an RQAE one depth: depths=(64,)",
        )
    return sources[0]


def _resolve(path: str) -> Sequence[Path]:
    name = path.removeprefix("bundled:")
    pattern = str(BUNDLED / name) if name != path else path
    if Path(pattern).exists():
        return [Path(pattern)]
    anchor = Path(Path(pattern).anchor)
    found = sorted(anchor.glob(str(Path(pattern).relative_to(anchor)))) if pattern else []
    if not found:
        there = sorted(str(card.parent.relative_to(BUNDLED)) for card in BUNDLED.rglob("card.json"))
        raise MissingFile(
            path,
            expected="a dictionary: a file, a folder, a glob of these, or bundled:NAME",
            seen="nothing there",
            fix=f"check the path; bundled are {', '.join(there)}",
        )
    return found


def _reader(path: Path, format: str | None) -> SourceReader:
    if format is not None:
        reader: SourceReader = registry.create("sources", format)
        return reader
    tried = []
    for name in registry.names("sources"):
        candidate: SourceReader = registry.create("sources", name)
        if candidate.matches(path):
            return candidate
        tried.append(name)
    inside = ", ".join(sorted(found.name for found in path.glob("*"))[:5]) if path.is_dir() else path.name
    raise BadFile(
        str(path),
        expected=f"a dictionary in one of the formats {', '.join(tried)}",
        seen=inside or "an empty folder",
        fix="point at the folder that holds the weights, or name the format",
    )
