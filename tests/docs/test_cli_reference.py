"""docs/cli.md is what the commands say, however wide the terminal is."""

from __future__ import annotations

import runpy

import pytest

from tests.support.paths import ROOT

SCRIPT = runpy.run_path(str(ROOT / "results" / "recipes" / "cli_reference.py"))


@pytest.mark.parametrize("columns", ["40", "200"])
def test_it_is_current(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == SCRIPT["reference"](), "run `make docs`"


def test_every_option_has_a_help_text() -> None:
    rows = [line for line in SCRIPT["reference"]().splitlines() if line.startswith("| `-")]
    assert len(rows) > 100
    assert not [row for row in rows if not row.split("|")[2].strip()]
