"""The command line for tests: in this process, or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from evalkit.cli import main
from tests.support.hardware import quick_dtype
from tests.support.paths import ROOT

EVALKIT = [sys.executable, "-m", "evalkit"]
# options of a run over three features of a shipped dictionary
SMALL = ["-d", "bundled:sae/layer_15/width_2k/average_l0_32", "--features", 3, "--examples", 12, "--positives", 6,
         "--negatives", 6, "--context-length", 64, "--max-tokens", 18000, "--controls", "shuffled",
         "--dtype", quick_dtype()]  # fmt: skip


def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``evalkit ARGUMENTS``, called in this process."""
    monkeypatch.setattr(sys, "argv", ["evalkit", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


def run_command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """``evalkit ARGUMENTS`` in a process of its own, in the root of the repository; fails the test if the command fails."""
    done = subprocess.run(
        [*EVALKIT, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done
