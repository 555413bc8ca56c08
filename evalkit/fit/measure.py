"""How well a dictionary fits some hidden states: the error it leaves, how many latents it takes, which of them fire.

One pass over the latents serves any number of sets of states, so a dictionary on disk is read once. Sums are in float64.
Knows sources and tensors; no corpus, no subject model, no verdict (see ``fit_check``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.transforms import Step, transformed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from evalkit.protocols import FeatureSource
    from evalkit.sources.sae.weights import SaeWeights

__all__ = ["Fit", "States", "measure", "reconstructed"]


@dataclass(frozen=True, slots=True, eq=False)
class States:
    """Raw states that a dictionary reads, (token, d), and those it shall reconstruct, (token, d_out).

    ``further`` are transforms after the dictionary's own, ``offset`` (d,) is added to what its encoder sees: how the states
    would be read if another normalisation or bias had been declared. Both for SAEs only.
    """

    read: Float[Tensor, "token d"]
    target: Float[Tensor, "token d_out"]
    further: tuple[Step, ...] = ()
    offset: Tensor | None = None
    own_steps: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """``fvu``: squared error over the variance about the mean; ``fvu_centred``: the same when the mean error is taken away.

    ``l0``: active latents per token, ``fired`` (n,): tokens each latent is active on; None where the source is no SAE.
    Source of FVU: Gemma Scope, arXiv 2408.05147, section 4.
    """

    fvu: float
    fvu_centred: float
    n_tokens: int
    l0: float | None = None
    fired: Tensor | None = field(default=None, repr=False)

    @property
    def alive_share(self) -> float | None:
        """Share of the latents that are active on at least one of the tokens."""
        return None if self.fired is None else float((self.fired > 0).double().mean())

    def as_json(self) -> dict[str, Any]:
        """For records."""
        found = {"fvu": self.fvu, "l0": self.l0, "alive_share": self.alive_share, "n_tokens": self.n_tokens}
        return {name: value for name, value in found.items() if value is not None}


def measure(source: FeatureSource, sets: Sequence[States]) -> list[Fit]:
    """The fit on each set of states. The source is bound. Latents of an SAE are gone through once for all sets."""
    if not isinstance(source, SaeSource):
        return [_fit(source.reconstruct(one.read[None])[0], one.target) for one in sets]
    seen, undoing = [], []
    for one in sets:
        steps = (source.steps if one.own_steps else ()) + one.further
        y, undo = transformed(one.read.float(), steps)
        seen.append(y if one.offset is None else y + one.offset.to(y.device))
        undoing.append(undo)
    lengths = [len(y) for y in seen]
    made, active_of, fired = reconstructed(source.weights, torch.cat(seen), lengths)
    fits = []
    for row, (one, undo, found) in enumerate(zip(sets, undoing, torch.split(made, lengths), strict=True)):
        back = undo(found) if source.site.reconstructs is None else found
        first = sum(lengths[:row])
        l0 = float(active_of[first : first + lengths[row]].double().mean())
        fits.append(_fit(back, one.target, l0, fired[row]))
    return fits


def reconstructed(weights: SaeWeights, y: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What the encoder sees, y (T, d) → reconstructions (T, d_out), active latents per token (T,) and, for each stretch of
    ``lengths`` tokens, on how many of them each latent fires (stretch, n). One pass over the latents.
    """
    made = weights.constant(y)
    active_of = torch.zeros(len(y), dtype=torch.int64, device=y.device)
    fired = torch.zeros(len(lengths), weights.width, dtype=torch.int64)
    for tile, active in weights.tiles(y):
        made += weights.decoded(active, tile)
        on = active > 0
        active_of += on.sum(dim=-1)
        for row, part in enumerate(torch.split(on, list(lengths))):
            fired[row, tile] = part.sum(dim=0).cpu()
    return made, active_of, fired


def _fit(made: Tensor, target: Tensor, l0: float | None = None, fired: Tensor | None = None) -> Fit:
    truth = target.double()
    error = truth - made.double().to(truth.device)
    variance = max(float((truth - truth.mean(dim=0)).square().sum()), 1e-30)
    whole, centred = float(error.square().sum()), float((error - error.mean(dim=0)).square().sum())
    return Fit(whole / variance, centred / variance, len(truth), l0, fired)
