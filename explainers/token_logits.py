"""Explainers of the output side: what a feature makes the model predict, told from its promoted tokens alone.

No example is read, so a feature that fires on one thing to predict another is described by the other.
``TokenLogitsExplainer`` asks a language model with the prompt ``prompts/token_logits_v1.toml``; ``PromotedExplainer``
names the tokens, without one. Where promoted tokens come from is the collecting stage's affair (see
``ExplainExamples.promoted``).
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

    ``n_tokens``: the strongest so many are shown. ``thinking_tokens``: room for models that think before they answer.
    ``seed`` goes to the client, mixed with the feature.
    """

    name = "token-logits"
    uses_client = True
    version = "1"

    def __init__(self, n_tokens: int = 20, max_tokens: int = 200, thinking_tokens: int = 0, seed: int = 0) -> None:
        self.n_tokens, self.max_tokens, self.seed = n_tokens, max_tokens + thinking_tokens, seed

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None) -> Explanation:
        """Describe what the feature promotes.

        Raises InputError where it promotes nothing, BadConfig without a client, ClientError where no reply can be read.
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

    ``n_tokens``: at most so many are named. Spellings that differ in case or surrounding space only count as one.
    """

    name = "promoted"
    version = "1"

    def __init__(self, n_tokens: int = 10) -> None:
        self.n_tokens = n_tokens

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None = None) -> Explanation:
        """Name what the feature promotes. Raises InputError where it promotes nothing."""
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
            expected="tokens that its direction promotes",
            seen="none: no direction in the residual stream, or no unembedding beside the subject model",
            fix="use an explainer that reads examples, such as words or default",
        )
    return examples.promoted


def _name(token: str) -> str:
    """Words as they are, white space by name, anything else in quotes."""
    bare = token.strip()
    if not bare:
        return "a line break" if "\n" in token or "\r" in token else "a tab" if "\t" in token else "a space"
    return bare if all(letter.isalnum() or letter in "'’-_" for letter in bare) else quoted(bare)
