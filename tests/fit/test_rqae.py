"""FVU of an RQAE against the literal encoding, norm and sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evalkit.errors import CorpusError
from evalkit.fit.rqae import measure_rqae_fit
from evalkit.records import SubjectInfo
from rqae import RqaeConfig
from rqae.encoding.codebook import distinct_codes
from rqae.literal import encode_literal
from tests.support.random_rqae import random_rqae

MODEL = random_rqae(RqaeConfig(16, num_quantizers=10))
GAIN = np.random.default_rng(0).normal(1, 0.3, 16).astype(np.float32)
INFO = SubjectInfo("toy", 16, 2, GAIN, 1e-6)
HIDDEN = torch.randn(90, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1


def test_fvu_is_the_textbook_one_in_both_units() -> None:
    depths = (1, 4, 10)
    found = measure_rqae_fit(MODEL, HIDDEN.split(40), INFO, depths)
    x = HIDDEN.double().numpy()
    scale = 1 / np.sqrt((x**2).mean(1, keepdims=True) + 1e-6)
    normed = x * scale * GAIN
    codes = encode_literal(MODEL, torch.from_numpy(normed).float())
    for depth in depths:
        rebuilt = np.zeros_like(normed)
        for layer in range(depth):
            vectors = MODEL.codebook[layer][codes[:, layer]].double()
            rebuilt += (vectors @ MODEL.w_out[layer].T.double() + MODEL.b_out[layer].double()).numpy()
        for kind, truth, guess in (("normed", normed, rebuilt), ("raw", x, rebuilt / GAIN / scale)):
            expected = ((truth - guess) ** 2).sum() / ((truth - truth.mean(0)) ** 2).sum()
            assert getattr(found, kind)[depth] == pytest.approx(expected, rel=1e-4)
    pairs = {(layer, code) for row in codes.tolist() for layer, code in enumerate(row)}
    assert found.alive_share == pytest.approx(len(pairs) / (10 * distinct_codes(MODEL.config)))
    assert found.n_tokens == 90
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-9)


def test_chunks_change_only_rounding() -> None:
    whole = measure_rqae_fit(MODEL, [HIDDEN], INFO, (10,))
    parts = measure_rqae_fit(MODEL, HIDDEN.split(7), INFO, (10,))
    assert whole.raw[10] == pytest.approx(parts.raw[10], rel=1e-6)


def test_no_rows_are_refused() -> None:
    with pytest.raises(CorpusError, match="hidden states: expected at least one row; seen none"):
        measure_rqae_fit(MODEL, [], INFO, (1,))
