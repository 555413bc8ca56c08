"""A client in front of another one that stops before the next request would go over the limits of a run.

Requests in flight count with the most they can cost. Knows no server; keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evalkit.abilities import close_client, concurrency_of
from evalkit.errors import BudgetSpent
from evalkit.llm.accounting.answer_store import KeyedRequest
from evalkit.llm.accounting.prices import Price
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.protocols import Client
from evalkit.records import Message, Response

__all__ = ["MOST_TOKENS_PER_CHARACTER", "TOKENS_PER_CHARACTER", "BudgetedClient"]

TOKENS_PER_CHARACTER = 0.25  # of prompts, where nothing better is known; 0.22 to 0.25 was seen with a vocabulary of 49k
MOST_TOKENS_PER_CHARACTER = 1.5 * TOKENS_PER_CHARACTER  # where it must not be too little


class BudgetedClient:
    """Counts requests sent and what they cost. ``spent_calls`` and ``spent_cost`` (US dollars) start with earlier ones."""

    def __init__(
        self,
        live: Client,
        *,
        max_calls: int | None = None,
        max_cost: float | None = None,
        price: Price | None = None,
        spent_calls: int = 0,
        spent_cost: float = 0.0,
    ) -> None:
        self.name = live.name
        self.concurrency = concurrency_of(live)
        self._live, self._price = live, price
        self._max_calls, self._max_cost = max_calls, max_cost
        self.spent_calls, self.spent_cost = spent_calls, spent_cost
        self._reserved = 0.0
        self._under_way: dict[str, float] = {}  # by key, the most a request costs that an earlier command sent

    def count_under_way(self, requests: Sequence[KeyedRequest]) -> None:
        """Count what an earlier command handed in and is not answered yet; asked for again, it is not counted twice."""
        for request in requests:
            self._under_way[request.key] = self._most(request.content())
        self.spent_calls += len(requests)
        self._reserved += sum(self._under_way.values())

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        """The reply of the client behind. Raises BudgetSpent before sending what would go over a limit."""
        request = GenerateRequest(messages, **options)
        key = KeyedRequest.of(self.name, request).key if self._under_way else ""
        if (most := self._under_way.pop(key, None)) is not None:
            return await self._ask(request, most)
        if self._max_calls is not None and self.spent_calls >= self._max_calls:
            raise BudgetSpent(
                "--max-calls",
                expected=f"at most {self._max_calls} requests over all of this run",
                seen="more to ask",
                fix="every answer is kept; raise the limit and run the same command to go on",
            )
        most = self._most(request)
        if self._max_cost is not None and self.spent_cost + self._reserved + most > self._max_cost:
            raise BudgetSpent(
                "--max-cost",
                expected=f"at most ${self._max_cost:.2f} over all of this run",
                seen=f"${self.spent_cost:.2f} spent, ${self._reserved + most:.4f} for the requests in flight and the next",
                fix="every answer is kept; raise the limit and run the same command to go on",
            )
        self.spent_calls += 1
        self._reserved += most
        return await self._ask(request, most)

    async def _ask(self, request: GenerateRequest, most: float) -> Response:
        try:
            response = await self._live.generate(request.messages, **request.options())
        finally:
            self._reserved -= most
        if self._price is not None:
            told = self._price.cost(response.prompt_tokens, response.completion_tokens)
            self.spent_cost += told if response.prompt_tokens > 0 else most  # a server that tells no usage
        return response

    def _most(self, request: GenerateRequest) -> float:
        """What a request costs if its reply is as long as it may be; the prompt's tokens are estimated, generously.

        By bytes: what takes several per character, Chinese for example, takes more tokens as well.
        """
        if self._price is None:
            return 0.0
        size = sum(len(message.content.encode("utf-8", "replace")) for message in request.messages)
        return self._price.cost(MOST_TOKENS_PER_CHARACTER * size, request.max_tokens)

    async def close(self) -> None:
        """Close the client behind."""
        await close_client(self._live)
