"""Sends the first request of every form without a batch, so that a wrong key, name or parameter fails in a second.

In a batch it would fail after up to a day. Records in the ledger which forms the server has answered and which parameters
it rejects.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from evalkit.errors import ClientDown, ClientError, NoAnswer
from evalkit.llm.accounting.answer_store import KeyedRequest
from evalkit.llm.clients.batch.jsonl import form_of
from evalkit.llm.clients.batch.ledger import Ledger
from evalkit.llm.clients.openai import OpenAIClient
from evalkit.llm.clients.server.dialects import Dialect
from evalkit.records import Response

__all__ = ["Probe", "left_open"]

_LOG = logging.getLogger(__name__)


class Probe:
    """Probes one model at one server. Updates ``dialect`` with what the ledger knows of the server.

    ``in_flight``: the key of the request that is being sent, None between requests.
    ``resolve``: called with the key and the result of every request that was sent.
    """

    def __init__(
        self,
        online: OpenAIClient,
        dialect: Dialect,
        ledger: Ledger,
        resolve: Callable[[str, Response | Exception], None],
    ) -> None:
        self._online, self._dialect, self._ledger, self._resolve = online, dialect, ledger, resolve
        self.in_flight: str | None = None
        self._left = False
        learned = ledger.learned()
        self._forms: set[str] = learned[1] if learned else set()
        if learned and dialect.kind is None:
            dialect.kind = learned[0].kind
        dialect.refused |= learned[0].refused if learned else set()

    async def run(self, waiting: Mapping[str, KeyedRequest]) -> None:
        """Send the first of these requests of every form that the server has not answered yet. Raises ClientDown."""
        firsts: dict[str, KeyedRequest] = {}
        for request in waiting.values():
            firsts.setdefault(form_of(request), request)
        for form, request in firsts.items():
            if form in self._forms:
                continue
            content = request.content()
            self.in_flight = request.key
            try:
                response = await self._online.generate(content.messages, **content.options())
            except (ClientDown, NoAnswer) as error:
                if self._left:
                    self._resolve(request.key, left_open())
                    return
                if isinstance(error, ClientDown):
                    raise
                _LOG.info("%s; sending it in a batch", error)
                continue
            except ClientError as error:
                self._resolve(request.key, error)
            else:
                self._resolve(request.key, response)
            finally:
                self.in_flight = None
            self._forms.add(form)
            self._ledger.learn(self._dialect, self._forms)
            if self._left:
                return

    def refuse(self, parameters: set[str]) -> None:
        """From now on leave out these parameters, which the server rejects."""
        if {parameter for parameter in parameters if self._dialect.refuse(parameter)}:
            self._ledger.learn(self._dialect, self._forms)

    def finish(self) -> None:
        """Wait for the request in flight, which is paid for, and send no more."""
        self._left = True
        if self.in_flight is not None:
            self._online.finish()


def left_open() -> NoAnswer:
    """The error for callers whose batch the next command fetches."""
    return NoAnswer(
        "batches",
        expected="the command to wait until they end",
        seen="the command stopped first",
        fix="run the same command again; it fetches their answers",
    )
