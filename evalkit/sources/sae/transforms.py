"""Transforms of hidden states before a dictionary's encoder, and their inverses for the reconstruction.

Every step is declared by the dictionary or by the user, acts on each token separately and can be undone. Knows tensors
only; reads and writes no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from evalkit.errors import BadConfig

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Centre",
    "LayerNorm",
    "RmsNorm",
    "Scale",
    "Step",
    "Undo",
    "UnitNorm",
    "describe",
    "parse_transform",
    "transformed",
]

Undo: TypeAlias = "Callable[[Tensor], Tensor]"


class Step(Protocol):
    """One transform of hidden states (…, d)."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Undo]:
        """Transform x; also returns a function that maps a reconstruction of the result back to the units of x."""

    def __str__(self) -> str:
        """A short name for tables."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply by a constant, such as √d over the average norm of the training data, or √d for embeddings."""

    factor: float

    def __call__(self, x: Tensor) -> tuple[Tensor, Undo]:
        return x * self.factor, lambda y: y / self.factor

    def __str__(self) -> str:
        return f"scale {self.factor:.4g}"


@dataclass(frozen=True, slots=True)
class Centre:
    """Subtract each token's mean over the dimensions, as TransformerLens does for states of the residual stream.

    ``restore``: add the mean to the reconstruction again; False leaves the reconstruction centred.
    """

    restore: bool = True

    def __call__(self, x: Tensor) -> tuple[Tensor, Undo]:
        mean = x.mean(dim=-1, keepdim=True)
        return x - mean, lambda y: y + mean if self.restore else y

    def __str__(self) -> str:
        return "centre"


@dataclass(frozen=True, slots=True)
class UnitNorm:
    """Scale each token to the norm ``norm``; None: √d. Source: SAELens, ``constant_norm_rescale``."""

    norm: float | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Undo]:
        target = x.shape[-1] ** 0.5 if self.norm is None else self.norm
        factor = target / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return x * factor, lambda y: y / factor

    def __str__(self) -> str:
        return "constant norm" if self.norm is None else f"norm {self.norm:.4g}"


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """(x - mean) / (standard deviation + eps) per token, with n - 1 in the deviation. Source: SAELens, ``layer_norm``."""

    eps: float = 1e-5

    def __call__(self, x: Tensor) -> tuple[Tensor, Undo]:
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean
        deviation = centred.std(dim=-1, keepdim=True)
        return centred / (deviation + self.eps), lambda y: y * deviation + mean

    def __str__(self) -> str:
        return "layer norm"


@dataclass(frozen=True, slots=True, eq=False)
class RmsNorm:
    """x / √(mean square + eps) per token, times ``gain`` (d,) if given."""

    eps: float = 1e-6
    gain: Tensor | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Undo]:
        scale = torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        if self.gain is None:
            return x * scale, lambda y: y / scale
        gain = self.gain.to(x.device)
        inverse = torch.where(gain == 0, torch.zeros_like(gain), 1 / gain)
        return x * scale * gain, lambda y: y * inverse / scale

    def __str__(self) -> str:
        return "RMS norm" if self.gain is None else "RMS norm with gain"


def transformed(x: Tensor, steps: tuple[Step, ...]) -> tuple[Tensor, Undo]:
    """Apply all steps in order; also returns a function that undoes them in reverse order."""
    undoing: list[Undo] = []
    for step in steps:
        x, undo = step(x)
        undoing.append(undo)

    def back(y: Tensor) -> Tensor:
        for undo in reversed(undoing):
            y = undo(y)
        return y

    return x, back


def describe(steps: tuple[Step, ...]) -> str:
    """The steps in words, such as ``centre, scale 0.16``; ``none`` without steps."""
    return ", ".join(str(step) for step in steps) or "none"


_FORMS = "none, or a comma-separated list of centre, scale:NUMBER, unit-norm, unit-norm:NUMBER, layer-norm, rms-norm"


def parse_transform(text: str) -> tuple[Step, ...]:
    """Parse a transform such as ``centre,scale:0.16`` into steps, in order; ``none``: no steps. Raises BadConfig."""
    steps: list[Step] = []
    for part in (part.strip() for part in text.split(",")):
        name, _, value = part.partition(":")
        number = _number(value) if value else None
        if name == "none" and not value and text.strip() == "none":
            return ()
        if name == "scale" and number is not None:
            steps.append(Scale(number))
        elif name == "unit-norm" and (number is not None or not value):
            steps.append(UnitNorm(number))
        elif name in ("centre", "center") and not value:
            steps.append(Centre())
        elif name == "layer-norm" and not value:
            steps.append(LayerNorm())
        elif name == "rms-norm" and not value:
            steps.append(RmsNorm())
        else:
            raise BadConfig(
                "transform", expected=_FORMS, seen=repr(part), fix="write for example --transform scale:0.16"
            )
    return tuple(steps)


def _number(text: str) -> float | None:
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) and found > 0 else None
