"""Converts tokens as tools write them (``Ġthe``, ``▁the``, ``Ċ``, ``<0x0A>``, ``âĢĻ``) to the text they represent.

Works from strings alone, without the tokenizer. If any token contains a space, the text was decoded already, and Ġ and ▁
are left unchanged. Knows no format and no model; reads and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from evalkit.corpus.token_text import BYTES, bytes_of_byte_level, bytes_of_sentencepiece, split_bytes

__all__ = ["boundaries", "text_pieces"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_RAW = re.compile("[" + "".join(re.escape(letter) for letter, byte in BYTES.items() if byte >= 0x80) + "]{2,}")
_BOUNDARIES = frozenset(
    {
        *("<bos>", "<eos>", "<pad>", "<s>", "</s>", "[CLS]", "[SEP]", "[PAD]"),
        *(
            "<|endoftext|>",
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|im_end|>",
            "<|eot_id|>",
            "<|padding|>",
            "<|pad|>",
        ),
        *(f"<｜{end}{space}of{space}sentence｜>" for end in ("begin", "end") for space in "▁ "),
    }
)


def boundaries(tokens: Sequence[str]) -> tuple[bool, ...]:
    """Per token, whether it is BOS, EOS or padding, which separate the documents that a text consists of."""
    if _BOUNDARIES.isdisjoint(tokens):
        return (False,) * len(tokens)
    return tuple(token in _BOUNDARIES for token in tokens)


def text_pieces(tokens: Sequence[str]) -> tuple[str, ...]:
    """One text piece per token. A character split over several tokens belongs to the first, the others are empty."""
    text = "".join(tokens)
    if " " not in text:
        if "Ġ" in text or "Ċ" in text:
            return tuple(split_bytes([bytes_of_byte_level(token) for token in tokens]))
        if "▁" in text:
            tokens = [token.replace("▁", " ") for token in tokens]
    pieces = _decode_byte_tokens(tokens) if "<0x" in text else list(tokens)
    return _decode_raw_bytes(pieces) if _RAW.search(text) else tuple(pieces)


def _decode_byte_tokens(tokens: Sequence[str]) -> list[str]:
    """Decode runs of byte tokens (``<0xC3>``, ``<0xA9>``) to characters."""
    pieces: list[str] = []
    for is_bytes, run in groupby(tokens, lambda token: _BYTE_TOKEN.fullmatch(token) is not None):
        written = list(run)
        pieces += split_bytes([bytes_of_sentencepiece(token) for token in written]) if is_bytes else written
    return pieces


def _decode_raw_bytes(pieces: list[str]) -> tuple[str, ...]:
    """Decode runs of letters that stand for bytes of characters, as byte-level tokenizers write them."""
    text = "".join(pieces)
    owner = [place for place, piece in enumerate(pieces) for _ in piece]
    decoded = list(text)
    for run in _RAW.finditer(text):
        data = [bytes([BYTES[letter]]) for letter in run[0]]
        if "\ufffd" not in b"".join(data).decode("utf-8", errors="replace"):
            decoded[run.start() : run.end()] = split_bytes(data)
    found = [""] * len(pieces)
    for place, letter in zip(owner, decoded, strict=True):
        found[place] += letter
    return tuple(found)
