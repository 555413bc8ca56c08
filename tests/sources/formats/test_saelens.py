"""sae-lens's folders: parity with the library's own output for every architecture, old configs, centring, broken files.

The dictionaries in ``data/saelens`` were saved by sae-lens, and ``expected.npz`` holds what it computes with them
(``data/make_saelens.py``, versions in ``made_by.json``).
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evalkit.errors import BadConfig, BadFile, BadShape, EvalkitError, MissingExtra, MissingFile
from evalkit.installation import install_command
from evalkit.records import Site
from evalkit.registry import create
from evalkit.sources import open_dictionary
from evalkit.sources.formats.saelens import CONFIG, WEIGHTS, SaeLensReader
from evalkit.sources.formats.saelens_registry import open_registered, split_registered
from evalkit.sources.sae.transforms import Centre, RmsNorm, Scale
from evalkit.subject.sites import site_of_hook
from evalkit.util.tensor_files import Stored
from tests.support.hostile import Bomb
from tests.support.paths import SOURCES_DATA

DATA = SOURCES_DATA / "saelens"
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
EXPECTED = dict(np.load(DATA / "expected.npz"))
X = EXPECTED["x"]
D, N = 12, 32


def opened(folder: Path, **options: Any) -> Any:
    (source,) = SaeLensReader().read(folder, **options)
    return source


def copied(tmp_path: Path, name: str, **config: Any) -> Path:
    """A fixture of one's own; ``config`` replaces keys, None removes them, and a ``metadata`` adds to that of the file."""
    folder = tmp_path / name
    shutil.copytree(DATA / name, folder, dirs_exist_ok=True)
    held = json.loads((folder / CONFIG).read_text())
    if "metadata" in config:
        held["metadata"] = {**held.get("metadata", {}), **config.pop("metadata")}
    held |= config
    for part in (held, held.get("metadata", {})):
        for key in [key for key, value in part.items() if value is None]:
            del part[key]
    (folder / CONFIG).write_text(json.dumps(held))
    return folder


def with_tensors(folder: Path, **tensors: torch.Tensor | None) -> Path:
    held = {**load_file(folder / WEIGHTS), **tensors}
    save_file({name: value.contiguous() for name, value in held.items() if value is not None}, folder / WEIGHTS)
    return folder


