"""Computes the work and cost of a run, for ``--dry-run`` and for the estimate recorded beside the actual cost.

Opens dictionaries and, if they exist, the run's examples and recorded answers. Loads no model, makes no API calls, writes
nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.abilities import BatchClient, concurrency_of
from evalkit.collect.dump_windows import check_ready
from evalkit.collect.stage import open_sources, read_examples
from evalkit.config.run_config import RunConfig
from evalkit.corpus.readers import locate
from evalkit.errors import MissingFile
from evalkit.evaluate.components import make_explainers
from evalkit.evaluate.score_stage import shuffled_partners
from evalkit.llm.accounting.answer_store import Recording, Spent
from evalkit.llm.session import RECORDING, batched, replays
from evalkit.pipeline.estimate import (
    CountingClient,
    Estimate,
    Load,
    count_explaining,
    count_scoring,
    made_up,
    tokens_per_character,
    total,
)
from evalkit.pipeline.resolved import ResolvedRun
from evalkit.protocols import FeatureSource
from evalkit.records import Explanation, FeatureExamples
from evalkit.store.run_store import RunStore
from evalkit.subject.download import find_model
from evalkit.subject.sites import parse_site
from evalkit.subject.throughput import forward_rate
from evalkit.util.run_async import wait_for

__all__ = ["estimate_asking", "plan"]

_NOTHING_READ: dict[str, int | None] = {"tokens": None, "seconds": None}
# Requests in flight, for clients that do not name their limit: as many as features are scored at a time.
_CONCURRENCY = 64
_CHARACTERS_PER_TOKEN = 3.9  # of English text
_GZIP_RATIO = 2.6  # size of English text over its size when compressed


@dataclass(frozen=True, slots=True)
class _Basis:
    """The basis on which calls are counted.

    explainers: names of the explainers that will be scored.
    explained: explanations that exist already, by source and feature.
    features_per_example: how many features of the run each of ``examples`` stands for.
    """

    examples: list[FeatureExamples]
    explainers: list[str]
    explained: Mapping[tuple[str, str], list[Explanation]]
    features_per_example: float
    description: str


def plan(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Dictionaries, controls, the maximum numbers of features and judgements, and the language model's cost."""
    run = ResolvedRun(config)
    sources = open_sources(config)
    n_sources = len(sources) + len(run.control_dictionaries(sources))
    n_features = n_sources * config.n_features
    asking = estimate_asking(run, folder, sources)
    return {
        "dictionaries": [source.name for source in sources],
        "controls": run.controls(sources),
        "features": n_features,
        "explanations": n_features * len(config.explainers),
        "judgements": n_features * _tests_per_feature(run, folder) * (config.n_positives + config.n_negatives),
        "reading": _NOTHING_READ
        if check_ready(sources)
        else _reading(config, [source.site.path for source in sources]),
        "language_model": None if asking is None else asking.as_json(),
    }


def _reading(config: RunConfig, sites: Sequence[str]) -> dict[str, int | None]:
    """Tokens of the corpus that the subject model reads, and about how many seconds that takes; None where unknown."""
    located = locate(config.corpus)
    tokens = config.max_tokens
    if located.files and located.kind in ("text", "jsonl"):
        characters = sum(path.stat().st_size * (_GZIP_RATIO if path.suffix == ".gz" else 1) for path in located.files)
        there = int(characters / _CHARACTERS_PER_TOKEN)
        tokens = there if tokens is None else min(tokens, there)
    try:
        folder = Path(find_model(config.subject()))
    except MissingFile:
        return {"tokens": tokens, "seconds": None}
    depths = [block.layer for site in sites if (block := parse_site(site))]
    layers = max(depths) + 1 if len(depths) == len(sites) else None
    rate = forward_rate(folder, layers, dtype=config.dtype, device=config.device) if tokens else None
    return {"tokens": tokens, "seconds": None if not rate or not tokens else round(tokens / rate)}


