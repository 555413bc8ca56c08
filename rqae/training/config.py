"""The options of RQAE training and its learning-rate schedule. Knows no tensors; reads and writes no files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rqae.config import RqaeConfig
from rqae.errors import RqaeError
from rqae.training.gradients import Precision

__all__ = ["RqaeTrainingConfig"]


@dataclass(frozen=True, slots=True)
class RqaeTrainingConfig:
    """Options of a training run.

    Sizes of the RQAE, as in ``RqaeConfig``:
        dim: width of the hidden states, d_model.
        num_quantizers, codebook_dim, codebook_size, quantization_method: see ``RqaeConfig``.
    Start:
        initialisation: "sequential" fits the quantizers one after the other to ``init_tokens`` rows; "random" draws
            random weights like the original implementation.
        init_tokens: rows used for the sequential start; also the size of the buffer that shuffles a stream.
    Optimisation:
        steps: Adam steps.
        batch_tokens: rows per step.
        learning_rate: relative to the root mean square of each quantizer's initial weights.
        final_learning_rate: share of ``learning_rate`` at the last step.
        warmup_steps: steps of linear warm-up.
        clip_norm: largest norm of the gradient over all layers.
        seed: of the initial weights and the order of rows.
        precision: of the matrix products in the gradients; bfloat16 is faster where the hardware supports it.
        nested_depths: depths whose reconstruction errors are added to the loss, weighted so that a relative change in
            the error counts the same at every depth.
    Files and measurements:
        checkpoint: file to write; training resumes from it if it exists. None: no checkpoint.
        checkpoint_every: steps between two checkpoints.
        evaluate_every: steps between two measurements of the held-out FVU; None: a tenth of all steps.
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
    final_learning_rate: float = 0.05
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
        """The learning rate of a step: linear warm-up, then a half cosine down to the final share."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        low = self.final_learning_rate
        return self.learning_rate * (low + (1 - low) * (1 + math.cos(math.pi * min(1.0, done))) / 2)

    def check(self) -> None:
        """Raise RqaeError for an option out of its range."""
        least = {"steps": 0, "batch_tokens": 1, "init_tokens": 2, "checkpoint_every": 1, "warmup_steps": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise RqaeError(
                    f"training option {name!r}",
                    expected=f"at least {low}",
                    seen=str(getattr(self, name)),
                    fix="raise it",
                )
        if not all(0 < depth <= self.num_quantizers for depth in self.nested_depths):
            raise RqaeError(
                "training option 'nested_depths'",
                expected=f"depths from 1 to {self.num_quantizers}",
                seen=str(list(self.nested_depths)),
                fix="remove the depths outside this range",
            )
        if self.initialisation == "sequential" and self.dim < self.codebook_dim:
            raise RqaeError(
                "training option 'codebook_dim'",
                expected=f"at most dim = {self.dim}",
                seen=str(self.codebook_dim),
                fix="lower it",
            )