def literal(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Activations and reconstruction of a fixture in float64, one token at a time, from the papers' formulas."""
    config = json.loads((DATA / name / CONFIG).read_text())
    w = {key: value.double().numpy() for key, value in load_file(DATA / name / WEIGHTS).items()}
    kind = "topk" if "topk" in str(config.get("activation_fn_str")) else config.get("architecture", "standard")
    k = config.get("k") or config.get("activation_fn_kwargs", {}).get("k")
    active, rebuilt = [], []
    lengths = np.sqrt((w["W_dec"] ** 2).sum(1)) if config.get("rescale_acts_by_decoder_norm") else np.ones(N)
    for token in X.astype(np.float64):
        mean, spread, scale = 0.0, 1.0, 1.0
        if name == "old_gpt2":
            mean = token.mean()
        if config.get("normalize_activations") == "layer_norm":
            mean, spread = token.mean(), np.sqrt(((token - token.mean()) ** 2).sum() / (D - 1)) + 1e-5
        elif config.get("normalize_activations") == "constant_norm_rescale":
            scale = np.sqrt(D) / np.sqrt((token**2).sum())
        elif config.get("normalize_activations") == "expected_average_only_in":
            scale = 0.37
        z = (token - mean) / spread * scale
        if "transcoder" not in kind and config.get("apply_b_dec_to_input", True):
            z = z - w["b_dec"]
        pre = z @ w["W_enc"]
        if kind == "gated":
            a = np.where(pre + w["b_gate"] > 0, np.maximum(pre * np.exp(w["r_mag"]) + w["b_mag"], 0), 0)
        else:
            pre = (pre + w["b_enc"]) * lengths
            floor = w["topk_threshold"] if "topk_threshold" in w else w.get("threshold", 0.0)
            if kind == "topk":
                floor = np.sort(pre)[-k - 1]
            a = np.where((pre > floor) & (pre > 0), pre, 0)
        back = (a / lengths) @ w["W_dec"] + w["b_dec"]
        if "W_skip" in w:
            back = back + w["W_skip"] @ token
        elif "transcoder" not in kind:
            back = back / scale * (spread - 1e-5 if spread != 1.0 else 1.0) + mean
        active.append(a)
        rebuilt.append(back)
    return np.array(active), np.array(rebuilt)


def test_every_architecture_is_among_the_fixtures() -> None:
    seen = {json.loads((DATA / name / CONFIG).read_text()).get("architecture", "standard") for name in NAMES}
    assert seen == {
        *("standard", "gated", "topk", "jumprelu", "batchtopk"),
        *("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"),
    }
    assert len(NAMES) == 20
    assert json.loads((DATA / "made_by.json").read_text())["sae_lens"] == "6.54.0"


@pytest.mark.parametrize("name", NAMES)
def test_parity_with_the_library(name: str) -> None:
    source = opened(DATA / name)
    activations, rebuilt = EXPECTED[f"{name}.activations"], EXPECTED[f"{name}.reconstruction"]
    if name == "old_gpt2":  # the library was given centred states; ours adds the mean again
        rebuilt = rebuilt + X.mean(axis=1, keepdims=True)
    x = torch.from_numpy(X)[None]
    assert 0.02 < (activations > 0).mean() < 0.9
    np.testing.assert_allclose(source.activations(x, source.features())[0].numpy(), activations, atol=1e-5)
    np.testing.assert_allclose(
        source.activations(x, ["31", "4", "4"])[0].numpy(), activations[:, [31, 4, 4]], atol=1e-5
    )
    np.testing.assert_allclose(source.reconstruct(x)[0].numpy(), rebuilt, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_parity_with_the_formulas(name: str) -> None:
    source = opened(DATA / name)
    x = torch.from_numpy(X)[None]
    activations, rebuilt = literal(name)
    np.testing.assert_allclose(source.activations(x, source.features())[0].numpy(), activations, atol=1e-4)
    np.testing.assert_allclose(source.reconstruct(x)[0].numpy(), rebuilt, atol=1e-4)


def test_matrices_stay_on_disk() -> None:
    for name in NAMES:
        weights = opened(DATA / name).weights
        assert isinstance(weights.w_enc, Stored) and isinstance(weights.w_dec, Stored), name
        assert (weights.d_model, weights.width) == (D, N)


def test_the_registry_knows_it_and_it_recognises_its_layout(tmp_path: Path) -> None:
    reader = create("sources", "saelens")
    folder = DATA / "standard"
    assert all(reader.matches(path) for path in (DATA, folder, folder / CONFIG, folder / WEIGHTS))
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / "sae.safetensors").write_bytes(b"")
    assert not any(
        reader.matches(path) for path in (tmp_path, tmp_path / "none", Path(__file__), DATA / "made_by.json")
    )
    assert opened(folder / CONFIG).name == opened(folder / WEIGHTS).name == opened(folder).name


def test_names_sites_and_what_is_declared(tmp_path: Path) -> None:
    sources = {name: opened(DATA / name) for name in NAMES}
    assert sources["topk"].name == "gemma-2-2b/layers.12/sae/width-32/l0-5"
    assert sources["batchtopk"].l0 == sources["batchtopk_checkpoint"].l0 == sources["old_topk"].l0 == 5.0
    assert sources["standard"].name == "gemma-2-2b/layers.12/sae/width-32/standard"
    assert sources["standard"].l0 is None
    assert sources["hook_z"].site == Site("gemma-2-2b", "layers.3.self_attn.o_proj:in")
    assert sources["transcoder"].site == Site("gemma-2-2b", "layers.12.mlp:in", MLP_OUT)
    assert sources["transcoder"].name == "gemma-2-2b/layers.12.mlp:in/transcoder/width-32/transcoder"
    assert sources["old_gpt2"].site == Site("gpt2-small", "layers.7")
    rates = 10 ** load_file(DATA / "old_gpt2" / "sparsity.safetensors")["sparsity"].double().numpy()
    declared = sources["old_gpt2"].info.declared
    assert declared == {"alive_share": 29 / 32, "mean_density": pytest.approx(rates.mean())}
    folder = copied(tmp_path, "standard")
    (folder / "card.json").write_text(json.dumps({"site": "layers.4", "fvu": 0.2, "l0": 31.7, "model": "toy"}))
    assert opened(folder).name == "toy/layers.4/sae/width-32/l0-32"
    assert opened(folder).info.declared == {"fvu": 0.2, "l0": 31.7}
    given = opened(folder, site="layers.9", model="mine", l0=20)
    assert (given.name, given.l0) == ("mine/layers.9/sae/width-32/l0-20", 20.0)
    assert opened(folder, name="short").name == "short"
    (folder / "card.json").write_text(f'{{"l0": 1{"0" * 400}, "fvu": NaN, "alive_share": "all"}}')
    assert opened(folder).info.declared == {}


def test_several_in_one_folder(tmp_path: Path) -> None:
    for place in ("run_a/final", "run_b/final"):
        shutil.copytree(DATA / "topk", tmp_path / place)
        shutil.copytree(DATA / "standard", tmp_path / place / "inner")
    assert [source.name for source in SaeLensReader().read(tmp_path)] == [
        "gemma-2-2b/layers.12/sae/width-32/l0-5",
        "gemma-2-2b/layers.12/sae/width-32/inner",
    ] * 2
    assert len({source.name for source in open_dictionary(tmp_path)}) == 4
    with pytest.raises(BadConfig, match=r"one dictionary, because the option name= is given; seen 4 dictionaries"):
        SaeLensReader().read(tmp_path, name="x")
    assert len({source.name for source in open_dictionary(DATA)}) == len(NAMES)


MLP_OUT = "layers.12.mlp_out"


@pytest.mark.parametrize("model", ["google/gemma-2-2b", "allenai/OLMo-2-1124-7B", "gpt2-small", "somebody/new-model"])
@pytest.mark.parametrize(
    "hook",
    ["blocks.12.hook_mlp_out", "blocks.3.hook_attn_out", "blocks.3.hook_resid_mid", "blocks.0.hook_resid_pre"],
)
def test_a_hook_means_what_the_option_site_means_whatever_the_model(tmp_path: Path, model: str, hook: str) -> None:
    """Where it is depends on the model, and is found when that is loaded."""
    own = opened(copied(tmp_path, "standard", metadata={"model_name": model, "hook_name": hook}))
    other = {"model_name": model, "hook_name": "blocks.5.hook_resid_post"}
    given = opened(copied(tmp_path / "given", "standard", metadata=other), site=hook)
    assert own.site == given.site == Site(model.split("/")[-1], str(site_of_hook(hook)))


TRUE, FALSE = {"center_writing_weights": True}, {"center_writing_weights": False}
RESIDUAL = "blocks.8.hook_resid_pre"


@pytest.mark.parametrize(
    ("centred", "model", "hook", "more"),
    [
        (True, "gpt2-small", RESIDUAL, {}),
        (True, "gpt2", RESIDUAL, {"sae_lens_training_version": "3.19.1"}),
        (False, "gpt2", RESIDUAL, {"sae_lens_training_version": "3.19.2"}),
        (False, "gpt2", RESIDUAL, {"sae_lens_training_version": "6.54.0"}),
        (True, "gpt2", RESIDUAL, {"sae_lens_training_version": "6.54.0", "model_from_pretrained_kwargs": TRUE}),
        (False, "gpt2", RESIDUAL, {"model_from_pretrained_kwargs": FALSE}),
        (False, "gpt2", RESIDUAL, {"model_from_pretrained_kwargs": {}}),
        (True, "gpt2-small", "blocks.3.hook_mlp_out", {}),
        (True, "gpt2-small", "blocks.3.hook_attn_out", {}),
        (True, "gpt2-small", "blocks.3.hook_resid_mid", {}),
        (False, "gpt2-small", "blocks.3.attn.hook_z", {"model_from_pretrained_kwargs": TRUE}),
        (False, "gpt2-small", "blocks.3.mlp.hook_post", {}),
        (False, "gpt2", "transformer.h.7", {}),
        (False, "gpt2", RESIDUAL, {"model_class_name": "AutoModelForCausalLM", "model_from_pretrained_kwargs": TRUE}),
        (False, "EleutherAI/pythia-70m-deduped", RESIDUAL, {}),
        (True, "EleutherAI/pythia-70m-deduped", RESIDUAL, {"model_from_pretrained_kwargs": TRUE}),
        (False, "google/gemma-2-2b", RESIDUAL, {"model_from_pretrained_kwargs": TRUE}),
        (False, "meta-llama/Meta-Llama-3-8B", RESIDUAL, {"model_from_pretrained_kwargs": TRUE}),
    ],
)
def test_centring_is_decided_by_what_the_config_says(
    tmp_path: Path, centred: bool, model: str, hook: str, more: dict[str, Any]
) -> None:
    old = copied(tmp_path, "old_gpt2", model_name=model, hook_point=hook, **more)
    assert opened(old).steps == ((Centre(),) if centred else ())
    new_metadata = {"model_from_pretrained_kwargs": None, "sae_lens_training_version": None}
    new = copied(tmp_path, "standard", metadata={**new_metadata, "model_name": model, "hook_name": hook, **more})
    assert opened(new).steps == ((Centre(),) if centred else ())
    for wish in (True, False):
        assert opened(old, centre=wish).steps == ((Centre(),) if wish else ())


def test_centring_alone_explains_the_difference() -> None:
    x = torch.from_numpy(X)[None]
    centred, raw = opened(DATA / "old_gpt2"), opened(DATA / "old_gpt2", centre=False)
    given = x - x.mean(dim=-1, keepdim=True)
    ours = centred.activations(x, centred.features())
    torch.testing.assert_close(ours, raw.activations(given, raw.features()), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, raw.activations(x, raw.features()), atol=0.1)
    with pytest.raises(BadConfig, match=r"expected centre=true or centre=false; seen 'yes'"):
        opened(DATA / "old_gpt2", centre="yes")


@pytest.mark.parametrize(("model", "centred"), [("gemma-2-2b", False), ("gpt2-small", True)])
def test_a_normalised_hook_is_the_norm_without_its_gain(tmp_path: Path, model: str, centred: bool) -> None:
    hooks = {"hook_name": "blocks.5.ln2.hook_normalized", "model_name": model}
    source = opened(copied(tmp_path, "transcoder", metadata=hooks))
    assert source.site == Site(model, "layers.5.pre_mlp_norm:in", MLP_OUT)
    x = X.astype(np.float64)
    eps = 1e-5 if centred else 1e-6
    if centred:
        x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps)
    w = {key: value.double().numpy() for key, value in load_file(DATA / "transcoder" / WEIGHTS).items()}
    expected = np.maximum(x @ w["W_enc"] + w["b_enc"], 0)
    seen = source.activations(torch.from_numpy(X)[None], source.features())[0].numpy()
    np.testing.assert_allclose(seen, expected, atol=1e-4)
    assert opened(tmp_path / "transcoder", site="layers.5.mlp:in").steps == ()
    assert any(isinstance(step, RmsNorm) for step in source.steps)


