"""The language model of a run: its client from the registry, behind the run's recording and budget.

The one place that knows how the three are put together. Writes ``calls.sqlite`` in the run folder; whoever may still write
an answer into it holds ``calls.lock``.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from evalkit import registry
from evalkit.budget import BudgetedClient
from evalkit.clients.sender import Sender, lock_when_free
from evalkit.config import RunConfig
from evalkit.errors import BadConfig
from evalkit.prices import Price, read_prices
from evalkit.protocols import Client
from evalkit.store import RunStore

__all__ = ["RECORDING", "client_part", "make_client", "open_client", "price_of", "replays"]

_LOG = logging.getLogger(__name__)
RECORDING = "calls.sqlite"


def client_part(config: RunConfig) -> registry.Part | None:
    """The configured client's name and options, None without one. Raises PluginError, BadConfig."""
    if config.client is None:
        return None
    part = registry.parse_part("clients", config.client)
    options = {**part.options, **config.client_options}
    for option in options:
        if re.search(r"(^|_)(key|token|secret|password|authorization|headers)$", option.lower()):
            raise BadConfig(
                f"client option {option}",
                expected="keys in the environment only",
                seen="a key on the command line",
                fix="set the variable that `evalkit doctor` names, and take this one as no longer secret",
            )
    return registry.Part(part.name, part.label, options)


def make_client(config: RunConfig) -> Client | None:
    """The configured client, live or replaying. Reaches nobody. Raises PluginError, BadConfig, MissingExtra."""
    part = client_part(config)
    if part is None:
        return None
    client: Client = registry.create("clients", part.name, **part.options)
    return client


def replays(config: RunConfig) -> bool:
    """Whether the configured client answers from a recording by itself."""
    part = client_part(config)
    return part is not None and part.name == "replay"


def price_of(config: RunConfig, model: str) -> Price | None:
    """What the model's tokens cost, by the run's price file. Raises BadConfig where a limit on cost needs it."""
    prices = read_prices(config.prices) if config.prices else {}
    price = prices.get(model) or prices.get(model.split(";")[0])
    if price is None and config.max_cost is not None:
        raise BadConfig(
            "--max-cost",
            expected=f"a price of {model!r} in the file given with --prices",
            seen=f"prices of {', '.join(prices)}" if prices else "no price file" if not config.prices else "no prices",
            fix=f'write ["{model.split(";")[0]}"] with prompt and completion in US dollars per million tokens',
        )
    return price


@asynccontextmanager
async def open_client(config: RunConfig, store: RunStore) -> AsyncIterator[Any]:
    """The client that a run's explainers and judges ask, None without one.

    A live one is recorded in the run folder. What was sent when the block ends, well or not, is waited for and recorded,
    and what it took is kept in the run's records.
    """
    live = make_client(config)
    if live is None:
        yield None
        return
    if replays(config):
        try:
            yield live
        finally:
            await live.close()  # type: ignore[attr-defined]
        return
    price = price_of(config, live.name)
    path = store.folder / RECORDING
    async with AsyncExitStack() as ending:  # the last one first, each whatever happens to the others
        lock = await lock_when_free(path.with_suffix(".lock"))
        ending.callback(os.close, lock)
        asked = _in_its_process(config, live, path, lock)
        guard = BudgetedClient(asked, max_calls=config.max_calls, max_cost=config.max_cost, price=price)
        client = registry.create("clients", "replay", path=path, record_from=guard, cache=config.cache)
        ending.push_async_callback(client.close)
        before = client.spent()
        guard.spent_calls = before.calls
        guard.spent_cost = price.cost(before.prompt_tokens, before.completion_tokens) if price else 0.0
        ending.callback(_keep_spending, store, client, price)
        ending.push_async_callback(client.settle)
        try:
            yield client
        finally:
            if client.in_flight:
                _LOG.warning("waiting for %d requests that were sent; Ctrl-C waits no longer", client.in_flight)


def _in_its_process(config: RunConfig, live: Client, path: Path, lock: int) -> Client:
    """The client in a process of its own, unless its model ends with this one anyway."""
    part = client_part(config)
    if part is None or getattr(live, "in_process", False):
        return live
    return Sender(part, live, [path, *filter(None, [config.cache])], lock)


def _keep_spending(store: RunStore, client: Any, price: Price | None) -> None:
    spent = client.spent()
    store.write_asked(
        client.name,
        calls=spent.calls,
        prompt_tokens=spent.prompt_tokens,
        completion_tokens=spent.completion_tokens,
        cost=price.cost(spent.prompt_tokens, spent.completion_tokens) if price else None,
    )
