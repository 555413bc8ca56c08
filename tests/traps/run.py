"""``make traps``: puts each mistake seen in the field into a copy of the tree, and checks that a test notices.

``traps.toml`` names the traps: what was seen, the patch that brings it back, and the tests that must fail then (and pass
without it). Prints a line a trap; exit code 1 if one goes unnoticed. Writes only below a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Found = TypeVar("Found")
_AT_A_TIME = 2  # CI has two cores, and every test that a trap names computes on one


def load() -> list[dict[str, Any]]:
    """The traps, in the order of the file."""
    found: list[dict[str, Any]] = tomllib.loads((HERE / "traps.toml").read_text("utf-8"))["trap"]
    return found


def copy_tree(target: Path) -> None:
    """Every file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def patch(tree: Path, name: str, *, reverse: bool = False) -> None:
    """Apply a patch of this folder, or take it out again. Raises CalledProcessError where it does not fit."""
    command = ["git", "apply", *(["--reverse"] if reverse else []), str(HERE / name)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)


def run_tests(tree: Path, tests: list[str]) -> subprocess.CompletedProcess[str]:
    """Pytest in the copy, on the copy's own packages."""
    # bytecode may be kept: a run takes seconds, so a patched file is always newer than its bytecode
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def verdict(tree: Path, trap: dict[str, Any]) -> tuple[bool, str]:
    """Whether a test notices the trap, and what pytest printed."""
    patch(tree, trap["patch"])
    result = run_tests(tree, trap["tests"])
    patch(tree, trap["patch"], reverse=True)
    return result.returncode == 1 and "FAILED " in result.stdout, result.stdout


def check_copy(tree: Path) -> None:
    """Raises AssertionError if the tests would run on other packages than the copy's."""
    where = "import evalkit, pathlib; print(pathlib.Path(evalkit.__file__).parents[1].resolve())"
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    used = subprocess.run(
        [sys.executable, "-c", where], cwd=tree, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(used.stdout.strip()) == tree.resolve(), f"the tests would run on {used.stdout}"


def main() -> int:
    """All traps, or those named on the command line; two at a time, each in a copy of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="traps; default: all")
    names = parser.parse_args().names
    traps = [trap for trap in load() if not names or trap["name"] in names]
    unnoticed = 0
    with tempfile.TemporaryDirectory(prefix="traps-") as folder, ThreadPoolExecutor(_AT_A_TIME) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(_AT_A_TIME):
            tree = Path(folder) / str(number)
            copy_tree(tree)
            check_copy(tree)
            trees.put(tree)

        def in_a_tree(work: Callable[[Path], Found]) -> Found:
            tree = trees.get()
            try:
                return work(tree)
            finally:
                trees.put(tree)

        untouched = pool.submit(
            in_a_tree, lambda tree: run_tests(tree, sorted({t for one in traps for t in one["tests"]}))
        )
        found = pool.map(lambda trap: in_a_tree(lambda tree: verdict(tree, trap)), traps)
        for trap, (noticed, printed) in zip(traps, found, strict=True):
            unnoticed += not noticed
            print(f"{'noticed' if noticed else 'UNNOTICED':9}  {trap['name']}: {trap['seen']}", flush=True)
            if not noticed:
                print(printed[-2000:])
        if untouched.result().returncode:
            print(untouched.result().stdout, "the tests fail without any trap", sep="\n")
            return 1
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