def test_an_average_norm_comes_from_the_scaler_or_the_option(tmp_path: Path) -> None:
    assert opened(DATA / "scaled_checkpoint").steps == (Scale(0.37),)
    folder = copied(tmp_path, "scaled_checkpoint")
    assert opened(folder, norm=30).steps == (Scale(pytest.approx(12**0.5 / 30)),)
    for text in ('{"scaling_factor": null}', "{}"):
        (folder / "activation_scaler.json").write_text(text)
        with pytest.raises(BadConfig) as caught:
            opened(folder)
        assert str(caught.value) == (
            f"{folder / CONFIG}: expected a scaling factor for expected_average_only_in: a file activation_scaler.json, or "
            "the option norm=; seen neither; fix: give norm=, the mean norm of the training states, or norm=3.4641 if the "
            "factor is folded into the weights"
        )
    assert opened(folder, norm=3.5).steps == (Scale(pytest.approx(0.98974, rel=1e-4)),)
    old = copied(tmp_path, "old_topk", normalize_activations=True)
    with pytest.raises(BadConfig, match=r"the option norm="):
        opened(old)
    assert opened(copied(tmp_path, "old_topk", normalize_activations=False)).steps == ()
    with pytest.raises(
        BadConfig, match=r"norm= only where normalize_activations is expected_average_only_in; seen none"
    ):
        opened(DATA / "standard", norm=30)
    for bad in (0, -1, "many", True, float("inf"), float("nan"), 10**400):
        with pytest.raises(BadConfig, match=r"the option norm: expected a number above 0; seen"):
            opened(folder, norm=bad)
    (folder / "activation_scaler.json").write_text('{"scaling_factor": -2}')
    with pytest.raises(BadConfig, match=r"activation_scaler\.json: scaling_factor: expected a number above 0; seen -2"):
        opened(folder)


