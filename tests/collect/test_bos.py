"""What a dictionary declares of BOS, from its file to the contexts that it is read on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evalkit.collect.stage import collect_stage
from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig, RunMismatch
from evalkit.store.run_store import RunStore
from evalkit.util.progress import SILENT
from tests.support.run_folders import WORDS

WIDTH, BOS = 32, 0


def write_dictionary(folder: Path, **declared: Any) -> str:
    """A SAELens dictionary of the tiny GPT-2, whose tokenizer adds no BOS by itself."""
    folder.mkdir()
    encoder = torch.randn(WIDTH, 48, generator=torch.Generator().manual_seed(0))
    tensors = {"W_enc": encoder, "W_dec": encoder.T.contiguous(), "b_enc": torch.zeros(48), "b_dec": torch.zeros(WIDTH)}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "architecture": "standard",
        "d_in": WIDTH,
        "d_sae": 48,
        "activation_fn": "relu",
        "model_name": "tiny-gpt2",
    }
    config |= {"hook_name": "blocks.1.hook_mlp_out", "apply_b_dec_to_input": False, **declared}
    (folder / "cfg.json").write_text(json.dumps(config))
    return str(folder)


def first_tokens(tmp_path: Path, model: Path, dictionaries: list[str], **options: Any) -> set[int]:
    text = tmp_path / "text.jsonl"
    draw = np.random.default_rng(0)
    text.write_text("\n".join(json.dumps({"text": " ".join(draw.choice(WORDS, 160))}) for _ in range(40)))
    wanted = {"n_features": 2, "n_explain": 6, "n_positives": 4, "n_negatives": 4, "controls": (), "dtype": "float32"}
    wanted |= {"corpus": str(text), "context_length": 64, "window_length": 16, "force": True}
    config = RunConfig.create(model=str(model), dictionaries=tuple(dictionaries), **wanted, **options)
    with RunStore.create(tmp_path / "run", config.identity()) as store:
        collect_stage(config, store, SILENT)
    return {int(token) for token in np.load(tmp_path / "run" / "corpus" / "tokens.npy")[:, 0]}


@pytest.mark.parametrize(
    ("declared", "options", "begins"),
    [
        ({"prepend_bos": True}, {}, True),
        ({"metadata": {"prepend_bos": True}}, {}, True),
        ({"prepend_bos": False}, {}, False),
        ({"prepend_bos": None}, {}, False),
        ({}, {}, False),
        ({}, {"prepend_bos": True}, True),
        ({"prepend_bos": True}, {"prepend_bos": False}, False),
    ],
)
def test_contexts_begin_as_declared(
    tmp_path: Path, tiny_gpt2: Path, declared: dict[str, Any], options: dict[str, Any], begins: bool
) -> None:
    found = first_tokens(tmp_path, tiny_gpt2, [write_dictionary(tmp_path / "sae", **declared)], **options)
    assert found == {BOS} if begins else BOS not in found


def test_dictionaries_that_disagree_stop_before_the_model_is_read(tmp_path: Path) -> None:
    both = [write_dictionary(tmp_path / name, prepend_bos=name == "with") for name in ("with", "without")]
    with pytest.raises(BadConfig, match="prepend_bos: expected dictionaries that all declare the same"):
        first_tokens(tmp_path, tmp_path / "no-model", both)


def test_it_is_part_of_the_identity_of_a_run(tmp_path: Path, tiny_gpt2: Path) -> None:
    dictionary = write_dictionary(tmp_path / "sae", prepend_bos=True)
    first_tokens(tmp_path, tiny_gpt2, [dictionary])
    with pytest.raises(RunMismatch, match="a run with prepend_bos = False"):
        first_tokens(tmp_path, tiny_gpt2, [dictionary], prepend_bos=False)
