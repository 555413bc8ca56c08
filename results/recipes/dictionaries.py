"""Trains the dictionaries that the package ships: one RQAE and five SAEs of SmolLM2-135M's residual stream after layer 15.

    python results/recipes/registry_text.py --work text
    evalkit models pull smollm2-135m
    python results/recipes/dictionaries.py --work text --model models/smollm2-135m --out evalkit/data/dictionaries

Collects hidden states of full contexts of 128 tokens (bfloat16; the first token of each and attention sinks left out),
trains one dictionary after the other and writes each with its card. What is there already is skipped, so an interrupted
run goes on. Reads WORK/{train,held-out,demo}.jsonl.gz; writes WORK/contexts, WORK/activations and the dictionaries.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from evalkit.corpus import Corpus, tokenize_corpus
from evalkit.final_norm import denormalise, normalise
from evalkit.records import Site, SubjectInfo, TokenBatch
from evalkit.sources.gemma_scope import read_weights
from evalkit.sources.sae import measure_fit
from evalkit.subject import Subject
from evalkit.training.activations import ActivationStore
from evalkit.training.cards import Card, CorpusPart, sae_folder, write_card, write_sae
from evalkit.training.sae import SaeTrainingConfig, train_sae
from rqae import RQAE
from rqae.training import RqaeTrainingConfig, train_rqae

MODEL, SITE = "smollm2-135m", "layers.15"
CONTEXTS = {"train": 18_900, "held-out": 820, "demo": 1_600}
BATCH = 16
SEED = 0
SAES = ((2048, 32.0), (2048, 16.0), (2048, 64.0), (1024, 32.0), (4096, 32.0))  # width, L0
COMMAND = "python results/recipes/dictionaries.py"


def contexts(corpus: Corpus, limit: int) -> Iterator[TokenBatch]:
    """Batches of the first full contexts."""
    full = np.flatnonzero(corpus.lengths == corpus.context_length)[:limit]
    for at in range(0, len(full), BATCH):
        yield corpus.batch(full[at : at + BATCH])


def collect(work: Path, name: str, subject: Subject) -> ActivationStore:
    """The hidden states of one of the three texts."""
    text = work / f"{name}.jsonl.gz"
    digest = hashlib.blake2b(text.read_bytes(), digest_size=8).hexdigest()
    corpus = tokenize_corpus(text, subject.tokenizer, work / "contexts" / f"{name}-{digest}")
    full = min(CONTEXTS[name], int((corpus.lengths == corpus.context_length).sum()))
    return ActivationStore.build(
        contexts(corpus, CONTEXTS[name]),
        lambda batch: subject.hidden(batch.token_ids)[SITE],
        Site(MODEL, SITE),
        work / "activations" / name,
        corpus_name=f"registry text, {name}, {digest}",
        d_model=subject.info.d_model,
        max_tokens=full * (corpus.context_length - 1),
    )


def corpus_parts(work: Path) -> tuple[CorpusPart, ...]:
    """The sources of the training text, their licences and numbers of documents."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    with gzip.open(work / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            counts[document["source"], document["license"]] += 1
    return tuple(CorpusPart(source, licence, count) for (source, licence), count in sorted(counts.items()))


def train_one_sae(
    width: int,
    l0: float,
    train: ActivationStore,
    held_out: ActivationStore,
    demo: ActivationStore,
    work: Path,
    out: Path,
) -> None:
    """Train, write and measure one SAE, unless it is there."""
    done = work / "done" / f"sae-{width}-{l0:g}"
    if done.exists():
        return
    config = SaeTrainingConfig(width=width, l0=l0, seed=SEED)
    checkpoint = work / f"sae-{width}-{l0:g}.checkpoint"
    weights, report = train_sae(train, config, held_out=held_out, checkpoint=checkpoint)
    name = f"{MODEL}/{SITE}/sae/width-{width}/l0-{round(report.fit.l0)}"
    card = Card(
        model=MODEL,
        site=SITE,
        name=name,
        kind="sae",
        command=COMMAND,
        corpus=corpus_parts(work),
        n_tokens=report.n_tokens,
        n_distinct_tokens=report.n_distinct,
        held_out_tokens=report.fit.n_tokens,
        fvu=report.fit.fvu,
        l0=report.fit.l0,
        alive_share=report.fit.alive_share,
        width=width,
        seed=SEED,
    )
    folder = write_sae(out / "sae", weights, card)
    stored = read_weights(folder / "params.npz")
    again, on_demo = measure_fit(stored, held_out.chunks()), measure_fit(stored, demo.chunks())
    further = {
        **left_out(train),
        "trained_for_l0": l0,
        "demo": {"fvu": round(on_demo.fvu, 4), "l0": round(on_demo.l0, 2)},
    }
    further["seconds"] = round(report.seconds)
    write_card(folder, Card(**{**fields_of(card), "fvu": again.fvu, "l0": again.l0, "further": further}))
    done.parent.mkdir(exist_ok=True)
    done.write_text(str(sae_folder(out / "sae", train.site, width, report.fit.l0)))
    print(f"{name}: {report.fit}; stored {again.fvu:.4f}; demo {on_demo}; {report.seconds:.0f} s", flush=True)


