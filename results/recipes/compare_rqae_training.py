"""Trains RQAEs from the same initialisation with different rates and depths, for the table in decisions/0013.

    python results/recipes/compare_rqae_training.py --work text --model models/smollm2-135m 200:2e-3 1000:2e-2:16,64

A setting is STEPS:RATE, or STEPS:RATE:DEPTHS with nested depths, or STEPS:RATE:DEPTHS:BATCH. Reads the hidden states that
``dictionaries.py`` wrote to WORK/activations: trains on 300,000 of them and measures on 8,192 held-out ones. Prints one
line of JSON per setting; writes nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from evalkit.subject.final_norm import normalise
from evalkit.subject.model import Subject
from evalkit.training.activation_store import ActivationStore
from rqae.model import initial_codebook
from rqae.progress import SILENT
from rqae.training.batches import ArrayBatches
from rqae.training.config import RqaeTrainingConfig
from rqae.training.initialisation import greedy_layers
from rqae.training.loop import held_out_fvu
from rqae.training.trainer import Trainer

SITE, QUANTIZERS, ROWS, HELD_OUT, START = "layers.15", 256, 300_000, 8192, 65_536
DEPTHS = (16, 64, 256)


def setting(text: str, base: RqaeTrainingConfig) -> RqaeTrainingConfig:
    """STEPS:RATE[:DEPTHS[:BATCH]] as a configuration."""
    steps, rate, depths, batch = [*text.split(":"), "", ""][:4]
    return replace(
        base,
        steps=int(steps),
        learning_rate=float(rate),
        nested_depths=tuple(int(depth) for depth in depths.split(",") if depth),
        batch_tokens=int(batch or base.batch_tokens),
    )


def trained(config: RqaeTrainingConfig, layers: dict[str, Tensor], codebook: Tensor, rows: Tensor) -> Trainer:
    """Train copies of the layers for the whole schedule."""
    copies = {name: tensor.clone() for name, tensor in layers.items()}
    trainer = Trainer(config, copies, codebook, torch.device("cpu"))
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.steps):
        trainer.advance(rows[torch.randint(len(rows), (config.batch_tokens,), generator=generator)])
    return trainer


@torch.no_grad()
def main() -> None:
    """Fit the initialisation once, then train every setting from it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("text"))
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("settings", nargs="+", help="STEPS:RATE[:DEPTHS[:BATCH]]")
    options = parser.parse_args()
    info = Subject.load(options.model, sites=(SITE,), dtype="bfloat16", device="cpu").info
    train, held_out = (ActivationStore(options.work / "activations" / name) for name in ("train", "held-out"))
    rows, measured = normalise(train.sample(ROWS, 0), info), normalise(held_out.sample(HELD_OUT, 1), info)
    base = RqaeTrainingConfig(dim=info.d_model, num_quantizers=QUANTIZERS, precision="bfloat16")
    generator = torch.Generator().manual_seed(base.seed)
    codebook = initial_codebook(base.model, generator)
    sample = ArrayBatches(rows, info.d_model, base.seed).sample(START)
    layers = greedy_layers(sample, base.model, codebook, generator, SILENT)
    for text in options.settings:
        started = time.monotonic()
        model = trained(setting(text, base), layers, codebook, rows).model()
        fvu = {depth: round(found, 5) for depth, found in held_out_fvu(model, measured, DEPTHS).items()}
        print(json.dumps({"setting": text, "fvu": fvu, "seconds": round(time.monotonic() - started)}), flush=True)


if __name__ == "__main__":
    main()
