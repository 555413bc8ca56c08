from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from evalkit.corpus.token_text import _TABLES, _by_prefixes, token_pieces
from evalkit.errors import CorpusError
from tests.conftest import byte_level_tokenizer, sentencepiece_tokenizer

BYTE_LEVEL = byte_level_tokenizer()
SENTENCEPIECE = sentencepiece_tokenizer()
HARD = "Hi 😀👩‍👩‍👧 日本語 naïve — “q”\n\n\tx  y\u00a0z \ufffd end"


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_decoding_of_any_ids(tokenizer: Any, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=24))
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == decode(tokenizer, ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_of_any_text(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_pieces(tokenizer, ids)) == decode(tokenizer, ids)
    if tokenizer is BYTE_LEVEL:
        assert "".join(token_pieces(tokenizer, ids)) == text


def test_both_have_a_table() -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        token_pieces(tokenizer, [5])
        assert _TABLES[tokenizer] is not None


def test_a_split_character_belongs_to_its_first_token() -> None:
    ids = BYTE_LEVEL("a é")["input_ids"]
    assert token_pieces(BYTE_LEVEL, ids)[-2:] == ("é", "")
    assert token_pieces(BYTE_LEVEL, ids[:-1])[-1] == "\ufffd"  # a window that ends inside it


def test_sentencepiece_leading_space_is_only_stripped_at_the_start() -> None:
    ids = SENTENCEPIECE("the the", add_special_tokens=False)["input_ids"]
    assert token_pieces(SENTENCEPIECE, ids) == ("the", " the")
    assert token_pieces(SENTENCEPIECE, ids[1:]) == ("the",)


def test_special_tokens_keep_their_text() -> None:
    assert token_pieces(BYTE_LEVEL, [0, 1]) == ("<s>", "</s>")


def test_one_row_is_like_many() -> None:
    """Libraries change what decoding returns for one row; ours is always a tuple of strings."""
    ids = BYTE_LEVEL("the whale")["input_ids"]
    assert all(isinstance(piece, str) for piece in token_pieces(BYTE_LEVEL, ids))
    assert token_pieces(BYTE_LEVEL, ids[:1]) == (token_pieces(BYTE_LEVEL, ids)[0],)
    assert token_pieces(BYTE_LEVEL, []) == ()


def test_negative_ids_are_an_error() -> None:
    with pytest.raises(CorpusError, match="ids from 0; seen -1"):
        token_pieces(BYTE_LEVEL, [3, -1])


@pytest.mark.parametrize("make", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_the_slow_way_agrees_about_the_text(make: Callable[[], Any]) -> None:
    tokenizer = make()
    draw = random.Random(5)
    for _ in range(100):
        ids = [draw.randrange(len(tokenizer)) for _ in range(12)]
        assert "".join(_by_prefixes(tokenizer, ids)) == "".join(token_pieces(tokenizer, ids))


@pytest.mark.slow
def test_smollm2(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(HARD)["input_ids"]
    pieces = token_pieces(tokenizer, ids)
    assert "".join(pieces) == HARD
    assert pieces[:3] == ("Hi", " 😀", "")
    draw = random.Random(11)
    windows = [[draw.randrange(len(tokenizer)) for _ in range(32)] for _ in range(10_000)]
    started = time.process_time()
    found = [token_pieces(tokenizer, window) for window in windows]
    assert time.process_time() - started < 8
    for window, pieces in zip(windows, found, strict=True):
        assert "".join(pieces) == decode(tokenizer, window)


@pytest.mark.slow
def test_wordpiece_goes_the_slow_way(minilm: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    ids = tokenizer("Hello, unaffable world's")["input_ids"]
    assert "".join(token_pieces(tokenizer, ids)) == decode(tokenizer, ids)
    assert token_pieces(tokenizer, ids)[3:6] == (" una", "ffa", "ble")
