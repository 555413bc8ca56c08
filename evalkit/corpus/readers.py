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
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

from evalkit.errors import BadFile, CorpusError, MissingFile, require
from evalkit.util.hub import hub_reachable

__all__ = ["Located", "Piece", "locate", "read_pieces"]

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
        for path in located.files:
            yield from ((text, True) for text in _read_jsonl(path, text_field))
    else:
        rows = _rows(located, split, revision)
        yield from ((_field(row, text_field, located.name), True) for row in rows)


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
    return _SUFFIXES.get(path.suffix) or _SUFFIXES.get("".join(path.suffixes[-2:]))


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
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _lines(path: Path) -> Iterator[str]:
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, 1):  # noqa: B007 (named in the error below)
                yield line
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise BadFile(
            f"{path}:{number + 1}", expected="UTF-8 text", seen=str(error), fix="convert it to UTF-8, or drop the file"
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


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadFile(
                where,
                expected="one JSON object per line",
                seen=f"not valid JSON (column {error.colno})",
                fix="correct or remove the line",
            ) from error
        if not isinstance(row, dict):
            raise BadFile(
                where, expected="a JSON object", seen=type(row).__name__, fix=f'write {{"{text_field}": "…"}} per line'
            )
        yield _field(row, text_field, where)


def _field(row: dict[str, Any], text_field: str, where: str) -> str:
    if isinstance(text := row.get(text_field), str):
        return text
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
        except (pa.ArrowException, OSError) as error:
            raise BadFile(
                str(path), expected="a parquet file", seen=str(error)[:200], fix="write or download it again"
            ) from error
