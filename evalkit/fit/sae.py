"""How well a sparse autoencoder or transcoder fits some tokens, and how often each latent fires: one pass over its weights.

Latents are taken tile by tile, each for all tokens of a block before the next, so a dictionary on disk is never held and is
read once a block; the default sample is one block. Knows tensors; nothing of corpora, models or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.errors import BadShape, CorpusError
from evalkit.fit.measure import reconstructed
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.transforms import transformed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["SaeMeasure", "measure_rows"]

_BLOCK = 9216  # tokens: 8,192 and the rest of a context of up to 1,024
_ROWS = 1024  # compared at a time in float64
_FLOOR = 1e-12  # below this a norm counts as zero


@dataclass(frozen=True, slots=True, eq=False)
class SaeMeasure:
    """x is the state at ``site.out`` and x̂ its reconstruction, each (token, d_out).

    ``fvu``: Σ‖x - x̂‖² / Σ‖x - mean‖²; ``rescale``: the one factor α for which mean + α(x̂ - mean) comes closest to x, with
    ``mean`` (d_out,) that of x; ``fvu_rescaled``: the FVU of that. ``cosines`` of x and x̂, ``norm_ratios`` ‖x̂‖/‖x‖ and
    ``active``, the latents that fire, are by token; ``counts`` (latent,): the tokens on which each fires.
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
        """Latents that fire, by token."""
        return float(self.active.mean())

    @property
    def alive_share(self) -> float:
        """Of all latents, those that fire on some token."""
        return float((self.counts > 0).mean())


def measure_rows(
    source: SaeSource, hidden: Float[Tensor, "token d_in"], target: Float[Tensor, "token d_out"] | None = None
) -> SaeMeasure:
    """FVU, cosines, norms, the best rescaling and firing counts over raw hidden states; sums in float64.

    ``hidden`` is what the dictionary reads, ``target`` what it should give: the same where None. Raises CorpusError on no
    tokens, BadShape for states of another shape, BadFile (see ``Stored.take``).
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


def _run(source: SaeSource, hidden: Tensor) -> tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]:
    """Reconstructions (token, d_out), active latents by token, tokens by latent."""
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
    error = variance = product = square = 0.0
    cosines, ratios = [], []
    for low in range(0, len(target), _ROWS):
        x, y = (rows[low : low + _ROWS].double() for rows in (target, rebuilt))
        error += float((x - y).square().sum())
        norms, lengths = x.norm(dim=1).clamp_min(_FLOOR), y.norm(dim=1)
        cosines.append((x * y).sum(dim=1) / norms / lengths.clamp_min(_FLOOR))
        ratios.append(lengths / norms)
        x, y = x - mean, y - mean
        variance += float(x.square().sum())
        product += float((x * y).sum())
        square += float(y.square().sum())
    variance = variance or math.nan
    rescale = product / square if square else math.nan
    return SaeMeasure(
        fvu=error / variance,
        rescale=rescale,
        fvu_rescaled=(variance - rescale * product) / variance,
        cosines=torch.cat(cosines).cpu().numpy(),
        norm_ratios=torch.cat(ratios).cpu().numpy(),
        active=active,
        counts=counts,
        mean=mean.cpu().numpy(),
    )
