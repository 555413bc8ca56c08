"""Nearest neighbours against a dense float64 table of cosines; random directions against draws of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from evalkit.inspection.parts import nearest_rows as neighbours
from evalkit.inspection.parts.nearest_rows import nearest_rows, random_nearest, random_rank
from evalkit.util.tensor_files import open_safetensors


def rows(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def table(matrix: torch.Tensor) -> np.ndarray:
    """All cosines; -9 with oneself and with rows that are zero."""
    values = matrix.double().numpy()
    lengths = np.linalg.norm(values, axis=1)
    with np.errstate(invalid="ignore"):
        found = (values @ values.T) / lengths[:, None] / lengths
    np.fill_diagonal(found, -9)
    found[lengths == 0] = found[:, lengths == 0] = -9
    return found


@pytest.mark.parametrize("stored", [False, True])
def test_neighbours_are_those_of_the_whole_table(stored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_QUERIES", 17)
    monkeypatch.setattr(neighbours, "_TILE", 13)
    matrix = rows(70, 6)
    matrix[[9, 40]] = 0
    matrix[33] = 3 * matrix[20]
    whole = matrix
    if stored:
        save_file({"decoder": matrix.T.contiguous()}, tmp_path / "a.safetensors")
        whole = open_safetensors(tmp_path / "a.safetensors")["decoder"].T
    found, cosines = nearest_rows(whole), table(matrix)
    kept = np.setdiff1d(np.arange(70), [9, 40])
    np.testing.assert_array_equal(found.rows, kept)
    np.testing.assert_array_equal(found.nearest, cosines[kept].argmax(1))
    np.testing.assert_allclose(found.cosines, cosines[kept].max(1), atol=1e-6)
    assert (found.total, found.zero, found.sampled) == (70, 2, False)
    degrees = [sum(cosines[row].argmax() == one for row in kept) for one in range(70)]
    np.testing.assert_array_equal(found.in_degrees, degrees)
    assert found.cosines.max() == pytest.approx(1, abs=1e-6) and found.cosines.max() <= 1


def test_a_sample_looks_among_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "ALL_UP_TO", 99)
    monkeypatch.setattr(neighbours, "SAMPLE", 30)
    monkeypatch.setattr(neighbours, "_TILE", 32)
    matrix = rows(100, 5)
    matrix[7] = 0
    found, cosines = nearest_rows(matrix, seed=3), table(matrix)
    assert found.sampled and len(set(found.rows.tolist())) == len(found.rows) in (29, 30)
    assert (np.diff(found.rows) > 0).all() and 7 not in found.rows and found.zero == 1
    np.testing.assert_array_equal(found.nearest, cosines[found.rows].argmax(1))
    assert not set(found.nearest.tolist()) <= set(found.rows.tolist())
    np.testing.assert_array_equal(nearest_rows(matrix, seed=3).rows, found.rows)
    assert nearest_rows(matrix, seed=4).rows.tolist() != found.rows.tolist()
    assert found.in_degrees.sum() == len(found.rows)


def test_one_row_and_only_zeros_have_no_neighbour() -> None:
    for matrix in (rows(1, 4), torch.zeros(3, 4)):
        found = nearest_rows(matrix)
        assert len(found.rows) == len(found.cosines) == found.in_degrees.sum() == 0


def test_random_directions_are_as_the_formula_says() -> None:
    n, dim = 60, 5
    found = np.concatenate([nearest_rows(rows(n, dim, seed)).cosines for seed in range(400)])
    edges = np.linspace(-1, 1, 41)
    density = random_nearest(edges, n, dim)
    assert (density * np.diff(edges)).sum() == pytest.approx(1)
    shares = np.histogram(found, edges)[0] / len(found)
    np.testing.assert_allclose(density * np.diff(edges), shares, atol=0.01)
    for rank in (1, 10, 30):
        above = (found > random_rank(rank, n, n, dim)).mean() * n
        assert above == pytest.approx(rank, rel=0.1)
    assert random_rank(n, n, n, dim) == -1
    assert -1 < random_rank(2, 3, 3, 4) < random_rank(1, 3, 3, 4) < 1


def test_the_formula_holds_for_few_rows() -> None:
    """With two rows there is one cosine, as often below 0 as above."""
    assert random_rank(1, 2, 2, 7) == pytest.approx(0, abs=1e-9)
    assert random_rank(3, 4, 2, 7) == pytest.approx(-random_rank(1, 4, 2, 7))
