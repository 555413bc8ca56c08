"""eai-delphi for the tests: installed without its own pins into a folder that all tests of a session share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from evalkit.delphi.library import without_engine
from tests.support.paths import ROOT

__all__ = ["PACKAGES", "use_library", "without_engine"]

# it, what it needs to be imported, and what that needs; plotly is for its own reader of scores
PACKAGES = (
    *("eai-delphi", "aiofiles", "asyncer", "beartype", "blobfile", "docstring-parser", "faiss-cpu", "lxml", "orjson"),
    *("plotly", "pycryptodomex", "sentence-transformers", "simple-parsing", "sniffio", "tiktoken"),
)


def use_library(factory: pytest.TempPathFactory) -> Path:
    """The folder it is installed in, which is importable from then on."""
    base = factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base  # workers have their folders below one
    folder = shared / "delphi-library"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / ".complete").exists():
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--only-binary=:all:", "-c", str(ROOT / "constraints.txt"), "--target", str(folder)]
            subprocess.run([*command, *PACKAGES], check=True)
            (folder / ".complete").touch()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    without_engine()
    return folder
