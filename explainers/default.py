"""The explainer that shows a language model marked windows with integer activations and asks for one phrase.

The prompt is the versioned file ``prompts/default_v1.toml``; the module ``asking`` sends it. The functions that build the
prompt and parse the reply are pure.
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

__all__ = ["FORM", "SCHEMA", "DefaultExplainer", "explain_prompt", "parse_explanation"]

_PROMPT = read_prompt("default_v1")
SCHEMA = {
    "type": "object",
    "properties": {"explanation": PHRASE},
    "required": ["explanation"],
    "additionalProperties": False,
}


class DefaultExplainer:
    """Asks the client for one phrase.

    ``n_examples``: the largest number of active windows shown, evenly spaced among all.
    ``n_negatives``: the same for inactive windows.
    ``share``: where the marks are placed; see ``evalkit.markup.marked_tokens``.
    ``max_tokens``: limit for the reply.
    ``thinking_tokens``: additional tokens for models that reason before they answer.
    ``seed``: hashed with the feature into the seed that is sent to the client.

    If the windows do not fit the model's context, the weakest active windows are left out and the explanation's note says
    so.
    """

    name = "default"
    uses_client = True
    version = "1"

    def __init__(
        self,
        n_examples: int = 40,
        n_negatives: int = 0,
        share: float = MARK_SHARE,
        max_tokens: int = 200,
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
            lambda shown: explain_prompt(examples, shown, silent, self.share),
            FORM,
            seed=derive_request_seed(self.seed, examples.source, feature),
            max_tokens=self.max_tokens,
        )
        return Explanation(examples.source, feature, self.name, self.version, text, note)


def explain_prompt(
    examples: ExplainExamples,
    shown: Sequence[Example],
    silent: Sequence[Example] = (),
    share: float = MARK_SHARE,
) -> list[Message]:
    """The chat messages that ask for an explanation. ``shown``: active windows; ``silent``: inactive windows."""
    return chat(_PROMPT, [*active_lines(examples, shown, share), *inactive_lines(silent, len(shown) + 1)])


def parse_explanation(response: Response) -> str | None:
    """The phrase of a reply; None unless it has one JSON object, with a text under the single key "explanation"."""
    found = read_object(response, {"explanation"})
    return None if found is None else phrase(found["explanation"])


FORM = Form(SCHEMA, parse_explanation, _PROMPT["retry"], 'a JSON object {"explanation": "…"} with one phrase')
