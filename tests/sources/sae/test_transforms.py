"""Input steps against their formulas, and that every one is undone exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evalkit.errors import BadConfig
from evalkit.sources.sae.transforms import Centre, RmsNorm, Scale, describe, parse_transform, transformed

X = torch.randn(7, 3, 10, generator=torch.Generator().manual_seed(0)) * 3 + 1
GAIN = torch.linspace(0.5, 2, 10)
raw = X.double().numpy()
centred = raw - raw.mean(-1, keepdims=True)
EXPECTED = {
    "scale:0.16": raw * 0.16,
    "centre": centred,
    "unit-norm": raw / np.linalg.norm(raw, axis=-1, keepdims=True) * np.sqrt(10),
    "unit-norm:2.5": raw / np.linalg.norm(raw, axis=-1, keepdims=True) * 2.5,
    "layer-norm": centred / (centred.std(-1, ddof=1, keepdims=True) + 1e-5),
    "rms-norm": raw / np.sqrt((raw**2).mean(-1, keepdims=True) + 1e-6),
    "centre,scale:2": centred * 2,
}


@pytest.mark.parametrize("text", sorted(EXPECTED))
def test_steps_are_their_formulas_and_are_undone(text: str) -> None:
    y, back = transformed(X, parse_transform(text))
    np.testing.assert_allclose(y.numpy(), EXPECTED[text], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(back(y).numpy(), raw, rtol=2e-4, atol=2e-4)


def test_a_gain_is_divided_out_and_a_zero_gain_carries_nothing() -> None:
    gain = GAIN.clone()
    gain[3] = 0
    y, back = transformed(X, (RmsNorm(1e-6, gain),))
    np.testing.assert_allclose(y.numpy(), EXPECTED["rms-norm"] * gain.numpy(), rtol=2e-5, atol=2e-5)
    again = back(y).numpy()
    assert (again[..., 3] == 0).all()
    np.testing.assert_allclose(np.delete(again, 3, -1), np.delete(raw, 3, -1), rtol=2e-4, atol=2e-4)


def test_words() -> None:
    assert describe(()) == "none" and describe((Centre(), Scale(0.5))) == "centre, scale 0.5"
    assert parse_transform("none") == ()


@pytest.mark.parametrize(
    "text", ["", "scale", "scale:-1", "scale:nan", "centre:2", "none,centre", "norm", "unit-norm:x", "scale:0"]
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(BadConfig, match="transform: expected none, or a comma-separated list of"):
        parse_transform(text)
