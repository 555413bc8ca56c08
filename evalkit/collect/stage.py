"""The first stage of a run: turns a corpus and dictionaries into examples.

Calls the steps in order (contexts, fit check, grid, calibration, features, activations, examples); each step skips what
is on disk already. Dumps that contain their examples need neither corpus nor subject model (see ``dump_examples``).
Writes ``corpus/``, ``fit.json``, ``calibration.safetensors``, ``collected/`` and ``examples/`` under the run folder, and
the tables ``sources`` and ``features``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from evalkit.collect.dump_examples import write_ready
from evalkit.collect.dump_windows import check_ready, gather_ready
from evalkit.collect.example_files import ExampleStore, rows_of
from evalkit.collect.sampling import Counts, draw_windows, windows_of
from evalkit.config.run_config import RunConfig
from evalkit.corpus.bos import wanted_bos
from evalkit.corpus.windows import Grid, build_grid
from evalkit.errors import BadFile, CorpusError, MissingFile, RunMismatch, require
from evalkit.protocols import ExampleSource, FeatureSource, Progress
from evalkit.records import FeatureExamples, FeatureId
from evalkit.store.run_store import RunStore
from evalkit.store.tables import FeatureRow
from evalkit.util.sealed_files import read_sealed_json, write_sealed

if TYPE_CHECKING:
    from evalkit.collect.activations import Collection, SelectedFeatures
    from evalkit.collect.calibration import Calibration, Centre
    from evalkit.corpus.contexts import Corpus
    from evalkit.subject.model import Subject

__all__ = ["collect_stage", "open_sources", "read_examples"]

_REDO = "delete the folder collected and run again"


def open_sources(config: RunConfig) -> list[FeatureSource]:
    """All dictionaries of the configuration, not yet bound to a subject model; or all dumps.

    Raises BadConfig for a mixture of both, and for dictionaries without a subject model.
    """
    require("torch", "model")
    from evalkit.sources import open_dictionaries

    subject = PurePosixPath(config.model or "").name  # for dictionaries that do not name their subject model
    wanted = [
        (s.path, {**s.model_dump(exclude_none=True, exclude={"path"}), "subject": subject}) for s in config.specs()
    ]
    sources = open_dictionaries(wanted)
    if not check_ready(sources):
        config.subject()
    return sources


def collect_stage(config: RunConfig, store: RunStore, progress: Progress) -> None:
    """Collect the examples of every source. Loads nothing if they are all on disk already."""
    if _collected(store):
        return
    started = time.monotonic()
    sources = open_sources(config)
    if dumps := check_ready(sources):
        detail = _collect_from_dumps(config, store, dumps, progress)
    else:
        detail = _collect_from_corpus(config, store, sources, progress)
    store.write_stage("collect", time.monotonic() - started, detail)


def _collect_from_dumps(
    config: RunConfig, store: RunStore, dumps: Sequence[ExampleSource], progress: Progress
) -> dict[str, Any]:
    material = gather_ready(config, dumps, progress)
    _check_manifest(store.folder / "collected" / "manifest.json", material.manifest())
    return write_ready(config, store, material)


def _collect_from_corpus(
    config: RunConfig, store: RunStore, sources: Sequence[FeatureSource], progress: Progress
) -> dict[str, Any]:
    """Run the steps of the stage in order; returns the detail for the stage's record."""
    for module in ("torch", "transformers", "safetensors"):
        require(module, "model")
    from evalkit.collect.activations import collect
    from evalkit.collect.build_controls import build_controls
    from evalkit.collect.promoted_tokens import promoted_by_source
    from evalkit.collect.select_features import select_features
    from evalkit.fit.gate import admit
    from evalkit.subject.download import find_model

    prepend_bos = wanted_bos(config.prepend_bos, [source.info for source in sources])
    model = find_model(config.subject())
    subject = _load_subject(config, model, sources)
    text = _decoder(subject.tokenizer)
    corpus = _tokenize(config, store, subject, prepend_bos, progress)
    bound = [source.bind(subject.info) for source in sources]
    fit_file = store.folder / "fit.json"
    measured = admit(bound, subject, corpus, fit_file, seed=config.seed, force=config.force, progress=progress)
    subject.sites = _input_sites(sources)  # the outputs of transcoders are only read by the fit check
    grid = build_grid(corpus, window_length=config.window_length, skip_first=config.skip_first, seed=config.seed)
    _check_enough(config, corpus, grid)
    calibration, centres = _calibrate(config, store, subject, corpus, grid, bound, progress)
    selected = select_features(config, bound, calibration, centres, measured)
    selected += build_controls(config, selected, calibration, lambda token: text((token,))[0], subject.info)
    folder = store.folder / "collected"
    _check_manifest(folder / "manifest.json", _manifest(selected))
    store.write_sources([features.info for features in selected], [features.measured for features in selected])
    collection = collect(corpus, calibration, selected, folder, batch_size=config.batch_size, progress=progress)
    promoted = promoted_by_source(selected, subject, model, revision=config.revision)
    _write_examples(config, store, selected, collection, corpus, grid, promoted, text, progress)
    return {"tokens": corpus.n_tokens, "windows": len(grid), "duplicate_windows": grid.n_duplicates}


