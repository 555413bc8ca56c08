"""A client that wraps another one and stops before a request would exceed the run's limit on calls or cost.

A request in flight is counted at the highest cost it can have. Knows no server; writes nothing.
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

# estimate for prompts before any reply has reported usage; measured: 0.22 to 0.25 with a vocabulary of 49k tokens
TOKENS_PER_CHARACTER = 0.25
MOST_TOKENS_PER_CHARACTER = 1.5 * TOKENS_PER_CHARACTER  # used where an estimate that is too low would break a limit


class BudgetedClient:
    """Counts the requests that are sent and their cost.

    ``live``: the client that sends them.
    ``max_calls``, ``max_cost`` (US dollars): the limits; None for no limit.
    ``price``: of the model's tokens; None counts every request as free.
    ``spent_calls``, ``spent_cost`` (US dollars): the totals of earlier commands, where counting starts.
    """

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
        self._under_way: dict[str, float] = {}  # unanswered requests of earlier commands: key → highest cost

    def count_under_way(self, requests: Sequence[KeyedRequest]) -> None:
        """Count requests that an earlier command submitted and that have no answer yet.

        ``generate`` does not count them a second time.
        """
        for request in requests:
            self._under_way[request.key] = self._most(request.content())
        self.spent_calls += len(requests)
        self._reserved += sum(self._under_way.values())

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        """The wrapped client's reply. Raises BudgetSpent, without sending, if the request would exceed a limit."""
        request = GenerateRequest(messages, **options)
        key = KeyedRequest.of(self.name, request).key if self._under_way else ""
        if (most := self._under_way.pop(key, None)) is not None:
            return await self._ask(request, most)
        if self._max_calls is not None and self.spent_calls >= self._max_calls:
            raise BudgetSpent(
                "--max-calls",
                expected=f"at most {self._max_calls} requests in this run",
                seen="more requests to send",
                fix="raise the limit and run the same command again; it resumes, and every answer is kept",
            )
        most = self._most(request)
        if self._max_cost is not None and self.spent_cost + self._reserved + most > self._max_cost:
            raise BudgetSpent(
                "--max-cost",
                expected=f"at most ${self._max_cost:.2f} in this run",
                seen=f"${self.spent_cost:.2f} spent, ${self._reserved + most:.4f} for the next request and those in flight",
                fix="raise the limit and run the same command again; it resumes, and every answer is kept",
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
            self.spent_cost += told if response.prompt_tokens > 0 else most  # 0: the server reports no usage
        return response

    def _most(self, request: GenerateRequest) -> float:
        """The cost of a request whose reply uses all of ``max_tokens``, with a high estimate of the prompt's tokens.

        The estimate counts bytes, not characters: text with several bytes per character, such as Chinese, also takes more
        tokens per character.
        """
        if self._price is None:
            return 0.0
        size = sum(len(message.content.encode("utf-8", "replace")) for message in request.messages)
        return self._price.cost(MOST_TOKENS_PER_CHARACTER * size, request.max_tokens)

    async def close(self) -> None:
        """Close the wrapped client."""
        await close_client(self._live)
