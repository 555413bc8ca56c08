"""Trains a sparse autoencoder on an activation store: batch-top-k in training, JumpReLU on disk.

In training, the encoder keeps the ``l0`` × rows largest pre-activations of a batch. The cut-off is estimated from rows of
that batch. So every step has the target L0 on average, and no penalty shrinks the activations. After training, one
threshold for all latents, calibrated on training rows, gives the target L0 for any batch: a JumpReLU, which can be stored
in Gemma Scope's layout. The mean and scale of the input are folded into the weights, so the SAE reads and reconstructs
the raw hidden state. Reads and writes no files except its own checkpoint.
Sources: BatchTopK, arXiv 2412.06410; auxiliary loss for dead latents, arXiv 2406.04093, appendix A.2.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evalkit.errors import BadConfig, BadFile, CorpusError
from evalkit.fit.sae import SaeFit, measure_fit
from evalkit.protocols import Progress
from evalkit.seeds import derive
from evalkit.sources.sae.weights import SaeWeights
from evalkit.training.activation_store import ActivationStore
from evalkit.util.atomic_files import atomic_path
from evalkit.util.progress import SILENT

__all__ = ["SaeTrainingConfig", "TrainingReport", "train_sae"]

SAMPLE_ROWS = 65_536  # rows from which the mean, the scale and the threshold are estimated
QUANTILE_ROWS = 256  # rows of a batch from which its cut-off is estimated


@dataclass(frozen=True, slots=True)
class SaeTrainingConfig:
    """Options of SAE training.

    l0: target mean number of active latents per token.
    tokens: training tokens, counting repeats.
    dead_after: tokens without firing after which a latent counts as dead.
    aux_latents, aux_weight: number of dead latents in the auxiliary loss, and its weight.
    checkpoint_steps: steps between two checkpoints.
    """

    width: int = 2048
    l0: float = 32.0
    tokens: int = 4_000_000
    batch_size: int = 2048
    learning_rate: float = 3e-3
    warmup_share: float = 0.03
    decay_share: float = 0.25
    dead_after: int = 200_000  # tokens without firing
    aux_latents: int = 256
    aux_weight: float = 1 / 32
    seed: int = 0
    bfloat16: bool = True
    checkpoint_steps: int = 500

    def __post_init__(self) -> None:
        for name in ("width", "l0", "tokens", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise BadConfig(name, expected="a positive number", seen=str(getattr(self, name)), fix="raise it")
        if self.l0 >= self.width:
            raise BadConfig("l0", expected=f"less than the width {self.width}", seen=str(self.l0), fix="lower it")

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return max(1, self.tokens // self.batch_size)


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """Results of training. ``fit``: on the held-out rows. ``n_tokens``, ``n_distinct``: tokens with and without repeats."""

    fit: SaeFit
    n_tokens: int
    n_distinct: int
    seconds: float


def train_sae(
    store: ActivationStore,
    config: SaeTrainingConfig,
    *,
    held_out: ActivationStore,
    checkpoint: Path | None = None,
    progress: Progress = SILENT,
) -> tuple[SaeWeights, TrainingReport]:
    """Train one SAE. Its weights are rounded to float16, as they will be stored, before they are measured and returned.

    With ``checkpoint`` (a file), interrupted training resumes from it and gives the same weights as without interruption.
    Raises CorpusError (a store smaller than a batch, a held-out store of another site), BadFile (a checkpoint of
    another training run).
    """
    if held_out.site != store.site or held_out.d_model != store.d_model:
        raise CorpusError(
            str(held_out.folder),
            expected=f"hidden states of {store.site} with d_model {store.d_model}",
            seen=f"{held_out.site} with d_model {held_out.d_model}",
            fix="collect the held-out states again",
        )
    started = time.monotonic()
    trainer = _Trainer(store, config)
    if checkpoint is not None and checkpoint.exists():
        trainer.load(checkpoint)
    task = progress.start(f"SAE width {config.width}, L0 {config.l0:g}", config.steps, "step")
    progress.advance(task, trainer.step)
    batches = store.batches(config.batch_size, seed=derive(config.seed, "sae-batches"), skip=trainer.step)
    while trainer.step < config.steps:
        trainer.update(next(batches))
        progress.advance(task)
        if checkpoint is not None and trainer.step % config.checkpoint_steps == 0:
            trainer.save(checkpoint)
    weights = trainer.fold(store.sample(SAMPLE_ROWS, derive(config.seed, "sae-threshold")))
    progress.finish(task)
    fit = measure_fit(weights, held_out.chunks())
    n_tokens = config.steps * config.batch_size
    return weights, TrainingReport(fit, n_tokens, min(n_tokens, len(store)), time.monotonic() - started)


class _Trainer:
    """Parameters, optimiser, and tokens since each latent last fired. Inputs are scaled to a mean square of 1."""

    def __init__(self, store: ActivationStore, config: SaeTrainingConfig) -> None:
        self.config = config
        self.step = 0
        sample = store.sample(SAMPLE_ROWS, derive(config.seed, "sae-scale"))
        self.mean = sample.mean(0)
        self.scale = 1.0 / float((sample - self.mean).square().mean().sqrt())
        generator = torch.Generator().manual_seed(derive(config.seed, "sae-init"))
        w_dec = torch.randn(config.width, store.d_model, generator=generator)
        w_dec /= w_dec.norm(dim=1, keepdim=True)
        self.w_dec = w_dec.requires_grad_()
        self.w_enc = w_dec.detach().T.contiguous().requires_grad_()
        self.b_enc = torch.zeros(config.width, requires_grad=True)
        self.b_dec = torch.zeros(store.d_model, requires_grad=True)
        self.idle = torch.zeros(config.width, dtype=torch.int64)
        self.optimiser = torch.optim.Adam(self._parameters(), lr=config.learning_rate, betas=(0.9, 0.999), fused=True)

    def _parameters(self) -> list[Tensor]:
        return [self.w_enc, self.b_enc, self.w_dec, self.b_dec]

    def update(self, rows: Tensor) -> None:
        """One step on a batch of raw hidden states (row, d_model)."""
        for group in self.optimiser.param_groups:
            group["lr"] = self._learning_rate()
        x = (rows - self.mean) * self.scale
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bfloat16):
            pre = (x @ self.w_enc).float() + self.b_enc
            active = pre * (pre > self._cutoff(pre.detach()))
            error = x - (active @ self.w_dec).float() - self.b_dec
            loss = error.square().mean()
            dead = self.idle > self.config.dead_after
            if dead.any():
                loss = loss + self.config.aux_weight * self._auxiliary_loss(pre, error.detach(), dead)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._remove_radial_gradient()
        torch.nn.utils.clip_grad_norm_(self._parameters(), 1.0)
        self.optimiser.step()
        with torch.no_grad():
            self.w_dec /= self.w_dec.norm(dim=1, keepdim=True)
            self.idle += len(rows)
            self.idle[(active > 0).any(0)] = 0
        self.step += 1

    def _cutoff(self, pre: Tensor) -> Tensor:
        """The cut-off that ``l0`` pre-activations per token exceed on average, from evenly spaced rows of the batch."""
        stride = max(1, len(pre) // QUANTILE_ROWS)
        flat = pre[::stride].flatten()
        kept = max(1, round(self.config.l0 * flat.numel() / self.config.width))
        return flat.topk(kept, sorted=False).values.min().clamp_min(0.0)

    def _auxiliary_loss(self, pre: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """Relative error with which the strongest dead latents reconstruct ``error``, the residual of the live latents."""
        columns = dead.nonzero().squeeze(1)
        count = min(self.config.aux_latents, len(columns))
        values, indices = torch.relu(pre[:, columns]).topk(count, dim=1, sorted=False)
        acts = torch.zeros(len(pre), len(columns)).scatter(1, indices, values)
        explained = (acts @ self.w_dec[columns]).float()
        return (error - explained).square().mean() / error.square().mean().clamp_min(1e-8)

    def _remove_radial_gradient(self) -> None:
        gradient = self.w_dec.grad
        if gradient is not None:
            rows = self.w_dec.detach()
            gradient -= (gradient * rows).sum(1, keepdim=True) * rows

    def _learning_rate(self) -> float:
        done = (self.step + 1) / self.config.steps
        warm = min(1.0, done / max(self.config.warmup_share, 1e-9))
        cool = min(1.0, (1.0 - done) / max(self.config.decay_share, 1e-9) + 1e-3)
        return self.config.learning_rate * warm * cool

    @torch.no_grad()
    def fold(self, rows: Tensor) -> SaeWeights:
        """The SAE for raw hidden states, matrices rounded to float16. Its threshold gives the target L0 on ``rows``."""
        w_enc, w_dec = _rounded(self.w_enc), _rounded(self.w_dec)
        b_dec = self.mean + self.b_dec / self.scale
        b_enc = self.b_enc / self.scale - (self.mean.double() @ w_enc.double()).float()
        kept = max(1, round(self.config.l0 * len(rows)))
        largest = torch.zeros(0)
        for chunk in torch.split(rows, 8192):
            flat = torch.relu(chunk @ w_enc + b_enc).flatten()
            largest = torch.cat([largest, flat.topk(min(kept, flat.numel()), sorted=False).values])
            largest = largest.topk(min(kept, largest.numel()), sorted=False).values
        threshold = torch.full((self.config.width,), max(float(largest.min()), 0.0))
        return SaeWeights(w_enc, b_enc.detach().clone(), w_dec, b_dec.detach().clone(), threshold)

    def save(self, path: Path) -> None:
        """Write a checkpoint with everything needed to resume."""
        tensors = dict(zip(("w_enc", "b_enc", "w_dec", "b_dec"), self._parameters(), strict=True))
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "idle": self.idle,
            "mean": self.mean,
            "parameters": {name: tensor.detach() for name, tensor in tensors.items()},
            "optimiser": self.optimiser.state_dict(),
        }
        with atomic_path(path) as temporary:
            torch.save(state, temporary)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Resume from a checkpoint. Raises BadFile for a damaged checkpoint, or one of another training run."""
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            same = state["config"] == asdict(self.config) and torch.equal(state["mean"], self.mean)
        except Exception as error:  # torch.load raises many kinds for a damaged or foreign file
            raise _foreign_checkpoint(path, f"a file that cannot be read ({type(error).__name__})") from error
        if not same:
            raise _foreign_checkpoint(path, "another configuration or other hidden states")
        for tensor, name in zip(self._parameters(), ("w_enc", "b_enc", "w_dec", "b_dec"), strict=True):
            tensor.copy_(state["parameters"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.idle, self.step = state["idle"], state["step"]


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.detach().half().float()


def _foreign_checkpoint(path: Path, seen: str) -> BadFile:
    return BadFile(
        str(path),
        expected="a checkpoint of this training run",
        seen=seen,
        fix="delete it to start over, or use the settings and text it was written with",
    )
