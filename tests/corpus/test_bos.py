from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from evalkit.corpus.bos import wanted_bos
from evalkit.corpus.tokenisation import tokenize_corpus
from evalkit.errors import BadConfig
from evalkit.records import SourceInfo
from tests.conftest import byte_level_tokenizer


def source(name: str, **declared: object) -> SourceInfo:
    return SourceInfo(name, "sae", "layers.1", declared=declared)


SAYS, DENIES, SILENT = source("a", prepend_bos=True), source("b", prepend_bos=False), source("c", l0=3.0)


@pytest.mark.parametrize(
    ("given", "sources", "wanted"),
    [
        (None, [], None),
        (None, [SILENT], None),
        (None, [SILENT, SAYS, source("d", prepend_bos=True)], True),
        (None, [DENIES], False),
        (True, [DENIES, SAYS], True),
        (False, [SAYS, SILENT], False),
        (True, [SILENT], True),
    ],
)
def test_the_option_decides_then_what_is_declared(
    given: bool | None, sources: list[SourceInfo], wanted: bool | None
) -> None:
    assert wanted_bos(given, sources) is wanted


def test_dictionaries_of_one_run_must_agree() -> None:
    with pytest.raises(BadConfig) as caught:
        wanted_bos(None, [SAYS, DENIES])
    assert str(caught.value) == (
        "prepend_bos: expected dictionaries that all declare the same, because they read the same contexts; seen true for "
        "a and false for b; fix: score them in runs of their own, or decide with --prepend-bos or --no-prepend-bos"
    )


def test_an_option_against_what_is_declared_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        wanted_bos(False, [SAYS, SILENT])
    assert caplog.messages == ["a declares prepend_bos True; contexts have no BOS"]


def test_a_tokenizer_without_bos_is_told_of(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.bos_token = None
    (tmp_path / "a.txt").write_text("the whale swam " * 100)
    with pytest.raises(BadConfig, match=r"prepend_bos: expected a tokenizer with a BOS token; .*--no-prepend-bos"):
        tokenize_corpus(tmp_path / "a.txt", tokenizer, tmp_path / "corpus", add_bos=True)


@pytest.mark.parametrize(
    ("first", "asked", "told"), [(5, True, True), (0, True, False), (0, False, True), (5, None, False)]
)
def test_rows_of_a_token_matrix_stay_and_are_told_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: int, asked: bool | None, told: bool
) -> None:
    tokens = np.random.default_rng(0).integers(2, 300, (4, 64))
    tokens[:, 0] = first
    np.save(tmp_path / "m.npy", tokens)
    with caplog.at_level(logging.WARNING):
        corpus = tokenize_corpus(tmp_path / "m.npy", byte_level_tokenizer(), tmp_path / "corpus", add_bos=asked)
    assert np.array_equal(corpus.tokens, tokens)
    assert any("used unchanged" in message for message in caplog.messages) is told