def test_what_old_files_call_things(tmp_path: Path) -> None:
    threshold = load_file(DATA / "jumprelu" / WEIGHTS)["threshold"]
    logged = with_tensors(copied(tmp_path, "jumprelu"), threshold=None, log_threshold=threshold.log())
    torch.testing.assert_close(opened(logged).weights.threshold, threshold)
    ones = with_tensors(copied(tmp_path, "old_gpt2"), scaling_factor=torch.ones(N))
    assert opened(ones).weights.width == N
    layered = copied(tmp_path, "old_gpt2", hook_point="blocks.{layer}.hook_mlp_out")
    assert opened(layered).site.path == "layers.8.mlp_out"
    plain = {"hook_name": "blocks.5.hook_unheard_of", "hf_hook_name": "model.layers.5"}
    assert opened(copied(tmp_path, "standard", metadata=plain)).site.path == "layers.5"
    for shifted in (None, True):  # the decoder's bias lives at another site
        assert opened(copied(tmp_path, "transcoder", apply_b_dec_to_input=shifted)).weights.shift is None
    half = copied(tmp_path, "gated")
    with_tensors(half, **{name: value.half() for name, value in load_file(half / WEIGHTS).items()})
    seen = opened(half).weights.encode(torch.from_numpy(X))
    np.testing.assert_allclose(seen.numpy(), EXPECTED["gated.activations"], atol=0.05)


