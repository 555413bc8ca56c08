"""``--preset`` sets the options that were not given, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command_line import call
from tests.support.run_folders import tiny_options


def test_a_preset_leaves_given_options_alone(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_options(tmp_path, tiny_llama)
    monkeypatch.setenv("EVALKIT_COLLECT_NEGATIVES", "7")  # a variable counts as given
    options = [
        "--model",
        tiny_llama,
        "-d",
        tmp_path / "sae",
        "--corpus",
        tiny["corpus"],
        "--dtype",
        "float32",
        "--force",
    ]
    run = tmp_path / "run"
    code, _, error = call(
        capsys,
        monkeypatch,
        "collect",
        *options,
        "--preset",
        "saebench",
        "--positives",
        5,
        "--features",
        4,
        "--out",
        run,
    )
    assert code == 0, error
    config = json.loads((run / "run.json").read_text())
    config = config.get("config", config)
    assert (config["n_positives"], config["n_negatives"]) == (5, 7)
    assert (config["window_length"], config["explain_by"], config["preset"]) == (21, "mixed", "saebench")
