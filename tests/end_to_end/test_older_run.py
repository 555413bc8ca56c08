"""A run folder written by an earlier version still opens, prints the same table, and resumes."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

OLDER = ROOT / "tests" / "end_to_end" / "data" / "older_run"
# the options that the run was started with
OPTIONS = [
    *("--model", "model", "-d", "sae", "-d", "rqae", "--corpus", "text.jsonl", "--depths", "2,8", "--density", "0.05"),
    *("--features", "3", "--examples", "6", "--positives", "4", "--negatives", "4"),
    *("--dtype", "float32", "--force", "--explainer", "words", "--judge", "lexical"),
]


@pytest.fixture
def older(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLDER, tmp_path / "older"))


def evalkit(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "evalkit", *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def records(folder: Path) -> dict[tuple[object, ...], tuple[object, ...]]:
    """Every row of every table of the records, whole."""
    with sqlite3.connect(folder / "records.sqlite") as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            (table, row): row
            for table in tables
            if table in ("sources", "features", "explanations", "scores", "judgements")
            for row in database.execute(f"SELECT * FROM {table}")
        }


def test_it_prints_the_same_table(older: Path) -> None:
    assert evalkit(older, "table", "run", "--format", "csv") == (older / "detection.csv").read_text("utf-8")


def test_it_resumes_and_repeats_nothing(older: Path) -> None:
    before = records(older / "run")
    collected = {path: path.read_bytes() for path in sorted((older / "run" / "collected").iterdir())}
    evalkit(older, "run", *OPTIONS, "--scorer", "detection", "--scorer", "fuzzing", "--out", "run")
    assert evalkit(older, "table", "run", "--format", "csv") == (older / "both.csv").read_text("utf-8")
    after = records(older / "run")
    assert before.items() <= after.items(), "records that were there have changed"
    assert len(after) > len(before)
    assert collected == {path: path.read_bytes() for path in collected}
