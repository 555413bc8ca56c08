"""A run from its configuration: collect, explain, score, in that order, each skipping what is there.

The only module that knows the order of the stages. Explainers, judges, scorers, sources and clients come from the
registry by name. Writes a run folder (see ``store`` and ``examples``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit import registry
from evalkit.collecting import collect_stage, open_sources, read_examples
from evalkit.config import RunConfig
from evalkit.errors import BadConfig, MissingFile
from evalkit.judging import explain_features, score_features
from evalkit.progress import SILENT
from evalkit.protocols import Client, Explainer, Progress
from evalkit.store import RunStore

__all__ = [
    "collect_stage",
    "explain_stage",
    "load_config",
    "open_sources",
    "plan",
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
        if "collect" in stages:
            collect_stage(config, store, progress)
        if "explain" in stages:
            explain_stage(config, store, progress)
        if "score" in stages:
            score_stage(config, store, progress)


def _check_parts(config: RunConfig, stages: Sequence[str]) -> None:
    """Make every named part once, so that a wrong name or a missing model is found before the expensive stages."""
    client = _client(config) if {"explain", "score"} & set(stages) else None
    if "explain" in stages:
        _explainers(config, client)
    if "score" in stages:
        for name in config.judges:
            _judge(name, config, client)
        for name in config.scorers:
            registry.create("scorers", name)


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


def plan(config: RunConfig) -> dict[str, Any]:
    """What a run would do, without loading the subject model: sources, features, and the most judgements there can be."""
    names = [source.name for source in open_sources(config)]
    n_sources = len(names) + sum(control != "shuffled" for control in config.controls)
    tests = len(config.explainers) * len(config.judges) * len(config.scorers) * (1 + ("shuffled" in config.controls))
    return {
        "dictionaries": names,
        "controls": list(config.controls),
        "features": n_sources * config.n_features,
        "explanations": n_sources * config.n_features * len(config.explainers),
        "judgements": n_sources * config.n_features * tests * (config.n_positives + config.n_negatives),
    }


def explain_stage(config: RunConfig, store: RunStore, progress: Progress) -> None:
    """Examples → explanations."""
    started = time.monotonic()
    client = _client(config)
    explainers = _explainers(config, client)
    examples = read_examples(store, config.seed)
    asyncio.run(explain_features(store, examples, explainers, client, progress=progress))
    store.write_stage("explain", time.monotonic() - started, {"explainers": list(explainers)})


def score_stage(config: RunConfig, store: RunStore, progress: Progress) -> None:
    """Explanations → judgements."""
    started = time.monotonic()
    client = _client(config)
    scorers = [registry.create("scorers", name) for name in config.scorers]
    judges = _by_record_name({name: _judge(name, config, client) for name in config.judges}, client)
    examples = read_examples(store, config.seed)
    asyncio.run(
        score_features(
            store,
            examples,
            _explained(config, client, store),
            judges,
            scorers,
            shuffled="shuffled" in config.controls,
            seed=config.seed,
            progress=progress,
        )
    )
    store.write_stage("score", time.monotonic() - started, {"judges": list(judges)})


def _explainers(config: RunConfig, client: Client | None) -> dict[str, Explainer]:
    return _by_record_name({name: registry.create("explainers", name) for name in config.explainers}, client)


def _explained(config: RunConfig, client: Client | None, store: RunStore) -> list[str]:
    """The recorded explainers to score: those of the configuration, all there are if it names none."""
    recorded = store.explainers()
    wanted = list(_explainers(config, client))
    if not all(name in recorded for name in wanted):  # explained with a client, scored without one
        wanted = [name for name in recorded if name.split("@")[0] in config.explainers]
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


def _by_record_name(parts: dict[str, Any], client: Client | None) -> dict[str, Any]:
    """Parts by the name they are recorded by: with that of the model behind them, so two models never share a record.

    That model is the client's for parts that ask it (``uses_client``), or what the part itself calls its ``variant``.
    """
    named = {}
    for name, part in parts.items():
        behind = client.name if client and getattr(part, "uses_client", False) else getattr(part, "variant", None)
        named[f"{name}@{behind}" if behind else name] = part
    return named


def _client(config: RunConfig) -> Client | None:
    if config.client is None:
        return None
    client: Client = registry.create("clients", config.client, **config.client_options)
    return client


def _judge(name: str, config: RunConfig, client: Client | None) -> Any:
    if name == "llm":
        if client is None:
            raise BadConfig("judge 'llm'", expected="a client", seen="none", fix="add --client replay:FILE")
        return registry.create("judges", name, client=client)
    if name == "embedding":
        return registry.create("judges", name, model=config.embedding_model, device=config.device)
    return registry.create("judges", name)
