"""Reads the lines of Neuronpedia's exports: folders of ``batch-N.jsonl.gz`` (or plain .jsonl), one JSON object per line.

Files are streamed. An invalid line raises an error that names the file and the line. Shared by ``neuronpedia`` and
``neuronpedia_explanations``, which know the parts of an export. Does not load torch; writes nothing.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from evalkit.errors import BadFile
from evalkit.records import FeatureId

__all__ = [
    "DEEPEST",
    "MOST_FEATURES",
    "Record",
    "bad_line",
    "batches",
    "check_origin",
    "index_of",
    "origin_of",
    "records",
]

DEEPEST = 3  # levels of subfolders that are searched for parts of an export
MOST_FEATURES = 1 << 22
_LONGEST_LINE = 4 << 20  # bytes, decompressed
_BATCH = re.compile(r"batch-(\d+)\.jsonl(?:\.gz)?")

Record: TypeAlias = dict[str, Any]


def batches(folder: Path) -> list[Path]:
    """Batch files by number. If a batch exists both compressed and plain, the compressed file is used."""
    found: dict[int, Path] = {}
    for file in sorted(folder.glob("batch-*")):
        if name := _BATCH.fullmatch(file.name):
            found[int(name[1])] = file
    return [found[number] for number in sorted(found)]


def records(file: Path) -> Iterator[tuple[str, Record]]:
    """The JSON object of each line, with its place (``FILE line N``). Empty lines are skipped. Raises BadFile."""
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            while line := stream.readline(_LONGEST_LINE + 1):
                number += 1
                place = f"{file} line {number}"
                if len(line) > _LONGEST_LINE:
                    raise bad_line(place, f"a line of at most {_LONGEST_LINE} bytes", "a longer one")
                if not line.isspace():
                    yield place, _parsed(place, line)
    except (OSError, EOFError, zlib.error) as error:
        expected = "a complete gzip file" if file.suffix == ".gz" else "a readable file"
        raise bad_line(f"{file} line {number + 1}", expected, str(error)[:100] or type(error).__name__) from error


def _parsed(place: str, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad_line(place, "a JSON object", "invalid JSON") from error
    if not isinstance(record, dict):
        raise bad_line(place, "a JSON object", f"a {type(record).__name__}")
    return record


def origin_of(place: str, record: Record) -> tuple[str, str]:
    """The export's names of the model (``modelId``) and of the source (``layer``). Raises BadFile."""
    model, source = record.get("modelId"), record.get("layer")
    if not (isinstance(model, str) and model and isinstance(source, str) and source):
        raise bad_line(place, "modelId and layer as non-empty strings", f"{model!r} and {source!r}"[:80])
    return model, source


def check_origin(place: str, record: Record, origin: tuple[str, str]) -> None:
    """Raise BadFile if a line belongs to another model or source than ``origin``."""
    seen = (record.get("modelId"), record.get("layer"))
    if seen != origin:
        raise bad_line(place, f"modelId {origin[0]} and layer {origin[1]}", f"{seen[0]} and {seen[1]}")


def index_of(place: str, record: Record) -> FeatureId:
    """The feature's id, which exports write as a string or as a number. Raises BadFile."""
    index = record.get("index")
    text = str(index) if isinstance(index, int) and not isinstance(index, bool) else index
    if not isinstance(text, str) or not re.fullmatch(r"0|[1-9]\d{0,9}", text, re.ASCII):
        raise bad_line(place, "index as a feature number", repr(index)[:40])
    return text


def bad_line(place: str, expected: str, seen: str) -> BadFile:
    """The error for an invalid line."""
    return BadFile(place, expected=expected, seen=seen, fix="download that file again, or move it out of the folder")
