from __future__ import annotations

import numpy as np
import pytest
import torch

from evalkit.errors import UnknownFeature
from evalkit.records import Site, TokenBatch
from evalkit.sources.controls import PermutedSource, PlantedSource, RandomDirectionsSource

SITE = Site("m", "layers.1")


def batch(rows: list[int], length: int = 16) -> TokenBatch:
    ids = np.array([[(row * 7 + position) % 11 for position in range(length)] for row in rows])
    return TokenBatch(ids, np.ones_like(ids, dtype=bool), np.array(rows))


def test_random_directions_are_unit_and_seeded() -> None:
    source = RandomDirectionsSource(SITE, 24, 5, 0.01, seed=3)
    directions = source.directions(source.features()).T
    assert torch.allclose(directions.norm(dim=0), torch.ones(5))
    assert torch.equal(directions[:, [3]].T, RandomDirectionsSource(SITE, 24, 5, 0.01, seed=3).directions(["3"]))
    assert not torch.equal(directions[:, [3]].T, RandomDirectionsSource(SITE, 24, 5, 0.01, seed=4).directions(["3"]))
    hidden = torch.randn(2, 16, 24)
    expected = torch.einsum("btd,df->btf", hidden, directions[:, [4, 1]])
    assert torch.allclose(source.activations(hidden, ["4", "1"]), expected, atol=1e-6)
    projected = source.reconstruct(hidden)
    assert torch.allclose(source.reconstruct(projected), projected, atol=1e-5)
    with pytest.raises(UnknownFeature, match="expected one of its 5 features; seen 9"):
        source.activations(hidden, ["9"])


def test_planted_features_fire_on_their_tokens_only() -> None:
    source = PlantedSource(SITE, {"a": (3, 5), "b": (7,)})
    one = batch([0, 4])
    fired = source.token_activations(one, ["b", "a"]).numpy()
    assert np.array_equal(fired[..., 0] == 1, one.token_ids == 7)
    assert np.array_equal(fired[..., 1] == 1, (one.token_ids == 3) | (one.token_ids == 5))
    assert source.threshold("a") == 0.0


def test_permuted_activations_do_not_depend_on_the_batch_and_keep_their_distribution() -> None:
    values = torch.zeros(1000, 2)
    values[:100, 0] = torch.arange(1, 101)
    values[:100, 1] = torch.arange(1, 101) * 2
    source = PermutedSource(SITE, values, ("x", "y"), seed=1, context_length=16)
    rows = list(range(500))
    whole = source.token_activations(batch(rows), ["x", "y"])
    apart = torch.cat([source.token_activations(batch(rows[i : i + 7]), ["x", "y"]) for i in range(0, 500, 7)])
    assert torch.equal(whole, apart)
    assert torch.equal(whole[..., 1], 2 * whole[..., 0])  # what fires together still does
    assert 0.08 < (whole[..., 0] > 0).float().mean() < 0.12
    fired = (whole[..., 0] > 0).float().flatten()
    assert abs(np.corrcoef(fired[1:], fired[:-1])[0, 1]) < 0.05  # and neighbours no longer do
