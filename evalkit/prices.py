"""What tokens cost: a TOML file of the user's, one table per model, in US dollars per million tokens.

No prices come with the package: they would be wrong within months. Reads one file; knows no client.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.config import read_toml
from evalkit.errors import BadConfig

__all__ = ["Price", "read_prices"]


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """US dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


def read_prices(path: Path) -> dict[str, Price]:
    """Prices by model name. Raises MissingFile, BadConfig."""
    return {model: _price(path, model, table) for model, table in read_toml(path).items()}


def _price(path: Path, model: str, table: Any) -> Price:
    sound = isinstance(table, dict) and set(table) == {"prompt", "completion"}
    if not sound or not all(type(value) in (int, float) and value >= 0 for value in table.values()):
        raise BadConfig(
            f"{path} [{model}]",
            expected="prompt and completion, in US dollars per million tokens",
            seen=repr(table)[:80],
            fix='write for example ["my-model"] with the lines prompt = 0.15 and completion = 0.6',
        )
    return Price(float(table["prompt"]), float(table["completion"]))
