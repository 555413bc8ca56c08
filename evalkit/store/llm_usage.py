"""Language model usage of a run: the recorded numbers, and the sentence printed from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Asked"]


@dataclass(frozen=True, slots=True)
class Asked:
    """Calls and tokens of one language model over all commands of a run.

    cost: in US dollars, None without a price
    estimate: the numbers that the first command expected, under the same names; may be empty
    """

    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    estimate: dict[str, Any]

    def sentence(self) -> str:
        """For a table's footer: "model: 12 calls, 3,400 + 80 tokens, $0.01 (estimated …)"."""
        told = _amounts(self.calls, self.prompt_tokens, self.completion_tokens, self.cost)
        if not self.estimate:
            return f"{self.model}: {told}"
        e = self.estimate
        expected = _amounts(e["calls"], e["prompt_tokens"], e["completion_tokens"], e["cost_usd"])
        return f"{self.model}: {told} (estimated: {expected})"


def _amounts(calls: int, prompt_tokens: int, completion_tokens: int, cost: float | None) -> str:
    money = "" if cost is None else f", ${cost:,.4f}"
    return f"{calls:,} calls, {prompt_tokens:,} prompt and {completion_tokens:,} completion tokens{money}"
