"""The language model of a run: creates its client and wraps it in the run's recording and budget.

The only module that combines the three. Writes ``calls.sqlite`` in the run folder; every process that may still write an
answer into it holds ``calls.lock``. A batch client (``batched``) records its submitted batches beside it, in
``batches.sqlite``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from evalkit import registry
from evalkit.abilities import BatchClient, close_client, finish_client, is_batched, runs_in_process
from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig, BudgetSpent
from evalkit.llm.accounting.answer_store import Spent
from evalkit.llm.accounting.budget import MOST_TOKENS_PER_CHARACTER, BudgetedClient
from evalkit.llm.accounting.prices import Price, read_prices
from evalkit.llm.clients.batch.ledger import requests_in_batches
from evalkit.llm.clients.recorder import Recorder
from evalkit.llm.clients.sender.parent import Sender, lock_when_free
from evalkit.protocols import Client
from evalkit.store.run_store import RunStore

__all__ = ["BATCHES", "RECORDING", "batched", "client_part", "make_client", "open_client", "price_of", "replays"]

_LOG = logging.getLogger(__name__)
RECORDING, BATCHES = "calls.sqlite", "batches.sqlite"


def client_part(config: RunConfig) -> registry.Part | None:
    """The configured client's name and options, or None if no client is configured. Raises PluginError, BadConfig."""
    if config.client is None:
        return None
    part = registry.parse_part("clients", config.client)
    options = {**part.options, **config.client_options}
    for option in options:
        if re.search(r"(^|_)(key|token|secret|password|authorization|headers)$", option.lower()):
            raise BadConfig(
                f"client option {option}",
                expected="API keys in environment variables only",
                seen="a key on the command line",
                fix="set the variable that `evalkit doctor` names, and rotate this key: it may be in your shell history",
            )
    return registry.Part(part.name, part.label, options)


def make_client(config: RunConfig) -> Client | None:
    """The configured client, live or replaying. Makes no API calls. Raises PluginError, BadConfig, MissingExtra."""
    part = client_part(config)
    if part is None:
        return None
    client: Client = registry.create("clients", part.name, **part.options)
    return client


def replays(config: RunConfig) -> bool:
    """Whether the configured client is the one that answers from a recording."""
    part = client_part(config)
    return part is not None and part.name == "replay"


def batched(config: RunConfig) -> bool:
    """Whether the configured client submits its requests in batches."""
    part = client_part(config)
    return part is not None and is_batched(registry.load_class("clients", part.name))


def price_of(config: RunConfig, model: str) -> Price | None:
    """The price of the model's tokens in the run's price file, in batches for a batch client; None if it is not listed.

    Raises BadConfig if it is not listed and the run has a limit on cost.
    """
    price = _listed_price(config, model)
    return price.in_batches() if price is not None and batched(config) else price


def _listed_price(config: RunConfig, model: str) -> Price | None:
    prices = read_prices(config.prices) if config.prices else {}
    price = prices.get(model) or prices.get(model.split(";")[0])
    if price is None and config.max_cost is not None:
        raise BadConfig(
            "--max-cost",
            expected=f"a price of {model!r} in the file given with --prices",
            seen=f"prices of {', '.join(prices)}" if prices else "no price file" if not config.prices else "no prices",
            fix=f'add ["{model.split(";")[0]}"] with prompt and completion in US dollars per million tokens',
        )
    return price


@asynccontextmanager
async def open_client(config: RunConfig, store: RunStore, live: Client | None = None) -> AsyncIterator[Any]:
    """The client for a run's explainers and judges, None without one. ``live``: the configured client, if made already.

    A live client is recorded in the run folder. When the block ends, also by an error, requests in flight are awaited and
    recorded, and their cost is written to the run's records. If an error ends the block, batches are awaited only where a
    limit on calls or cost was reached; otherwise the next command fetches their answers.
    """
    live = make_client(config) if live is None else live
    if live is None:
        yield None
        return
    if replays(config):
        try:
            yield live
        finally:
            await close_client(live)
        return
    price, listed = price_of(config, live.name), _listed_price(config, live.name)
    path = store.folder / RECORDING
    async with AsyncExitStack() as ending:  # runs the callbacks in reverse order, each even if others fail
        lock = await lock_when_free(path.with_suffix(".lock"))
        ending.callback(os.close, lock)
        asked = _in_its_process(config, live, path, lock)
        guard = BudgetedClient(asked, max_calls=config.max_calls, max_cost=config.max_cost, price=price)
        client = Recorder(path, guard, cache=config.cache)
        ending.push_async_callback(client.close)
        in_batches = batched(config)
        handed_in = requests_in_batches(store.folder / BATCHES, live.name)
        if isinstance(live, BatchClient) and in_batches:
            live.keep_in(store.folder / BATCHES, client.record_batched)
        elif handed_in:
            told = "%d requests of %s are in batches; --client openai-batch fetches them, this client sends them again"
            _LOG.warning(told, len(handed_in), live.name)
        before = client.spent()
        guard.spent_calls = before.calls
        guard.spent_cost = _spent_cost(listed, before)
        if in_batches:  # another client would send these again and pay again
            guard.count_under_way(handed_in)
        ending.callback(_keep_spending, store, client, listed)
        ending.push_async_callback(client.settle)
        left = False
        try:
            yield client
        except BaseException as error:
            left = _leaves(error, in_batches)
            if left:
                finish_client(asked)
            raise
        finally:
            if client.in_flight and not (left and in_batches):
                _LOG.warning("waiting for %d requests in flight; Ctrl-C stops waiting", client.in_flight)


def _spent_cost(price: Price | None, spent: Spent) -> float:
    """The cost of earlier answers in US dollars; estimated from prompt lengths if the server reports no usage."""
    if price is None:
        return 0.0
    if spent.calls and not spent.prompt_tokens:
        _LOG.warning("the server reports no token usage; cost is estimated from the length of prompts")
        return price.cost(MOST_TOKENS_PER_CHARACTER * spent.prompt_characters, 0)
    return price.of(spent)


def _leaves(error: BaseException, batched: bool) -> bool:
    """Whether to exit without waiting: on Ctrl-C; for batches, unless the budget was reached."""
    if not batched:
        return isinstance(error, asyncio.CancelledError)
    group = error if isinstance(error, BaseExceptionGroup) else BaseExceptionGroup("", [error])
    return group.subgroup(BudgetSpent) is None


def _in_its_process(config: RunConfig, live: Client, path: Path, lock: int) -> Client:
    """The client in a process of its own, unless it is one that runs in this process (``in_process``)."""
    part = client_part(config)
    if part is None or runs_in_process(live):
        return live
    return Sender(part, live, [path, *filter(None, [config.cache])], lock)


def _keep_spending(store: RunStore, client: Any, price: Price | None) -> None:
    spent = client.spent()
    store.write_asked(
        client.name,
        calls=spent.calls,
        prompt_tokens=spent.prompt_tokens,
        completion_tokens=spent.completion_tokens,
        cost=price.of(spent) if price else None,
    )
