"""Handles one batch from its file to its answers: submits it, polls it until it ends, reads and records the results.

Writes every step into the ledger just before or after taking it, so that another process can resume from any of them.
Does not know who waits for the answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evalkit.errors import ClientDown, ClientError, RequestRefused
from evalkit.llm.accounting.answer_store import KeyedRequest, Recorded
from evalkit.llm.clients.batch.api import ENDED, BatchApi, State
from evalkit.llm.clients.batch.jsonl import Line, outcome, read_lines
from evalkit.llm.clients.batch.ledger import Batch, Ledger
from evalkit.llm.clients.server.endpoints import Endpoint
from evalkit.llm.clients.server.failures import Refusal, Transient
from evalkit.llm.clients.server.limits import duration_s
from evalkit.records import Response

__all__ = ["Follower", "Result"]

_LOG = logging.getLogger(__name__)
_TOGETHER = 500  # answers recorded per transaction
_TELL_EVERY_S = 60.0
_LOOKS_AGAIN = 10  # further polls of a batch that has ended and whose answers are incomplete
_LATE_S = 3600.0  # how long after its window a batch that has not ended is reported as late
_FULL = ("token_limit_exceeded", "request_limit_exceeded", "batch_limit_exceeded")


@dataclass(slots=True)
class Result:
    """The result of a batch.

    ``settled``: by key of a request, its answer or final error.
    ``again``: by key of a request, why it goes into another batch; "" if this was not the request's fault.
    ``refused``: parameters that the server rejects.
    ``full``: why the server has no room for this batch at present; "" otherwise.
    ``withheld``: number of requests that the server counts as answered but whose answers are not in its files.
    """

    settled: dict[str, Response | ClientError] = field(default_factory=dict)
    again: dict[str, str] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    full: str = ""
    withheld: int = 0


class Follower:
    """Follows the batches of one model at one server.

    ``record``: called with all answers of a batch before the ledger marks it as ended.
    ``look_every_s``: time between two polls.
    """

    def __init__(
        self,
        api: BatchApi,
        ledger: Ledger,
        endpoint: Endpoint,
        url: str,
        record: Callable[[Sequence[tuple[KeyedRequest, Recorded]]], None],
        *,
        look_every_s: float,
    ) -> None:
        self._api, self._ledger, self._endpoint, self._url = api, ledger, endpoint, url
        self._record, self._look_every_s = record, look_every_s
        self._told: set[tuple[str, str]] = set()

    async def hand_in(self, batch: Batch) -> None:
        """Upload and create the batch. Raises TooLarge, ClientDown, StorageError."""
        content = b"".join(batch.lines)
        batch.lines.clear()
        self._ledger.uploaded(batch, await self._api.upload(batch.name, content))
        del content
        self._ledger.begins(batch, time.time())
        state = await self._api.create(batch.name, batch.file or "")
        self._ledger.created(batch, state.id)
        _LOG.info("batch %d (%s): %s requests submitted", batch.number, state.id, f"{len(batch.requests):,}")

    async def follow(self, batch: Batch) -> Result:
        """Wait until the batch has ended and its answers are recorded; its result. Raises ClientDown, StorageError."""
        if batch.id is None and not await self._found(batch):
            return Result(again=dict.fromkeys(batch.requests, ""))
        state = await self._until_ended(batch)
        if state.status == "failed":
            result = self._failed(batch, state)
        else:
            completed = state.completed
            result = await self._read(batch, state, completed)
            for _ in range(_LOOKS_AGAIN):  # some servers report the end before the files are complete
                if not result.withheld:
                    break
                await asyncio.sleep(self._look_every_s)
                state = await self._until_ended(batch)
                completed = max(completed, state.completed)
                result = await self._read(batch, state, completed)
        if result.withheld:
            self._hold_open(state, result, completed)
        else:
            self._ledger.ended(batch, state.status)
        _tell(batch, state, result)
        return result

    def _hold_open(self, state: State, result: Result, completed: int) -> None:
        """Fail the requests without an answer instead of submitting them again: the batch may still return paid answers."""
        down = ClientDown(
            f"batch {state.id} at {self._url}",
            expected=f"answers to the {completed:,} requests that the server counts as answered",
            seen=f"{result.withheld:,} fewer in its files",
            fix="run the same command again later; to give the batch up and send its requests again, "
            "delete batches.sqlite in the run folder",
        )
        result.settled |= dict.fromkeys(result.again, down)
        result.again.clear()

    async def _found(self, batch: Batch) -> bool:
        """Whether the server created a batch whose creation an earlier command did not see confirmed. If not, drop it."""
        state = None
        if batch.begun is not None:
            await asyncio.sleep(max(0.0, batch.begun + self._api.listed_within_s - time.time()))
            state = await self._api.find(batch.name, batch.file or "", batch.begun)
        if state is None:
            if batch.file is not None:
                await self._api.delete(batch.file)
            self._ledger.ended(batch, "never made")
            return False
        self._ledger.created(batch, state.id)
        _LOG.info("batch %d (%s): found again", batch.number, state.id)
        return True

    async def _until_ended(self, batch: Batch) -> State:
        assert batch.id is not None
        done, told = -1, time.monotonic()
        while (state := await self._api.state(batch.id)).status not in ENDED:
            self._wonder(batch, state)
            if state.done > done and time.monotonic() - told >= _TELL_EVERY_S:
                done, told = state.done, time.monotonic()
                amounts = f"{done:,} of {len(batch.requests):,} requests done"
                _LOG.info("batch %d (%s): %s, %s", batch.number, batch.id, state.status, amounts)
            await asyncio.sleep(self._look_every_s)
        return state

    def _wonder(self, batch: Batch, state: State) -> None:
        """Warn of a batch that may never end, once per batch and reason."""
        window_s = duration_s(self._api.window)
        late = batch.begun is not None and window_s is not None and time.time() - batch.begun > window_s + _LATE_S
        for odd, words in (
            (state.status == "unknown", "is in a state that the protocol does not know"),
            (late, f"has not ended, though its window was {self._api.window}"),
        ):
            if odd and (batch.name, words) not in self._told:
                self._told.add((batch.name, words))
                told = (batch.number, batch.id, words, self._look_every_s)
                _LOG.warning(
                    "batch %d (%s) %s; still polling every %g s; Ctrl-C stops waiting and leaves it open", *told
                )

    async def _read(self, batch: Batch, state: State, completed: int) -> Result:
        """Read the batch's files and record the answers. ``completed``: requests that the server counts as answered."""
        result, seconds = Result(), time.time() - (batch.begun or time.time())
        lines: list[Line] = []
        there = unreadable = 0
        for file in filter(None, (state.output_file, state.error_file)):
            found, lost = read_lines(await self._api.content(file, len(batch.requests)))
            if file == state.output_file:
                there = len({line.key for line in found} & batch.requests.keys()) + lost
            lines += found
            unreadable += lost
        for first in range(0, len(lines), _TOGETHER):
            answered = []
            for line in lines[first : first + _TOGETHER]:
                request = batch.requests.get(line.key)
                if request is not None and not isinstance(result.settled.get(line.key), Response):
                    self._sort(batch, request, line, result)
                    if isinstance(response := result.settled.get(line.key), Response):
                        answered.append((request, Recorded(response, seconds)))
            self._record(answered)
            await asyncio.sleep(0)
        missing = [key for key in batch.requests if key not in result.settled and key not in result.again]
        result.withheld = min(max(completed - there, 0), max(len(missing) - unreadable, 0))
        why = f"{unreadable} unreadable lines" if unreadable else f"no result in a batch that is {state.status}"
        result.again |= dict.fromkeys(missing, why)
        if (
            state.status == "cancelled" and not result.withheld
        ):  # on purpose, so do not submit the rest without being told
            down = ClientDown(
                f"batch {state.id}",
                expected="it to be completed",
                seen="it was cancelled at the server",
                fix="run the same command again to submit the requests without an answer again",
            )
            result.settled |= dict.fromkeys(result.again, down)
            result.again.clear()
        return result

    def _sort(self, batch: Batch, request: KeyedRequest, line: Line, result: Result) -> None:
        content = request.content()
        form = self._endpoint.form(content, batch.dialect)
        found = outcome(line, content, form, self._endpoint, self._url)
        if isinstance(found, Transient):
            result.again[line.key] = found.reason
        elif isinstance(found, Refusal):
            result.again[line.key] = ""
            result.refused.add(found.parameter)
        else:
            result.settled[line.key] = found
            result.again.pop(line.key, None)

    def _failed(self, batch: Batch, state: State) -> Result:
        """The result of a batch that the server rejected as a whole.

        If the server is full, or rejects single lines, the other requests go into another batch. Raises ClientDown
        otherwise.
        """
        redact = self._endpoint.redact
        told = [(redact(code)[:80], redact(message)[:200], line) for code, message, line in state.errors]
        reason = f"{told[0][0]}: {told[0][1]}" if told else "no reason"
        if any(code in _FULL for code, _, _ in told):
            return Result(again=dict.fromkeys(batch.requests, ""), full=reason)
        keys = list(batch.requests)
        bad = {line: f"{code}: {message}" for code, message, line in told if isinstance(line, int)}
        if told and len(bad) == len(told) and 0 < len(bad) < len(keys) and all(0 < line <= len(keys) for line in bad):
            refused = {
                keys[line - 1]: RequestRefused(
                    f"request to {self._url}", expected="it to be accepted in a batch", seen=why, fix="see the reason"
                )
                for line, why in bad.items()
            }
            return Result(settled=dict(refused), again={key: "" for key in keys if key not in refused})
        self._ledger.ended(batch, state.status)  # no request of it was answered
        raise ClientDown(
            f"batch {state.id} at {self._url}",
            expected="it to be accepted",
            seen=reason,
            fix="see the reason; the same command submits it again",
        )


def _tell(batch: Batch, state: State, result: Result) -> None:
    answered = sum(isinstance(one, Response) for one in result.settled.values())
    counts = f"{answered:,} of {len(batch.requests):,} requests answered"
    _LOG.info("batch %d (%s): %s, %s", batch.number, state.id, state.status, counts)
    if failed := Counter(reason for reason in result.again.values() if reason):
        reason, _ = failed.most_common(1)[0]
        told = (batch.number, state.id, failed.total(), reason)
        _LOG.warning("batch %d (%s): %d requests got no answer (%s); retrying in another batch", *told)
