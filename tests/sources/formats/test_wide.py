"""A dictionary far wider than what is asked of it: only the asked columns are read, and give the full encode's numbers."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from evalkit.sources import load_source
from evalkit.sources.sae.source import SaeSource

D, N = 256, 65_536
REAL = np.random.default_rng(5).choice(N, size=150, replace=False)


def sparse_dictionary(folder: Path) -> dict[str, np.ndarray]:
    """A .safetensors file with holes: 150 real columns, zeros elsewhere. Returns the real columns and all vectors."""
    rng = np.random.default_rng(6)
    columns = rng.normal(size=(D, len(REAL))).astype(np.float32)
    vectors = {"b_enc": rng.normal(size=N), "b_dec": rng.normal(size=D), "threshold": rng.uniform(0, 20, size=N)}
    vectors = {name: values.astype(np.float32) for name, values in vectors.items()}
    shapes = {"w_enc": (D, N), "b_enc": (N,), "w_dec": (N, D), "b_dec": (D,), "threshold": (N,)}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": (at, at + size)}
        at += size
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    folder.mkdir(parents=True)
    with (folder / "params.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(packed)) + packed)
        base = stream.tell()
        stream.truncate(base + at)
        for row in range(D):
            for place, latent in enumerate(REAL):
                stream.seek(base + 4 * (row * N + int(latent)))
                stream.write(columns[row, place].tobytes())
        for place, latent in enumerate(REAL):
            stream.seek(base + header["w_dec"]["data_offsets"][0] + 4 * int(latent) * D)
            stream.write(columns[:, place].tobytes())
        for name, values in vectors.items():
            stream.seek(base + header[name]["data_offsets"][0])
            stream.write(values.tobytes())
    return {"columns": columns, **vectors}


class Reads:
    """Counts the bytes that ``os.pread`` returns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self._real = 0, os.pread
        monkeypatch.setattr(os, "pread", self._counting)

    def _counting(self, file: int, size: int, offset: int) -> bytes:
        found = self._real(file, size, offset)
        self.count += len(found)
        return found


@pytest.fixture
def case(tmp_path: Path) -> Iterator[tuple[Path, dict[str, np.ndarray]]]:
    folder = tmp_path / "resid_post" / "layer_12_width_64k_l0_small"
    held = sparse_dictionary(folder)
    yield folder, held
    (folder / "params.safetensors").unlink()


def test_some_features_cost_some_columns(
    case: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, held = case
    size = (folder / "params.safetensors").stat().st_size
    assert size > 130_000_000
    reads = Reads(monkeypatch)
    source = load_source(folder, model="toy")
    assert isinstance(source, SaeSource)
    assert reads.count < size / 100, "opening reads vectors only"
    x = torch.from_numpy(np.random.default_rng(7).normal(size=(2, 8, D)).astype(np.float32))
    chosen = [str(latent) for latent in REAL[:100]]
    reads.count = 0
    found = source.activations(x, chosen).numpy()
    once = reads.count
    assert 0 < once < size / 50
    source.activations(x, chosen)
    assert reads.count == once, "the same features again are kept"
    pre = x.double().numpy() @ held["columns"][:, :100].astype(np.float64) + held["b_enc"][REAL[:100]]
    expected = np.where((pre > 0) & (pre > held["threshold"][REAL[:100]]), pre, 0.0)
    assert 0.02 < (expected > 0).mean() < 0.9
    np.testing.assert_allclose(found, expected, atol=1e-3)
    full = source.weights.encode(x)
    np.testing.assert_allclose(found, full[..., torch.from_numpy(REAL[:100])].numpy(), atol=1e-4)


def test_the_reconstruction_of_a_wide_one_is_the_sum_over_its_latents(case: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, held = case
    source = load_source(folder, model="toy")
    x = np.random.default_rng(8).normal(size=(1, 3, D))
    pre = x @ held["columns"].astype(np.float64) + held["b_enc"][REAL]
    active = np.where((pre > 0) & (pre > held["threshold"][REAL]), pre, 0.0)
    expected = active @ held["columns"].T.astype(np.float64) + held["b_dec"]
    found = source.reconstruct(torch.from_numpy(x.astype(np.float32)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=2e-2)
