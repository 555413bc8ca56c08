"""No code of a model folder runs: every loading call says so, and a "y" on standard input changes nothing."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LOADERS = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")
CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig
class C(LlamaConfig):
    model_type = 'mine'
"""
LOAD = {
    "subject": "from evalkit.subject import Subject; Subject.load({folder!r}, sites=('layers.0',), dtype='float32')",
    "whole": "import torch; from evalkit.subject.loading import load_whole; load_whole({folder!r}, dtype=torch.float32)",
    "judge": "from scorers.judges.causal import _load; import torch; _load({folder!r}, torch.float32, None)",
    "embedding": "from scorers.judges.minilm import Embedder; Embedder({folder!r})",
    "dump": "from pathlib import Path; from evalkit.sources.dumps.delphi import _load_tokenizer; "
    "_load_tokenizer({folder!r}, Path('.'))",
}


def test_every_loading_call_says_that_no_code_may_run() -> None:
    calls = 0
    for package in ("evalkit", "scorers", "explainers", "results"):
        for path in (ROOT / package).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(call, ast.Call):
                    continue
                name = ast.unparse(call.func)
                if not any(f"{loader}.from_" in name for loader in LOADERS):
                    continue
                calls += 1
                given = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert given.get("trust_remote_code") == "False", f"{path}:{call.lineno}"
    assert calls >= 8


@pytest.mark.parametrize("kind", LOAD)
def test_a_folder_with_code_of_its_own(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder, marker = tmp_path / "model", tmp_path / "executed"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    own = {
        "AutoConfig": "mine.C", "AutoModel": "mine.M", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": ["mine.T", None],
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": own}))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "tokenizer_class": "T", "auto_map": own}))
    (folder / "mine.py").write_text(CODE.format(marker=str(marker)))
    done = subprocess.run(
        [sys.executable, "-c", LOAD[kind].format(folder=str(folder))],
        cwd=ROOT, input="y\n" * 20, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and not marker.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith(("evalkit.errors.BadFile", "evalkit.errors.MissingFile"))