def _input_sites(sources: Sequence[FeatureSource]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(source.site.path for source in sources))


def _load_subject(config: RunConfig, model: str, sources: Sequence[FeatureSource]) -> Subject:
    """The subject model, with the sites that the dictionaries read and those that they reconstruct."""
    from evalkit.subject.model import Subject

    sites = dict.fromkeys([*_input_sites(sources), *(source.site.out for source in sources)])
    return Subject.load(model, sites=list(sites), dtype=config.dtype, device=config.device, revision=config.revision)


def _tokenize(
    config: RunConfig, store: RunStore, subject: Subject, prepend_bos: bool | None, progress: Progress
) -> Corpus:
    from evalkit.corpus.tokenisation import tokenize_corpus

    return tokenize_corpus(
        config.corpus,
        subject.tokenizer,
        store.folder / "corpus",
        context_length=config.context_length,
        text_field=config.text_field,
        split=config.split,
        max_tokens=config.max_tokens,
        add_bos=prepend_bos,
        skip_first=config.skip_first,
        revision=config.revision,
        progress=progress,
    )


def _calibrate(
    config: RunConfig,
    store: RunStore,
    subject: Subject,
    corpus: Corpus,
    grid: Grid,
    sources: Sequence[FeatureSource],
    progress: Progress,
) -> tuple[Calibration, list[Centre]]:
    """The calibration sample, and the centres of RQAE features if a dictionary needs them."""
    from evalkit.collect.calibration import calibrate, choose_centres
    from evalkit.protocols import CentredSource

    needs_centres = any(isinstance(source, CentredSource) for source in sources)
    centres = choose_centres(corpus, grid.context_pools, config.n_features, config.seed) if needs_centres else []
    calibration = calibrate(
        corpus,
        subject,
        store.folder / "calibration.safetensors",
        sites=_input_sites(sources),
        n_contexts=config.calibration_contexts,
        centres=centres,
        seed=config.seed,
        progress=progress,
    )
    return calibration, centres


def _manifest(selected: Sequence[SelectedFeatures]) -> list[dict[str, Any]]:
    """The values that must not change when a run is resumed: per source the thresholds and the FVU, to six digits."""
    return [
        {
            "source": one.source.name,
            "thresholds": {f: float(f"{one.source.threshold(f):.6g}") for f in one.features},
            "fvu": float(f"{one.measured.get('fvu_measured', 0.0):.6g}"),
        }
        for one in selected
    ]


def _check_manifest(path: Path, manifest: list[dict[str, Any]]) -> None:
    """Write the manifest, or raise RunMismatch if the run began with other values (a replaced dictionary file, say)."""
    if not path.exists():
        write_sealed(path, (json.dumps(manifest, indent=1) + "\n").encode())
        return
    known = read_sealed_json(path, expected="what the collection began with", fix=_REDO)
    if not isinstance(known, list):
        raise BadFile(str(path), expected="what the collection began with", seen="JSON of another kind", fix=_REDO)
    changed = [new["source"] for old, new in zip(known, manifest, strict=False) if old != new]
    if changed or len(known) != len(manifest):
        raise RunMismatch(
            str(path.parent.parent),
            expected="the dictionaries, model and device that its collection began with",
            seen=f"other values of {changed[0]}"
            if changed
            else f"{len(manifest)} dictionaries instead of {len(known)}",
            fix="restore them, use another --out, or delete the folder to start over",
        )


def _collected(store: RunStore) -> bool:
    """Whether the examples of every source are on disk."""
    if not store.stage_done("collect"):
        return False
    examples = ExampleStore(store.folder / "examples")
    paths = [examples.windows_path, *(examples.path(index) for index in range(len(store.source_names())))]
    return all(path.exists() for path in paths)


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


def _write_examples(
    config: RunConfig,
    store: RunStore,
    selected: Sequence[SelectedFeatures],
    collection: Collection,
    corpus: Corpus,
    grid: Grid,
    promoted: Sequence[Mapping[FeatureId, tuple[str, ...]]],
    text: Callable[[tuple[int, ...]], tuple[str, ...]],
    progress: Progress,
) -> None:
    examples = ExampleStore(store.folder / "examples")
    counts = Counts(**config.counts())
    used: set[int] = set()
    in_score_pool = int((grid.pools == 1).sum())
    task = progress.start("sample windows", len(selected), "dictionaries")
    for index, one in enumerate(selected):
        source, features = one.source, one.features
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
                    window_share=float((grid.pools[windows.rows] == 1).sum() / in_score_pool),
                    promoted=promoted[index].get(feature, ()),
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
    from evalkit.corpus.token_text import token_pieces

    @cache
    def pieces(ids: tuple[int, ...]) -> tuple[str, ...]:
        return token_pieces(tokenizer, ids)

    return pieces


def read_examples(store: RunStore, seed: int) -> dict[str, dict[FeatureId, FeatureExamples]]:
    """The examples of every source of a run, by source and feature. Raises MissingFile before the stage is done."""
    if not _collected(store):
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
        peaks = {row.feature: row.explain_peak for row in rows}
        promoted = {row.feature: row.promoted for row in rows}
        found[name] = examples.read_source(index, windows, peaks, seed, promoted)
    return found
