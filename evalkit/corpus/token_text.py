"""The text piece of every token; the pieces of a window join to exactly the tokenizer's decoding of the window.

Knows tokenizers, not corpora or models; reads and writes nothing. Special tokens keep their text (windows exclude them by
their mask). A character split over several byte-level tokens belongs to the first of them; the others are empty. If a
decoder strips the start of a text (the space that sentencepiece puts there), the first piece lacks it too.

One table of strings per tokenizer makes this fast. The table is checked against the tokenizer on random ids when it is
created; if they disagree (with WordPiece, for example), pieces are the differences between decodings of growing prefixes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby
from typing import Any
from weakref import WeakKeyDictionary

from evalkit.errors import CorpusError

__all__ = ["BYTES", "bytes_of_byte_level", "bytes_of_sentencepiece", "split_bytes", "token_pieces"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TRIALS = 200  # random id sequences that a table is checked on
_TABLES: WeakKeyDictionary[Any, _Table | None] = WeakKeyDictionary()


def token_pieces(tokenizer: Any, ids: Iterable[int]) -> tuple[str, ...]:
    """One text piece per token id; their concatenation is the tokenizer's decoding of the ids.

    Special tokens are kept as text; spaces are not cleaned up. Ids without a token give an empty piece. Raises
    CorpusError for a negative id.
    """
    wanted = [int(index) for index in ids]
    if not wanted:
        return ()
    if min(wanted) < 0:
        raise CorpusError(
            f"token id {min(wanted)}", expected="ids from 0", seen=str(min(wanted)), fix="pass token ids of the corpus"
        )
    if tokenizer not in _TABLES:
        _TABLES[tokenizer] = _make_table(tokenizer)
    table = _TABLES[tokenizer]
    return _by_prefixes(tokenizer, wanted) if table is None else table.pieces(wanted)


class _Table:
    """The bytes of each token, and its text if these bytes are valid text alone. An id without a token has no bytes."""

    def __init__(self, raw: Sequence[bytes | None], byte_tokens: Sequence[bool], *, strip_first_space: bool) -> None:
        self._raw = raw
        self._byte_tokens = byte_tokens  # sentencepiece replaces each of these if a run of them is invalid
        self._has_byte_tokens = any(byte_tokens)
        self._strip = strip_first_space
        self._text: list[str | None] = [None if data is None else _strict(data) for data in raw]

    def pieces(self, ids: Sequence[int]) -> tuple[str, ...]:
        """One piece per id."""
        size = len(self._text)
        found = [self._text[index] if index < size else None for index in ids]
        pieces = [text for text in found if text is not None]
        if len(pieces) < len(found):
            pieces = self._join(ids)
        if self._strip:
            first = next((place for place, piece in enumerate(pieces) if piece), 0)
            pieces[first] = pieces[first].removeprefix(" ")
        return tuple(pieces)

    def _join(self, ids: Sequence[int]) -> list[str]:
        """Pieces of a sequence in which some characters are split over tokens, or some ids have no token."""
        pieces = [""] * len(ids)
        known = [place for place, index in enumerate(ids) if index < len(self._raw) and self._raw[index] is not None]
        for is_bytes, run in groupby(known, lambda place: self._has_byte_tokens and self._byte_tokens[ids[place]]):
            places = list(run)
            raw = [self._raw[ids[place]] or b"" for place in places]
            valid = not is_bytes or _strict(b"".join(raw)) is not None
            for place, piece in zip(places, split_bytes(raw) if valid else ["\ufffd"] * len(raw), strict=True):
                pieces[place] = piece
        return pieces


def _strict(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def split_bytes(raw: Sequence[bytes]) -> list[str]:
    """Decode joined bytes and give every character to the token that its first byte is in."""
    data = b"".join(raw)
    text = data.decode("utf-8", errors="replace")
    starts = [0, *accumulate(len(part) for part in raw)]
    pieces = [""] * len(raw)
    place = offset = 0
    for character in text:
        while place + 1 < len(raw) and starts[place + 1] <= offset:
            place += 1
        pieces[place] += character
        offset += _width(data, offset) if character == "\ufffd" else len(character.encode("utf-8"))
    return pieces


def _width(data: bytes, offset: int) -> int:
    """How many bytes one replacement character represents (three if the text itself contains U+FFFD)."""
    try:
        data[offset:].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start == 0:
            return error.end
    return 3


def _make_table(tokenizer: Any) -> _Table | None:
    """The table of a tokenizer whose decoder is byte-level or sentencepiece's, None if they disagree."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    added = {token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    byte_tokens = [name is not None and bool(_BYTE_TOKEN.fullmatch(name)) and name not in added for name in names]
    plain = [None if name is None else bytes_of_byte_level(name) for name in names]
    pieced = [None if name is None else bytes_of_sentencepiece(name) for name in names]
    for table in (
        _Table(plain, [False] * len(names), strip_first_space=False),
        _Table(pieced, byte_tokens, strip_first_space=False),
        _Table(pieced, byte_tokens, strip_first_space=True),
    ):
        if _agrees_with(table, tokenizer):
            return table
    return None


def _agrees_with(table: _Table, tokenizer: Any) -> bool:
    """Whether pieces of the table join to the tokenizer's decoding, on random ids with many rare ones among them."""
    draw = random.Random(0)
    size = len(tokenizer)
    for trial in range(_TRIALS):
        top = size if trial % 2 else min(size, 400)  # special and byte tokens have low ids in most vocabularies
        ids = [draw.randrange(top) for _ in range(1 + trial % 40)]
        if "".join(table.pieces(ids)) != _decode(tokenizer, ids):
            return False
    return True


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _by_prefixes(tokenizer: Any, ids: list[int]) -> tuple[str, ...]:
    """The text that each further token adds to the decoding. Quadratic in time, but works for every decoder."""
    full = _decode(tokenizer, ids)
    ends: list[int] = []
    for count in range(1, len(ids)):
        shared = 0
        for mine, final in zip(_decode(tokenizer, ids[:count]), full, strict=False):
            if mine != final:
                break
            shared += 1
        ends.append(max(shared, ends[-1] if ends else 0))
    ends.append(len(full))
    return tuple(full[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))


def _byte_map() -> dict[str, int]:
    """GPT-2's mapping of printable characters to bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(rest)}


BYTES = _byte_map()


def bytes_of_byte_level(token: str) -> bytes:
    """The bytes that a token of a byte-level tokenizer represents (``Ġthe``)."""
    if all(character in BYTES for character in token):
        return bytes(BYTES[character] for character in token)
    return token.encode("utf-8")  # an added token, kept as it is written


def bytes_of_sentencepiece(token: str) -> bytes:
    """The bytes that a token of a sentencepiece tokenizer represents (``▁the``, ``<0x0A>``)."""
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode("utf-8")
