"""Gemma Scope 2's layout: what configs and folders say, the arithmetic in plain numpy, and files that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from evalkit.errors import BadConfig, BadFile, BadShape, EvalkitError, MissingFile
from evalkit.records import Site
from evalkit.registry import create
from evalkit.sources.formats.gemma_scope_2 import GemmaScope2Reader
from evalkit.util.tensor_files import Stored

D, OUT, N = 8, 6, 1024
Arrays = dict[str, np.ndarray]
RESID = {
    "model_name": "google/gemma-3-1b-pt",
    "hf_hook_point_in": "model.layers.12.output",
    "architecture": "jump_relu",
}
TRANSCODER = {
    "model_name": "google/gemma-3-1b-it",
    "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
    "architecture": "jump_relu",
    "type": "transcoder",
    "width": N,
    "l0": 120,
}


def arrays(out: int = D, skip: bool = False) -> Arrays:
    rng = np.random.default_rng(out + skip)
    held = {"w_enc": rng.normal(size=(D, N)), "b_enc": rng.normal(size=N), "w_dec": rng.normal(size=(N, out))}
    held |= {"b_dec": rng.normal(size=out), "threshold": rng.uniform(0, 2, size=N)}
    if skip:
        held["affine_skip_connection"] = rng.normal(size=(D, out))
    return {name: value.astype(np.float32) for name, value in held.items()}


def store(folder: Path, values: Arrays, config: dict[str, Any] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, folder / "params.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def literal(values: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """JumpReLU in float64; the skip connection multiplies the input from the right."""
    held = {name: value.astype(np.float64) for name, value in values.items()}
    pre = x @ held["w_enc"] + held["b_enc"]
    active = np.where((pre > held["threshold"]) & (pre > 0), pre, 0.0)
    rebuilt = active @ held["w_dec"] + held["b_dec"]
    return active, rebuilt + x @ held["affine_skip_connection"] if "affine_skip_connection" in held else rebuilt


@pytest.mark.parametrize(("out", "skip"), [(D, False), (OUT, False), (OUT, True)])
def test_it_computes_what_the_paper_says(tmp_path: Path, out: int, skip: bool) -> None:
    values, affine = arrays(out, skip), "_affine" if skip else ""
    config = {**(RESID if out == D else TRANSCODER), "affine_connection": skip, "l0": 50, "width": N}
    folder = store(tmp_path / "some" / f"layer_5_width_1k_l0_medium{affine}", values, config)
    (source,) = GemmaScope2Reader().read(folder)
    assert isinstance(source.weights.w_enc, Stored)
    assert isinstance(source.weights.w_dec, Stored)
    x = np.random.default_rng(1).normal(size=(2, 3, D))
    active, rebuilt = literal(values, x)
    hidden = torch.from_numpy(x.astype(np.float32))
    assert 0.1 < (active > 0).mean() < 0.9
    np.testing.assert_allclose(source.activations(hidden, source.features()).numpy(), active, atol=1e-4)
    np.testing.assert_allclose(source.activations(hidden, ["7", "3"]).numpy(), active[..., [7, 3]], atol=1e-4)
    np.testing.assert_allclose(source.reconstruct(hidden).numpy(), rebuilt, atol=1e-3)


def test_names_are_unique_and_of_the_dictionary_alone(tmp_path: Path) -> None:
    root = tmp_path / "gemma-scope-2-1b-pt"
    for word, l0 in (("small", 20), ("medium", 50), ("big", None)):
        store(root / "resid_post" / f"layer_12_width_1k_l0_{word}", arrays(), {**RESID, **({"l0": l0} if l0 else {})})
    store(root / "resid_post_all" / "layer_12_width_1k_l0_small", arrays(), {**RESID, "l0": 20})
    for affine in (False, True):
        ending = "_affine" if affine else ""
        config = {**TRANSCODER, "affine_connection": affine}
        store(root / "transcoder_all" / f"layer_5_width_1k_l0_big{ending}", arrays(OUT, affine), config)
    sources = GemmaScope2Reader().read(root)
    assert sorted(source.name for source in sources) == sorted(
        [
            "gemma-3-1b-it/layers.5.pre_feedforward_layernorm/transcoder/width-1024/l0-120/affine/all",
            "gemma-3-1b-it/layers.5.pre_feedforward_layernorm/transcoder/width-1024/l0-120/all",
            "gemma-3-1b-pt/layers.12/sae/width-1024/l0-20",
            "gemma-3-1b-pt/layers.12/sae/width-1024/l0-20/all",
            "gemma-3-1b-pt/layers.12/sae/width-1024/l0-50",
            "gemma-3-1b-pt/layers.12/sae/width-1024/l0-big",
        ]
    )
    for source in sources:
        folder = source.weights.w_enc.file.parent  # type: ignore[union-attr]
        assert [alone.name for alone in GemmaScope2Reader().read(folder)] == [source.name]
    assert {source.l0 for source in sources} == {20.0, 50.0, 120.0, None}


@pytest.mark.parametrize(
    ("kind", "site", "out"),
    [
        ("resid_post", "layers.9", None),
        ("attn_out_all", "layers.9.self_attn.o_proj:in", None),
        ("mlp_out", "layers.9.post_feedforward_layernorm", None),
        ("transcoder", "layers.9.pre_feedforward_layernorm", "layers.9.post_feedforward_layernorm"),
    ],
)
def test_folders_say_it_where_there_is_no_config(tmp_path: Path, kind: str, site: str, out: str | None) -> None:
    folder = store(tmp_path / "gemma-scope-2-270m-it" / kind / "layer_9_width_1k_l0_small", arrays(), None)
    (source,) = GemmaScope2Reader().read(folder)
    assert source.site == Site("gemma-3-270m-it", site, out)
    (given,) = GemmaScope2Reader().read(folder, site="layers.2", out="layers.3", model="m", name="mine", l0=4)
    assert (given.site, given.name, given.l0) == (Site("m", "layers.2", "layers.3"), "mine", 4.0)


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("model.layers.11.self_attn.o_proj.input", "layers.11.self_attn.o_proj:in"),
        ("model.language_model.layers.11.output", "layers.11"),
        ("model.layers.11.post_feedforward_layernorm.output", "layers.11.post_feedforward_layernorm"),
    ],
)
def test_hooks_of_configs(tmp_path: Path, hook: str, site: str) -> None:
    config = {**RESID, "hf_hook_point_in": hook, "hf_hook_point_out": hook, "model_name": "gemma-v3-4b-it"}
    (source,) = GemmaScope2Reader().read(store(tmp_path, arrays(), config))
    assert source.site == Site("gemma-3-4b-it", site)


def test_the_registry_knows_it(tmp_path: Path) -> None:
    folder = store(tmp_path / "resid_post" / "layer_12_width_1k_l0_small", arrays(), RESID)
    reader = create("sources", "gemma-scope-2")
    assert all(reader.matches(path) for path in (tmp_path, folder, folder / "params.safetensors"))
    assert not any(reader.matches(path) for path in (tmp_path / "none", folder / "config.json", Path(__file__).parent))


@pytest.mark.parametrize(
    ("values", "config", "error", "words"),
    [
        (
            {k: v for k, v in arrays().items() if k != "threshold"},
            RESID,
            BadFile,
            "threshold: expected the tensors w_enc",
        ),
        ({**arrays(), "w_dec": np.zeros((D, N), np.float32)}, RESID, BadShape, "w_dec: expected shape (1024, 8)"),
        ({**arrays(), "b_dec": np.zeros(D + 1, np.float32)}, RESID, BadShape, "b_dec: expected shape (8,)"),
        ({**arrays(), "w_enc": np.zeros(N, np.float32)}, RESID, BadShape, "w_enc: expected a matrix"),
        ({**arrays(), "b_enc": np.full(N, np.nan, np.float32)}, RESID, BadFile, "1024 of 1024 are NaN"),
        ({**arrays(), "threshold": np.zeros(N, np.int32)}, RESID, BadFile, "threshold: expected the tensors"),
        (arrays(), {**RESID, "width": 4096}, BadShape, "expected 4096 latents, as in config.json; seen 1024"),
        (arrays(), {**RESID, "architecture": "topk"}, BadConfig, "architecture: expected jump_relu; seen 'topk'"),
        (arrays(), {**RESID, "type": "crosscoder"}, BadConfig, "type: expected sae or transcoder"),
        (
            arrays(),
            {**RESID, "affine_connection": True},
            BadFile,
            "True in config.json, and no such tensor",
        ),
        (
            arrays(D, True),
            {**RESID, "affine_connection": False},
            BadFile,
            "False in config.json, and this tensor",
        ),
        (arrays(), {"model_name": "m"}, BadConfig, "expected metadata with the hook that it reads"),
        (arrays(), {**RESID, "hf_hook_point_in": 3}, BadConfig, "expected metadata with the hook that it reads"),
        (arrays(), {"hf_hook_point_in": "model.layers.1.output"}, BadConfig, "with the model it was trained on"),
        (
            {**arrays(D, True), "affine_skip_connection": np.zeros((3, 3), np.float32)},
            RESID,
            BadShape,
            "affine_skip_connection: expected shape (8, 8); seen shape (3, 3)",
        ),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, values: Arrays, config: dict[str, Any], error: type[EvalkitError], words: str
) -> None:
    folder = store(tmp_path / "d", values, config)
    with pytest.raises(error) as caught:
        GemmaScope2Reader().read(folder)
    assert str(folder) in str(caught.value)
    assert words in str(caught.value)


def test_a_folder_that_lies_about_its_width(tmp_path: Path) -> None:
    folder = store(tmp_path / "resid_post" / "layer_1_width_16k_l0_small", arrays(), RESID)
    with pytest.raises(BadShape, match="expected about 16384 latents, as in the folder's name; seen 1024"):
        GemmaScope2Reader().read(folder)


def test_broken_and_missing_files(tmp_path: Path) -> None:
    reader, folder = GemmaScope2Reader(), store(tmp_path / "d", arrays(), RESID)
    with pytest.raises(BadConfig, match=r"expected the options .*; seen layer"):
        reader.read(folder, layer=3)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(BadFile, match="expected a JSON object; seen a list"):
        reader.read(folder)
    (folder / "config.json").write_text(json.dumps(RESID))
    data = (folder / "params.safetensors").read_bytes()
    for cut in (0, 7, 50, len(data) - 1):
        (folder / "params.safetensors").write_bytes(data[:cut])
        with pytest.raises(BadFile, match=r"plain tensors in a \.safetensors file"):
            reader.read(folder)
    with pytest.raises(
        MissingFile, match=r"a folder with params\.safetensors, or a folder above several; seen no such file"
    ):
        reader.read(tmp_path / "none")
    cross = tmp_path / "clt" / "width_1k_l0_big"
    cross.mkdir(parents=True)
    (cross / "params_layer_0.safetensors").write_bytes(data)
    assert reader.matches(cross)
    with pytest.raises(BadConfig, match="a dictionary that reads one layer; seen a cross-layer transcoder"):
        reader.read(cross)
