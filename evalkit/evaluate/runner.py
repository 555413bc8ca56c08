"""Runs the jobs of a stage concurrently and collects their failures.

A job is one feature with one explainer, or one explanation with one test. An expected failure of a job is recorded and the
other jobs continue; errors that would fail every job stop the stage. Knows nothing of explainers or judges; writes nothing
itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import TypeVar

from evalkit.abilities import concurrency_of
from evalkit.errors import (
    BadConfig,
    BudgetSpent,
    ClientDown,
    DamagedFile,
    EvalkitError,
    MissingExtra,
    MissingFile,
    PluginError,
    StageFailed,
    StorageError,
)
from evalkit.protocols import Client, Progress

__all__ = ["FATAL", "concurrency_limit", "failure_reason", "run_jobs"]

_LOG = logging.getLogger(__name__)

# Features in flight. High enough to keep every client busy: clients hold their own, lower limits.
_CONCURRENCY = 64
# These would fail for every feature, or end the run on purpose.
FATAL = (BadConfig, BudgetSpent, ClientDown, DamagedFile, MissingExtra, MissingFile, PluginError, StorageError)

Job = TypeVar("Job")


def concurrency_limit(clients: Iterable[Client | None]) -> int:
    """How many features may be in flight.

    At least what the clients accept: a batch client answers no request before all of them are queued.
    """
    return max([_CONCURRENCY, *(concurrency_of(client) or 0 for client in clients)])


async def run_jobs(
    stage: str,
    jobs: Sequence[Job],
    work: Callable[[Job], Awaitable[str | None]],
    progress: Progress,
    group: Callable[[Job], str],
    *,
    limit: int = _CONCURRENCY,
    may_fail: Collection[str] = (),
) -> None:
    """Run ``work`` on every job, at most ``limit`` at a time.

    work: returns None on success, else the reason of the failure, which it has recorded.
    group: the explainer or judge that a job belongs to.
    may_fail: groups that may fail for every job.

    Raises StageFailed, after all jobs, if every job of another group failed.
    """
    if not jobs:
        return
    started = time.monotonic()
    task = progress.start(stage, len(jobs), "features")
    slots = asyncio.Semaphore(limit)
    failures: dict[str, list[str]] = {}

    async def run_one(job: Job) -> None:
        async with slots:
            if reason := await work(job):
                failures.setdefault(group(job), []).append(reason)
            progress.advance(task)

    async with asyncio.TaskGroup() as tasks:
        for job in jobs:
            tasks.create_task(run_one(job))
    progress.finish(task)
    sizes = Counter(map(group, jobs))
    for name, reasons in failures.items():
        if len(reasons) == sizes[name] and name not in may_fail:
            raise StageFailed(
                f"{stage}: {name}",
                expected=f"at least one of {len(reasons)} features to succeed",
                seen=f"all failed; the first: {reasons[0]}",
                fix="fix the cause and run the same command again",
            )
    n_failed = sum(map(len, failures.values()))
    if n_failed:
        _LOG.warning("%s: %d of %d features failed; the same command retries them", stage, n_failed, len(jobs))
    _LOG.info("%s: %d records in %.1f s", stage, len(jobs) - n_failed, time.monotonic() - started)


def failure_reason(error: Exception) -> str:
    """The text that is recorded for a failed feature."""
    return str(error) if isinstance(error, EvalkitError) else f"{type(error).__name__}: {error}"
