"""Token prices, from a TOML file that the user writes: one table per model, in US dollars per million tokens.

``batch_discount`` is the share of the price that the provider deducts for requests in batches; 0 if it is left out.

The package contains no prices because they would be out of date within months. Reads one file; knows no client.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.config.run_config import read_toml
from evalkit.errors import BadConfig
from evalkit.llm.accounting.answer_store import Spent

__all__ = ["Price", "read_prices"]

_KEYS = {"prompt", "completion", "batch_discount"}


@dataclass(frozen=True, slots=True)
class Price:
    """``prompt``, ``completion``: US dollars per million tokens. ``batch_discount``: share deducted in batches, 0 to 1."""

    prompt: float
    completion: float
    batch_discount: float = 0.0

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """The cost of these tokens outside batches, in US dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

    def in_batches(self) -> Price:
        """The price of the same tokens in batches."""
        left = 1 - self.batch_discount
        return Price(left * self.prompt, left * self.completion)

    def of(self, spent: Spent) -> float:
        """The cost in US dollars of all answers of a recording, in batches or not."""
        batched = spent.batched_prompt_tokens, spent.batched_completion_tokens
        others = spent.prompt_tokens - batched[0], spent.completion_tokens - batched[1]
        return self.cost(*others) + self.in_batches().cost(*batched)


def read_prices(path: Path) -> dict[str, Price]:
    """Prices by model name. Raises MissingFile, BadConfig."""
    return {model: _price(path, model, table) for model, table in read_toml(path).items()}


def _price(path: Path, model: str, table: Any) -> Price:
    sound = isinstance(table, dict) and {"prompt", "completion"} <= set(table) <= _KEYS
    sound = sound and all(type(value) in (int, float) and value >= 0 for value in table.values())
    if not sound or table.get("batch_discount", 0) > 1:
        raise BadConfig(
            f"{path} [{model}]",
            expected="prompt and completion in US dollars per million tokens, and optionally batch_discount from 0 to 1",
            seen=repr(table)[:80],
            fix='write, for example, ["my-model"] with the lines prompt = 0.15 and completion = 0.6',
        )
    return Price(*(float(table.get(key, 0)) for key in ("prompt", "completion", "batch_discount")))
