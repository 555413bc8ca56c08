"""Training: all quantizers together, straight through each quantizer, the residual detached between them.

Reads rows of final-normed hidden states (masked tokens already dropped) and, if asked, writes and resumes from one
checkpoint file, which is loaded with ``weights_only``. Knows nothing of language models or text. The same activations,
configuration and seed give the same RQAE on one machine, resumed or not.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rqae.config import RqaeConfig
from rqae.errors import RqaeError
from rqae.model import RQAE, initial_codebook
from rqae.progress import SILENT, Progress
from rqae.training.batches import Activations, Batches, batches_of, derived_generator
from rqae.training.checkpoint import resume, save
from rqae.training.gradients import Precision
from rqae.training.initialisation import greedy_layers, random_layers
from rqae.training.trainer import LAYERS, Trainer

__all__ = ["RqaeTrainingConfig", "TrainingReport", "held_out_fvu", "train_rqae"]


_DIGEST_ROWS = 256  # by which a checkpoint knows its activations again


@dataclass(frozen=True, slots=True)
class RqaeTrainingConfig:
    """How to train. ``learning_rate`` is relative to each quantizer's initial weight size (root mean square).

    ``initialisation`` "sequential" fits the quantizers one after the other to ``init_tokens`` rows first; "random" is
    upstream's start. A stream of activations is shuffled through a buffer of ``init_tokens`` rows. ``precision`` is that of
    the gradients' matrix products; bfloat16 is faster where the hardware has it. ``nested_depths``: reconstructions from
    fewer quantizers that count too, a relative change of each as much as one of the whole. ``checkpoint`` is a file written
    every ``checkpoint_every`` steps; training resumes from it when it is there. ``evaluate_every``: steps between
    measurements on held-out rows, None for ten in all.
    """

    dim: int
    num_quantizers: int = 256
    codebook_dim: int = 4
    codebook_size: int = 5
    quantization_method: str = "round_fsq"
    initialisation: Literal["sequential", "random"] = "sequential"
    init_tokens: int = 65_536
    steps: int = 2000
    batch_tokens: int = 2048
    learning_rate: float = 2e-2
    final_learning_rate: float = 0.05  # as a share of learning_rate
    warmup_steps: int = 20
    clip_norm: float = 1.0
    seed: int = 0
    precision: Precision = "float32"
    nested_depths: tuple[int, ...] = ()
    checkpoint: Path | None = None
    checkpoint_every: int = 100
    evaluate_every: int | None = None

    @property
    def model(self) -> RqaeConfig:
        """The config of the RQAE to train."""
        return RqaeConfig(
            self.dim, self.codebook_dim, self.codebook_size, self.num_quantizers, self.quantization_method
        )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to the final share."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        low = self.final_learning_rate
        return self.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * min(1.0, done))) / 2)


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """What training did. FVU is the fraction of variance unexplained, about the evaluated rows' own mean.

    ``fvu_held_out`` and ``fvu_start`` (before the first step): by depth, empty without held-out rows. ``losses``: (step,
    FVU of that step's batch), ``curve``: (step, held-out FVU of all quantizers); both of all steps, also those before a
    resume. ``tokens`` and ``seconds`` are of this call. ``dead_share``: of (quantizer, code) pairs, hardly ever taken.
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
    """FVU of rows (N, d) at ``depths`` (None: 1, 4, 16, 64, 256, … up to all quantizers), about the rows' own mean."""
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


def _check(config: RqaeTrainingConfig) -> None:
    least = {"steps": 0, "batch_tokens": 1, "init_tokens": 2, "checkpoint_every": 1, "warmup_steps": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise RqaeError(
                f"training option {name!r}", expected=f"at least {low}", seen=str(getattr(config, name)), fix="raise it"
            )
    if not all(0 < depth <= config.num_quantizers for depth in config.nested_depths):
        raise RqaeError(
            "training option 'nested_depths'",
            expected=f"depths from 1 to {config.num_quantizers}",
            seen=str(list(config.nested_depths)),
            fix="leave out deeper ones",
        )
    if config.initialisation == "sequential" and config.dim < config.codebook_dim:
        raise RqaeError(
            "training option 'codebook_dim'",
            expected=f"at most dim = {config.dim}",
            seen=str(config.codebook_dim),
            fix="lower it",
        )


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

    ``held_out`` (M, d) rows of other documents give the report's FVU. On resuming, a stream must start again from its
    beginning. The model comes back on the CPU. Raises RqaeError for rows of another width or not finite.
    """
    _check(config)
    began = time.monotonic()
    batches = batches_of(activations, config.dim, config.seed, max(config.init_tokens, config.batch_tokens))
    path, data = config.checkpoint, _digest(batches.sample(_DIGEST_ROWS))
    if path is not None and path.is_file():
        saved = resume(path, config, data)
        layers = {name: saved[f"layer.{name}"] for name in LAYERS}
        trainer = Trainer(config, layers, saved["codebook"], torch.device(device))
        trainer.load(saved)
        for step in range(trainer.step):  # a stream has to move past what was used
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
