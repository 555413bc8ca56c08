"""Trains one dictionary from text, end to end: contexts, hidden states, training, measuring, weights with a card.

The only module of training that knows corpus and subject model together. Hidden states of full contexts are kept under a
work folder, so training a second dictionary of the same site pays for no forward pass. Writes the dictionary's folder
last, whole or not at all.
"""

from __future__ import annotations

import collections
import gzip
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evalkit.corpus import Corpus, tokenize_corpus
from evalkit.errors import CorpusError
from evalkit.final_norm import denormalise, normalise
from evalkit.models import find_model
from evalkit.progress import SILENT
from evalkit.protocols import Progress
from evalkit.records import Site, SubjectInfo, TokenBatch
from evalkit.sources.gemma_scope import read_weights
from evalkit.sources.sae import measure_fit
from evalkit.subject import Dtype, Subject
from evalkit.training.activations import ActivationStore
from evalkit.training.cards import Card, CorpusPart, write_card, write_sae
from evalkit.training.sae import SaeTrainingConfig, train_sae
from rqae import RQAE
from rqae.codebook import distinct_codes
from rqae.training import RqaeTrainingConfig, train_rqae

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["TextSpec", "TrainingText", "corpus_parts", "open_text", "train_rqae_dictionary", "train_sae_dictionary"]

_BATCH = 16  # contexts per forward
RQAE_DEPTHS = (16, 64, 256)


@dataclass(frozen=True, slots=True)
class TextSpec:
    """What to train on. ``held_out`` is text of other documents; ``max_tokens`` (distinct tokens) bounds both."""

    model: str
    site: str
    corpus: str
    held_out: str
    work: Path
    max_tokens: int | None = None
    held_out_tokens: int = 100_000
    context_length: int = 128
    dtype: Dtype = "bfloat16"
    device: str = "auto"


@dataclass(frozen=True, slots=True, eq=False)
class TrainingText:
    """Hidden states to train on and to measure on, and what is known of the subject model."""

    train: ActivationStore
    held_out: ActivationStore
    info: SubjectInfo
    parts: tuple[CorpusPart, ...]


def open_text(spec: TextSpec, progress: Progress = SILENT) -> TrainingText:
    """Collect the hidden states, or open them where they are. Raises EvalkitError."""
    subject = Subject.load(find_model(spec.model), sites=(spec.site,), dtype=spec.dtype, device=spec.device)
    stores = [
        _collect(spec, subject, name, source, limit, progress)
        for name, source, limit in (
            ("train", spec.corpus, spec.max_tokens),
            ("held-out", spec.held_out, spec.held_out_tokens),
        )
    ]
    return TrainingText(stores[0], stores[1], subject.info, corpus_parts(spec.corpus))


def _collect(
    spec: TextSpec, subject: Subject, name: str, source: str, limit: int | None, progress: Progress
) -> ActivationStore:
    folder = spec.work / name
    corpus = tokenize_corpus(
        source,
        subject.tokenizer,
        folder / "contexts",
        context_length=spec.context_length,
        max_tokens=limit,
        progress=progress,
    )
    full = int((corpus.lengths == corpus.context_length).sum())
    if not full:
        raise CorpusError(
            source,
            expected=f"at least one context of {spec.context_length} tokens",
            seen=f"{corpus.n_tokens} tokens in {corpus.n_documents} documents",
            fix="use longer documents or a smaller --context-length",
        )
    return ActivationStore.build(
        _full_contexts(corpus),
        lambda batch: subject.hidden(batch.token_ids)[spec.site],
        Site(Path(spec.model).name, spec.site),
        folder / "activations",
        corpus_name=f"{Path(source).name} {corpus.settings.digest}",
        d_model=subject.info.d_model,
        max_tokens=full * (corpus.context_length - 1),
        progress=progress,
    )


def _full_contexts(corpus: Corpus) -> Iterator[TokenBatch]:
    full = np.flatnonzero(corpus.lengths == corpus.context_length)
    for first in range(0, len(full), _BATCH):
        yield corpus.batch(full[first : first + _BATCH])


def corpus_parts(source: str) -> tuple[CorpusPart, ...]:
    """Sources and licences of a jsonl corpus whose lines name them; otherwise the file itself, licence unknown."""
    path = Path(source)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)
                counts[str(document.get("source", path.name)), str(document.get("license", "unknown"))] += 1
    counts = counts or collections.Counter({(path.name, "unknown"): 1})
    return tuple(CorpusPart(name, licence, count) for (name, licence), count in sorted(counts.items()))


