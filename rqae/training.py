"""Training: all quantizers together, straight through each quantizer, the residual detached between them.

Reads rows of final-normed hidden states (masked tokens already dropped) and, if asked, writes and resumes from one
checkpoint file, which holds tensors only and is loaded with ``weights_only``. Knows nothing of language models or text.
The same activations, configuration and seed give the same RQAE on one machine, resumed or not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rqae.batches import Activations, Batches, batches_of, derived_generator
from rqae.blocked import BlockedEncoder
from rqae.codebook import canonical_indices
from rqae.config import RqaeConfig
from rqae.errors import RqaeError
from rqae.gradients import loss_and_gradients
from rqae.initialisation import greedy_layers, random_layers
from rqae.model import RQAE, initial_codebook
from rqae.progress import SILENT, Progress

__all__ = ["RqaeTrainingConfig", "TrainingReport", "held_out_fvu", "train_rqae"]

_LAYERS = ("w_in", "b_in", "w_out", "b_out")
_BETAS = (0.9, 0.99)
_EPSILON = 1e-12
_COUNT_DECAY = 0.99  # of the running share of tokens per code


@dataclass(frozen=True, slots=True)
class RqaeTrainingConfig:
    """How to train. ``learning_rate`` is relative to each quantizer's initial weight size (root mean square).

    ``initialisation`` "sequential" fits the quantizers one after the other to ``init_tokens`` rows first; "random" is
    upstream's start. A stream of activations is shuffled through a buffer of ``init_tokens`` rows. ``checkpoint`` is a
    file written every ``checkpoint_every`` steps; training resumes from it when it is there.
    """

    dim: int
    num_quantizers: int = 256
    codebook_dim: int = 4
    codebook_size: int = 5
    quantization_method: str = "round_fsq"
    initialisation: Literal["sequential", "random"] = "sequential"
    init_tokens: int = 65_536
    steps: int = 400
    batch_tokens: int = 2048
    learning_rate: float = 2e-3
    final_learning_rate: float = 0.05  # as a share of learning_rate
    warmup_steps: int = 20
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint: Path | None = None
    checkpoint_every: int = 100

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
    FVU of that step's batch).
    """

    steps: int
    tokens: int
    seconds: float
    fvu_start: Mapping[int, float] = field(default_factory=dict)
    fvu_held_out: Mapping[int, float] = field(default_factory=dict)
    losses: tuple[tuple[int, float], ...] = ()


