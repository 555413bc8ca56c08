"""Runs a configuration: collect, explain, score, in that order; each stage skips what is recorded already.

The only module that knows the order of the stages. Explainers, judges, scorers, sources and clients come from the
registry by name. Writes a run folder (see ``evalkit.store`` and ``evalkit.collect.example_files``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit.collect.stage import collect_stage, read_examples
from evalkit.config.run_config import RunConfig
from evalkit.errors import MissingFile
from evalkit.evaluate.explain_stage import explain_features
from evalkit.evaluate.score_stage import score_features
from evalkit.llm.session import open_client
from evalkit.pipeline.plan import estimate_asking
from evalkit.pipeline.resolved import ResolvedRun
from evalkit.protocols import Client, Progress
from evalkit.store.run_folder import read_identity
from evalkit.store.run_store import RunStore
from evalkit.util.progress import SILENT
from evalkit.util.run_async import wait_for

__all__ = ["load_config", "run"]

_STAGES = ("collect", "explain", "score")


def run(config: RunConfig, folder: Path, *, stages: Sequence[str] = _STAGES, progress: Progress = SILENT) -> None:
    """Run the stages on a folder; what is recorded already is kept and not repeated. Raises EvalkitError."""
    resolved = ResolvedRun(config)
    resolved.check(stages)
    with RunStore.create(folder, config.identity()) as store:
        if set(stages) == set(_STAGES):
            _record_estimate(resolved, store)
        if "collect" in stages:
            collect_stage(config, store, progress)
        if {"explain", "score"} & set(stages):
            wait_for(_explain_and_score(resolved, store, stages, progress))


def load_config(folder: Path, **changes: Any) -> RunConfig:
    """The configuration of an existing run, with other explainers, judges, scorers or client.

    Raises MissingFile, BadConfig.
    """
    identity = read_identity(folder)
    identity.pop("protocol", None)
    return RunConfig.create(**{**identity, **changes})


async def _explain_and_score(run: ResolvedRun, store: RunStore, stages: Sequence[str], progress: Progress) -> None:
    """The two stages that may query a language model, with one client for both."""
    async with open_client(run.config, store, run.client) as client:
        if "explain" in stages:
            await _explain(run, store, client, progress)
        if "score" in stages:
            await _score(run, store, client, progress)


def _record_estimate(run: ResolvedRun, store: RunStore) -> None:
    """Record the expected calls, tokens and cost, once per run and model, to be compared with the actual ones."""
    client = run.client
    if client is None or any(asked.model == client.name and asked.estimate for asked in store.asked()):
        return
    estimate = estimate_asking(run, store.folder)
    if estimate is not None:
        store.write_estimate(estimate.model, estimate.as_json())


async def _explain(run: ResolvedRun, store: RunStore, client: Client | None, progress: Progress) -> None:
    """Turn examples into explanations."""
    started = time.monotonic()
    explainers = run.explainers | run.baseline_explainers
    examples = read_examples(store, run.config.seed)
    await explain_features(store, examples, explainers, client, progress=progress)
    store.write_stage("explain", time.monotonic() - started, {"explainers": list(explainers)})


async def _score(run: ResolvedRun, store: RunStore, client: Client | None, progress: Progress) -> None:
    """Turn explanations into judgements and scores."""
    started = time.monotonic()
    tests = run.tests_with(client)
    needed = any(test.needs_explanation and test.explainers is None for test in tests)
    await score_features(
        store,
        read_examples(store, run.config.seed),
        _scored_explainers(run, store) if needed else [],
        tests,
        shuffled=run.with_shuffled,
        seed=run.config.seed,
        progress=progress,
    )
    store.write_stage("score", time.monotonic() - started, {"judges": sorted({test.judge_name for test in tests})})


def _scored_explainers(run: ResolvedRun, store: RunStore) -> list[str]:
    """The explainers to score, as far as they have explanations. Raises MissingFile if none has."""
    recorded = store.explainers()
    scored = [name for name in run.scored_explainers(recorded) if name in recorded]
    if not scored:
        raise MissingFile(
            str(store.folder),
            expected=f"explanations by {', '.join(run.config.explainers) or 'some explainer'}",
            seen=f"explanations by {', '.join(recorded)}" if recorded else "no explanation",
            fix=f"run `evalkit explain {store.folder}` first",
        )
    return scored
