"""The import rule, the public names, and that the light core stays light."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import evalkit
from tests.support.paths import ROOT

OURS = ("evalkit", "explainers", "scorers", "rqae")
CONTRACTS = {"evalkit.records", "evalkit.errors", "evalkit.protocols"}

# folder or file → what of ours it may import
RULES = {
    "evalkit/records.py": set(),
    "evalkit/errors.py": set(),
    "evalkit/protocols.py": {"evalkit.records"},
    "explainers": {*CONTRACTS, "evalkit.markup", "explainers"},
    "scorers": {*CONTRACTS, "evalkit.markup", "scorers"},
    "rqae": {"rqae"},
}
# a file that may import more than its folder: what an export holds is known in one place, which loads no torch
MORE = {"explainers/neuronpedia.py": {"evalkit.sources.dumps.neuronpedia_explanations"}}


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if (ROOT / _as_path(node, alias)).exists()}
    return {name for name in found if name.split(".")[0] in OURS}


def _as_path(node: ast.ImportFrom, alias: ast.alias) -> str:
    return f"{node.module}.{alias.name}".replace(".", "/") + ".py"


def files(where: str) -> list[Path]:
    path = ROOT / where
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("where", RULES)
def test_import_rule(where: str) -> None:
    for file in files(where):
        allowed = RULES[where] | MORE.get(str(file.relative_to(ROOT)), set())
        for name in imports(file):
            inside = any(name == module or name.startswith(f"{module}.") for module in allowed)
            assert inside or (name == "evalkit" and "evalkit.records" in allowed), f"{file} imports {name}"


def test_explainers_and_scorers_load_no_torch() -> None:
    """All built-in ones: what is heavy is loaded when it is used."""
    code = """
import sys
from evalkit.registry import BUILT_INS, load_class
for kind in ("explainers", "scorers"):
    for name in BUILT_INS[kind]:
        load_class(kind, name)
print("torch" in sys.modules)
"""
    assert run_python(code).stdout.strip() == "False"


def test_report_imports_neither_torch_nor_clients() -> None:
    for file in files("evalkit/report"):
        text = file.read_text(encoding="utf-8")
        assert "import torch" not in text and "transformers" not in text, file
        assert not any("clients" in name or "subject" in name for name in imports(file)), file


def test_the_pipeline_finds_parts_through_the_registry() -> None:
    for name in ("pipeline", "collecting", "judging", "api"):
        reached = imports(ROOT / f"evalkit/{name}.py")
        assert not any(part.split(".")[0] in ("explainers", "scorers") or ".clients" in part for part in reached), name


def test_public_names_are_exact_and_importable() -> None:
    assert evalkit.__all__ == sorted(evalkit.__all__)
    for name in evalkit.__all__:
        assert getattr(evalkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        _ = evalkit.scores


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_and_help_are_lazy() -> None:
    heavy = "torch", "pandas", "transformers", "scipy", "matplotlib", "pyarrow", "pydantic"
    code = f"import evalkit, evalkit.cli, sys; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.parametrize("command", [(), ("inspect",)])
def test_help_takes_less_than_a_second(command: tuple[str, ...]) -> None:
    """Of processor time, so that it does not matter what else the machine does."""
    durations = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "evalkit", *command, "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        durations.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(durations) < 1.0, durations


def test_reading_results_needs_no_torch() -> None:
    code = """
import sys
import evalkit.report.tables, evalkit.report.plots.files, evalkit.store.run_store
print("torch" in sys.modules)
"""
    assert run_python(code).stdout.strip() == "False"


def test_files_stay_readable() -> None:
    for package in OURS:
        for file in files(package):
            assert len(file.read_text(encoding="utf-8").splitlines()) <= 400, file
