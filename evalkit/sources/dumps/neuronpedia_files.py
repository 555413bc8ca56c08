"""The lines of Neuronpedia's exports: folders of ``batch-N.jsonl.gz`` (or plain .jsonl), one JSON object a line.

Files are streamed; a line that is not what it should be is one error that names file and line. Knows no part of an export
in particular (see ``neuronpedia``, ``neuronpedia_explanations``); loads no torch; writes nothing.
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

DEEPEST = 3  # folders below the one named, in which parts of an export are looked for
MOST_FEATURES = 1 << 22
_LONGEST_LINE = 4 << 20  # bytes, unpacked
_BATCH = re.compile(r"batch-(\d+)\.jsonl(?:\.gz)?")

Record: TypeAlias = dict[str, Any]


def batches(folder: Path) -> list[Path]:
    """Batch files by number; of a batch that is there both packed and plain, the packed one."""
    found: dict[int, Path] = {}
    for file in sorted(folder.glob("batch-*")):
        if name := _BATCH.fullmatch(file.name):
            found[int(name[1])] = file
    return [found[number] for number in sorted(found)]


def records(file: Path) -> Iterator[tuple[str, Record]]:
    """JSON objects, one a line, each with its place (``FILE line N``). Empty lines are skipped. Raises BadFile."""
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
        expected = "a whole gzip file" if file.suffix == ".gz" else "a readable file"
        raise bad_line(f"{file} line {number + 1}", expected, str(error)[:100] or type(error).__name__) from error


def _parsed(place: str, line: bytes) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise bad_line(place, "a JSON object", str(error)[:100]) from error
    if not isinstance(record, dict):
        raise bad_line(place, "a JSON object", f"a {type(record).__name__}")
    return record


def origin_of(place: str, record: Record) -> tuple[str, str]:
    """The export's own names of the model and of the source (its ``layer``). Raises BadFile."""
    model, source = record.get("modelId"), record.get("layer")
    if not (isinstance(model, str) and model and isinstance(source, str) and source):
        raise bad_line(place, "modelId and layer, as names", f"{model!r} and {source!r}"[:80])
    return model, source


def check_origin(place: str, record: Record, origin: tuple[str, str]) -> None:
    """Raises BadFile for a line of another model or source."""
    seen = (record.get("modelId"), record.get("layer"))
    if seen != origin:
        raise bad_line(place, f"modelId {origin[0]} and layer {origin[1]}", f"{seen[0]} and {seen[1]}")


def index_of(place: str, record: Record) -> FeatureId:
    """The feature: exports write it as a string or a number. Raises BadFile."""
    index = record.get("index")
    text = str(index) if isinstance(index, int) and not isinstance(index, bool) else index
    if not isinstance(text, str) or not re.fullmatch(r"0|[1-9]\d{0,9}", text, re.ASCII):
        raise bad_line(place, "index, the number of a feature", repr(index)[:40])
    return text


def bad_line(place: str, expected: str, seen: str) -> BadFile:
    """The error about a line."""
    return BadFile(place, expected=expected, seen=seen, fix="download that file again, or leave it out of the folder")
