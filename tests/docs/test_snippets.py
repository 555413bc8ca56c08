"""Python and TOML on the pages: compiled, imports resolved, files read by what reads them."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path

import pytest

import evalkit
import rqae
from evalkit.config.sweep_file import read_sweep
from evalkit.llm.accounting.prices import read_prices
from tests.support.documents import PAGES, Page
from tests.support.paths import ROOT

SNIPPETS = [(page, code) for page in PAGES for code in page.blocks("python")]
TABLES = [(page, text) for page in PAGES for text in page.blocks("toml")]


def ids(item: object) -> str:
    return item.name if isinstance(item, Page) else ""


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=ids)
def test_python_snippets_use_names_that_exist(page: Page, code: str) -> None:
    for node in ast.walk(ast.parse(code, page.name)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name), alias.name
                assert node.module not in ("rqae", "evalkit") or alias.name in module.__all__
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
    for name in re.findall(r"evalkit\.(\w+)", code):
        assert name in evalkit.__all__


def test_there_are_snippets_of_both_packages() -> None:
    code = "".join(code for _, code in SNIPPETS)
    assert "import evalkit" in code and "from rqae import" in code and rqae.__all__


@pytest.mark.parametrize(("page", "text"), TABLES, ids=ids)
def test_toml_can_be_read(page: Page, text: str, tmp_path: Path) -> None:
    file = tmp_path / "shown.toml"
    file.write_text(text)
    keys = tomllib.loads(text)
    if "dictionaries" in keys:
        assert len(read_sweep(file).specs()) == len(keys["dictionaries"])
    elif "project" not in keys:
        assert all(price.cost(1e6, 1e6) > 0 for price in read_prices(file).values())


def test_the_price_file_it_shows_can_be_read(tmp_path: Path) -> None:
    shown = next(block for block in Page("docs/clients.md").blocks("toml") if "prompt =" in block)
    (tmp_path / "prices.toml").write_text(shown)
    assert read_prices(tmp_path / "prices.toml")["my-model"].cost(1e6, 1e6) == pytest.approx(0.75)


def test_the_tutorial_is_the_installable_example() -> None:
    page, example = Page("docs/plugins.md"), ROOT / "tests" / "plugin_example"
    assert (example / "evalkit_top_token.py").read_text() in page.blocks("python")
    entry = tomllib.loads((example / "pyproject.toml").read_text())["project"]["entry-points"]
    assert any(tomllib.loads(block).get("project", {}).get("entry-points") == entry for block in page.blocks("toml"))
    assert len((example / "evalkit_top_token.py").read_text().splitlines()) <= 14
