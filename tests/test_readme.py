"""The README is tested: its cheap commands run, its dear ones exist, its code is the code that is shipped."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import evalkit
import rqae
from evalkit.cli import app
from evalkit.llm.accounting.prices import read_prices
from tests.support.paths import ROOT
from tests.support.run_folders import write_run

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    """Every command after a ``$`` prompt, ``a && b`` as two."""
    lines = [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [part for part in parts if part]


CHEAP = {"table", "plot", "plugins"}


def test_there_are_commands_of_every_kind() -> None:
    programs = {command[0] for command in commands()}
    assert {"make", "evalkit", "pip", "git"} <= programs
    assert {command[1] for command in commands() if command[0] == "evalkit"} >= {"run", "table", "plot", "models"}


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "evalkit"], ids=" ".join)
def test_evalkit_commands(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "mine")
    arguments = command[1:] if command[1] in CHEAP else [*command[1:], "--help"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    if command[1] not in CHEAP:  # --help stops before options are checked, so look each of them up
        for option in (part for part in command if part.startswith("--")):
            assert option in result.output
    if "--out" in command and command[1] in CHEAP:
        assert (tmp_path / command[command.index("--out") + 1]).exists()


@pytest.mark.parametrize(
    "target", sorted({c[1] for c in commands() if c[0] == "make"} | set(re.findall(r"`make (\w+)`", README)))
)
def test_make_targets_exist(target: str) -> None:
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_extras_and_files_that_it_names_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for group in re.findall(r"'\.\[([\w,]+)\]'", README):
        assert set(group.split(",")) <= set(extras)
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_the_tutorial_is_the_installable_example() -> None:
    example = ROOT / "tests" / "plugin_example"
    assert (example / "evalkit_top_token.py").read_text() in blocks("python")
    entry = tomllib.loads((example / "pyproject.toml").read_text())["project"]["entry-points"]
    assert any(tomllib.loads(block).get("project", {}).get("entry-points") == entry for block in blocks("toml"))
    assert len((example / "evalkit_top_token.py").read_text().splitlines()) <= 14


def test_the_price_file_it_shows_can_be_read(tmp_path: Path) -> None:
    shown = next(block for block in blocks("toml") if "prompt =" in block)
    (tmp_path / "prices.toml").write_text(shown)
    assert read_prices(tmp_path / "prices.toml")["my-model"].cost(1e6, 1e6) == pytest.approx(0.75)


def test_python_snippets_use_names_that_exist() -> None:
    for block in blocks("python"):
        compile(block, "README.md", "exec")
        for name in re.findall(r"evalkit\.(\w+)", block):
            assert name in evalkit.__all__
        for names in re.findall(r"from rqae import (.*)", block):
            assert set(names.split(", ")) <= set(rqae.__all__)


def test_each_use_is_short() -> None:
    """Each of the three uses is shown in under ten commands or lines of code."""
    for title in ("## 1.", "## 2.", "## 3."):
        section = README.split(title)[1].split("\n## ")[0]
        first = re.search(r"```\w+\n(.*?)```", section, flags=re.DOTALL)
        assert first is not None
        code = [line for line in first[1].splitlines() if line.strip() and not line.lstrip().startswith(("#", '"""'))]
        assert len(code) < 10, title


def test_the_demo_table_is_the_one_of_the_results_folder() -> None:
    shown = README.split("<!-- demo table: begin -->")[1].split("<!-- demo table: end -->")[0]
    rows = [line for line in shown.splitlines() if line.startswith("| smollm2")]
    full = (ROOT / "results" / "demo" / "table.md").read_text()
    assert len(rows) >= 11
    for row in rows:
        name, mean = row.split("|")[1].strip(), row.split("|")[2].strip().split(" ")[0]
        matching = [line for line in full.splitlines() if line.split("|")[1:2] and line.split("|")[1].strip() == name]
        assert any(f"| {mean} |" in re.sub(r"\s+", " ", line) for line in matching), row
