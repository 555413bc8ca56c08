"""The example plug-in, really installed: found, listed with its origin, and run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

CODE = """
import asyncio, json
from evalkit import Example, ExplainExamples, load_explainer
from evalkit.registry import list_plugins

plugin = next(plugin for plugin in list_plugins() if plugin.name == "top-token")
window = Example(0, 0, (" the", " whale"), (0.1, 4.0), decile=9)
examples = ExplainExamples("source", "7", 0.0, 4.0, (window,))
explanation = asyncio.run(load_explainer("top-token").explain("7", examples, None))
print(json.dumps([plugin.kind, plugin.origin, plugin.error, explanation.text]))
"""


def test_the_example_stays_small_and_imports_evalkit_alone() -> None:
    lines = (ROOT / "tests/plugin_example/evalkit_top_token.py").read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 10
    assert [line for line in lines if "import" in line] == ["from evalkit import Explanation"]


@pytest.mark.slow
def test_installed_it_is_found_and_runs(tmp_path: Path) -> None:
    # the build writes beside the sources, so it gets a copy
    package = shutil.copytree(ROOT / "tests/plugin_example", tmp_path / "package")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(tmp_path / "site"), str(package)], check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert json.loads(done.stdout) == ["explainers", "evalkit-top-token", None, "the token 'whale'"]
