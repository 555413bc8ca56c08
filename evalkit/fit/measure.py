"""Measures how well a dictionary fits hidden states: FVU, L0 and which latents fire.

One pass over the latents serves any number of sets of states, so that a dictionary on disk is read once. Sums are in
float64. Knows sources and tensors; no corpus, no subject model, no verdict (see ``evalkit.fit.check``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from evalkit.fit.fvu import Spread, fvu
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
    """Raw states that a dictionary reads, and those that it should reconstruct.

    The last three, for SAEs only, read the states as if another normalisation or bias had been declared:

    ``further``: transforms after the dictionary's own.
    ``offset``: (d,), added to the encoder's input.
    ``own_steps``: whether the dictionary's own transforms are applied.
    """

    read: Float[Tensor, "token d"]
    target: Float[Tensor, "token d_out"]
    further: tuple[Step, ...] = ()
    offset: Tensor | None = None
    own_steps: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """The fit of a dictionary to one set of states.

    ``fvu``: see ``evalkit.fit.fvu``; NaN where all target states are equal.
    ``fvu_centred``: the FVU after the mean error is subtracted.
    ``l0``: active latents per token; None where the source is not an SAE.
    ``fired``: (n,), the number of tokens on which each latent is active; None where the source is not an SAE.
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
        """For records. An FVU that is not defined is left out."""
        known = None if math.isnan(self.fvu) else self.fvu
        found = {"fvu": known, "l0": self.l0, "alive_share": self.alive_share, "n_tokens": self.n_tokens}
        return {name: value for name, value in found.items() if value is not None}


def measure(source: FeatureSource, sets: Sequence[States]) -> list[Fit]:
    """The fit on each set of states, in their order. The source must be bound. Passes over the latents of an SAE once."""
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
    """Runs an SAE on its encoder's input y (T, d), in one pass over the latents.

    ``lengths`` cuts the T tokens into consecutive stretches. Returns the reconstructions (T, d_out), the number of active
    latents per token (T,), and the number of tokens of each stretch on which each latent fires (stretch, n).
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
    spread, error_spread = Spread(), Spread()
    spread.add(target)
    error = target.double() - made.double().to(target.device)
    error_spread.add(error)
    return Fit(fvu(float(error.square().sum()), spread), fvu(error_spread.total, spread), len(target), l0, fired)
