import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import safe_open, save_file

from rqae import RqaeConfig, RqaeError, random_codes
from rqae.feature_sets import FeatureSet
from rqae.literal import encode_literal
from tests.support.random_rqae import random_rqae

MODEL = random_rqae(RqaeConfig(16, num_quantizers=12))


def rows(count, seed=0):
    return torch.randn(count, MODEL.config.dim, generator=torch.Generator().manual_seed(seed))


def same(left, right):
    assert left.config == right.config and left.labels == right.labels and left.origins == right.origins
    assert left.codes.dtype == right.codes.dtype == torch.int64 and torch.equal(left.codes, right.codes)
    assert (left.positions is None) == (right.positions is None)
    assert left.positions is None or torch.equal(left.positions, right.positions)


def test_from_tokens():
    hidden = rows(5)
    found = FeatureSet.from_tokens(MODEL, hidden, labels=list("abcde"), positions=torch.arange(5) * 10)
    assert torch.equal(found.codes, encode_literal(MODEL, hidden))
    assert (len(found), found.depth) == (5, 12)
    assert found.labels == tuple("abcde") and set(found.origins) == {"token"}
    assert torch.equal(FeatureSet.from_tokens(MODEL, hidden, depth=3).codes, encode_literal(MODEL, hidden, 3))
    assert FeatureSet.from_tokens(MODEL, hidden).labels[:2] == ("token 0", "token 1")


def test_vectors_pass_the_final_norm():
    """The norm written out in numpy with a gain like Gemma's; then the literal encoding."""
    vectors, gain = rows(20) * 7, 1 + rows(1, 1)[0] / 3
    normed = vectors.numpy().astype(np.float64)
    normed = normed / np.sqrt((normed**2).mean(axis=-1, keepdims=True))
    for gained, expected in ((gain, normed * gain.numpy()), (None, normed)):
        found = FeatureSet.from_vectors(MODEL, vectors, gained)
        assert torch.equal(found.codes, encode_literal(MODEL, torch.from_numpy(expected).float()))
        assert set(found.origins) == {"vector"} and found.positions is None
    shallow = FeatureSet.from_vectors(MODEL, vectors, gain, depth=5, labels=[str(k) for k in range(20)])
    assert shallow.depth == 5 and shallow.labels[7] == "7"


@settings(max_examples=25, deadline=None)
@given(st.integers(-120, 120), st.integers(0, 1000))
def test_the_length_of_a_vector_plays_no_role(power, seed):
    vectors = rows(4, seed)
    scaled = FeatureSet.from_vectors(MODEL, vectors * 2.0**power)
    assert torch.equal(scaled.codes, FeatureSet.from_vectors(MODEL, vectors).codes)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_vector_without_direction_names_its_row(value):
    vectors = rows(4)
    vectors[2] = value
    with pytest.raises(RqaeError, match="vector in row 2: expected finite numbers that are not all zero"):
        FeatureSet.from_vectors(MODEL, vectors)


def test_vectors_that_do_not_fit():
    with pytest.raises(RqaeError, match=r"gain: expected shape \[16\]; seen shape \[15\]"):
        FeatureSet.from_vectors(MODEL, rows(2), torch.ones(15))
    with pytest.raises(RqaeError, match=r"vectors: expected shape \[2, 16\]; seen shape \[2, 8\]"):
        FeatureSet.from_vectors(MODEL, rows(2)[:, :8])
    only_first = torch.zeros(2, 16)
    only_first[:, 0] = 1
    gain = torch.ones(16)
    gain[0] = 0
    with pytest.raises(RqaeError, match=r"vector in row 0: .* also after the gain"):
        FeatureSet.from_vectors(MODEL, only_first, gain)


def test_random_sets_are_the_null_of_features():
    found = FeatureSet.random(MODEL, 6, seed=3)
    assert torch.equal(found.codes, random_codes(MODEL, 6, 3)) and set(found.origins) == {"random"}
    assert torch.equal(FeatureSet.random(MODEL, 6, seed=3, depth=4).codes, random_codes(MODEL, 6, 3)[:, :4])
    with pytest.raises(RqaeError, match="depth: expected 1 to 12; seen 13"):
        FeatureSet.random(MODEL, 6, seed=3, depth=13)


