"""The light core, installed alone: tables and plots of an existing run, and what it says of everything else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.run_folders import write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with ``pip install .`` and nothing else."""
    folder = tmp_path_factory.mktemp("core") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # what an older build left there would get into the wheel
    subprocess.run([*pip, ROOT], check=True, cwd=folder)
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    return folder / "bin"


def call(core: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [core / "evalkit", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_tables_and_plots_need_no_torch(core: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    absent = subprocess.run([core / "python", "-c", "import torch"], capture_output=True, check=False)
    assert absent.returncode == 1
    for format in ("markdown", "csv", "json", "latex"):
        printed = call(core, "table", tmp_path / "run", "--format", format, cwd=tmp_path)
        assert printed.returncode == 0 and "depth-64" in printed.stdout, printed.stderr
    parquet = call(core, "table", tmp_path / "run", "--format", "parquet", "--out", "table.parquet", cwd=tmp_path)
    assert parquet.returncode == 0 and (tmp_path / "table.parquet").stat().st_size > 1000
    drawn = call(core, "plot", tmp_path / "run", cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert all(Path(line).stat().st_size > 10_000 for line in drawn.stdout.split())


@pytest.mark.parametrize(
    "command",
    [
        ["run", "--model", "m", "-d", "bundled:rqae-256", "--out", "out"],
        ["models", "pull", "smollm2-135m"],
        ["train", "sae", "--model", "m", "--site", "layers.1", "--corpus", "c", "--held-out", "h", "--out", "o"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_what_is_missing_names_its_install_command(core: Path, command: list[str], tmp_path: Path) -> None:
    done = call(core, "-q", *command, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "fix: pip install 'evalkit[model]'" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