CROSSED = "check that the config belongs to these weights"


@pytest.mark.parametrize(
    ("name", "config", "error", "words"),
    [
        (
            "standard",
            {"architecture": "abstopk"},
            BadFile,
            ("architecture: expected one of batchtopk, gated", "'abstopk'"),
        ),
        ("standard", {"architecture": "temporal"}, BadFile, ("standard, topk, transcoder; seen 'temporal'", CROSSED)),
        ("standard", {"architecture": ["gated"]}, BadFile, ("architecture", "['gated']")),
        (
            "old_topk",
            {"activation_fn_str": "tanh-relu"},
            BadFile,
            ("activation_fn: expected relu or topk; seen 'tanh-relu'",),
        ),
        (
            "standard",
            {"normalize_activations": "covariance_whitening"},
            BadFile,
            ("normalize_activations", "whitening"),
        ),
        ("standard", {"normalize_activations": ["none"]}, BadFile, ("normalize_activations", "['none']")),
        (
            "skip_transcoder",
            {"normalize_activations": "layer_norm"},
            BadFile,
            ("none, because the skip path reads the raw state", "'layer_norm'"),
        ),
        ("transcoder", {"normalize_activations": "expected_average_only_in"}, BadFile, ("for a transcoder",)),
        (
            "hook_z",
            {"reshape_activations": "spiral"},
            BadFile,
            ("reshape_activations: expected none or hook_z; seen 'spi",),
        ),
        ("standard", {"metadata": {"hook_head_index": 3}}, BadFile, ("hook_head_index", "not of one head; seen 3")),
        (
            "standard",
            {"apply_b_dec_to_input": "no"},
            BadFile,
            ("apply_b_dec_to_input: expected true or false; seen 'no'",),
        ),
        ("topk", {"k": None}, BadFile, ("k: expected 1 to 32, the width; seen None", CROSSED)),
        ("topk", {"k": 33}, BadFile, ("k: expected 1 to 32, the width; seen 33",)),
        ("topk", {"k": 10**30}, BadFile, ("k: expected 1 to 32",)),
        ("topk", {"k": True}, BadFile, ("k: expected a whole number above 0; seen True",)),
        ("old_topk", {"activation_fn_kwargs": [5]}, BadFile, ("k: expected 1 to 32, the width; seen None",)),
        ("standard", {"d_sae": 10**12}, BadShape, ("W_enc: expected shape (12, 1000000000000); seen shape (12, 32)",)),
        ("standard", {"d_in": -1}, BadFile, ("d_in: expected a whole number above 0; seen -1",)),
        ("transcoder", {"d_out": 12}, BadShape, ("W_dec: expected shape (32, 12); seen shape (32, 16)",)),
        ("standard", {"architecture": "gated"}, BadFile, ("b_gate: expected a floating-point tensor with this name",)),
        ("standard", {"architecture": "jumprelu"}, BadFile, ("threshold: expected a floating-point tensor with",)),
        ("standard", {"architecture": "batchtopk"}, BadFile, ("topk_threshold: expected a floating-point tensor",)),
        ("transcoder", {"architecture": "skip_transcoder"}, BadFile, ("W_skip: expected a floating-point tensor",)),
        ("transcoder", {"metadata": {"hook_name_out": None}}, BadConfig, ("hook_name_out", "out=layers.12.mlp")),
        (
            "standard",
            {"metadata": {"hook_name": "blocks.1.hook_pattern"}},
            BadConfig,
            ("blocks.1.hook_pattern", "--site"),
        ),
        ("standard", {"metadata": {"hook_name": None}}, BadConfig, ("the option site=", "none of these")),
        ("standard", {"metadata": {"model_name": None}}, BadConfig, ("the option model=",)),
    ],
)
def test_configs_that_do_not_fit(
    tmp_path: Path, name: str, config: dict[str, Any], error: type[EvalkitError], words: tuple[str, ...]
) -> None:
    folder = copied(tmp_path, name, **config)
    with pytest.raises(error) as caught:
        opened(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensors", "error", "words"),
    [
        ("standard", {"b_enc": None}, BadFile, ("b_enc", "only W_dec, W_enc, b_dec")),
        ("standard", {"W_enc": torch.zeros(N, D)}, BadShape, ("W_enc", "(12, 32)", "(32, 12)")),
        ("standard", {"W_dec": torch.zeros(D, N)}, BadShape, ("W_dec", "(32, 12)", "(12, 32)")),
        ("standard", {"b_dec": torch.zeros(N)}, BadShape, ("b_dec", "(12)", "(32,)")),
        ("standard", {"b_enc": torch.zeros(N, dtype=torch.int64)}, BadFile, ("b_enc", "floating-point")),
        ("standard", {"b_enc": torch.full((N,), torch.nan)}, BadFile, ("b_enc", "32 of 32 are NaN or infinite")),
        ("gated", {"r_mag": torch.full((N,), torch.inf)}, BadFile, ("r_mag", "32 of 32 are NaN or infinite")),
        ("jumprelu", {"threshold": torch.zeros(1)}, BadShape, ("threshold", "(32)", "(1,)")),
        ("batchtopk_checkpoint", {"topk_threshold": torch.zeros(2)}, BadShape, ("topk_threshold", "shape ()", "(2,)")),
        ("skip_transcoder", {"W_skip": torch.zeros(12, 16)}, BadShape, ("W_skip", "(16, 12)", "(12, 16)")),
        ("old_gpt2", {"scaling_factor": torch.full((N,), 1.5)}, BadFile, ("scaling_factor", "expected ones", "fold")),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path,
    name: str,
    tensors: dict[str, torch.Tensor | None],
    error: type[EvalkitError],
    words: tuple[str, ...],
) -> None:
    folder = with_tensors(copied(tmp_path, name), **tensors)
    with pytest.raises(error) as caught:
        opened(folder)
    assert str(caught.value).startswith(str(folder / WEIGHTS))
    for word in words:
        assert word in str(caught.value)


def test_nan_in_a_column_is_found_when_it_is_read(tmp_path: Path) -> None:
    w_enc = load_file(DATA / "standard" / WEIGHTS)["W_enc"]
    w_enc[4, 7] = torch.nan
    source = opened(with_tensors(copied(tmp_path, "standard"), W_enc=w_enc))
    x = torch.from_numpy(X)[None]
    np.testing.assert_allclose(
        source.activations(x, ["6"])[0].numpy(), EXPECTED["standard.activations"][:, [6]], atol=1e-5
    )
    with pytest.raises(BadFile, match=r"W_enc: expected finite numbers; seen 1 of 12 are NaN or infinite"):
        source.activations(x, ["7"])


def test_sparsity_of_another_dictionary_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path, "old_gpt2")
    save_file({"sparsity": torch.zeros(N - 1)}, folder / "sparsity.safetensors")
    with pytest.raises(BadShape, match=r"sparsity\.safetensors: sparsity: expected shape \(32\); seen shape \(31,\)"):
        opened(folder)
    save_file({"rates": torch.zeros(N)}, folder / "sparsity.safetensors")
    assert opened(folder).info.declared == {}


