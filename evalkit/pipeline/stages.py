"""A run from its configuration: collect, explain, score, in that order, each skipping what is there.

The only module that knows the order of the stages. Explainers, judges, scorers, sources and clients come from the
registry by name. Writes a run folder (see ``store`` and ``examples``).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit import registry
from evalkit.collect.stage import collect_stage, read_examples
from evalkit.config.run_config import RunConfig
from evalkit.errors import MissingFile
from evalkit.evaluate.components import make_explainers, make_tests
from evalkit.evaluate.explain_stage import explain_features
from evalkit.evaluate.score_stage import score_features
from evalkit.llm.session import make_client, open_client, price_of
from evalkit.pipeline.plan import estimate_asking
from evalkit.protocols import Client, Progress
from evalkit.records import BASELINE
from evalkit.store.run_store import RunStore
from evalkit.util.progress import SILENT
from evalkit.util.run_async import wait_for

__all__ = [
    "collect_stage",
    "explain_stage",
    "load_config",
    "read_examples",
    "run",
    "score_stage",
]

_LOG = logging.getLogger(__name__)
_STAGES = ("collect", "explain", "score")


def run(config: RunConfig, folder: Path, *, stages: Sequence[str] = _STAGES, progress: Progress = SILENT) -> None:
    """Run the stages on a folder. Raises EvalkitError; what is complete stays and is not done again."""
    _check_parts(config, stages)
    with RunStore.create(folder, config.identity()) as store:
        if set(stages) == set(_STAGES):
            _keep_estimate(config, store)
        if "collect" in stages:
            collect_stage(config, store, progress)
        if {"explain", "score"} & set(stages):
            wait_for(_describe_and_judge(config, store, stages, progress))


async def _describe_and_judge(config: RunConfig, store: RunStore, stages: Sequence[str], progress: Progress) -> None:
    """The two stages that may ask a language model, with one client for both."""
    async with open_client(config, store) as client:
        if "explain" in stages:
            await explain_stage(config, store, client, progress)
        if "score" in stages:
            await score_stage(config, store, client, progress)


def _keep_estimate(config: RunConfig, store: RunStore) -> None:
    """What asking the language model is expected to take, kept beside what it will have taken: by the first command."""
    client = make_client(config)
    if client is None or any(asked.model == client.name and asked.estimate for asked in store.asked()):
        return
    estimate = estimate_asking(config, store.folder)
    if estimate is not None:
        store.write_estimate(estimate.model, estimate.as_json())


def _check_parts(config: RunConfig, stages: Sequence[str]) -> None:
    """Make every named part once, so that a wrong name or a missing model is found before the expensive stages."""
    client = make_client(config) if {"explain", "score"} & set(stages) else None
    if client is not None:
        price_of(config, client.name)
    if "explain" in stages:
        make_explainers(config, client)
    if "score" in stages:
        make_tests(config, client)


def load_config(folder: Path, **changes: Any) -> RunConfig:
    """The configuration of an existing run, with other explainers, judges, scorers or client."""
    path = folder / "run.json"
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFile(
            str(path), expected="a run folder", seen="no run.json", fix="start with `evalkit collect` or `evalkit run`"
        ) from error
    identity.pop("protocol", None)
    return RunConfig.create(**{**identity, **changes})


async def explain_stage(config: RunConfig, store: RunStore, client: Client | None, progress: Progress) -> None:
    """Examples → explanations."""
    started = time.monotonic()
    explainers = make_explainers(config, client)
    if "lexical" in config.controls:
        explainers |= make_explainers(config.model_copy(update={"explainers": BASELINE[:1]}), None)
    examples = read_examples(store, config.seed)
    await explain_features(store, examples, explainers, client, progress=progress)
    store.write_stage("explain", time.monotonic() - started, {"explainers": list(explainers)})


async def score_stage(config: RunConfig, store: RunStore, client: Client | None, progress: Progress) -> None:
    """Explanations → judgements."""
    started = time.monotonic()
    tests = make_tests(config, client)
    needed = any(test.needs_explanation and test.explainers is None for test in tests)
    await score_features(
        store,
        read_examples(store, config.seed),
        _explained(config, client, store) if needed else [],
        tests,
        shuffled="shuffled" in config.controls,
        seed=config.seed,
        progress=progress,
    )
    store.write_stage("score", time.monotonic() - started, {"judges": sorted({test.judge_name for test in tests})})


def _explained(config: RunConfig, client: Client | None, store: RunStore) -> list[str]:
    """The recorded explainers to score: those of the configuration, all there are if it names none."""
    recorded = store.explainers()
    wanted = []
    for text in dict.fromkeys(config.explainers):
        (name,) = make_explainers(config.model_copy(update={"explainers": (text,)}), client)
        label = registry.parse_part("explainers", text).label
        # where it was explained with another client than it is scored with, or with none
        wanted += [name] if name in recorded else [one for one in recorded if one.rpartition("@")[0] == label]
    if not config.explainers:
        wanted = recorded
    if not wanted:
        raise MissingFile(
            str(store.folder),
            expected=f"explanations by {', '.join(config.explainers) or 'some explainer'}",
            seen=f"explanations by {', '.join(recorded)}" if recorded else "no explanation",
            fix=f"run `evalkit explain {store.folder}` first",
        )
    return wanted
