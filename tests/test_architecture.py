"""The import rule, the public names, and that the light core stays light."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

import evalkit
from tests.support.paths import ROOT

OURS = ("evalkit", "explainers", "scorers", "rqae")

# Who may import whom, bottom to top: a folder (or, at the top of a package, a module) imports only what stands on lines
# above its own. A new folder or a new module at the top of a package needs a line here; there is no other way in.
LAYERS = """
    rqae.errors rqae.progress
    rqae.config
    rqae.encoding rqae.checkpoint
    rqae.model
    rqae.literal rqae.training
    rqae.features
    rqae.feature_sets
    rqae.splits rqae.vmf
    rqae.searching
    rqae

    evalkit.installation
    evalkit.errors evalkit.thoughts
    evalkit.records
    evalkit.seeds evalkit.markup evalkit.protocols
    evalkit.abilities
    evalkit.registry
    evalkit.util
    evalkit.config evalkit.stats
    evalkit.subject
    evalkit.corpus
    evalkit.sources.sae evalkit.sources.rqae
    evalkit.sources.formats
    evalkit.sources.dumps
    evalkit.sources
    evalkit.fit
    evalkit.store
    evalkit.collect
    evalkit.llm.requests
    evalkit.llm.accounting
    evalkit.llm.clients.server
    evalkit.llm.clients
    evalkit.llm.clients.batch evalkit.llm.clients.sender
    evalkit.llm
    evalkit.evaluate
    evalkit.pipeline
    evalkit.report
    evalkit.report.plots
    evalkit.inspection.parts
    evalkit.inspection.rqae
    evalkit.inspection.sae
    evalkit.inspection
    evalkit.training
    evalkit.delphi
    evalkit.doctor

    explainers
    scorers.picking
    scorers.judges.llm
    scorers.judges
    scorers

    evalkit.api
    evalkit
    evalkit.cli
    evalkit.__main__
"""
LEVEL = {room: level for level, line in enumerate(LAYERS.splitlines()) for room in line.split()}

# Plug-ins import the contracts and nothing else, so that a package of somebody else's can do what a built-in does.
CONTRACTS = {
    "evalkit.abilities",
    "evalkit.records",
    "evalkit.errors",
    "evalkit.protocols",
    "evalkit.markup",
    "evalkit.seeds",
    "evalkit.thoughts",
}
RULES = {"explainers": {*CONTRACTS, "explainers"}, "scorers": {*CONTRACTS, "scorers"}, "rqae": {"rqae"}}
# What an export holds is known in one place, which loads no torch.
MORE = {
    "explainers/neuronpedia.py": {"evalkit.sources.dumps.neuronpedia_explanations"},
    "explainers/delphi.py": {"evalkit.sources.dumps.delphi_layout"},
}

MODULES_IN_A_FOLDER = 12
LINES_IN_A_FILE = 350
MEDIAN_LINES = 140


def modules() -> dict[str, Path]:
    """Every module of ours by dotted name; a package by its ``__init__``."""
    found = {}
    for package in OURS:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The line of ``LAYERS`` that a module falls under: itself at the top of a package that lists it, else its folder."""
    folder = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    return module if module in LEVEL else folder


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            # `import evalkit` alone reads the version and where the package is, which is no arrow to its API
            found |= {alias.name for alias in node.names if alias.name != "evalkit"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {full if (full := f"{module}.{alias.name}") in MODULES else module for alias in node.names}
    return {name for name in found if name in MODULES}


def files(where: str) -> list[Path]:
    return sorted((ROOT / where).rglob("*.py"))


def test_every_module_has_a_layer() -> None:
    """At the top of a package each module is named, so none slips back into the flat folder."""
    flat = [m for m in MODULES if room(m) in ("evalkit", "rqae") and m not in LEVEL]
    assert not flat, f"{flat}: put it into the folder of its stage, or give it a line in LAYERS"
    missing = sorted({room(module) for module in MODULES} - set(LEVEL))
    assert not missing, f"{missing}: a new folder needs a line in LAYERS"
    gone = sorted(set(LEVEL) - {room(module) for module in MODULES})
    assert not gone, f"{gone}: in LAYERS, but no such folder or module"


def test_no_import_runs_up() -> None:
    """An import between two folders goes down, so there is no circle either."""
    wrong = [
        f"{module} imports {imported}: {room(imported)} does not stand below {room(module)}"
        for module, path in MODULES.items()
        for imported in imports(path)
        if room(imported) != room(module) and LEVEL[room(imported)] >= LEVEL[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("where", RULES)
def test_plug_ins_import_only_contracts(where: str) -> None:
    for file in files(where):
        allowed = RULES[where] | MORE.get(str(file.relative_to(ROOT)), set())
        for name in imports(file):
            assert any(name == module or name.startswith(f"{module}.") for module in allowed), f"{file} imports {name}"


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


def test_parts_are_found_through_the_registry() -> None:
    for module, path in MODULES.items():
        if module.split(".")[0] == "evalkit":
            assert not any(name.split(".")[0] in ("explainers", "scorers") for name in imports(path)), module
    for name in ("pipeline", "collect", "evaluate"):
        assert not any("llm.clients" in reached for file in files(f"evalkit/{name}") for reached in imports(file)), name


def test_public_names_are_exact_and_importable() -> None:
    assert evalkit.__all__ == sorted(evalkit.__all__)
    for name in evalkit.__all__:
        assert getattr(evalkit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        _ = evalkit.scores


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_and_help_are_lazy() -> None:
    heavy = "torch", "numpy", "pandas", "transformers", "scipy", "matplotlib", "pyarrow", "pydantic"
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


def test_folders_and_files_stay_readable() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    too_long = {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > LINES_IN_A_FILE}
    assert not too_long
    assert median(lines.values()) < MEDIAN_LINES
    in_folder = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    assert not {str(folder.relative_to(ROOT)): n for folder, n in in_folder.items() if n > MODULES_IN_A_FOLDER}


def test_no_test_imports_another_test_module() -> None:
    """What tests share is in tests/support, so that each can move and run alone."""
    for file in files("tests"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").rpartition(".")[2].startswith("test_"), f"{file}: {node.module}"
