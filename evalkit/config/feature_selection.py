"""Parses ``--features``: which features of a dictionary are scored.

The choices are a number of random features that fire, explicit ids, or features within a range of density. Knows nothing
of dictionaries. Reads the file of a ``file:`` choice and no other; writes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.config.defaults import N_FEATURES
from evalkit.errors import BadConfig, MissingFile

__all__ = ["Choice", "parse_features"]

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_BAND = re.compile(r"density:([0-9.e+-]+?)\.\.([0-9.e+-]+?)(?::(\d+))?")
_MOST = 1_000_000  # maximum number of ids in one choice
_FORMS = "50 (at random among those that fire), ids:0-99,512, file:IDS.txt, or density:1e-4..1e-2:50"


@dataclass(frozen=True, slots=True)
class Choice:
    """A choice of features.

    ``n``: number of features.
    ``ids``: their ids; None if they are drawn at random.
    ``band``: lowest and highest share of tokens on which a feature fires; None for no limits.
    """

    n: int
    ids: tuple[str, ...] | None = None
    band: tuple[float, float] | None = None

    def fields(self) -> dict[str, Any]:
        """The choice as fields of ``RunConfig``."""
        return {"n_features": self.n, "feature_ids": self.ids, "density_band": self.band}


def parse_features(text: str | int, default: int = N_FEATURES) -> Choice:
    """Parses ``50``, ``ids:0-99,512``, ``file:PATH`` or ``density:LOW..HIGH[:N]``.

    Ids in a file are separated by newlines, commas or spaces. ``default``: number of features for ``density:`` without N.
    Raises BadConfig if the text has none of these forms, and MissingFile if the file does not exist.
    """
    text = str(text).strip()
    if text.isdecimal() and int(text) > 0:
        return Choice(int(text))
    if text.startswith("ids:"):
        ids = _ids(text.removeprefix("ids:").split(","), text)
        return Choice(len(ids), ids)
    if text.startswith("file:"):
        path = Path(text.removeprefix("file:")).expanduser()
        try:
            words = re.split(r"[\s,]+", path.read_text("utf-8"))
        except FileNotFoundError as error:
            raise MissingFile(
                str(path), expected="a file of feature ids", seen="no such file", fix="check the path"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            seen = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"unreadable: {error.strerror}"
            raise BadConfig(
                str(path), expected="a text file of feature ids", seen=seen, fix="write one id per line"
            ) from error
        ids = _ids(words, text)
        return Choice(len(ids), ids)
    if found := _BAND.fullmatch(text):
        try:
            low, high = float(found[1]), float(found[2])
        except ValueError:
            low, high = 1.0, 0.0
        if 0 <= low < high <= 1:
            return Choice(int(found[3] or default), None, (low, high))
    raise BadConfig("--features", expected=_FORMS, seen=repr(text), fix="use one of these forms")


def _ids(words: list[str], text: str) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for word in filter(None, (word.strip() for word in words)):
        parts = _RANGE.fullmatch(word)
        if parts is None or (parts[2] and int(parts[2]) < int(parts[1])):
            raise BadConfig(
                "--features", expected="ids and ranges such as 7 or 0-99", seen=repr(word), fix=f"correct {text!r}"
            )
        first, last = int(parts[1]), int(parts[2] or parts[1])
        if len(found) + last - first >= _MOST:
            raise BadConfig("--features", expected=f"fewer than {_MOST:,} ids", seen=word, fix="choose fewer features")
        found.update((str(index), None) for index in range(first, last + 1))
    if not found:
        raise BadConfig("--features", expected="feature ids", seen=repr(text), fix="give at least one id")
    return tuple(found)
