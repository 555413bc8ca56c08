"""The project's Markdown pages as data for tests: code blocks, commands, links, headings, names between backticks."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.support.paths import ROOT

__all__ = ["MAPS", "PAGES", "Page"]

ELLIPSIS = "…"  # in a command: options that the reader fills in


@dataclass(frozen=True)
class Page:
    """A Markdown file, by its path from the root of the project."""

    name: str

    @property
    def path(self) -> Path:
        return ROOT / self.name

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def prose(self) -> str:
        """The text without its code blocks."""
        return re.sub(r"^```.*?^```", "", self.text, flags=re.DOTALL | re.MULTILINE)

    def blocks(self, language: str) -> list[str]:
        """The contents of the code blocks of one language."""
        return re.findall(rf"^```{language}\n(.*?)^```", self.text, flags=re.DOTALL | re.MULTILINE)

    def commands(self) -> list[list[str]]:
        """Every command after a ``$`` prompt, ``a && b`` as two."""
        lines = [line[2:] for block in self.blocks("console") for line in block.splitlines() if line.startswith("$ ")]
        parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
        return [part for part in parts if part]

    def code_spans(self) -> list[list[str]]:
        """What stands between backticks in the prose, line by line."""
        return [spans for line in self.prose.splitlines() if (spans := re.findall(r"`([^`]+)`", line))]

    def links(self) -> list[str]:
        """Targets of links and images."""
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    def anchors(self) -> set[str]:
        """What ``#…`` may name: the headings as a repository page spells them."""
        headings = re.findall(r"^#+ (.*)$", self.prose, flags=re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _pages(*patterns: str) -> list[Page]:
    return [Page(str(path.relative_to(ROOT))) for pattern in patterns for path in sorted(ROOT.glob(pattern))]


PAGES = _pages("README.md", "docs/*.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/**/*.md")
# Pages whose backticked paths and dotted names must be those of the tree as it is.
MAPS = [page for page in PAGES if page.name not in ("CHANGELOG.md", "results/demo/table.md")]
