"""The explainer with a chain of thought: a language model first writes notes on the examples, then the explanation.

The reply is one JSON object in which the notes come first, so that the model writes the phrase after them. Only the phrase
is kept. The prompt is the versioned file ``prompts/cot_v1.toml``; the module ``asking`` sends it.
"""

from __future__ import annotations

from collections.abc import Sequence

from evalkit.markup import MARK_SHARE
from evalkit.protocols import Client
from evalkit.records import Example, ExplainExamples, Explanation, FeatureId, Message, Response
from evalkit.seeds import derive_request_seed
from explainers.asking import (
    PHRASE,
    Form,
    active_lines,
    ask_for_phrase,
    chat,
    inactive_lines,
    phrase,
    read_object,
    read_prompt,
    require_client,
    spread,
)

__all__ = ["SCHEMA", "CotExplainer", "cot_prompt", "parse_conclusion"]

_PROMPT = read_prompt("cot_v1")
_MOST_NOTES = 8
_NOTE = {"type": "string", "minLength": 1, "maxLength": 160}
SCHEMA = {
    "type": "object",
    "properties": {  # in the order in which the model must write them
        "observations": {"type": "array", "items": _NOTE, "minItems": 3, "maxItems": _MOST_NOTES},
        "explanation": PHRASE,
    },
    "required": ["observations", "explanation"],
    "additionalProperties": False,
}


class CotExplainer:
    """Asks the client for notes on the examples and one phrase.

    ``max_tokens``: limit for both; eight notes of 160 characters are about 350 tokens of English, a phrase about 100.

    The other options are those of the explainer ``default``.
    """

    name = "cot"
    uses_client = True
    version = "1"

    def __init__(
        self,
        n_examples: int = 40,
        n_negatives: int = 0,
        share: float = MARK_SHARE,
        max_tokens: int = 600,
        thinking_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        self.n_examples, self.n_negatives, self.share = n_examples, n_negatives, share
        self.max_tokens, self.seed = max_tokens + thinking_tokens, seed

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None) -> Explanation:
        """Describe the feature. Raises BadConfig without a client, ClientError if no reply can be parsed."""
        silent = spread(examples.negatives, self.n_negatives)
        text, note = await ask_for_phrase(
            require_client(self.name, client),
            examples,
            spread(examples.positives, self.n_examples),
            lambda shown: cot_prompt(examples, shown, silent, self.share),
            _FORM,
            seed=derive_request_seed(self.seed, examples.source, feature),
            max_tokens=self.max_tokens,
        )
        return Explanation(examples.source, feature, self.name, self.version, text, note)


def cot_prompt(
    examples: ExplainExamples,
    shown: Sequence[Example],
    silent: Sequence[Example] = (),
    share: float = MARK_SHARE,
) -> list[Message]:
    """The chat messages that ask for notes and an explanation. ``shown``: active windows; ``silent``: inactive ones."""
    return chat(_PROMPT, [*active_lines(examples, shown, share), *inactive_lines(silent, len(shown) + 1)])


def parse_conclusion(response: Response) -> str | None:
    """The phrase of a reply; None unless it has one JSON object with one to eight non-blank notes and the explanation."""
    found = read_object(response, {"observations", "explanation"})
    if found is None:
        return None
    notes = found["observations"]
    if not isinstance(notes, list) or not 1 <= len(notes) <= _MOST_NOTES:
        return None
    return phrase(found["explanation"]) if all(isinstance(note, str) and note.strip() for note in notes) else None


_FORM = Form(
    SCHEMA,
    parse_conclusion,
    _PROMPT["retry"],
    'a JSON object {"observations": ["…"], "explanation": "…"} with one to eight notes and one phrase',
)
