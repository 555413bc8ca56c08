import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from rqae import RQAE, RqaeConfig, RqaeError
from tests.support.random_rqae import random_rqae

CONFIGS = [RqaeConfig(24, 4, 5, 6), RqaeConfig(24, 3, 4, 3, "fsq"), RqaeConfig(24, 4, 19, 5, "vq")]


class Published(torch.nn.Module):
    """The module tree of the published code, which loads its checkpoints strictly by these names."""

    def __init__(self, dim, codebook_dim, codebook_size, num_quantizers, quantization_method):
        super().__init__()
        codes = codebook_size**codebook_dim if "fsq" in quantization_method else codebook_size
        pairs = [
            (torch.nn.Linear(dim, codebook_dim), torch.nn.Linear(codebook_dim, dim)) for _ in range(num_quantizers)
        ]
        self.layers = torch.nn.ModuleList(torch.nn.ModuleList(pair) for pair in pairs)
        self.codebook = torch.nn.Parameter(torch.randn(num_quantizers, codes, codebook_dim))
        self.register_buffer("codebook_counts", torch.zeros(num_quantizers, codes))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.quantization_method)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_round_trip_in_the_published_layout(tmp_path, config, dtype):
    model = random_rqae(config)
    model.codebook_counts += 0.25
    model.save_pretrained(tmp_path, dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    settings = json.loads((tmp_path / "config.json").read_text())
    published = Published(**settings)
    published.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    again = RQAE.from_pretrained(tmp_path)
    assert again.config == config
    tolerance = {None: 3e-7, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    for name in ("w_in", "b_in", "w_out", "b_out", "codebook", "codebook_counts"):
        assert getattr(again, name).dtype == torch.float32
        torch.testing.assert_close(getattr(again, name), getattr(model, name), rtol=tolerance, atol=tolerance)
    for i, (inward, outward) in enumerate(published.layers):
        torch.testing.assert_close(inward.weight.data, again.w_in[i])
        torch.testing.assert_close(outward.weight.data, again.w_out[i])


def test_half_precision_grid_is_restored_exactly(tmp_path):
    model = random_rqae(CONFIGS[0])
    model.save_pretrained(tmp_path, torch.float16)
    assert torch.equal(RQAE.from_pretrained(tmp_path).codebook, model.codebook)


@pytest.fixture
def folder(tmp_path):
    random_rqae(CONFIGS[0]).save_pretrained(tmp_path)
    return tmp_path


def change(folder, **tensors):
    stored = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del stored[name]
        else:
            stored[name] = tensor
    save_file(stored, folder / "model.safetensors")


def refused(folder) -> str:
    with pytest.raises(RqaeError) as error:
        RQAE.from_pretrained(folder)
    return str(error.value)


def test_wrong_shape_names_the_tensor(folder):
    change(folder, **{"layers.3.1.weight": torch.zeros(4, 24)})
    assert refused(folder) == (
        f"{folder}/model.safetensors: tensor 'layers.3.1.weight': expected shape [24, 4]; seen shape [4, 24]; "
        "fix: use config.json and model.safetensors from the same checkpoint"
    )


def test_missing_and_surplus_tensors_are_named(folder):
    change(folder, **{"layers.5.0.bias": None})
    assert "tensor 'layers.5.0.bias': expected shape [4]; seen no such tensor" in refused(folder)
    change(folder, **{"layers.5.0.bias": torch.zeros(4), "layers.6.0.bias": torch.zeros(4)})
    assert "tensor 'layers.6.0.bias': expected only the tensors of 6 quantizers; seen 1 more" in refused(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(folder, value):
    change(folder, **{"layers.2.0.weight": torch.full((4, 24), value)})
    assert "tensor 'layers.2.0.weight': expected finite numbers; seen NaN or infinity" in refused(folder)


def test_other_dtypes_and_other_codebooks_are_refused(folder):
    change(folder, **{"layers.2.0.bias": torch.zeros(4, dtype=torch.int64)})
    assert "seen dtype I64" in refused(folder)
    change(folder, **{"layers.2.0.bias": torch.zeros(4), "codebook": torch.rand(6, 625, 4)})
    assert "expected the round_fsq grid of 5 levels; seen other values" in refused(folder)


def test_truncated_and_garbage_files(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"\x80\x04garbage" * 20):
        path.write_bytes(content)
        assert "expected a safetensors file" in refused(folder)


def test_huge_header_is_refused_without_reading_it(folder):
    for size in (1 << 40, (1 << 63) - 1, 100_000_001):
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + b"{}")
        assert "expected a safetensors file" in refused(folder)


def test_a_pickle_is_never_opened(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"codebook": torch.zeros(1)}, folder / "model.pt")
    assert "expected a safetensors file; seen no such file" in refused(folder)


@pytest.mark.parametrize(
    "text,message",
    [
        ("{", "expected a JSON object; seen invalid JSON"),
        ("[1]", "seen list"),
        ('{"dim": 24}', "seen no codebook_dim, codebook_size, num_quantizers, quantization_method"),
        ("[" * 100_000, "expected a JSON object; seen invalid JSON"),
    ],
)
def test_bad_config(folder, text, message):
    (folder / "config.json").write_text(text)
    assert message in refused(folder)


def test_hostile_sizes_in_the_config(folder):
    config = json.loads((folder / "config.json").read_text())
    for key, value in (("dim", 10**12), ("num_quantizers", 2**19), ("dim", -1), ("codebook_size", 1.5)):
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        assert "expected" in refused(folder)


def test_values_beyond_half_precision_are_not_saved_as_infinity(tmp_path):
    model = random_rqae(CONFIGS[0])
    model.w_out[0, 0, 0] = 1e6
    with pytest.raises(RqaeError, match=r"'layers.0.1.weight': expected finite numbers in torch.float16"):
        model.save_pretrained(tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists()