class _Trainer:
    """The layers, their Adam moments, and one step. Everything that a checkpoint holds."""

    def __init__(self, config: RqaeTrainingConfig, layers: dict[str, Tensor], codebook: Tensor) -> None:
        self.config, self.layers, self.codebook = config, layers, codebook
        self.canonical = canonical_indices(config.model)
        sizes = {name: layers[name].square().mean(dim=(1, 2)).sqrt() for name in ("w_in", "w_out")}  # (n_q,)
        self.scale = {
            "w_in": sizes["w_in"][:, None, None],
            "b_in": torch.ones(len(sizes["w_in"]), 1),  # p has about unit variance
            "w_out": sizes["w_out"][:, None, None],
            "b_out": sizes["w_out"][:, None],
        }
        self.first = {name: torch.zeros_like(layers[name]) for name in _LAYERS}
        self.second = {name: torch.zeros_like(layers[name]) for name in _LAYERS}
        self.counts = torch.zeros(codebook.shape[:2])
        self.step = 0

    def state(self) -> dict[str, Tensor]:
        """Flat tensors, by name."""
        groups = {"layer": self.layers, "scale": self.scale, "first": self.first, "second": self.second}
        flat = {f"{group}.{name}": tensors[name] for group, tensors in groups.items() for name in _LAYERS}
        return flat | {"counts": self.counts, "codebook": self.codebook, "step": torch.tensor(self.step)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of ``state``."""
        for group, tensors in (
            ("layer", self.layers), ("scale", self.scale), ("first", self.first), ("second", self.second)
        ):  # fmt: skip
            for name in _LAYERS:
                tensors[name] = state[f"{group}.{name}"].clone()
        self.counts, self.codebook, self.step = state["counts"], state["codebook"], int(state["step"])

    def encoder(self) -> BlockedEncoder:
        """For the layers as they are now."""
        w_in, b_in, w_out, b_out = (self.layers[name] for name in _LAYERS)
        return BlockedEncoder.build(self.config.model, w_in, b_in, w_out, b_out, self.codebook, self.canonical)

    def advance(self, x: Tensor) -> float:
        """One Adam step on the rows x (N, d); returns the batch's FVU."""
        squared, gradients, codes = loss_and_gradients(x, self.layers, self.encoder())
        gradients = {name: gradient * self.scale[name] for name, gradient in gradients.items()}
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        shrink = min(1.0, self.config.clip_norm / max(norm, 1e-30))
        rate = self.config.learning_rate_at(self.step)
        self.step += 1
        low, high = _BETAS
        for name, gradient in gradients.items():
            gradient.mul_(shrink)
            first = self.first[name].mul_(low).add_(gradient, alpha=1 - low)
            second = self.second[name].mul_(high).addcmul_(gradient, gradient, value=1 - high)
            spread = (second / (1 - high**self.step)).sqrt_().add_(_EPSILON)
            self.layers[name] = self.layers[name] - (first / spread) * (rate / (1 - low**self.step) * self.scale[name])
        shares = torch.zeros_like(self.counts)
        shares.scatter_add_(1, codes.T, torch.full(codes.T.shape, 1 / len(x)))
        self.counts.mul_(_COUNT_DECAY).add_(shares, alpha=1 - _COUNT_DECAY)
        return float(squared.sum() / (x - x.mean(dim=0)).square().sum())

    def model(self) -> RQAE:
        """The RQAE as trained so far. ``codebook_counts`` are corrected for their start at zero."""
        correction = 1 - _COUNT_DECAY**self.step if self.step else 1.0
        return RQAE(self.config.model, **self.layers, codebook=self.codebook, codebook_counts=self.counts / correction)


def held_out_fvu(model: RQAE, rows: Tensor | NDArray[np.floating], batch_tokens: int = 4096) -> dict[int, float]:
    """FVU of rows (N, d) at depths 1, 4, 16, 64, 256, … up to all quantizers, about the rows' own mean."""
    count = model.config.num_quantizers
    depths = [depth for depth in (1, 4, 16, 64, 256, 1024) if depth < count] + [count]
    errors = dict.fromkeys(depths, 0.0)
    total, square = torch.zeros(model.config.dim, dtype=torch.float64), 0.0
    for start in range(0, len(rows), batch_tokens):
        x = torch.as_tensor(rows[start : start + batch_tokens]).to(torch.float32)
        for depth, found in model.reconstructions(model.encode(x), depths):
            errors[depth] += float((found - x).square().sum(dtype=torch.float64))
        total += x.sum(dim=0, dtype=torch.float64)
        square += float(x.square().sum(dtype=torch.float64))
    variance = square - float(total.square().sum()) / max(1, len(rows))
    return {depth: error / variance if variance > 0 else math.nan for depth, error in errors.items()}


def _fingerprint(config: RqaeTrainingConfig) -> str:
    """What must be equal for a checkpoint to go on: everything but where and how often it is saved."""
    values = {name: value for name, value in asdict(config).items() if not name.startswith("checkpoint")}
    return repr(sorted(values.items()))


def _save(path: Path, trainer: _Trainer) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        torch.save({"config": _fingerprint(trainer.config), "tensors": trainer.state()}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _resume(path: Path, config: RqaeTrainingConfig) -> dict[str, Tensor]:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        seen, tensors = saved["config"], saved["tensors"]
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise RqaeError(
            str(path), expected="a training checkpoint", seen=str(error)[:120], fix="delete it to start again"
        ) from error
    if seen != _fingerprint(config):
        raise RqaeError(
            str(path),
            expected="a checkpoint of this training configuration",
            seen="another configuration",
            fix="delete it to start again, or give another checkpoint path",
        )
    state: dict[str, Tensor] = tensors
    return state


def _start(config: RqaeTrainingConfig, batches: Batches, progress: Progress) -> _Trainer:
    generator = torch.Generator().manual_seed(int(derived_generator(config.seed, "weights").integers(2**62)))
    codebook = initial_codebook(config.model, generator)
    if config.initialisation == "random":
        layers = random_layers(config.model, generator)
    else:
        layers = greedy_layers(batches.sample(config.init_tokens), config.model, codebook, generator, progress)
    return _Trainer(config, layers, codebook)


def _check(config: RqaeTrainingConfig) -> None:
    least = {"steps": 0, "batch_tokens": 1, "init_tokens": 2, "checkpoint_every": 1, "warmup_steps": 0}
    for name, low in least.items():
        if getattr(config, name) < low:
            raise RqaeError(
                f"training option {name!r}", expected=f"at least {low}", seen=str(getattr(config, name)), fix="raise it"
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
    progress: Progress = SILENT,
) -> tuple[RQAE, TrainingReport]:
    """Train an RQAE on final-normed hidden states: an array or memory map (N, d), or a stream of (n_i, d) tensors.

    ``held_out`` (M, d) rows of other documents give the report's FVU. ``progress`` has start, advance and finish. On
    resuming, a stream must start again from its beginning. Raises RqaeError for rows of another width or not finite.
    """
    _check(config)
    began = time.monotonic()
    batches = batches_of(activations, config.dim, config.seed, max(config.init_tokens, config.batch_tokens))
    path = config.checkpoint
    saved = _resume(path, config) if path is not None and path.is_file() else None
    if saved is None:
        trainer = _start(config, batches, progress)
    else:
        layers = {name: saved[f"layer.{name}"] for name in _LAYERS}
        trainer = _Trainer(config, layers, saved["codebook"])
        trainer.load(saved)
        for step in range(trainer.step):  # a stream has to move past what was used
            batches.skip(step, config.batch_tokens)
    before = {} if held_out is None or trainer.step else held_out_fvu(trainer.model(), held_out)
    losses = []
    task = progress.start("training all quantizers", config.steps, "steps")
    progress.advance(task, trainer.step)
    tokens = 0
    while trainer.step < config.steps:
        x = batches.batch(trainer.step, config.batch_tokens)
        tokens += len(x)
        losses.append((trainer.step, trainer.advance(x)))
        progress.advance(task)
        if path is not None and (trainer.step % config.checkpoint_every == 0 or trainer.step == config.steps):
            _save(path, trainer)
    progress.finish(task)
    model = trainer.model()
    after = {} if held_out is None else held_out_fvu(model, held_out)
    seconds = time.monotonic() - began
    return model, TrainingReport(trainer.step, tokens, seconds, before, after, tuple(losses))