def _tests_per_feature(run: ResolvedRun, folder: Path) -> int:
    """Number of tests per feature: of its own explanations, and of its partner's if the control "shuffled" is used."""
    n_scored = len(run.scored_explainers(_recorded_explainers(folder)))
    n_explanations = [n_scored if test.explainers is None else len(test.explainers) for test in run.tests]
    n_controls = 1 + run.with_shuffled
    return sum(
        n * n_controls if test.needs_explanation else 1 for n, test in zip(n_explanations, run.tests, strict=True)
    )


def _recorded_explainers(folder: Path) -> list[str]:
    try:
        with RunStore.open(folder) as store:
            return store.explainers()
    except MissingFile:
        return []


def estimate_asking(run: ResolvedRun, folder: Path, sources: Sequence[FeatureSource] | None = None) -> Estimate | None:
    """The requests that the run would still send to a language model; None without a client, or with the client replay.

    sources: the run's dictionaries if they are open already; otherwise they are opened if the run has no examples yet.
    """
    config, client = run.config, run.client
    if client is None or replays(config):
        return None
    basis = _basis(run, folder, sources)
    with ExitStack() as stack:
        recordings = []
        for path in filter(None, (folder / RECORDING, config.cache)):
            if path.is_file():
                recordings.append(Recording(path, write=False))
                stack.callback(recordings[-1].close)
        spent = max((found.spent(client.name) for found in recordings), key=lambda one: one.calls, default=Spent())
        counting = CountingClient(client.name, recordings, tokens_per_character(spent))
        parts = wait_for(_count(run, counting, basis))
    in_flight = concurrency_of(client) or _CONCURRENCY
    window = client.window if isinstance(client, BatchClient) and batched(config) else None
    return total(parts, client.name, run.price, spent, in_flight, basis.description, window)


async def _count(run: ResolvedRun, counting: CountingClient, basis: _Basis) -> dict[str, Load]:
    """Requests by part. Creates new explainers and judges, so that those of the run do not see the dummy replies."""
    n_explanations = max(len(basis.explainers), 1) * (1 + run.with_shuffled)
    loads = await count_explaining(make_explainers(run.config, counting), basis.examples, counting)
    loads |= await count_scoring(run.tests_with(counting), basis.examples, counting, basis.explained, n_explanations)
    return {name: load * basis.features_per_example for name, load in loads.items()}


def _basis(run: ResolvedRun, folder: Path, sources: Sequence[FeatureSource] | None) -> _Basis:
    """The run's own examples if they are collected, else one made-up feature that represents all."""
    config = run.config
    try:
        with RunStore.open(folder) as store:
            by_source = read_examples(store, config.seed)
            explainers = run.scored_explainers(store.explainers())
            explained = _explained(run, store, by_source, explainers)
    except MissingFile:
        sources = open_sources(config) if sources is None else sources
        n_features = (len(sources) + len(run.control_dictionaries(sources))) * config.n_features
        description = f"made-up examples, {n_features} features"
        return _Basis([made_up(config)], run.scored_explainers([]), {}, n_features, description)
    examples = [one for features in by_source.values() for one in features.values()]
    return _Basis(examples, explainers, explained, 1.0, f"the run's own examples, {len(examples)} features")


def _explained(
    run: ResolvedRun,
    store: RunStore,
    examples: Mapping[str, Mapping[str, FeatureExamples]],
    explainers: Sequence[str],
) -> Mapping[tuple[str, str], list[Explanation]]:
    """The recorded explanations that would be judged, by source and feature: its own, and its partner's."""
    found: dict[tuple[str, str], list[Explanation]] = defaultdict(list)
    for source, features in examples.items():
        partners = shuffled_partners(features, source, run.config.seed) if run.with_shuffled else {}
        for explainer in explainers:
            explanations = store.explanations(source, explainer)
            for feature in features:
                for explained in filter(None, (feature, partners.get(feature))):
                    if explained in explanations:
                        found[source, feature].append(explanations[explained])
    return found
