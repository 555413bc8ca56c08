"""Explainers of a feature's effect: they describe the tokens that the feature makes the model predict.

They use only ``ExplainExamples.promoted``, which the collect stage computes, and no windows. If a feature fires on one kind
of token to predict another, they describe the predicted kind. ``TokenLogitsExplainer`` queries a language model with the
prompt ``prompts/token_logits_v1.toml``; ``PromotedExplainer`` lists the tokens and makes no API calls.
"""

from __future__ import annotations

from collections.abc import Sequence

from evalkit.errors import InputError
from evalkit.markup import quoted
from evalkit.protocols import Client
from evalkit.records import ExplainExamples, Explanation, FeatureId, Message
from evalkit.seeds import derive_request_seed
from explainers.asking import ask_for_phrase, chat, read_prompt, require_client
from explainers.default import FORM

__all__ = ["PromotedExplainer", "TokenLogitsExplainer", "token_logits_prompt"]

_PROMPT = read_prompt("token_logits_v1")


class TokenLogitsExplainer:
    """Asks the client for one phrase on the promoted tokens.

    ``n_tokens``: how many of the strongest tokens are shown.
    ``max_tokens``, ``thinking_tokens``, ``seed``: as in the explainer ``default``.
    """

    name = "token-logits"
    uses_client = True
    version = "1"

    def __init__(self, n_tokens: int = 20, max_tokens: int = 200, thinking_tokens: int = 0, seed: int = 0) -> None:
        self.n_tokens, self.max_tokens, self.seed = n_tokens, max_tokens + thinking_tokens, seed

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None) -> Explanation:
        """Describe what the feature promotes.

        Raises InputError if it promotes nothing, BadConfig without a client, ClientError if no reply can be parsed.
        """
        client = require_client(self.name, client)
        messages = token_logits_prompt(_promoted(examples)[: self.n_tokens])
        text, note = await ask_for_phrase(
            client,
            examples,
            (),
            lambda _: messages,
            FORM,
            seed=derive_request_seed(self.seed, examples.source, feature),
            max_tokens=self.max_tokens,
        )
        return Explanation(examples.source, feature, self.name, self.version, text, note)


class PromotedExplainer:
    """Writes "tokens such as X, Y, Z are predicted next", or "the token X is predicted next".

    ``n_tokens``: the largest number of tokens named. Spellings that differ only in case or surrounding space count once.
    """

    name = "promoted"
    version = "1"

    def __init__(self, n_tokens: int = 10) -> None:
        self.n_tokens = n_tokens

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None = None) -> Explanation:
        """Name the tokens that the feature promotes. Raises InputError if it promotes nothing."""
        shown: dict[str, str] = {}
        for token in _promoted(examples):
            shown.setdefault(token.strip().casefold() or _name(token), _name(token))
        named = list(shown.values())[: self.n_tokens]
        tokens = f"tokens such as {', '.join(named)} are" if len(named) > 1 else f"the token {named[0]} is"
        return Explanation(examples.source, feature, self.name, self.version, f"{tokens} predicted next")


def token_logits_prompt(promoted: Sequence[str]) -> list[Message]:
    """The chat messages that ask what these tokens, strongest first, have in common."""
    return chat(_PROMPT, ["[" + ", ".join(map(quoted, promoted)) + "]"])


def _promoted(examples: ExplainExamples) -> tuple[str, ...]:
    if not examples.promoted:
        raise InputError(
            f"{examples.source} feature {examples.feature}",
            expected="tokens that the feature's direction promotes",
            seen="none: it has no direction in the residual stream, or the subject model's unembedding is not available",
            fix="use an explainer that uses examples, such as words or default",
        )
    return examples.promoted


def _name(token: str) -> str:
    """How a token is named: words as they are, white space by its kind, anything else in quotes."""
    bare = token.strip()
    if not bare:
        return "a line break" if "\n" in token or "\r" in token else "a tab" if "\t" in token else "a space"
    return bare if all(letter.isalnum() or letter in "'’-_" for letter in bare) else quoted(bare)
