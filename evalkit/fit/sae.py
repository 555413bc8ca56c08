"""Measures how well an SAE or transcoder fits some tokens, and how often each latent fires, in one pass over its weights.

Latents are processed tile by tile, each tile for all tokens of a block before the next tile. So a dictionary on disk is
never held whole and is read once per block; the default sample is one block. Knows tensors; no corpora, models or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.errors import BadShape, CorpusError
from evalkit.fit.fvu import Spread, fvu
from evalkit.fit.measure import reconstructed
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.transforms import transformed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from evalkit.sources.sae.weights import SaeWeights

__all__ = ["SaeFit", "SaeMeasure", "measure_fit", "measure_rows"]

_BLOCK = 9216  # tokens: 8,192 and the rest of a context of up to 1,024
_ROWS = 1024  # compared at a time in float64
_FLOOR = 1e-12  # below this a norm counts as zero


@dataclass(frozen=True, slots=True, eq=False)
class SaeMeasure:
    """What one pass found. x is the state at ``site.out`` and x̂ its reconstruction, each (token, d_out).

    ``fvu``: see ``evalkit.fit.fvu``.
    ``rescale``: the factor α for which mean + α(x̂ - mean) comes closest to x.
    ``fvu_rescaled``: the FVU of that.
    ``cosines``: of x and x̂, per token.
    ``norm_ratios``: ‖x̂‖/‖x‖, per token.
    ``active``: latents that fire, per token.
    ``counts``: tokens on which each latent fires, (latent,).
    ``mean``: of x, (d_out,).
    """

    fvu: float
    rescale: float
    fvu_rescaled: float
    cosines: NDArray[np.float64]
    norm_ratios: NDArray[np.float64]
    active: NDArray[np.int64]
    counts: NDArray[np.int64]
    mean: NDArray[np.float64]

    @property
    def n_tokens(self) -> int:
        return len(self.active)

    @property
    def l0(self) -> float:
        """Latents that fire per token."""
        return float(self.active.mean())

    @property
    def alive_share(self) -> float:
        """Share of the latents that fire on at least one token."""
        return float((self.counts > 0).mean())


def measure_rows(
    source: SaeSource, hidden: Float[Tensor, "token d_in"], target: Float[Tensor, "token d_out"] | None = None
) -> SaeMeasure:
    """FVU, cosines, norms, the best rescaling and firing counts over raw hidden states. Sums in float64.

    ``hidden``: what the dictionary reads.
    ``target``: what it should reconstruct; None for the same states.

    Raises CorpusError on no tokens, BadShape for states of another shape, BadFile (see ``Stored.take``).
    """
    target = hidden if target is None else target
    if not len(hidden):
        raise CorpusError("hidden states", expected="at least one token", seen="none", fix="use a longer corpus")
    for name, states, width in (("states", hidden, source.weights.d_model), ("targets", target, source.weights.d_out)):
        if states.shape != (len(hidden), width):
            raise BadShape(
                f"{name} of {source.name}",
                expected=f"shape ({len(hidden)}, {width})",
                seen=str(tuple(states.shape)),
                fix="give the states at the sites that it reads and reconstructs",
            )
    rebuilt, active, counts = _run(source, hidden)
    return _compare(target.float(), rebuilt, active, counts)


@dataclass(frozen=True, slots=True)
class SaeFit:
    """How well an SAE fits some tokens.

    ``fvu``: see ``evalkit.fit.fvu``.
    ``l0``: active latents per token.
    ``alive_share``: share of the latents that are active on at least one token.
    """

    fvu: float
    l0: float
    alive_share: float
    n_tokens: int


def measure_fit(weights: SaeWeights, rows: Iterable[Float[Tensor, "row d_model"]]) -> SaeFit:
    """The fit over chunks of raw hidden states. Sums in float64. Raises BadShape on no rows."""
    spread = Spread()
    error = active = torch.zeros((), dtype=torch.float64)
    fired = torch.zeros(weights.width, dtype=torch.bool)
    for chunk in rows:
        activations = weights.encode(chunk)
        error = error + (chunk - weights.decode(activations)).double().square().sum()
        spread.add(chunk)
        active = active + (activations > 0).sum()
        fired |= (activations > 0).any(0)
    count = spread.n_rows
    if count == 0:
        raise BadShape("hidden states", expected="at least one row", seen="none", fix="give a longer corpus")
    return SaeFit(fvu(float(error), spread), float(active) / count, float(fired.double().mean()), count)


def _run(source: SaeSource, hidden: Tensor) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """Reconstructions (token, d_out), active latents per token, tokens per latent."""
    rebuilt, active = [], []
    counts = torch.zeros(source.weights.width, dtype=torch.int64)
    for block in torch.split(hidden, _BLOCK):
        x, undo = transformed(block.float(), source.steps)
        found, fires, fired = reconstructed(source.weights, x, [len(block)])
        counts += fired[0]
        rebuilt.append(undo(found) if source.site.reconstructs is None else found)
        active.append(fires.cpu())
    return torch.cat(rebuilt), torch.cat(active).numpy(), counts.numpy()


def _compare(target: Tensor, rebuilt: Tensor, active: NDArray[np.int64], counts: NDArray[np.int64]) -> SaeMeasure:
    mean = target.mean(dim=0, dtype=torch.float64)
    spread = Spread()
    error = product = square = 0.0
    cosines, ratios = [], []
    for low in range(0, len(target), _ROWS):
        x, y = (rows[low : low + _ROWS].double() for rows in (target, rebuilt))
        error += float((x - y).square().sum())
        norms, lengths = x.norm(dim=1).clamp_min(_FLOOR), y.norm(dim=1)
        cosines.append((x * y).sum(dim=1) / norms / lengths.clamp_min(_FLOOR))
        ratios.append(lengths / norms)
        spread.add(x)
        x, y = x - mean, y - mean
        product += float((x * y).sum())
        square += float(y.square().sum())
    rescale = product / square if square else math.nan
    return SaeMeasure(
        fvu=fvu(error, spread),
        rescale=rescale,
        fvu_rescaled=fvu(spread.total - rescale * product, spread),
        cosines=torch.cat(cosines).cpu().numpy(),
        norm_ratios=torch.cat(ratios).cpu().numpy(),
        active=active,
        counts=counts,
        mean=mean.cpu().numpy(),
    )
