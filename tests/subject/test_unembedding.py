"""Finding the unembedding in checkpoints of every layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from evalkit.errors import MissingFile
from evalkit.records import SubjectInfo
from evalkit.subject.model import Subject
from evalkit.subject.unembedding import OutputHead, read_output_head

VOCAB, D_MODEL = 300, 32
INFO = SubjectInfo("m", D_MODEL, 12, np.ones(D_MODEL, dtype=np.float32), 1e-6)


def read(folder: Path, info: SubjectInfo = INFO) -> OutputHead | None:
    return read_output_head(str(folder), info, vocab_size=VOCAB)


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


@pytest.mark.parametrize("model", ["tiny_llama", "tied_llama", "tiny_gemma", "tiny_gpt2"])
def test_the_head_is_the_one_transformers_uses(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    subject = Subject.load(folder, sites=["layers.1"], dtype="float32")
    head = read_output_head(str(folder), subject.info, vocab_size=subject.vocab_size)
    assert head is not None
    whole = load(folder)
    assert torch.equal(head.unembedding.read(), whole.get_output_embeddings().weight)
    assert head.centred == (model == "tiny_gpt2")
    directions = torch.randn(5, D_MODEL)
    norm = whole.get_decoder().ln_f if model == "tiny_gpt2" else whole.get_decoder().norm
    with torch.no_grad():
        expected = norm(directions) - norm(torch.zeros(1, D_MODEL))
    found = head.before_unembedding(directions)
    scale = expected.norm(dim=1, keepdim=True) / found.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found * scale, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["tiny_llama", "tied_llama"])
def test_several_files_and_torch_files(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(model)
    expected = load(folder).get_output_embeddings().weight
    sharded, pickled = tmp_path / "sharded", copied(folder, tmp_path / "pickled")
    load(folder).save_pretrained(sharded, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    torch.save(load(folder).state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    for one in (sharded, pickled):
        head = read(one)
        assert head is not None and torch.equal(head.unembedding.read(), expected)


def test_only_the_shard_with_the_head_is_opened(tiny_llama: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    load(tiny_llama).save_pretrained(sharded, max_shard_size="40KB")
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    for name in {*index.values()} - {index["lm_head.weight"]}:
        (sharded / name).write_bytes(b"torn")
    assert read(sharded) is not None
    (sharded / index["lm_head.weight"]).unlink()
    with pytest.raises(MissingFile, match="expected a file of weights"):
        read(sharded)


def test_a_model_of_the_hub_is_found_in_the_local_cache(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def cached(repository: str, name: str, revision: str | None = None) -> str | None:
        asked.append((repository, name, revision))
        return str(tiny_llama / name) if (tiny_llama / name).exists() else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    head = read_output_head("someone/tiny", INFO, vocab_size=VOCAB, revision="abc")
    assert head is not None and torch.equal(head.unembedding.read(), load(tiny_llama).lm_head.weight)
    assert {(repository, revision) for repository, _, revision in asked} == {("someone/tiny", "abc")}


def test_no_head_that_can_be_told_is_none_and_never_another_matrix(tiny_llama: Path, tmp_path: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    whole = tmp_path / "whole"
    whole.mkdir()
    cases: dict[str, dict[str, torch.Tensor]] = {
        "a quantised head": {**tensors, "lm_head.weight": torch.ones(VOCAB, D_MODEL, dtype=torch.int8)},
        "a head of another width": {**tensors, "lm_head.weight": torch.ones(VOCAB, 48)},
        "an embedding of another model": {"vision.embed_tokens.weight": torch.ones(7, D_MODEL)},
        "nothing": {},
    }
    for tensors in cases.values():
        save_file(tensors, whole / "model.safetensors")
        assert read(whole) is None
    (whole / "model.safetensors").unlink()
    assert read(whole) is None
    assert read(tiny_llama / "model.safetensors") is None  # a file is no model folder
    unknown_norm = SubjectInfo("m", D_MODEL, 12, np.zeros(0, dtype=np.float32), 0.0)
    assert read(tiny_llama, unknown_norm) is None
