"""A run from its configuration: collect, explain, score, in that order, each skipping what is there.

The only module that knows the order of the stages. Explainers, judges, scorers, sources and clients come from the
registry by name. Writes a run folder (see ``store`` and ``examples``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from evalkit import registry
from evalkit.config import RunConfig
from evalkit.errors import BadConfig, CorpusError, MissingFile, require
from evalkit.examples import ExampleStore, FeatureExamples, rows_of
from evalkit.grid import Grid, build_grid
from evalkit.judging import explain_features, score_features
from evalkit.progress import SILENT
from evalkit.protocols import Client, Explainer, FeatureSource, Progress
from evalkit.records import FeatureId
from evalkit.sampling import Counts, draw_windows, windows_of
from evalkit.store import FeatureRow, RunStore

if TYPE_CHECKING:
    from evalkit.collection import Collection
    from evalkit.corpus import Corpus
    from evalkit.preparation import Prepared

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
    with RunStore.create(folder, config.identity()) as store:
        if "collect" in stages:
            collect_stage(config, store, progress)
        if "explain" in stages:
            explain_stage(config, store, progress)
        if "score" in stages:
            score_stage(config, store, progress)


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


def open_sources(config: RunConfig) -> list[FeatureSource]:
    """All dictionaries of the configuration, unbound."""
    require("torch", "model")
    from evalkit.sources import open_dictionary

    options: dict[str, Any] = {"depths": config.depths, "density": config.density, "revision": config.revision}
    options["subject"] = PurePosixPath(config.model).name  # where a dictionary does not say whose it is
    if config.site:
        options["site"] = config.site
    return [source for path in config.dictionaries for source in open_dictionary(path, **options)]


def collect_stage(config: RunConfig, store: RunStore, progress: Progress) -> None:
    """Corpus → examples. Nothing is loaded when the examples of every source are there."""
    if store.stage_done("collect"):
        return
    for module in ("torch", "transformers", "safetensors"):
        require(module, "model")
    from evalkit.calibration import calibrate, choose_centres
    from evalkit.collection import collect
    from evalkit.corpus import tokenize_corpus
    from evalkit.models import find_model
    from evalkit.preparation import prepare
    from evalkit.protocols import CentredSource
    from evalkit.subject import Subject

    started = time.monotonic()
    sources = open_sources(config)
    sites = list(dict.fromkeys(source.site.path for source in sources))
    subject = Subject.load(find_model(config.model), sites=sites, dtype=config.dtype, device=config.device)
    corpus = tokenize_corpus(
        config.corpus,
        subject.tokenizer,
        store.folder / "corpus",
        context_length=config.context_length,
        text_field=config.text_field,
        split=config.split,
        max_tokens=config.max_tokens,
        skip_first=config.skip_first,
        revision=config.revision,
        progress=progress,
    )
    grid = build_grid(corpus, window_length=config.window_length, skip_first=config.skip_first, seed=config.seed)
    _check_enough(config, corpus, grid)
    needs_centres = any(isinstance(source, CentredSource) for source in sources)
    centres = choose_centres(corpus, config.n_features, config.seed) if needs_centres else []
    calibration = calibrate(
        corpus,
        subject,
        store.folder / "calibration.safetensors",
        sites=sites,
        n_contexts=config.calibration_contexts,
        centres=centres,
        seed=config.seed,
        progress=progress,
    )
    text = _decoder(subject.tokenizer)
    prepared = prepare(config, sources, subject.info, calibration, centres, lambda token: text((token,))[0])
    store.write_sources([one.chosen.source.info for one in prepared], [one.measured for one in prepared])
    collection = collect(
        corpus,
        calibration,
        [one.chosen for one in prepared],
        store.folder / "collected",
        batch_size=config.batch_size,
        progress=progress,
    )
    _sample(config, store, prepared, collection, corpus, grid, text, progress)
    detail = {"tokens": corpus.n_tokens, "windows": len(grid), "duplicate_windows": grid.n_duplicates}
    store.write_stage("collect", time.monotonic() - started, detail)


def _check_enough(config: RunConfig, corpus: Corpus, grid: Grid) -> None:
    least = config.n_positives + config.n_negatives
    for pool, name in enumerate(("explain", "score")):
        if (seen := int((grid.pools == pool).sum())) < least:
            raise CorpusError(
                config.corpus,
                expected=f"at least {least} windows in each pool",
                seen=f"{seen} in the {name} pool ({corpus.n_documents} documents, {corpus.n_tokens} tokens)",
                fix="use a longer corpus with more documents, or fewer --positives and --negatives",
            )


def _sample(
    config: RunConfig,
    store: RunStore,
    prepared: Sequence[Prepared],
    collection: Collection,
    corpus: Corpus,
    grid: Grid,
    text: Callable[[tuple[int, ...]], tuple[str, ...]],
    progress: Progress,
) -> None:
    examples = ExampleStore(store.folder / "examples")
    counts = Counts(config.n_explain, config.n_positives, config.n_negatives)
    used: set[int] = set()
    task = progress.start("sample windows", len(prepared), "dictionaries")
    for index, one in enumerate(prepared):
        source, features = one.chosen.source, one.chosen.features
        activations = collection.read(index)
        rows, records = [], []
        for position, (feature, windows) in enumerate(
            zip(features, windows_of(activations, len(features), grid), strict=True)
        ):
            draw = draw_windows(windows, grid, counts, source=source.name, feature=feature, seed=config.seed)
            rows += rows_of(feature, windows, draw, grid)
            explain_peaks = windows.peaks[grid.pools[windows.rows] == 0]
            records.append(
                FeatureRow(
                    source=source.name,
                    feature=feature,
                    position=position,
                    status="ok" if draw.reason is None else "ineligible",
                    reason=draw.reason,
                    density=windows.n_active_tokens / activations.n_tokens,
                    threshold=source.threshold(feature),
                    peak=windows.maximum,
                    explain_peak=float(explain_peaks.max(initial=0.0)),
                )
            )
        examples.write_source(index, source.name, rows)
        store.write_features(source.name, records)
        used.update(row.row for row in rows)
        progress.advance(task)
    progress.finish(task)

    def pieces(row: int) -> tuple[str, ...]:
        batch = corpus.batch(grid.contexts[row : row + 1])
        start = int(grid.starts[row])
        return text(tuple(batch.token_ids[0, start : start + grid.window_length].tolist()))

    examples.write_windows(grid, np.array(sorted(used), dtype=np.int64), pieces)


def _decoder(tokenizer: Any) -> Callable[[tuple[int, ...]], tuple[str, ...]]:
    from evalkit.token_text import token_pieces

    @cache
    def pieces(ids: tuple[int, ...]) -> tuple[str, ...]:
        return token_pieces(tokenizer, ids)

    return pieces


def read_examples(store: RunStore, seed: int) -> dict[str, dict[FeatureId, FeatureExamples]]:
    """The examples of every source of a run, by source and feature. Raises MissingFile before collection is done."""
    if not store.stage_done("collect"):
        raise MissingFile(
            str(store.folder),
            expected="a run whose examples are collected",
            seen="none yet",
            fix="run `evalkit collect`",
        )
    examples = ExampleStore(store.folder / "examples")
    windows = examples.windows()
    found = {}
    for index, name in enumerate(store.source_names()):
        rows = store.features(name)
        thresholds = {row.feature: row.threshold for row in rows}
        peaks = {row.feature: row.explain_peak for row in rows}
        found[name] = examples.read_source(index, windows, thresholds, peaks, seed)
    return found


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
            list(_explainers(config, client)),
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


def _by_record_name(parts: dict[str, Any], client: Client | None) -> dict[str, Any]:
    """Parts that speak to a language model are recorded with its name, so two models never share a record."""
    return {
        f"{name}@{client.name}" if client and getattr(part, "uses_client", False) else name: part
        for name, part in parts.items()
    }


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
