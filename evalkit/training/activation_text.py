"""Training text for a dictionary: contexts of a corpus, their hidden states at one site, and the corpus's sources.

Hidden states of full contexts are stored under a work folder, so that training a second dictionary for the same site needs
no forward pass. Alternatively, they are streamed and not stored. Knows nothing of dictionaries.
"""

from __future__ import annotations

import collections
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evalkit.corpus.contexts import Corpus
from evalkit.corpus.tokenisation import tokenize_corpus
from evalkit.errors import CorpusError
from evalkit.protocols import Progress
from evalkit.records import Site, SubjectInfo, TokenBatch
from evalkit.subject.download import find_model
from evalkit.subject.model import Dtype, Subject
from evalkit.training.activation_store import ActivationStore
from evalkit.training.activation_stream import ActivationStream
from evalkit.training.cards import CorpusPart
from evalkit.util.progress import SILENT

__all__ = ["LossText", "TextSpec", "TrainingText", "corpus_parts", "full_contexts", "open_text"]

_BATCH = 16  # contexts per forward pass


@dataclass(frozen=True, slots=True)
class TextSpec:
    """Which text and hidden states to train on.

    held_out: text of other documents, for measurements.
    work: folder for tokenised text and stored hidden states.
    max_tokens: limit on distinct training tokens; None: no limit.
    stream: compute hidden states during training instead of storing them.
    """

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
    stream: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class LossText:
    """The model and the held-out contexts on which next-token losses are measured."""

    model: str
    corpus: Corpus
    contexts: NDArray[np.int64]
    dtype: Dtype
    device: str


@dataclass(frozen=True, slots=True, eq=False)
class TrainingText:
    """Hidden states for training and for measurements, the subject model's facts, and the sources of the text."""

    train: ActivationStore | ActivationStream
    held_out: ActivationStore
    info: SubjectInfo
    parts: tuple[CorpusPart, ...]
    losses: LossText | None = None


def open_text(spec: TextSpec, progress: Progress = SILENT) -> TrainingText:
    """Compute the hidden states, or open them if they are already stored. Raises EvalkitError."""
    model = find_model(spec.model)
    subject = Subject.load(model, sites=(spec.site,), dtype=spec.dtype, device=spec.device)
    site = Site(Path(spec.model).name, spec.site)
    corpus = _contexts(spec, subject, "train", spec.corpus, spec.max_tokens, progress)
    train: ActivationStore | ActivationStream
    if spec.stream:
        train = ActivationStream(
            corpus,
            full_contexts(corpus),
            lambda batch: subject.hidden(batch.token_ids)[spec.site],
            site,
            subject.info.d_model,
        )
    else:
        train = _collect(spec, corpus, subject, site, spec.corpus, spec.work / "train", progress)
    text = _contexts(spec, subject, "held-out", spec.held_out, spec.held_out_tokens, progress)
    held_out = _collect(spec, text, subject, site, spec.held_out, spec.work / "held-out", progress)
    losses = LossText(model, text, full_contexts(text), spec.dtype, spec.device)
    return TrainingText(train, held_out, subject.info, corpus_parts(spec.corpus), losses)


def _contexts(
    spec: TextSpec, subject: Subject, name: str, source: str, limit: int | None, progress: Progress
) -> Corpus:
    corpus = tokenize_corpus(
        source,
        subject.tokenizer,
        spec.work / name / "contexts",
        context_length=spec.context_length,
        max_tokens=limit,
        progress=progress,
    )
    if not len(full_contexts(corpus)):
        raise CorpusError(
            source,
            expected=f"at least one context of {spec.context_length} tokens",
            seen=f"{corpus.n_tokens} tokens in {corpus.n_documents} documents",
            fix="use longer documents or a smaller --context-length",
        )
    return corpus


def full_contexts(corpus: Corpus, limit: int | None = None) -> NDArray[np.int64]:
    """Indices of the contexts without padding; at most the first ``limit``."""
    return np.flatnonzero(corpus.lengths == corpus.context_length)[:limit]


def _collect(
    spec: TextSpec, corpus: Corpus, subject: Subject, site: Site, source: str, folder: Path, progress: Progress
) -> ActivationStore:
    """The hidden states of all full contexts, stored below ``folder``; computed unless already stored."""
    contexts = full_contexts(corpus)

    def batches() -> Iterator[TokenBatch]:
        for first in range(0, len(contexts), _BATCH):
            yield corpus.batch(contexts[first : first + _BATCH])

    return ActivationStore.build(
        batches(),
        lambda batch: subject.hidden(batch.token_ids)[site.path],
        site,
        folder / "activations",
        corpus_name=f"{Path(source).name} {corpus.settings.digest}, model in {spec.dtype}",
        d_model=subject.info.d_model,
        max_tokens=len(contexts) * (corpus.context_length - 1),
        progress=progress,
    )


def corpus_parts(source: str) -> tuple[CorpusPart, ...]:
    """The sources and licences named in the lines of a jsonl corpus; for others, the file itself, licence unknown."""
    path = Path(source)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    if path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for line in filter(str.strip, lines):
                document = json.loads(line)
                counts[str(document.get("source", path.name)), str(document.get("license", "unknown"))] += 1
    counts = counts or collections.Counter({(path.name, "unknown"): 1})
    return tuple(CorpusPart(name, licence, count) for (name, licence), count in sorted(counts.items()))
