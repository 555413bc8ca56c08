"""How reasoning models mark their thoughts, and where the answer begins.

The one home of these marks. Pure functions of a reply's text. A server that returns the reasoning in a field of its own
(``reasoning_content``, ``reasoning``) needs none of this: clients keep that field out of ``Response.text``.
"""

from __future__ import annotations

import json
import re

__all__ = ["answer_after_thought", "ends_in_thought", "opens_thought"]

_TAG = r"(?:seed:)?(?:think|thinking|thoughts?|reasoning|analysis|scratchpad|reflection)"
# One line per family: tags, Mistral, Kimi, gpt-oss (harmony; the turn's own marks may stand before it), Gemma, Cohere,
# OpenThinker.
_OPENING = re.compile(
    rf"<{_TAG}>"
    r"|\[THINK\]"
    r"|◁think▷"
    r"|(?:<\|start\|>assistant)?<\|channel\|>(?:analysis|commentary)"
    r"|<\|channel>thought"
    r"|<\|START_THINKING\|>"
    r"|<\|begin_of_thought\|>",
    re.IGNORECASE,
)
_CLOSING = re.compile(
    rf"</{_TAG}>"
    r"|\[/THINK\]"
    r"|◁/think▷"
    r"|(?:<\|start\|>assistant)?<\|channel\|>final(?:\s*<\|constrain\|>\w+)?<\|message\|>"
    r"|<channel\|>"
    r"|<\|END_THINKING\|>"
    r"|<\|end_of_thought\|>",
    re.IGNORECASE,
)
# Harmony as it looks when a server drops special tokens: "analysisThe user asks…assistantfinal{…}".
_BARE_HARMONY = re.compile(r"\s*analysis(?=\S).*?assistantfinal", re.DOTALL)
# What may frame the answer after a thought: marks of the turn or of the answer itself.
_BEFORE_ANSWER = re.compile(r"\s*(?:<\|START_RESPONSE\|>|<\|begin_of_solution\|>)")
_AFTER_ANSWER = re.compile(
    r"(?:<\|(?:return|end|eot_id|im_end|END_RESPONSE|END_OF_TURN_TOKEN|end_of_solution)\|>\s*)+$", re.IGNORECASE
)
# A mark can be quoted by the answer itself, inside a JSON string. So many opening braces before it are tried as the
# start of that JSON; an answer of ours has one.
_BRACES_TRIED = 16


def answer_after_thought(text: str) -> str:
    """The reply after its last thought, without marks that frame the answer; ``text`` unchanged if no thought ends in it.

    The opening mark may be missing: some chat templates write it into the prompt. A closing mark that the answer quotes
    inside a JSON string ends no thought.
    """
    marks = [found.end() for found in _CLOSING.finditer(text)]
    if bare := _BARE_HARMONY.match(text):
        marks.append(bare.end())
    unquoted_before = len(text)
    for end in sorted(marks, reverse=True):
        if end > unquoted_before:
            continue
        quoted_from = _json_around(text, end)
        if quoted_from is None:
            answer = text[end:]
            if framed := _BEFORE_ANSWER.match(answer):
                answer = answer[framed.end() :]
            return _AFTER_ANSWER.sub("", answer)
        unquoted_before = quoted_from
    return text


def ends_in_thought(text: str) -> bool:
    """Whether the reply ends before its thought does, so that nothing in it is an answer yet."""
    return _OPENING.match(answer_after_thought(text).lstrip()) is not None


def opens_thought(text: str) -> bool:
    """Whether an opening mark stands anywhere in ``text``."""
    return _OPENING.search(text) is not None


def _json_around(text: str, end: int) -> int | None:
    """Where the JSON object of the reply begins that the mark ending at ``end`` lies in; None if it lies in none."""
    decoder = json.JSONDecoder()
    place = end
    for _ in range(_BRACES_TRIED):
        place = text.rfind("{", 0, place)
        if place == -1:
            return None
        try:
            _, stop = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            continue
        if stop >= end:
            return place
    return None
