"""The first page: short, the picture and the commands at the top, the demo's numbers those of the results folder."""

from __future__ import annotations

import re

from tests.support.documents import Page
from tests.support.paths import ROOT

README = Page("README.md")


def test_it_is_short_and_begins_with_the_picture_and_the_two_commands() -> None:
    lines = README.text.splitlines()
    assert len(lines) <= 130
    first = "\n".join(lines[:20])
    assert "](results/demo/scores.png)" in first
    assert "$ make demo" in first and "$ make test" in first


def test_each_use_is_short() -> None:
    """Each of the three uses is shown in under ten commands or lines of code."""
    for title in ("## 1.", "## 2.", "## 3."):
        section = README.text.split(title)[1].split("\n## ")[0]
        first = re.search(r"```\w+\n(.*?)```", section, flags=re.DOTALL)
        assert first is not None
        code = [line for line in first[1].splitlines() if line.strip() and not line.lstrip().startswith(("#", '"""'))]
        assert len(code) < 10, title
        assert "](docs/" in section, f"{title} links to no guide"


def test_the_demo_table_is_the_one_of_the_results_folder() -> None:
    shown = README.text.split("<!-- demo table: begin -->")[1].split("<!-- demo table: end -->")[0]
    rows = [line for line in shown.splitlines() if line.startswith("| smollm2")]
    full = (ROOT / "results" / "demo" / "table.md").read_text()
    assert len(rows) >= 11
    for row in rows:
        name, mean = row.split("|")[1].strip(), row.split("|")[2].strip().split(" ")[0]
        matching = [line for line in full.splitlines() if line.split("|")[1:2] and line.split("|")[1].strip() == name]
        assert any(f"| {mean} |" in re.sub(r"\s+", " ", line) for line in matching), row
