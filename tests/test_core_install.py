"""The distributions, and the light core installed from them alone: plug-ins, tables and plots, which extra is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.run_folders import write_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is built from it, of the files that git tracks or would track."""
    folder = tmp_path_factory.mktemp("distributions")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "tree" / name)
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "tree"], check=True)
    return folder / "dist"


@pytest.fixture(scope="module")
def core(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment with the wheel, its dependencies and the example plug-in, and nothing else."""
    folder = tmp_path_factory.mktemp("core")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = [folder / "venv" / "bin" / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    (wheel,) = distributions.glob("evalkit_autointerp-*.whl")
    plugin = shutil.copytree(ROOT / "tests" / "plugin_example", folder / "plugin")  # a build writes beside the sources
    subprocess.run([*pip, wheel, plugin], check=True, cwd=folder)  # the plug-in requires evalkit-autointerp by name
    return folder / "venv" / "bin"


def call(core: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [core / "evalkit", *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_both_distributions_hold_the_bundled_data(distributions: Path) -> None:
    (sdist,), (wheel,) = distributions.glob("*.tar.gz"), distributions.glob("*.whl")
    assert sdist.name.startswith("evalkit_autointerp-") and wheel.name.startswith("evalkit_autointerp-")
    with tarfile.open(sdist) as packed:
        in_sdist = {name.partition("/")[2] for name in packed.getnames()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    needed = {
        name
        for name in filter(None, tracked.split("\0"))
        if name.startswith(("evalkit/", "explainers/", "scorers/", "rqae/")) and (ROOT / name).is_file()
    }
    assert len(needed) > 200
    assert needed <= in_wheel and needed <= in_sdist
    assert not [name for name in in_wheel if name.startswith(("tests/", "results/"))]


def test_an_installed_plugin_is_listed(core: Path, tmp_path: Path) -> None:
    listed = call(core, "plugins", "--json", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    rows = {row["name"]: row for row in json.loads(listed.stdout) if row["kind"] == "explainers"}
    assert (rows["top-token"]["origin"], rows["top-token"]["error"]) == ("evalkit-top-token", None)
    assert rows["words"]["origin"] == "built in"


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
    (fix,) = re.findall(r"fix: pip install '(.+\.whl)\[model\]'", done.stderr)  # from where this evalkit came
    assert Path(fix).is_file()
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
