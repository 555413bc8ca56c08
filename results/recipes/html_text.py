"""Converts HTML to readable plain text, with the standard library only.

Knows tags and class names, not sources: the same pattern recognises navigation in all of them. Keeps the line breaks of
``pre`` and joins the rest of each block into one line. Reads and writes no files.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

SKIPPED_TAGS = frozenset(
    [
        "script",
        "style",
        "nav",
        "svg",
        "aside",
        "footer",
        "header",
        "head",
        "button",
        "form",
        "noscript",
        "iframe",
        "select",
        "textarea",
        "template",
    ]
)
SKIPPED_NAMES = re.compile(
    r"^(nosearch|fancy_toc|toc|toc-.*|navheader|navfooter|sphinxsidebar|related|headerlink|anchor|sidebar|menu.*|"
    r"searchmenu|indexterm|contents|index|pikchr.*|clearer|buttons|nav-.*|footer|genindex.*|embedded|relatedtopics|"
    r"howtoget|MAC|tooltip|notice|copyright|legalnotice)$"
)
BLOCKS = frozenset(
    [
        "p",
        "div",
        "section",
        "article",
        "main",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "li",
        "ul",
        "ol",
        "dl",
        "dt",
        "dd",
        "table",
        "tr",
        "blockquote",
        "hr",
        "br",
        "pre",
        "figure",
    ]
)
VOID = frozenset(
    ["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr"]
)


class _Text(HTMLParser):
    def __init__(self, main: tuple[str, str, str] | None) -> None:
        super().__init__(convert_charrefs=True)
        self.main = main
        self.inside = main is None
        self.stack: list[tuple[str, bool, bool]] = []  # tag, starts a skipped part, is the main part
        self.skipping = 0
        self.pre = 0
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self.parts.append("\n")
        if tag in VOID:
            return
        values = {name: value or "" for name, value in attrs}
        names = [*values.get("class", "").split(), values.get("id", "")]
        skip = tag in SKIPPED_TAGS or any(SKIPPED_NAMES.match(name) for name in names)
        main = self.main is not None and self.main[0] == tag and values.get(self.main[1], "") == self.main[2]
        self.stack.append((tag, skip, main))
        self.skipping += skip
        self.inside = self.inside or main
        self.pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.parts.append("\n")
        if not any(open_tag == tag for open_tag, _, _ in self.stack):
            return
        while self.stack:
            open_tag, skip, main = self.stack.pop()
            self.skipping -= skip
            self.pre -= open_tag == "pre"
            if main:
                self.inside = False
            if open_tag == tag:
                break

    def handle_data(self, data: str) -> None:
        if self.inside and not self.skipping:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_to_text(html: str, main: tuple[str, str, str] | None = None) -> str:
    """The text of a page. ``main``: (tag, attribute, value) of the element to keep; None keeps the whole page."""
    parser = _Text(main)
    parser.feed(html)
    parser.close()
    return tidy("".join(parser.parts))


def tidy(text: str) -> str:
    """Remove trailing blanks, empty lines and lines of decoration.

    Empty lines are removed because, in a context that begins with two newlines, both tokens are attention sinks: the norm
    of their hidden states is a hundred times that of others, so they would dominate every sum of squares.
    """
    text = text.replace("\u00b6", "").replace("\u00a0", " ").replace("\r", "")
    lines = [line.rstrip() for line in text.split("\n")]
    lines = [line if line.startswith("    ") else re.sub(r" {2,}", " ", line).strip() for line in lines]
    lines = [line for line in lines if not re.fullmatch(r"\W{0,3}|[=~\-*_^#.+ ]+", line) or line == ""]
    return re.sub(r"\n{2,}", "\n", "\n".join(lines)).strip()