def fields_of(card: Card) -> dict[str, object]:
    """A card's fields, nested records as they are."""
    return {name: getattr(card, name) for name in Card.__slots__}


def left_out(store: ActivationStore) -> dict[str, object]:
    """What the store's filter did, for the card."""
    record = store.record
    rule = "the first token of each context, and tokens whose hidden state is over 10 times the median norm"
    return {"left_out": {"rule": rule, "attention_sinks": record.sinks, "of_tokens": record.sinks + record.rows}}


def train_the_rqae(
    train: ActivationStore, held_out: ActivationStore, demo: ActivationStore, info: SubjectInfo, work: Path, out: Path
) -> None:
    """Train, write and measure the RQAE, unless it is there."""
    folder = out / "rqae-256"
    if (folder / "card.json").exists():
        return
    started = time.monotonic()
    config = RqaeTrainingConfig(dim=train.d_model, num_quantizers=256, steps=600, seed=SEED)
    rows = (normalise(batch, info) for batch in train.batches(config.batch_tokens, seed=SEED))
    model, report = train_rqae(rows, config)
    model.save_pretrained(folder, dtype=torch.float16)
    seconds = time.monotonic() - started
    stored = RQAE.from_pretrained(folder)
    depths = (16, 64, 256)
    fits = {name: rqae_fit(stored, store, info, depths) for name, store in (("held_out", held_out), ("demo", demo))}
    n_tokens = report.tokens + config.init_tokens
    card = Card(
        model=MODEL,
        site=SITE,
        name=f"{MODEL}/{SITE}/rqae",
        kind="rqae",
        command=COMMAND,
        corpus=corpus_parts(work),
        n_tokens=n_tokens,
        n_distinct_tokens=min(n_tokens, len(train)),
        held_out_tokens=len(held_out),
        fvu=fits["held_out"][256]["raw"],
        l0=None,
        alive_share=code_use(stored, held_out, info),
        width=256,
        seed=SEED,
        further={
            **left_out(train),
            "fvu_by_depth": {str(depth): fit["raw"] for depth, fit in fits["held_out"].items()},
            "fvu_normed_by_depth": {str(depth): fit["normed"] for depth, fit in fits["held_out"].items()},
            "demo": {"fvu_by_depth": {str(depth): fit["raw"] for depth, fit in fits["demo"].items()}},
            "units": "fvu and fvu_by_depth: raw hidden states; fvu_normed_by_depth: final-normed hidden states",
            "seconds": round(seconds),
        },
    )
    write_card(folder, card)
    print(f"{card.name}: {fits}; {seconds:.0f} s", flush=True)


def rqae_fit(
    model: RQAE, store: ActivationStore, info: SubjectInfo, depths: tuple[int, ...]
) -> dict[int, dict[str, float]]:
    """FVU by depth, in raw and in final-normed units, about the mean of all rows."""
    squares = {depth: {"raw": 0.0, "normed": 0.0} for depth in depths}
    moments = {kind: [torch.zeros(store.d_model, dtype=torch.float64), 0.0] for kind in ("raw", "normed")}
    for hidden in store.chunks():
        normed = normalise(hidden, info)
        for kind, rows in (("raw", hidden), ("normed", normed)):
            moments[kind][0] += rows.double().sum(0)
            moments[kind][1] += float(rows.double().square().sum())
        codes = model.encode(normed)
        for depth in depths:
            found = model.decode(codes, depth)
            squares[depth]["normed"] += float((found - normed).double().square().sum())
            squares[depth]["raw"] += float((denormalise(found, hidden, info) - hidden).double().square().sum())
    totals = {kind: square - float(total.square().sum()) / len(store) for kind, (total, square) in moments.items()}
    return {
        depth: {kind: round(value / totals[kind], 4) for kind, value in row.items()} for depth, row in squares.items()
    }


def code_use(model: RQAE, store: ActivationStore, info: SubjectInfo) -> float:
    """Share of the (quantizer, distinct code) pairs that some row uses."""
    used = torch.zeros(256, 625, dtype=torch.bool)
    for hidden in store.chunks():
        codes = model.encode(normalise(hidden, info))
        used[torch.arange(256).expand_as(codes), codes] = True
    return float(used.sum()) / (256 * 544)


def main() -> None:
    """Collect, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("text"))
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--out", type=Path, default=Path("evalkit/data/dictionaries"))
    parser.add_argument("--only", choices=("activations", "sae", "rqae"), help="one part of the work")
    options = parser.parse_args()
    subject = Subject.load(options.model, sites=(SITE,), dtype="bfloat16", device="cpu")
    train, held_out, demo = (collect(options.work, name, subject) for name in CONTEXTS)
    if options.only in (None, "rqae"):
        train_the_rqae(train, held_out, demo, subject.info, options.work, options.out)
    if options.only in (None, "sae"):
        for width, l0 in SAES:
            train_one_sae(width, l0, train, held_out, demo, options.work, options.out)


if __name__ == "__main__":
    main()