def test_pickles_do_not_run_and_torn_files_are_named(tmp_path: Path) -> None:
    folder = copied(tmp_path, "standard")
    whole = (folder / WEIGHTS).read_bytes()
    mark = tmp_path / "ran"
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(BadFile, match=r"sae_weights\.safetensors: expected plain tensors in a \.safetensors file"):
        opened(folder)
    torch.save({"W_enc": Bomb(mark)}, folder / WEIGHTS)
    with pytest.raises(BadFile, match=r"expected plain tensors in a \.safetensors file"):
        opened(folder)
    assert not mark.exists()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:cut])
        with pytest.raises(BadFile, match=r"expected plain tensors in a \.safetensors file"):
            opened(folder)
    (folder / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little") + whole[8:])
    with pytest.raises(BadFile, match=r"expected plain tensors in a \.safetensors file"):
        opened(folder)


def test_configs_that_are_none(tmp_path: Path) -> None:
    folder = copied(tmp_path, "standard")
    for text, seen in (("{", "invalid JSON .line 1"), ("[1]", "a list"), ("[" * 100_000, "JSON that is nested too")):
        (folder / CONFIG).write_text(text)
        with pytest.raises(BadFile, match=rf"cfg\.json: expected a JSON object; seen {seen}"):
            opened(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(MissingFile, match=r"with cfg\.json and sae_weights\.safetensors, or a folder above several"):
        opened(folder)
    with pytest.raises(MissingFile, match=r"seen no such file or folder"):
        opened(tmp_path / "none")
    with pytest.raises(
        BadConfig, match=r"expected the options centre, l0, model, name, norm, out, site, subject; seen"
    ):
        opened(DATA / "standard", layer=3)
    with pytest.raises(BadConfig, match=r"the option l0: expected a number above 0; seen 'few'"):
        opened(DATA / "standard", l0="few")


def test_a_local_release_needs_no_library() -> None:
    source = open_registered(str(DATA), "old_gpt2", centre=False)
    assert (source.site, source.steps) == (Site("gpt2-small", "layers.7"), ())
    with pytest.raises(
        MissingFile, match=r"absent: expected cfg\.json and sae_weights\.safetensors; seen no such folder"
    ):
        open_registered(str(DATA), "absent")
    with pytest.raises(BadConfig, match=r"saelens:.*: expected the options centre, folder, l0.*; seen layer"):
        open_registered(str(DATA), "old_gpt2", layer=3)


@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is not None, reason="sae_lens is installed")
def test_without_the_library_the_extra_is_named() -> None:
    with pytest.raises(MissingExtra, match=re.escape(install_command("saelens"))):
        open_registered("gpt2-small-res-jb", "blocks.8.hook_resid_pre")


def cache_of(root: Path, repository: str, folders: dict[str, Path]) -> None:
    """A cache of Hugging Face's hub that holds these folders of a repository."""
    base = root / f"models--{repository.replace('/', '--')}"
    commit = "0" * 40
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(commit)
    for name, folder in folders.items():
        shutil.copytree(folder, base / "snapshots" / commit / name)


@pytest.mark.slow
def test_with_the_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its registry, its loaders and its cache with dictionaries made here; then every fixture against it once more."""
    library = pytest.importorskip("sae_lens")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    bloom, release, sae_id = "jbloom/GPT2-Small-SAEs-Reformatted", "gpt2-small-res-jb", "blocks.8.hook_resid_pre"
    cache_of(tmp_path, bloom, {sae_id: DATA / "old_gpt2"})
    x = torch.from_numpy(X)[None]
    for options in ({}, {"folder": tmp_path / "copy"}):
        if options:
            shutil.copytree(DATA / "old_gpt2", tmp_path / "copy" / sae_id)
        source = open_registered(release, sae_id, **options)
        assert (source.site, source.steps) == (Site("gpt2-small", "layers.7"), (Centre(),))
        seen = source.activations(x, source.features())[0].numpy()
        np.testing.assert_allclose(seen, EXPECTED["old_gpt2.activations"], atol=1e-5)
        assert source.info.declared["alive_share"] == 29 / 32
        assert 0 < source.info.declared["fvu"] < 1 and source.l0 == round(source.info.declared["l0"])
    assert split_registered(f"{release}/{sae_id}") == (release, sae_id)
    assert split_registered(f"{bloom}/{sae_id}") == (bloom, sae_id)
    with pytest.raises(BadConfig, match=r"an id of that release: .*; seen blocks\.99"):
        open_registered(release, "blocks.99")
    with pytest.raises(BadConfig, match=r"expected a release in sae-lens's registry"):
        open_registered("no-such-release", sae_id)
    with pytest.raises(MissingFile, match=r"expected a dictionary that sae-lens can download or has downloaded before"):
        open_registered(release, "blocks.9.hook_resid_pre")

    scaled = copied(tmp_path / "made", "old_gpt2", normalize_activations="expected_average_only_in")
    known = library.loading.pretrained_saes_directory.get_pretrained_saes_directory()["gpt2-small-mlp-tm"]
    within = known.saes_map["blocks.3.hook_mlp_out"]
    cache_of(tmp_path, known.repo_id, {within: scaled})
    shutil.copytree(scaled, tmp_path / "mlp" / within)
    downloaded = open_registered("gpt2-small-mlp-tm", "blocks.3.hook_mlp_out")
    local = open_registered("gpt2-small-mlp-tm", "blocks.3.hook_mlp_out", folder=tmp_path / "mlp")
    assert downloaded.steps == (Centre(),)  # the library has folded the factor into the weights
    assert local.steps == (Centre(), Scale(known.norm_scaling_factor["blocks.3.hook_mlp_out"]))
    features = [str(index) for index in range(N)]
    torch.testing.assert_close(
        downloaded.activations(x, features), local.activations(x, features), atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(downloaded.reconstruct(x), local.reconstruct(x), atol=1e-4, rtol=1e-5)

    for name in NAMES:
        if name in ("batchtopk_checkpoint", "scaled_checkpoint", "old_gpt2"):
            continue  # the library folds, thresholds or centres outside what it opens
        sae = library.SAE.load_from_disk(DATA / name).eval()
        given = x.reshape(1, len(X), 3, 4) if name == "hook_z" else x
        with torch.no_grad():
            activations, rebuilt = sae.encode(given), sae(given)
        ours = opened(DATA / name)
        torch.testing.assert_close(ours.activations(x, features), activations, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.reconstruct(x), rebuilt.reshape(1, len(X), -1), atol=1e-5, rtol=1e-5)