def train_sae_dictionary(
    text: TrainingText,
    config: SaeTrainingConfig,
    out: Path,
    *,
    command: str,
    checkpoint: Path | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Train an SAE and write it in Gemma Scope's layout below ``out``; returns its folder."""
    weights, report = train_sae(text.train, config, held_out=text.held_out, checkpoint=checkpoint, progress=progress)
    site = text.train.site
    card = Card(
        model=site.model,
        site=site.path,
        name=f"{site}/sae/width-{config.width}/l0-{round(report.fit.l0)}",
        kind="sae",
        command=command,
        corpus=text.parts,
        n_tokens=report.n_tokens,
        n_distinct_tokens=report.n_distinct,
        held_out_tokens=report.fit.n_tokens,
        fvu=report.fit.fvu,
        l0=report.fit.l0,
        alive_share=report.fit.alive_share,
        width=config.width,
        seed=config.seed,
        further={**_left_out(text.train), "trained_for_l0": config.l0, "seconds": round(report.seconds)},
    )
    folder = write_sae(out, weights, card)
    measure_fit(read_weights(folder / "params.npz"), text.held_out.chunks())  # what was written can be read
    return folder


def _left_out(store: ActivationStore) -> dict[str, Any]:
    record = store.record
    rule = "the first token of each context, and tokens whose hidden state is over 10 times the median norm"
    return {"left_out": {"rule": rule, "attention_sinks": record.sinks, "of_tokens": record.sinks + record.rows}}


def train_rqae_dictionary(
    text: TrainingText, config: RqaeTrainingConfig, out: Path, *, command: str, progress: Progress = SILENT
) -> Path:
    """Train an RQAE on final-normed hidden states and write its checkpoint folder ``out``, in float16."""
    started = time.monotonic()
    rows = (normalise(batch, text.info) for batch in text.train.batches(config.batch_tokens, seed=config.seed))
    model, report = train_rqae(rows, config, progress=progress)
    model.save_pretrained(out, dtype=torch.float16)
    seconds = time.monotonic() - started
    stored = RQAE.from_pretrained(out)
    depths = sorted({*(depth for depth in RQAE_DEPTHS if depth < config.num_quantizers), config.num_quantizers})
    fit, use = _measure_rqae(stored, text.held_out, text.info, depths)
    site = text.train.site
    n_tokens = report.tokens + config.init_tokens
    card = Card(
        model=site.model,
        site=site.path,
        name=f"{site}/{out.name}",
        kind="rqae",
        command=command,
        corpus=text.parts,
        n_tokens=n_tokens,
        n_distinct_tokens=min(n_tokens, len(text.train)),
        held_out_tokens=len(text.held_out),
        fvu=fit[config.num_quantizers]["raw"],
        l0=None,
        alive_share=use,
        width=config.num_quantizers,
        seed=config.seed,
        further={
            **_left_out(text.train),
            "fvu_by_depth": {str(depth): row["raw"] for depth, row in fit.items()},
            "fvu_normed_by_depth": {str(depth): row["normed"] for depth, row in fit.items()},
            "units": "fvu and fvu_by_depth: raw hidden states; fvu_normed_by_depth: final-normed ones",
            "seconds": round(seconds),
        },
    )
    write_card(out, card)
    return out


def _measure_rqae(
    model: RQAE, store: ActivationStore, info: SubjectInfo, depths: Sequence[int]
) -> tuple[dict[int, dict[str, float]], float]:
    """FVU by depth in raw and in final-normed units, about the mean; and the share of (quantizer, code) pairs used."""
    squares = {depth: {"raw": 0.0, "normed": 0.0} for depth in depths}
    sums: dict[str, Tensor] = {kind: torch.zeros(store.d_model, dtype=torch.float64) for kind in ("raw", "normed")}
    totals = dict.fromkeys(sums, 0.0)
    used = torch.zeros(model.config.num_quantizers, model.config.num_codes, dtype=torch.bool)
    for hidden in store.chunks():
        normed = normalise(hidden, info)
        for kind, rows in (("raw", hidden), ("normed", normed)):
            sums[kind] += rows.double().sum(0)
            totals[kind] += float(rows.double().square().sum())
        codes = model.encode(normed)
        used[torch.arange(len(used)).expand_as(codes), codes] = True
        for depth, found in model.reconstructions(codes, depths):
            squares[depth]["normed"] += float((found - normed).double().square().sum())
            squares[depth]["raw"] += float((denormalise(found, hidden, info) - hidden).double().square().sum())
    variance = {kind: totals[kind] - float(sums[kind].square().sum()) / len(store) for kind in sums}
    fit = {depth: {kind: round(row[kind] / variance[kind], 4) for kind in row} for depth, row in squares.items()}
    return fit, float(used.sum()) / (len(used) * distinct_codes(model.config))
