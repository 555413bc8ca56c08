"""Reads the explanations in a Neuronpedia export: ``explanations/`` (or ``explanations-…/``) of one source.

Keys that are read from each line: ``modelId``, ``layer`` (the source's id), ``index``, ``description``, ``typeName``,
``explanationModelName``. The files are read completely on first use; memory is bounded. The other parts of an export are
not needed. Does not load torch, so that explainers may import it; writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from evalkit.errors import BadConfig, MissingFile
from evalkit.records import Explanation, FeatureId
from evalkit.sources.dumps.neuronpedia_files import (
    DEEPEST,
    bad_line,
    batches,
    check_origin,
    index_of,
    origin_of,
    records,
)

__all__ = ["ExportedExplanations", "explanation_folders"]

_MOST, _MOST_CHARACTERS = 1 << 23, 1 << 28  # limits per export: number of explanations, characters in total

_LONGEST_NAME = 200  # characters

_Kept: TypeAlias = tuple[str, str, str]  # text, model that wrote it, method


class ExportedExplanations:
    """The explanations of one source of an export.

    ``folders``: the folders of batches, in reading order.
    ``name``: our name of the source.
    ``origin``: the export's names of model and source, which every line must repeat; None: taken from the first line.
    """

    def __init__(self, folders: Sequence[Path], name: str = "", origin: tuple[str, str] | None = None) -> None:
        self.folders, self.name = tuple(folders), name
        self.origin = origin
        self._kept: dict[FeatureId, list[_Kept]] | None = None

    @classmethod
    def find(cls, path: str | Path) -> ExportedExplanations:
        """The explanations of the only source at or below ``path``, which may also be a folder ``explanations``.

        Reads no lines yet. Raises MissingFile, BadConfig (several sources).
        """
        folder = Path(path).expanduser()
        found = [folder] if _is_part(folder) else explanation_folders(folder)
        if not found:
            raise MissingFile(
                str(path),
                expected="a folder of a Neuronpedia export with explanations/batch-0.jsonl.gz, or a folder above it",
                seen="no such batch in this folder" if folder.exists() else "no such folder",
                fix="download v1/MODEL/SOURCE/explanations/ of the bucket neuronpedia-datasets",
            )
        sources = list(dict.fromkeys(one.parent for one in found))
        if len(sources) > 1:
            raise BadConfig(
                str(path),
                expected="the explanations of one source",
                seen=f"{len(sources)} sources, such as {sources[0]} and {sources[1]}",
                fix="give the folder of one source",
            )
        return cls(found)

    def of(self, feature: FeatureId) -> Sequence[Explanation]:
        """The explanations of a feature, in file order. ``explainer``: the model; ``version``: its method.

        Raises BadFile.
        """
        if self._kept is None:
            self._kept = self._read()
        return [
            Explanation(self.name, feature, f"neuronpedia:{writer}", method, text)
            for text, writer, method in self._kept.get(feature, ())
        ]

    def _read(self) -> dict[FeatureId, list[_Kept]]:
        kept: dict[FeatureId, list[_Kept]] = {}
        count = characters = 0
        for file in (file for folder in self.folders for file in batches(folder)):
            for place, record in records(file):
                if self.origin is None:
                    self.origin = origin_of(place, record)
                check_origin(place, record, self.origin)
                text = record.get("description")
                if not isinstance(text, str):
                    raise bad_line(place, "description as a string", type(text).__name__)
                feature = index_of(place, record)
                if not text.strip():
                    continue
                count, characters = count + 1, characters + len(text)
                if count > _MOST or characters > _MOST_CHARACTERS:
                    raise bad_line(place, f"at most {_MOST} explanations, {_MOST_CHARACTERS} characters in all", "more")
                writer, method = (_name(record.get(key)) for key in ("explanationModelName", "typeName"))
                kept.setdefault(feature, []).append((text, writer, method))
        return kept


def _name(value: object) -> str:
    """The name of a model or method as one line of limited length. Interned, as the same few names repeat."""
    text = " ".join(str(value or "")[:_LONGEST_NAME].split())
    return sys.intern(text.encode("utf-8", "replace").decode("utf-8"))


def explanation_folders(folder: Path) -> list[Path]:
    """Folders with batches of explanations in ``folder`` and its subfolders (down to ``DEEPEST`` levels), sorted."""
    below = ("/".join([*["*"] * depth, "explanations*"]) for depth in range(DEEPEST + 1))
    return sorted(one for pattern in below for one in folder.glob(pattern) if _is_part(one))


def _is_part(folder: Path) -> bool:
    return folder.name.startswith("explanations") and folder.is_dir() and bool(batches(folder))
