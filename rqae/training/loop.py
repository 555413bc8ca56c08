"""The training loop: all quantizers are trained jointly, with straight-through gradients and detached residuals.

Reads rows of final-normed hidden states, without masked tokens. Optionally writes one checkpoint file and resumes from it
(loaded with ``weights_only``). Uses no language model and no text. On one machine, the same activations, configuration and
seed give the same RQAE, whether training was resumed or not.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rqae.model import RQAE, initial_codebook
from rqae.progress import SILENT, Progress
from rqae.training.batches import Activations, Batches, batches_of, derived_generator
from rqae.training.checkpoint import resume, save
from rqae.training.config import RqaeTrainingConfig
from rqae.training.initialisation import greedy_layers, random_layers
from rqae.training.trainer import LAYERS, Trainer

__all__ = ["TrainingReport", "held_out_fvu", "train_rqae"]

# A checkpoint stores a digest of this many activations, to detect a resume with different ones.
_DIGEST_ROWS = 256


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """The history of a training run. FVU is the fraction of variance unexplained, about the mean of the evaluated rows.

    steps: steps in total, including those before a resume.
    tokens, seconds: of this call only.
    fvu_start, fvu_held_out: held-out FVU by depth, before the first step and at the end; empty without held-out rows.
    losses: (step, FVU of that step's batch), including steps before a resume.
    curve: (step, held-out FVU of all quantizers), including steps before a resume.
    dead_share: share of (quantizer, code) pairs that were hardly used in recent steps.
    """

    steps: int
    tokens: int
    seconds: float
    fvu_start: Mapping[int, float] = field(default_factory=dict)
    fvu_held_out: Mapping[int, float] = field(default_factory=dict)
    losses: tuple[tuple[int, float], ...] = ()
    curve: tuple[tuple[int, float], ...] = ()
    dead_share: float = 0.0


def held_out_fvu(
    model: RQAE, rows: Tensor | NDArray[np.floating], depths: Sequence[int] | None = None, batch_tokens: int = 4096
) -> dict[int, float]:
    """FVU of rows (N, d) at ``depths`` (None: 1, 4, 16, 64, 256, … up to all quantizers), about the mean of the rows."""
    count = model.config.num_quantizers
    depths = depths or [*(depth for depth in (1, 4, 16, 64, 256, 1024) if depth < count), count]
    errors = dict.fromkeys(depths, 0.0)
    total, square = torch.zeros(model.config.dim, dtype=torch.float64), 0.0
    for start in range(0, len(rows), batch_tokens):
        x = torch.as_tensor(rows[start : start + batch_tokens]).to(model.w_in)
        for depth, found in model.reconstructions(model.encode(x), depths):
            errors[depth] += float((found - x).square().sum(dtype=torch.float64))
        total += x.sum(dim=0, dtype=torch.float64).cpu()
        square += float(x.square().sum(dtype=torch.float64))
    variance = square - float(total.square().sum()) / max(1, len(rows))
    return {depth: error / variance if variance > 0 else math.nan for depth, error in errors.items()}


def _digest(rows: Tensor) -> str:
    return hashlib.blake2b(rows.numpy().tobytes(), digest_size=16).hexdigest()


def _start(config: RqaeTrainingConfig, batches: Batches, device: torch.device, progress: Progress) -> Trainer:
    generator = torch.Generator().manual_seed(int(derived_generator(config.seed, "weights").integers(2**62)))
    codebook = initial_codebook(config.model, generator)
    if config.initialisation == "random":
        layers = random_layers(config.model, generator)
    else:
        layers = greedy_layers(batches.sample(config.init_tokens), config.model, codebook, generator, progress)
    return Trainer(config, layers, codebook, device)


@torch.no_grad()
def train_rqae(
    activations: Activations,
    config: RqaeTrainingConfig,
    *,
    held_out: Tensor | NDArray[np.floating] | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> tuple[RQAE, TrainingReport]:
    """Train an RQAE on final-normed hidden states: an array or memory map (N, d), or a stream of (n_i, d) tensors.

    ``held_out``: rows (M, d) of other documents, on which the FVU in the report is measured. When training resumes, a
    stream must start again from its beginning. The model is returned on the CPU. Raises RqaeError for rows of another
    width or with values that are not finite.
    """
    config.check()
    began = time.monotonic()
    batches = batches_of(activations, config.dim, config.seed, max(config.init_tokens, config.batch_tokens))
    path, data = config.checkpoint, _digest(batches.sample(_DIGEST_ROWS))
    if path is not None and path.is_file():
        saved = resume(path, config, data)
        layers = {name: saved[f"layer.{name}"] for name in LAYERS}
        trainer = Trainer(config, layers, saved["codebook"], torch.device(device))
        trainer.load(saved)
        for step in range(trainer.step):  # a stream has to skip the rows that were already used
            batches.skip(step, config.batch_tokens)
    else:
        trainer = _start(config, batches, torch.device(device), progress)
    count = config.num_quantizers
    if held_out is not None and not trainer.step:
        trainer.start = list(held_out_fvu(trainer.model(), held_out).items())
        trainer.curve.append((0, dict(trainer.start)[count]))
    every = config.evaluate_every or max(1, config.steps // 10)
    task = progress.start("training all quantizers", config.steps, "steps")
    progress.advance(task, trainer.step)
    tokens = 0
    while trainer.step < config.steps:
        x = batches.batch(trainer.step, config.batch_tokens)
        tokens += len(x)
        trainer.advance(x)
        if held_out is not None and trainer.step % every == 0 and trainer.step < config.steps:
            trainer.curve.append((trainer.step, held_out_fvu(trainer.model(), held_out, (count,))[count]))
        if path is not None and (trainer.step % config.checkpoint_every == 0 or trainer.step == config.steps):
            save(path, config, data, trainer.state())
        progress.advance(task)
    progress.finish(task)
    model = trainer.model()
    after = {} if held_out is None else held_out_fvu(model, held_out)
    curve = (*trainer.curve, (trainer.step, after[count])) if after else tuple(trainer.curve)
    seconds, losses, dead = time.monotonic() - began, tuple(trainer.losses), trainer.dead_share()
    return model.cpu(), TrainingReport(trainer.step, tokens, seconds, dict(trainer.start), after, losses, curve, dead)
