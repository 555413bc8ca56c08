"""The state of an RQAE in training (layers and Adam moments) and one optimisation step.

The state is what a training checkpoint holds. Reads and writes no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rqae.encoding.blocked import BlockedEncoder, full_precision
from rqae.encoding.codebook import canonical_indices
from rqae.model import RQAE
from rqae.training.config import RqaeTrainingConfig
from rqae.training.gradients import loss_and_gradients

__all__ = ["LAYERS", "Trainer"]

LAYERS = ("w_in", "b_in", "w_out", "b_out")
_BETAS = (0.9, 0.99)
_EPSILON = 1e-12
_COUNT_DECAY = 0.99  # decay per step of the running share of tokens per code


class Trainer:
    """Layers, Adam moments and the step count. ``losses``: (step, FVU of batch); ``curve``: (step, held-out FVU)."""

    def __init__(
        self, config: RqaeTrainingConfig, layers: dict[str, Tensor], codebook: Tensor, device: torch.device
    ) -> None:
        layers = {name: tensor.to(device) for name, tensor in layers.items()}
        self.config, self.layers, self.codebook, self.device = config, layers, codebook.to(device), device
        self.canonical = canonical_indices(config.model).to(device)
        self.losses: list[tuple[int, float]] = []
        self.curve: list[tuple[int, float]] = []
        self.start: list[tuple[int, float]] = []  # held-out FVU by depth before the first step
        sizes = {name: layers[name].square().mean(dim=(1, 2)).sqrt() for name in ("w_in", "w_out")}  # (n_q,)
        self.scale = {
            "w_in": sizes["w_in"][:, None, None],
            "b_in": torch.ones(len(sizes["w_in"]), 1, device=device),  # p has about unit variance
            "w_out": sizes["w_out"][:, None, None],
            "b_out": sizes["w_out"][:, None],
        }
        self.first = {name: torch.zeros_like(layers[name]) for name in LAYERS}
        self.second = {name: torch.zeros_like(layers[name]) for name in LAYERS}
        self.counts = torch.zeros(codebook.shape[:2], device=device)
        self.step = 0

    def state(self) -> dict[str, Tensor]:
        """The whole state as named tensors."""
        groups = {"layer": self.layers, "scale": self.scale, "first": self.first, "second": self.second}
        flat = {f"{group}.{name}": tensors[name] for group, tensors in groups.items() for name in LAYERS}
        history = {
            name: torch.tensor(pairs, dtype=torch.float64).view(-1, 2)
            for name, pairs in (("losses", self.losses), ("curve", self.curve), ("start", self.start))
        }
        return flat | history | {"counts": self.counts, "codebook": self.codebook, "step": torch.tensor(self.step)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state returned by ``state``."""
        for group, tensors in (
            ("layer", self.layers), ("scale", self.scale), ("first", self.first), ("second", self.second)
        ):  # fmt: skip
            for name in LAYERS:
                tensors[name] = state[f"{group}.{name}"].to(self.device, copy=True)
        self.counts, self.codebook = (state[name].to(self.device) for name in ("counts", "codebook"))
        self.step = int(state["step"])
        for name, pairs in (("losses", self.losses), ("curve", self.curve), ("start", self.start)):
            pairs[:] = [(int(step), float(value)) for step, value in state[name].tolist()]

    def encoder(self) -> BlockedEncoder:
        """An encoder for the current layers."""
        w_in, b_in, w_out, b_out = (self.layers[name] for name in LAYERS)
        return BlockedEncoder.build(self.config.model, w_in, b_in, w_out, b_out, self.codebook, self.canonical)

    def advance(self, x: Tensor) -> float:
        """One Adam step on the rows x (N, d); returns the batch's FVU."""
        x = x.to(self.device)
        with full_precision():
            squared, gradients, codes = loss_and_gradients(
                x, self.layers, self.encoder(), self.config.precision, self.config.nested_depths
            )
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
        shares.scatter_add_(1, codes.T, torch.full(codes.T.shape, 1 / len(x), device=self.device))
        self.counts.mul_(_COUNT_DECAY).add_(shares, alpha=1 - _COUNT_DECAY)
        fvu = float(squared.sum() / (x - x.mean(dim=0)).square().sum())
        self.losses.append((self.step, fvu))
        return fvu

    def model(self) -> RQAE:
        """The RQAE as trained so far. ``codebook_counts`` are corrected for the bias from starting at zero."""
        correction = 1 - _COUNT_DECAY**self.step if self.step else 1.0
        return RQAE(self.config.model, **self.layers, codebook=self.codebook, codebook_counts=self.counts / correction)

    def dead_share(self) -> float:
        """The share of (quantizer, distinct code) pairs used by fewer recent tokens than 1% of an even share."""
        usable = (self.canonical == torch.arange(len(self.canonical), device=self.device)) & (
            self.codebook.norm(dim=-1).amax(dim=0) > 0
        )
        shares = self.counts[:, usable] / self.counts.sum(dim=1, keepdim=True).clamp_min(1e-30)
        return float((shares < 0.01 / int(usable.sum())).float().mean())
