"""What a run would do and cost, before it does it: ``--dry-run``, and the estimate that a run is held against afterwards.

Opens dictionaries and, where there are some, the run's examples and recorded answers; loads no model and reaches nobody.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.collect.dump_examples import check_ready
from evalkit.collect.stage import open_sources, read_examples
from evalkit.config.run_config import NULL_SOURCES, RunConfig
from evalkit.corpus.readers import locate
from evalkit.errors import MissingFile
from evalkit.evaluate.components import make_explainers, make_tests
from evalkit.evaluate.score_stage import shuffled_partners
from evalkit.llm.accounting.answer_store import Recording, Spent
from evalkit.llm.session import RECORDING, batched, make_client, price_of, replays
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
from evalkit.protocols import FeatureSource
from evalkit.records import Explanation, FeatureExamples
from evalkit.store.run_store import RunStore
from evalkit.subject.download import find_model
from evalkit.subject.throughput import forward_rate
from evalkit.util.run_async import wait_for

__all__ = ["estimate_asking", "plan"]

_NOTHING: dict[str, int | None] = {"tokens": None, "seconds": None}
_IN_FLIGHT = 64  # where a client does not say
_CHARACTERS_PER_TOKEN, _GZIP = 3.9, 2.6  # of English text, and how much longer it is than when compressed


@dataclass(frozen=True, slots=True)
class _Material:
    """What the estimate is made on: features, the explanations they have, and how many features each stands for."""

    examples: list[FeatureExamples]
    explained: Mapping[tuple[str, str], list[Explanation]]
    stands_for: float
    basis: str


def plan(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Dictionaries, features, the most judgements there can be, and what asking a language model would take."""
    sources = open_sources(config)
    names = [source.name for source in sources]
    ready = bool(check_ready(sources))  # dumps need neither corpus nor controls that a model would have to read
    nulls = [] if ready else _null_sources(config, sources)
    controls = [control for control in config.controls if control in nulls or control not in NULL_SOURCES]
    n_sources = len(names) + len(nulls)
    tests = _n_tests(config)
    asking = estimate_asking(config, folder, sources)
    return {
        "dictionaries": names,
        "controls": controls,
        "features": n_sources * config.n_features,
        "explanations": n_sources * config.n_features * len(config.explainers),
        "judgements": n_sources * config.n_features * tests * (config.n_positives + config.n_negatives),
        "reading": _NOTHING if ready else _reading(config, [source.site.path for source in sources]),
        "language_model": None if asking is None else asking.as_json(),
    }


def _reading(config: RunConfig, sites: Sequence[str]) -> dict[str, int | None]:
    """Tokens of the corpus that the subject model reads, and about how many seconds that takes; None where unknown."""
    located = locate(config.corpus)
    tokens = config.max_tokens
    if located.files and located.kind in ("text", "jsonl"):
        characters = sum(path.stat().st_size * (_GZIP if path.suffix == ".gz" else 1) for path in located.files)
        there = int(characters / _CHARACTERS_PER_TOKEN)
        tokens = there if tokens is None else min(tokens, there)
    try:
        folder = Path(find_model(config.subject()))
    except MissingFile:
        return {"tokens": tokens, "seconds": None}
    depths = [int(number) for site in sites for number in re.findall(r"layers\.(\d+)", site)]
    layers = max(depths) + 1 if len(depths) == len(sites) else None
    rate = forward_rate(folder, layers, dtype=config.dtype, device=config.device) if tokens else None
    return {"tokens": tokens, "seconds": None if not rate or not tokens else round(tokens / rate)}


def _n_tests(config: RunConfig) -> int:
    """Tests of one feature: with every explanation that a scorer is given, and those of other features."""
    tests = make_tests(config, make_client(config))
    given = [len(config.explainers if test.explainers is None else test.explainers) for test in tests]
    with_null = 1 + ("shuffled" in config.controls)
    return sum(n * with_null if test.needs_explanation else 1 for n, test in zip(given, tests, strict=True))


def _null_sources(config: RunConfig, sources: Sequence[FeatureSource]) -> list[str]:
    """The controls that are dictionaries of their own; random codes need an RQAE."""
    has_rqae = any(source.info.kind == "rqae" for source in sources)
    return [name for name in config.controls if name in NULL_SOURCES and (has_rqae or name != "random-codes")]


def estimate_asking(config: RunConfig, folder: Path, sources: Sequence[FeatureSource] | None = None) -> Estimate | None:
    """What the run would still ask a language model; None without a client, or with one that only replays.

    ``sources``: where they are open already; opened here if the run's own examples do not tell.
    """
    client = make_client(config)
    if client is None or replays(config):
        return None
    material = _material(config, folder, sources)
    with ExitStack() as stack:
        recordings = []
        for path in filter(None, (folder / RECORDING, config.cache)):
            if path.is_file():
                recordings.append(Recording(path, write=False))
                stack.callback(recordings[-1].close)
        spent = max((found.spent(client.name) for found in recordings), key=lambda one: one.calls, default=Spent())
        counting = CountingClient(client.name, recordings, tokens_per_character(spent))
        parts = wait_for(_count(config, counting, material))
    in_flight = int(getattr(client, "concurrency", _IN_FLIGHT))
    window = str(getattr(client, "window", "")) if batched(config) else None
    return total(parts, client.name, price_of(config, client.name), spent, in_flight, material.basis, window)


async def _count(config: RunConfig, counting: CountingClient, material: _Material) -> dict[str, Load]:
    n_explanations = max(len(config.explainers), 1) * (1 + ("shuffled" in config.controls))
    loads = await count_explaining(make_explainers(config, counting), material.examples, counting)
    loads |= await count_scoring(
        make_tests(config, counting),
        material.examples,
        counting,
        material.explained,
        n_explanations,
    )
    return {name: load * material.stands_for for name, load in loads.items()}


def _material(config: RunConfig, folder: Path, sources: Sequence[FeatureSource] | None) -> _Material:
    """The run's own examples where they are collected, else one made-up feature that stands for all."""
    try:
        with RunStore.open(folder) as store:
            by_source = read_examples(store, config.seed)
            explained = _explained(config, store, by_source)
    except MissingFile:
        sources = open_sources(config) if sources is None else sources
        n_features = (len(sources) + len(_null_sources(config, sources))) * config.n_features
        return _Material([made_up(config)], {}, n_features, f"made-up examples, {n_features} features")
    examples = [one for features in by_source.values() for one in features.values()]
    return _Material(examples, explained, 1.0, f"the run's own examples, {len(examples)} features")


def _explained(
    config: RunConfig, store: RunStore, examples: Mapping[str, Mapping[str, FeatureExamples]]
) -> Mapping[tuple[str, str], list[Explanation]]:
    """The explanations that would be judged, by source and feature: its own, and its partner's."""
    wanted = {text.split(":")[0] for text in config.explainers}
    found: dict[tuple[str, str], list[Explanation]] = defaultdict(list)
    for source, features in examples.items():
        partners = shuffled_partners(features, source, config.seed) if "shuffled" in config.controls else {}
        for explainer in store.explainers():
            if wanted and explainer.split("@")[0].split(":")[0] not in wanted:
                continue
            there = store.explanations(source, explainer)
            for feature in features:
                for whose in filter(None, (feature, partners.get(feature))):
                    if whose in there:
                        found[source, feature].append(there[whose])
    return found