def test_ancestors_are_prefixes():
    whole = FeatureSet.from_tokens(MODEL, rows(3), positions=torch.tensor([5, -1, 7]))
    for depth, ancestor in zip((8, 1, 12), whole.ancestors((8, 1, 12)), strict=True):
        assert torch.equal(ancestor.codes, encode_literal(MODEL, rows(3), depth))
        assert ancestor.labels == whole.labels and torch.equal(ancestor.positions, whole.positions)
    for depth in (0, 13):
        with pytest.raises(RqaeError, match=f"depth: expected 1 to 12; seen {depth}"):
            whole.prefix(depth)


def test_joined_sets_keep_order_and_origins():
    tokens = FeatureSet.from_tokens(MODEL, rows(2), positions=torch.tensor([3, 4]))
    both = FeatureSet.joined([FeatureSet.random(MODEL, 1, 0), tokens])
    assert both.origins == ("random", "token", "token") and both.positions.tolist() == [-1, 3, 4]
    assert torch.equal(both.codes[1:], tokens.codes)
    assert FeatureSet.joined([FeatureSet.random(MODEL, 1, 0)]).positions is None
    with pytest.raises(RqaeError, match=r"of depths \[12, 2\]"):
        FeatureSet.joined([tokens, tokens.prefix(2)])


@pytest.mark.parametrize("positions", [None, torch.tensor([0, -1, 1 << 40])])
def test_round_trip(tmp_path, positions):
    labels = ["plain", "", 'quote " comma, ü \n\x1b'] if positions is None else ["a", "b", "c"]
    stored = FeatureSet.from_tokens(MODEL, rows(3), labels=labels, positions=positions)
    stored.save(tmp_path / "new" / "set.safetensors")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set.safetensors"]
    same(FeatureSet.load(tmp_path / "new" / "set.safetensors", MODEL.config), stored)
    stored.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new" / "set.safetensors").read_bytes()


def test_round_trip_of_the_largest_codebook(tmp_path):
    config = RqaeConfig(4, 1, 65_536, 2, "vq")
    codes = torch.tensor([[0, 65_535], [40_000, 32_768]])
    FeatureSet(config, codes, ("a", "b"), ("token", "token")).save(tmp_path / "set")
    assert torch.equal(FeatureSet.load(tmp_path / "set").codes, codes)


def test_a_set_of_another_rqae_is_refused(tmp_path):
    FeatureSet.random(MODEL, 2, 0).save(tmp_path / "set")
    with pytest.raises(RqaeError, match=r"expected features of RqaeConfig.*num_quantizers=13.*num_quantizers=12"):
        FeatureSet.load(tmp_path / "set", RqaeConfig(16, num_quantizers=13))


@pytest.fixture
def path(tmp_path):
    FeatureSet.from_tokens(MODEL, rows(3), positions=torch.arange(3)).save(tmp_path / "set.safetensors")
    return tmp_path / "set.safetensors"


def change(path: Path, header=None, **tensors):
    """Rewrite a stored set with other tensors, and its header's object passed through ``header``."""
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(file.metadata()["rqae_feature_set"])
    stored = {name: tensor for name, tensor in (stored | tensors).items() if tensor is not None}
    text = json.dumps(about) if header is None else header(about)
    save_file(stored, path, metadata={"rqae_feature_set": text})


def refused(path) -> str:
    with pytest.raises(RqaeError) as error:
        FeatureSet.load(path)
    assert str(error.value).startswith(str(path))
    return str(error.value)


def test_truncated_and_garbage_files(path):
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"", b"\x80\x04garbage" * 20, whole + b"x"):
        path.write_bytes(content)
        assert "expected a safetensors file" in refused(path)
    for size in (1 << 40, (1 << 63) - 1, 100_000_001):
        path.write_bytes(struct.pack("<Q", size) + b"{}")
        assert "expected a safetensors file" in refused(path)


