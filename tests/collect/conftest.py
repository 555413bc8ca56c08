"""A corpus of common and rare tokens, and its calibration sample."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evalkit.collect.calibration import Calibration, calibrate, choose_centres
from tests.support.array_corpus import ArrayCorpus, random_corpus
from tests.support.table_states import SITE, TableStates, pools_of


@pytest.fixture
def corpus() -> ArrayCorpus:
    """Half of the positions hold one of 40 common tokens."""
    corpus = random_corpus(n=400)
    common = np.random.default_rng(1).integers(100, 140, corpus.tokens.shape)
    return replace(
        corpus, tokens=np.where(np.random.default_rng(2).random(corpus.tokens.shape) < 0.5, common, corpus.tokens)
    )


@pytest.fixture
def calibration(corpus: ArrayCorpus, tmp_path: Path) -> Calibration:
    return calibrate(
        corpus, TableStates(), tmp_path / "c.safetensors", sites=[SITE.path], n_contexts=100,
        centres=choose_centres(corpus, pools_of(corpus, 0), 5, 0), seed=0,
    )  # fmt: skip
