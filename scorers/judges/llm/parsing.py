"""Parses a language model's reply: returns exactly the requested number of answers, or raises with the reason.

A reply is accepted only if it is unambiguous. It may be a list of 0 and 1, possibly repeated, in prose that neither denies
it nor calls it an example. Or it may be, without brackets and prose, the answers alone or numbered from 1. Pure functions,
linear in the length of the reply. Does not know prompts.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping

from evalkit.thoughts import answer_after_thought, opens_thought

__all__ = [
    "Unparsable",
    "gives_yes_or_no",
    "is_spoken_of",
    "parse_list",
    "parse_yes_no",
    "probability_of_yes",
    "takes_back",
]

_UNKNOWN_SHARE = 0.02  # how far P(yes) may be from its true value because a list of candidates is cut short
_LONGEST = 20_000  # characters after the reasoning; the answers need a few hundred

_YES = re.compile(r"1(?:\.0*)?(?:e[+-]?0+)?|true|yes", re.IGNORECASE | re.ASCII)
_NO = re.compile(r"-?0(?:\.0*)?(?:e[+-]?\d+)?|false|no", re.IGNORECASE | re.ASCII)
_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’"}

_INVISIBLE = re.compile("[\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")
_FULL_WIDTH = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {ord("、"): ","}
_FOREIGN_DIGIT = re.compile(r"(?![0-9])\d")

_LIST = re.compile(r"\[([^\[\]]*)\]")
_LABELS = re.compile(r"""(?:[\s`{}"':=.,;*]|json|answers?)*""", re.IGNORECASE)  # allowed around a list of one answer
_LEAD_IN = 200  # how many characters before a list are searched for words that introduce it
_GIVES_NEXT = re.compile(
    r"""[\s"'`>*•-]*|.*(?:[:=>→–—\-*{$]|\]\s*,?|\b(?:is|are|answers?))["'`\s]*""", re.IGNORECASE | re.DOTALL
)
_DENIES_NEXT = re.compile(
    r"\b(?:not|never|neither|nor|or|cannot|examples?|instance|e\.g|formats?|form|template|such|like|instead|rather|would"
    r"|wrong|incorrect|invalid)\b|n['’]t\b",
    re.IGNORECASE,
)
_TAKES_BACK = re.compile(
    r"\b(?:wait|correction|on second thought|scratch that|let me (?:reconsider|recheck|redo|correct)"
    r"|(?<!if this )(?<!if that )(?<!if it )(?:is|was|are|were|that['’]s) (?:wrong|incorrect|a mistake)"
    r"|i (?:cannot|can['’]t|could not|couldn['’]t) (?:tell|say|judge|answer|decide|determine))\b",
    re.IGNORECASE,
)
_LEAVES_LAST = re.compile(r"""[ \t"'`)]*(?:$|[\n.,;:!/}\]\[<#*$–—-]|(?:because|since|as|where|for)\b)""", re.IGNORECASE)
_SENTENCE_END = re.compile(r'[!?;。]|(?<!e\.g)\.(?!\S)|",', re.IGNORECASE)

_HEADING = re.compile(r"\s*(?:json\b)?\s*(?:answers?\s*[:=])?\s*", re.IGNORECASE)
_ENTRY = re.compile(
    r"(?:[-•]\s+)?(?:(?:text|item|answer)[\s_#]*)?(?P<number>[1-9][0-9]{0,3})"
    r"(?:[.)]\s+|\s*(?:[:=]|->|→)\s*|\s+[-–—]\s+)(?P<answer>\S+?)\.?",
    re.IGNORECASE,
)


class Unparsable(ValueError):
    """Raised for a reply that cannot be parsed; the message is the reason that is recorded."""


def parse_list(text: str, count: int) -> tuple[bool, ...]:
    """The answers of a reply. Raises Unparsable, and nothing else, unless there are ``count`` and all its lists agree.

    An answer is a number equal to 0 or 1, or true, false, yes or no, with or without quotes. Prose around a list is
    accepted, but not around a list of one answer, because "[1]" might be a reference to a text.
    """
    reply = answer_after_thought(_visible(text)).strip()
    if len(reply) > _LONGEST:
        raise Unparsable(f"the reply is too long, {len(reply)} characters: {_short(text)}")
    if opens_thought(reply):
        raise Unparsable(f"the reply ends during the model's reasoning: {_short(text)}")
    if "[" in reply or "]" in reply:
        answers = _in_brackets(reply, text)
        if count == 1 and not _LABELS.fullmatch(_LIST.sub("", reply)):
            raise Unparsable(f"the reply contains more than a list of one answer: {_short(text)}")
    else:
        answers = _numbered(reply) or _bare(reply)
        if not answers or count == 1:  # a single number may be the number of a text
            raise Unparsable(f"the reply contains no readable list: {_short(text)}")
    if len(answers) != count:
        raise Unparsable(f"{len(answers)} answers instead of {count}: {_short(text)}")
    return tuple(answers)


def _visible(text: str) -> str:
    """The reply without invisible characters and surrounding space, and with digits and brackets in ASCII."""
    if text.isascii():
        return text.strip()
    seen = _INVISIBLE.sub("", text).translate(_FULL_WIDTH).strip()
    return _FOREIGN_DIGIT.sub(lambda found: str(unicodedata.decimal(found[0])), seen)


def _in_brackets(reply: str, text: str) -> list[bool]:
    """The answers in the reply's list, which may be repeated. Brackets without any answer count as prose."""
    if re.sub(r"[^\[\]]+", "", reply).replace("[]", ""):
        raise Unparsable(f"the reply contains no readable list: {_short(text)}")
    only: list[bool] | None = None
    reason = ""
    for found in _LIST.finditer(reply):
        elements = _elements(found[1])
        answers = [answer for answer in map(_answer, elements) if answer is not None]
        if len(answers) < len(elements):
            odd = next(element for element in elements if _answer(element) is None)
            reason = f"{odd[:20]!r} is neither 0 nor 1: {_short(text)}"
            if answers:
                raise Unparsable(reason)
        elif is_spoken_of(reply, *found.span()):
            raise Unparsable(f"the reply discusses a list instead of giving one: {_short(text)}")
        elif only is not None and answers != only:
            raise Unparsable(f"the reply contains lists that differ: {_short(text)}")
        else:
            only = answers
    if only is None:
        raise Unparsable(reason)
    if takes_back(reply, reply.rindex("]") + 1):
        raise Unparsable(f"the reply retracts its list: {_short(text)}")
    return only


def takes_back(reply: str, end: int) -> bool:
    """Whether the text after the last list of a reply, which ends at ``end``, retracts the list."""
    return _TAKES_BACK.search(reply, end) is not None


def is_spoken_of(reply: str, start: int, end: int) -> bool:
    """Whether the words around the list ``reply[start:end]`` do more than introduce it.

    For example, they may call the list an example or a format, deny it or question it.
    """
    before = re.sub(r"```\w*\s*$", "", reply[max(0, start - _LEAD_IN) : start])
    line = before.rpartition("\n")[2]
    if not line.strip() and before.rstrip().endswith(":"):
        line = before.rstrip().rpartition("\n")[2]
    lead_in = _SENTENCE_END.split(line)[-1]
    handed_over = _GIVES_NEXT.fullmatch(lead_in) and _LEAVES_LAST.match(reply, end)
    return not handed_over or bool(_DENIES_NEXT.search(lead_in))


def _elements(inside: str) -> list[str]:
    """The elements of a list. One trailing separator is allowed.

    The separator is the comma if the list contains one, else the semicolon, else, after an initial answer, the space.
    """
    for separator in ",;":
        if separator in inside:
            *elements, last = (element.strip() for element in inside.split(separator))
            return [*elements, last] if last else elements
    words = inside.split()
    return words if words and _answer(words[0]) is not None else [inside.strip()] * bool(words)


def _answer(element: str) -> bool | None:
    bare = element
    if len(element) >= 2 and _QUOTES.get(element[0]) == element[-1]:
        bare = element[1:-1]
    if _YES.fullmatch(bare):
        return True
    return False if _NO.fullmatch(bare) else None


def _numbered(reply: str) -> list[bool]:
    """The answers of a reply such as lines "1. 0" and "2. yes", or {"1": 0, "2": 1}. Empty if it contains anything else."""
    plain = _HEADING.sub("", re.sub(r"[*`\"'“”‘’]", "", reply), count=1).strip()
    if plain.startswith("{") and plain.endswith("}"):
        plain = plain[1:-1]
    answers: list[bool] = []
    for part in re.split(r"[\n,;]|(?<=[a-z])\.(?=\s|$)", plain):
        if part.strip():
            entry = _ENTRY.fullmatch(part.strip())
            answer = _answer(entry["answer"]) if entry else None
            if entry is None or answer is None or int(entry["number"]) != len(answers) + 1:
                return []
            answers.append(answer)
    return answers


def _bare(reply: str) -> list[bool]:
    """The answers of a reply such as "1, 0, 1", "1 0 1" or one answer per line. Empty if it contains anything else."""
    plain = _HEADING.sub("", re.sub(r"[*`]", "", reply), count=1).strip()
    if plain.startswith("(") and plain.endswith(")"):
        plain = plain[1:-1]
    if re.fullmatch(r"[01](?:[ \t]+[01])+", plain):
        elements = plain.split()
    elif "," in plain:
        elements = [element.strip() for element in plain.removesuffix(".").split(",")]
    else:
        elements = [line.strip() for line in plain.splitlines() if line.strip()]
    speech = "," in plain and any(element.lower() in ("yes", "no") for element in elements)  # "No, no."
    answers = [answer for answer in map(_answer, elements) if answer is not None]
    cut = any(element.endswith(".") for element in elements)  # "1." may number a text
    return [] if speech or cut or len(answers) < len(elements) else answers


def parse_yes_no(text: str) -> bool:
    """The answer of a reply that is one word, yes or no. Raises Unparsable."""
    word = text.strip().strip(".!\"'").lower()
    if word not in ("yes", "no"):
        raise Unparsable(f"the reply is neither yes nor no: {_short(text)}")
    return word == "yes"


def gives_yes_or_no(candidates: Mapping[str, float], reply: str) -> bool:
    """Whether P(yes) can be computed from the first token: it is yes or no, in the reply or with probability ≥ 0.5.

    Servers may return probabilities from before the constraint. A low probability of both words is therefore acceptable if
    the reply is an answer.
    """
    begun = reply.strip().lower()
    return _yes_no_mass(candidates, "yes") + _yes_no_mass(candidates, "no") >= 0.5 or (
        begun != "" and any(word.startswith(begun) for word in ("yes", "no"))
    )


def _yes_no_mass(candidates: Mapping[str, float], word: str) -> float:
    """The probability of all spellings of ``word`` among the candidates, whose values are natural-log probabilities."""
    return sum(
        math.exp(min(logprob, 0.0))
        for token, logprob in candidates.items()
        if token.replace("Ġ", " ").replace("▁", " ").strip().lower() == word and not math.isnan(logprob)
    )


def probability_of_yes(candidates: Mapping[str, float]) -> float | None:
    """P(yes) / (P(yes) + P(no)), from natural-log probabilities of the first token; None if that is not known.

    Spellings that differ in case or surrounding space are added up. A list of candidates may be cut short, so that one of
    the words is missing. Its probability is then at most what the list leaves over, and at most that of the least likely
    candidate in a list of several. If that could change the result by more than 0.02, there is no result.
    """
    yes, no = _yes_no_mass(candidates, "yes"), _yes_no_mass(candidates, "no")
    if yes + no == 0:
        return None
    if yes and no:
        return yes / (yes + no)
    masses = [math.exp(min(logprob, 0.0)) for logprob in candidates.values() if not math.isnan(logprob)]
    missing = max(0.0, 1.0 - sum(masses))
    if len(masses) > 1:
        missing = min(missing, *masses)
    known = yes + no
    return float(yes > 0) if missing <= _UNKNOWN_SHARE * (known + missing) else None


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "…")
