"""The explainer that shows a language model active and inactive windows, and asks what only the active windows contain.

The prompt is the versioned file ``prompts/contrastive_v1.toml``. The module ``asking`` sends it; the reply has the form of
the explainer ``default``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evalkit.markup import MARK_SHARE
from evalkit.protocols import Client
from evalkit.records import Example, ExplainExamples, Explanation, FeatureId, Message
from evalkit.seeds import derive_request_seed
from explainers.asking import (
    active_lines,
    ask_for_phrase,
    chat,
    inactive_lines,
    read_prompt,
    require_client,
    spread,
)
from explainers.default import FORM

__all__ = ["ContrastiveExplainer", "contrastive_prompt"]

_PROMPT = read_prompt("contrastive_v1")
_FORM = replace(FORM, retry=_PROMPT["retry"])


class ContrastiveExplainer:
    """Asks the client for one phrase that fits the active windows but not the inactive windows.

    ``n_examples``: the largest number of active windows shown, evenly spaced among all.
    ``n_negatives``: the same for inactive windows.
    ``share``, ``max_tokens``, ``thinking_tokens``, ``seed``: as in the explainer ``default``.

    If the windows do not fit the model's context, the weakest active windows are left out, and inactive windows in the same
    proportion. The note of the explanation says so, and says if there were no inactive windows.
    """

    name = "contrastive"
    uses_client = True
    version = "1"

    def __init__(
        self,
        n_examples: int = 20,
        n_negatives: int = 20,
        share: float = MARK_SHARE,
        max_tokens: int = 200,
        thinking_tokens: int = 0,
        seed: int = 0,
    ) -> None:
        self.n_examples, self.n_negatives, self.share = n_examples, n_negatives, share
        self.max_tokens, self.seed = max_tokens + thinking_tokens, seed

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None) -> Explanation:
        """Describe the feature. Raises BadConfig without a client, ClientError if no reply can be parsed."""
        active, inactive = spread(examples.positives, self.n_examples), spread(examples.negatives, self.n_negatives)

        def question(shown: Sequence[Example]) -> list[Message]:
            beside = spread(inactive, -(-len(inactive) * len(shown) // len(active)))
            return contrastive_prompt(examples, shown, beside, self.share)

        text, note = await ask_for_phrase(
            require_client(self.name, client),
            examples,
            active,
            question,
            _FORM,
            seed=derive_request_seed(self.seed, examples.source, feature),
            max_tokens=self.max_tokens,
        )
        alone = "" if inactive else "there were no inactive windows to show"
        return Explanation(
            examples.source, feature, self.name, self.version, text, "; ".join(filter(None, (note, alone)))
        )


def contrastive_prompt(
    examples: ExplainExamples, shown: Sequence[Example], silent: Sequence[Example], share: float = MARK_SHARE
) -> list[Message]:
    """The chat messages that ask what ``shown`` (active windows) contain and ``silent`` (inactive windows) do not."""
    return chat(_PROMPT, [*active_lines(examples, shown, share), *inactive_lines(silent, len(shown) + 1)])
