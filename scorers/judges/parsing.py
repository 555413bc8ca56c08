"""Reads the answers out of a language model's reply: exactly as many as asked for, or a reason why not.

Pure functions, strict on purpose: a reply that could mean two things means nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

__all__ = ["Unparsable", "parse_list", "parse_yes_no", "probability_of_yes"]

_YES = {"1", "1.0", "true", "True"}
_NO = {"0", "0.0", "false", "False"}
_LABELS = re.compile(r"""(?:[\s`{}"':=.,;]|json|answers?|Answers?)*""")  # what may stand around the list of one item


class Unparsable(ValueError):
    """A reply that cannot be read; the message is the reason that is recorded."""


def parse_list(text: str, count: int) -> tuple[bool, ...]:
    """The ``count`` answers of a reply that holds exactly one list of them.

    An answer is 0 or 1, 0.0 or 1.0, true or false (also as Python writes them), bare or quoted. Prose around the list is
    tolerated, but not around a list of one, which might be a mere reference such as "[1]". Raises Unparsable.
    """
    if text.count("[") != 1 or text.count("]") != 1 or text.index("[") > text.index("]"):
        raise Unparsable(f"the reply holds no single list: {_short(text)}")
    before, _, rest = text.partition("[")
    inside, _, after = rest.partition("]")
    if count == 1 and not (_LABELS.fullmatch(before) and _LABELS.fullmatch(after)):
        raise Unparsable(f"the reply is more than a list of one answer: {_short(text)}")
    answers = [_answer(element.strip(" \t\r\n"), text) for element in inside.split(",")] if inside.strip() else []
    if len(answers) != count:
        raise Unparsable(f"{len(answers)} answers instead of {count}: {_short(text)}")
    return tuple(answers)


def _answer(element: str, text: str) -> bool:
    bare = element
    if len(element) >= 2 and element[0] == element[-1] and element[0] in "\"'":
        bare = element[1:-1]
    if bare in _YES:
        return True
    if bare in _NO:
        return False
    raise Unparsable(f"{element[:20]!r} is neither 0 nor 1: {_short(text)}")


def parse_yes_no(text: str) -> bool:
    """The answer of a reply that is one word, yes or no. Raises Unparsable."""
    word = text.strip().strip(".!\"'").lower()
    if word not in ("yes", "no"):
        raise Unparsable(f"the reply is neither yes nor no: {_short(text)}")
    return word == "yes"


def probability_of_yes(candidates: Mapping[str, float]) -> float | None:
    """P(yes) against no, from the natural-log probabilities of the first token; None where neither is a candidate.

    Spellings that differ in case or surrounding space count together.
    """
    mass = {"yes": 0.0, "no": 0.0}
    for token, logprob in candidates.items():
        word = token.replace("Ġ", " ").replace("▁", " ").strip().lower()
        if word in mass and not math.isnan(logprob):
            mass[word] += math.exp(min(logprob, 0.0))
    total = mass["yes"] + mass["no"]
    return mass["yes"] / total if total > 0 else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "…")
