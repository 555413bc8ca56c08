"""Trains the dictionaries of the package: one RQAE and five SAEs of SmolLM2-135M's residual stream after layer 15.

    python results/recipes/registry_text.py --work text
    evalkit models pull smollm2-135m
    python results/recipes/dictionaries.py --work text --model models/smollm2-135m --out evalkit/data/dictionaries

Collects hidden states of full contexts of 128 tokens (bfloat16; without the first token of each and attention sinks),
trains the dictionaries one after the other, and writes each with its card, to which it adds the fit on the demo corpus.
Finished steps are skipped, so an interrupted run resumes. Reads WORK/{train,held-out,demo}.jsonl.gz; writes
WORK/contexts, WORK/activations, WORK/done and the dictionaries.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evalkit.corpus.contexts import Corpus
from evalkit.corpus.tokenisation import tokenize_corpus
from evalkit.fit.sae import measure_fit
from evalkit.records import Site, SubjectInfo
from evalkit.sources.formats.gemma_scope import read_weights
from evalkit.subject.final_norm import denormalise, normalise
from evalkit.subject.model import Subject
from evalkit.training.activation_store import ActivationStore
from evalkit.training.activation_text import LossText, TrainingText, corpus_parts, full_contexts
from evalkit.training.dictionaries import train_rqae_dictionary, train_sae_dictionary
from evalkit.training.sae import SaeTrainingConfig
from rqae import RQAE
from rqae.training.config import RqaeTrainingConfig

MODEL, SITE = "smollm2-135m", "layers.15"
CONTEXTS = {"train": 18_900, "held-out": 820, "demo": 1_600}
BATCH = 16
SEED = 0
SAES = ((2048, 32.0), (2048, 16.0), (2048, 64.0), (1024, 32.0), (4096, 32.0))  # width, L0
COMMAND = "python results/recipes/dictionaries.py"


def text_of(work: Path, name: str, subject: Subject) -> Corpus:
    """One of the three texts, tokenised into contexts."""
    text = work / f"{name}.jsonl.gz"
    digest = hashlib.blake2b(text.read_bytes(), digest_size=8).hexdigest()
    return tokenize_corpus(text, subject.tokenizer, work / "contexts" / f"{name}-{digest}")


def collect(work: Path, name: str, subject: Subject) -> ActivationStore:
    """The hidden states of the first full contexts of one of the three texts."""
    corpus = text_of(work, name, subject)
    chosen = full_contexts(corpus, CONTEXTS[name])
    digest = hashlib.blake2b((work / f"{name}.jsonl.gz").read_bytes(), digest_size=8).hexdigest()
    return ActivationStore.build(
        (corpus.batch(chosen[at : at + BATCH]) for at in range(0, len(chosen), BATCH)),
        lambda batch: subject.hidden(batch.token_ids)[SITE],
        Site(MODEL, SITE),
        work / "activations" / name,
        corpus_name=f"registry text, {name}, {digest}",
        d_model=subject.info.d_model,
        max_tokens=len(chosen) * (corpus.context_length - 1),
    )


def once(work: Path, name: str, train: Callable[[], Path], demo: Callable[[Path], dict[str, Any]]) -> None:
    """Train and write one dictionary, unless a marker says it is done; add its fit on the demo corpus to the card."""
    marker = work / "done" / name
    if marker.exists():
        return
    folder = train()
    card = folder / "card.json"
    fields = {**json.loads(card.read_text("utf-8")), "demo": demo(folder)}
    card.write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n", "utf-8")
    marker.parent.mkdir(exist_ok=True)
    marker.write_text(str(folder))
    print({key: fields.get(key) for key in ("name", "fvu", "l0", "alive_share", "demo", "seconds")}, flush=True)


def sae_on(store: ActivationStore, folder: Path) -> dict[str, Any]:
    """FVU and L0 of a stored SAE."""
    fit = measure_fit(read_weights(folder / "params.npz"), store.chunks())
    return {"fvu": round(fit.fvu, 4), "l0": round(fit.l0, 2), "n_tokens": fit.n_tokens}


def rqae_on(store: ActivationStore, info: SubjectInfo, folder: Path) -> dict[str, Any]:
    """FVU of a stored RQAE with all quantizers, in raw units, about the mean of all rows."""
    model = RQAE.from_pretrained(folder)
    error = square = 0.0
    total = np.zeros(store.d_model)
    for hidden in store.chunks():
        found = denormalise(model.decode(model.encode(normalise(hidden, info))), hidden, info)
        error += float((found - hidden).double().square().sum())
        square += float(hidden.double().square().sum())
        total += hidden.double().sum(0).numpy()
    return {"fvu": round(error / (square - float(total @ total) / len(store)), 4), "n_tokens": len(store)}


def main() -> None:
    """Collect, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("text"))
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--out", type=Path, default=Path("evalkit/data/dictionaries"))
    parser.add_argument("--only", choices=("activations", "sae", "rqae"), help="do only this part of the work")
    options = parser.parse_args()
    work: Path = options.work
    subject = Subject.load(options.model, sites=(SITE,), dtype="bfloat16", device="cpu")
    train, held_out, demo = (collect(work, name, subject) for name in CONTEXTS)
    corpus = text_of(work, "held-out", subject)
    losses = LossText(str(options.model), corpus, full_contexts(corpus, CONTEXTS["held-out"]), "bfloat16", "cpu")
    text = TrainingText(train, held_out, subject.info, corpus_parts(str(work / "train.jsonl.gz")), losses)
    if options.only in (None, "rqae"):
        rqae = RqaeTrainingConfig(
            dim=train.d_model,
            num_quantizers=256,
            steps=4000,
            learning_rate=3e-2,
            nested_depths=(16, 64),
            seed=SEED,
            precision="bfloat16",
        )
        folder = options.out / "rqae-256"
        once(
            work,
            "rqae-256",
            lambda: train_rqae_dictionary(text, rqae, folder, command=COMMAND),
            lambda folder: rqae_on(demo, subject.info, folder),
        )
    if options.only in (None, "sae"):
        for width, l0 in SAES:
            sae = SaeTrainingConfig(width=width, l0=l0, seed=SEED)
            checkpoint = work / f"sae-{width}-{l0:g}.checkpoint"
            once(
                work,
                f"sae-{width}-{l0:g}",
                lambda sae=sae, checkpoint=checkpoint: train_sae_dictionary(
                    text, sae, options.out / "sae", command=COMMAND, checkpoint=checkpoint
                ),
                lambda folder: sae_on(demo, folder),
            )


if __name__ == "__main__":
    main()
