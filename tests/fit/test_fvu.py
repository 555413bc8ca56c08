"""FVU against numpy's own mean and variance, in one piece and in chunks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evalkit.fit.fvu import Spread, fvu


def spread(rows: np.ndarray, cuts: list[int]) -> Spread:
    found = Spread()
    for chunk in np.split(rows, sorted(cuts)):
        found.add(torch.from_numpy(chunk))
    return found


@given(
    st.integers(1, 40), st.integers(1, 6), st.lists(st.integers(0, 40), max_size=5), st.sampled_from([0.0, 3.0, 1e6])
)
def test_spread_is_the_variance_about_the_mean_however_rows_are_cut(
    n_rows: int, width: int, cuts: list[int], offset: float
) -> None:
    rows = np.random.default_rng(n_rows * 7 + width).normal(offset, 1, (n_rows, width))
    found = spread(rows, [min(cut, n_rows) for cut in cuts])
    assert found.n_rows == n_rows
    np.testing.assert_allclose(found.mean.numpy(), rows.mean(0), rtol=1e-12)
    assert found.total == pytest.approx(rows.var(0).sum() * n_rows, rel=1e-6, abs=1e-12)


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    """Σx² - (Σx)²/n in float64 would leave about one correct digit here."""
    rows = np.random.default_rng(0).normal(0, 1e-3, (1000, 4)) + 3e4
    exact = sum(float(np.var(column.astype(np.longdouble))) * 1000 for column in rows.T)
    assert spread(rows, [100, 500]).total == pytest.approx(exact, rel=1e-9)


def test_fvu_of_the_mean_is_one_and_of_equal_rows_is_not_defined() -> None:
    rows = np.random.default_rng(1).normal(5, 2, (30, 3))
    about_mean = float(((rows - rows.mean(0)) ** 2).sum())
    assert fvu(about_mean, spread(rows, [7])) == pytest.approx(1)
    assert math.isnan(fvu(1.0, spread(np.ones((4, 2)), [2])))


def test_no_rows_have_no_mean() -> None:
    with pytest.raises(ValueError, match="the mean of no rows"):
        _ = Spread().mean