def test_no_file_a_folder_and_a_pickle(path, tmp_path):
    assert "expected a safetensors file" in refused(tmp_path / "none")
    assert "expected a safetensors file" in refused(tmp_path)

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "opened",)

    torch.save({"codes": Trap()}, path)
    assert "expected a safetensors file" in refused(path)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    "tensors,message",
    [
        ({"codes": torch.zeros(3, 12)}, "tensor 'codes': expected dtype U16; seen dtype F32"),
        ({"codes": torch.zeros(3, 13, dtype=torch.uint16)}, "integers of shape [any, 1 to 12]; seen shape [3, 13]"),
        ({"codes": torch.zeros(3, 0, dtype=torch.uint16)}, "integers of shape [any, 1 to 12]; seen shape [3, 0]"),
        ({"codes": torch.zeros(36, dtype=torch.uint16)}, "integers of shape [any, 1 to 12]; seen shape [36]"),
        ({"codes": torch.zeros(0, 12, dtype=torch.uint16)}, "expected at least one row"),
        ({"codes": torch.zeros(4, 12, dtype=torch.uint16)}, "feature labels: expected 4 strings; seen 3: 'token 0'"),
        ({"codes": torch.full((3, 12), 625).to(torch.uint16)}, "feature codes: expected 0 to 624; seen 625 to 625"),
        ({"codes": torch.full((3, 12), 624).to(torch.uint16)}, "code 0 of feature 0: expected 468, the lowest index"),
        ({"codes": None}, "expected codes and optionally positions; seen ['positions']"),
        ({"more": torch.zeros(1)}, "expected codes and optionally positions; seen ['codes', 'more', 'positions']"),
        ({"positions": torch.arange(4)}, "feature positions: expected shape [3]"),
        ({"positions": torch.tensor([0, 1, -2])}, "feature positions: expected shape [3], int64, -1 or more"),
        ({"positions": torch.zeros(3)}, "tensor 'positions': expected dtype I64; seen dtype F32"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_what_they_should_be(path, tensors, message):
    change(path, **tensors)
    assert message in refused(path)


def config_with(**values):
    return lambda about: json.dumps(about | {"config": about["config"] | values})


@pytest.mark.parametrize(
    "header,message",
    [
        (lambda _: "{", "header: expected a JSON object; seen invalid JSON"),
        (lambda _: "[" * 100_000, "header: expected a JSON object; seen invalid JSON"),
        (lambda _: "[1]", "expected an object with config, labels, origins, version"),
        (lambda a: json.dumps(a | {"version": 2}), "version: expected 1; seen 2; fix: update the package"),
        (lambda a: json.dumps(a | {"version": "1"}), "expected an object with"),
        (lambda a: json.dumps(a | {"version": True}), "expected an object with"),
        (lambda a: json.dumps(a | {"labels": "abc"}), "expected an object with"),
        (lambda a: json.dumps(a | {"labels": ["a", "b", 3]}), "feature labels: expected 3 strings"),
        (lambda a: json.dumps(a | {"origins": ["token", "token", "me"]}), "each one of token, tokens, vector, random"),
        (lambda a: json.dumps(a | {"origins": ["token", "token", []]}), "feature origins: expected 3 strings"),
        (lambda a: json.dumps(a | {"config": {}}), "expected an object with"),
        (config_with(num_quantizers=11), "expected integers of shape [any, 1 to 11]; seen shape [3, 12]"),
        (config_with(codebook_size=3), "feature codes: expected 0 to 80"),
        (config_with(codebook_size=10**9), "expected an integer from 1 to 65536"),
        (config_with(dim="big"), "expected an integer from 1 to"),
        (config_with(codebook_dim=16), "expected at most 65536 codes"),
    ],
)
def test_headers_that_are_not_what_they_should_be(path, header, message):
    change(path, header)
    assert message in refused(path)


def test_a_file_of_another_kind(path):
    save_file({"codes": torch.zeros(3, 12, dtype=torch.uint16)}, path)
    assert "expected a feature set, with 'rqae_feature_set' in its header; seen none" in refused(path)


def test_a_failed_write_keeps_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RqaeError, match="expected a file that can be written; seen No space left on device"):
        FeatureSet.random(MODEL, 2, 0).save(path)
    assert path.read_bytes() == before and [each.name for each in path.parent.iterdir()] == [path.name]
    with pytest.raises(RqaeError, match="expected a file that can be written"):
        FeatureSet.random(MODEL, 2, 0).save(path / "inside")
