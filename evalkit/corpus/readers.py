"""Reads the text of a corpus: text files, JSON lines, parquet, data sets of the ``datasets`` library.

Yields pieces of documents one after the other; never holds more than one piece (about a million characters) or one row of
a table in memory. Knows nothing of tokens.

A document is a line of a .jsonl file, a row of a table, or a file of a folder or glob of .txt files. A single .txt file is
cut at blank lines into sections of at least 8,000 characters, each of which is a document: the explain and score pools are
split by document, so a single document would leave one of them empty.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import logging
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from evalkit.errors import BadFile, CorpusError, MissingFile, json_problem, require
from evalkit.util.hub import hub_reachable

__all__ = ["Located", "Piece", "locate", "read_pieces"]

_LOG = logging.getLogger(__name__)

Piece: TypeAlias = tuple[str, bool]  # text, and whether a new document starts with it
Kind: TypeAlias = Literal["text", "jsonl", "parquet", "saved", "hub", "matrix"]

SECTION = 8_000  # characters: the minimum length of a section of a single text file
PIECE = 1_000_000  # characters: a longer document is tokenised in pieces of about this length, cut at line ends
_SUFFIXES: dict[str, Kind] = {
    ".txt": "text",
    ".txt.gz": "text",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".parquet": "parquet",
    ".npy": "matrix",
    ".pt": "matrix",
    ".safetensors": "matrix",
}
_LONGEST_LINE = 64_000_000  # characters of a line of JSON
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # a cut emoji in JSON; it has no encoding in UTF-8
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_KNOWN = ".txt, .jsonl (either may be .gz), .parquet, .npy, .pt, .safetensors, a saved data set or a hub id"


@dataclass(frozen=True, slots=True)
class Located:
    """An existing corpus source: its kind, its files in reading order, and the name to print."""

    name: str
    kind: Kind
    files: tuple[Path, ...] = ()

    def digest(self, *, split: str, revision: str | None) -> str:
        """An identifier of the content: a hash of the bytes of its files, or a hub id with revision and split."""
        if self.kind == "hub":
            return f"hub:{self.name}@{revision or 'main'}:{split}"
        total = hashlib.blake2b(digest_size=16)
        for path in self.files:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest())
        return total.hexdigest()


def locate(source: str | Path) -> Located:
    """Determine the kind and the files of ``source``. Raises MissingFile, BadFile (an unknown kind of file)."""
    text = str(source)
    if text.startswith("bundled:"):
        return _bundled(text)
    path = Path(source).expanduser()
    if any(sign in text for sign in "*?[") and not path.exists():
        return _many(text, sorted(Path(found) for found in glob.glob(str(path), recursive=True)))  # noqa: PTH207 (absolute and ** patterns)
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return Located(text, "saved", tuple(sorted(path.rglob("*.arrow"))))
        return _many(text, sorted(found for found in path.rglob("*") if found.is_file()))
    if path.is_file():
        return Located(text, _kind(path) or _unknown(path), (path,))
    if isinstance(source, str) and _HUB_ID.fullmatch(text) and not _kind(path):
        return Located(text, "hub")
    raise MissingFile(text, expected=f"a corpus: {_KNOWN}", seen="no such file or folder", fix="check the path")


def read_pieces(located: Located, *, text_field: str, split: str, revision: str | None) -> Iterator[Piece]:
    """The text of a corpus, piece by piece. Raises BadFile and CorpusError if it cannot be read."""
    if located.kind == "text":
        if len(located.files) == 1:
            yield from _sections(located.files[0])
        else:
            for path in located.files:
                yield from _pieces(_lines(path))
    elif located.kind == "jsonl":
        texts = (text for path in located.files for text in _read_jsonl(path, text_field))
        yield from _documents(texts, located.name)
    else:
        rows = _rows(located, split, revision)
        yield from _documents((_field(row, text_field, located.name) for row in rows), located.name)


def _documents(texts: Iterable[str | None], name: str) -> Iterator[Piece]:
    """The texts that are not null; a warning says how many are."""
    n_null = 0
    try:
        for text in texts:
            if text is None:
                n_null += 1
            else:
                yield text, True
    finally:
        if n_null:
            _LOG.warning("%s: skipped %d rows whose text is null", name, n_null)


def _bundled(text: str) -> Located:
    name = text.removeprefix("bundled:")
    folder = Path(str(files("evalkit"))) / "data" / "corpus"
    path = folder / f"{name}.jsonl.gz"
    if not path.is_file():
        known = sorted(found.name.removesuffix(".jsonl.gz") for found in folder.glob("*.jsonl.gz"))
        raise MissingFile(
            text,
            expected="a corpus shipped with the package",
            seen=f"only {', '.join(known) or 'none'}",
            fix=f"use bundled:{known[0]}" if known else "reinstall the package",
        )
    return Located(text, "jsonl", (path,))


def _kind(path: Path) -> Kind | None:
    endings = [ending.lower() for ending in path.suffixes]
    return _SUFFIXES.get("".join(endings[-1:])) or _SUFFIXES.get("".join(endings[-2:]))


def _unknown(path: Path) -> Kind:
    fix = f"decompress it first: zstd -d {path.name}" if path.suffix == ".zst" else "convert it to .jsonl"
    raise BadFile(str(path), expected=f"a corpus: {_KNOWN}", seen=path.suffix or "no file ending", fix=fix)


def _many(text: str, found: list[Path]) -> Located:
    """The corpus files of a folder or glob, all of one kind; a matrix must be the only file."""
    kinds: dict[Kind, list[Path]] = {}
    for path in found:
        if kind := _kind(path):
            kinds.setdefault(kind, []).append(path)
    if not kinds:
        raise MissingFile(text, expected=f"files of a corpus: {_KNOWN}", seen="none", fix="check the path")
    if len(kinds) > 1 or (len(found) > 1 and "matrix" in kinds):
        raise BadFile(
            text,
            expected="files of one kind",
            seen=", ".join(f"{len(paths)} × {kind}" for kind, paths in kinds.items()),
            fix="name the files with a pattern, such as 'folder/*.txt'",
        )
    kind, paths = next(iter(kinds.items()))
    return Located(text, kind, tuple(paths))


def _open(path: Path) -> IO[str]:
    # "utf-8-sig" drops the byte order mark that some editors write
    packed = path.suffix.lower() == ".gz"
    return gzip.open(path, "rt", encoding="utf-8-sig") if packed else path.open(encoding="utf-8-sig")


def _lines(path: Path, longest: int = PIECE) -> Iterator[str]:
    """The lines of a file. A line of more than ``longest`` characters comes in several parts, so memory is bounded."""
    number = 0
    try:
        with _open(path) as stream:
            while line := stream.readline(longest):
                number += 1
                yield line
    except UnicodeDecodeError as error:
        raise BadFile(
            f"{path}:{number + 1}",
            expected="UTF-8 text",
            seen="bytes that are not UTF-8",
            fix="convert it to UTF-8, or drop the file",
        ) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise BadFile(
            f"{path}:{number + 1}",
            expected="a whole gzip file",
            seen="the compressed data are damaged or end too early",
            fix="compress or download the file again",
        ) from error


def _pieces(lines: Iterable[str]) -> Iterator[Piece]:
    """One document, in pieces of about PIECE characters."""
    first, held, size = True, list[str](), 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= PIECE:
            yield "".join(held), first
            first, held, size = False, [], 0
    if held:
        yield "".join(held), first


def _sections(path: Path) -> Iterator[Piece]:
    """The sections of one text file: cut at the first blank line after SECTION characters."""
    held, size = list[str](), 0
    for line in _lines(path):
        if size >= SECTION and not line.strip():
            yield from _pieces(held)
            held, size = [], 0
        held.append(line)
        size += len(line)
    yield from _pieces(held)


def _read_jsonl(path: Path, text_field: str) -> Iterator[str | None]:
    for number, line in enumerate(_lines(path, _LONGEST_LINE), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if len(line) >= _LONGEST_LINE:
            raise BadFile(
                where,
                expected=f"lines of fewer than {_LONGEST_LINE:,} characters",
                seen="a longer line",
                fix="write one document per line",
            )
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadFile(
                where,
                expected="one JSON object per line",
                seen=f"not valid JSON (column {error.colno})",
                fix="correct or remove the line",
            ) from error
        except (ValueError, RecursionError) as error:
            raise BadFile(
                where, expected="one JSON object per line", seen=json_problem(error), fix="correct or remove the line"
            ) from error
        if not isinstance(row, dict):
            raise BadFile(
                where, expected="a JSON object", seen=type(row).__name__, fix=f'write {{"{text_field}": "…"}} per line'
            )
        yield _field(row, text_field, where)


def _field(row: dict[str, Any], text_field: str, where: str) -> str | None:
    """The text of a row, with U+FFFD for half a surrogate pair; None if it is null."""
    if isinstance(text := row.get(text_field), str):
        return _LONE_SURROGATE.sub("\ufffd", text)
    if text is None and text_field in row:
        return None
    if text_field in row:
        raise CorpusError(
            where,
            expected=f"text in the field {text_field!r}",
            seen=type(text).__name__,
            fix="name the field that holds the text",
        )
    raise CorpusError(
        where,
        expected=f"a field {text_field!r}",
        seen=f"the fields {', '.join(map(repr, row)) or '(none)'}",
        fix="name the field that holds the text",
    )


def _rows(located: Located, split: str, revision: str | None) -> Iterator[dict[str, Any]]:
    if located.kind == "parquet":
        yield from _parquet_rows(located.files)
        return
    datasets: Any = require("datasets", "model")
    if located.kind == "hub" and not hub_reachable():
        raise MissingFile(
            located.name,
            expected="a file, a folder, or a data set on the hub",
            seen="no such file here, and the hub does not answer",
            fix="check the path and the network",
        )
    try:
        if located.kind == "saved":
            loaded = datasets.load_from_disk(located.name)
            if isinstance(loaded, dict):
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(located.name, split=split, revision=revision, streaming=True)
    except KeyError as error:
        raise CorpusError(
            located.name, expected=f"a split {split!r}", seen=f"the splits {', '.join(loaded)}", fix="name one of these"
        ) from error
    except Exception as error:  # the library raises many classes; all mean that the data set cannot be opened
        raise BadFile(
            located.name,
            expected="a data set",
            seen=f"{type(error).__name__}: {error}",
            fix="check the id and the split",
        ) from error
    yield from loaded


def _parquet_rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in paths:
        try:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
                yield from batch.to_pylist()
        except UnicodeDecodeError as error:
            raise BadFile(
                str(path), expected="UTF-8 text", seen="bytes that are not UTF-8", fix="write the file again as UTF-8"
            ) from error
        except (pa.ArrowException, OSError) as error:
            raise BadFile(
                str(path), expected="a parquet file", seen=str(error)[:200], fix="write or download it again"
            ) from error
