"""How well an RQAE reconstructs hidden states, in raw and in final-normed units, by depth.

Training writes it on the card, ``evalkit inspect`` prints it; ``rqae.held_out_fvu``, which training watches, knows no raw
units. Knows tensors and the subject model's final norm; nothing of corpora or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from evalkit.errors import CorpusError
from evalkit.records import SubjectInfo
from evalkit.subject.final_norm import denormalise, normalise
from rqae import RQAE
from rqae.encoding.codebook import distinct_codes

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["RqaeFit", "measure_rqae_fit"]


@dataclass(frozen=True, slots=True, eq=False)
class RqaeFit:
    """FVU by depth: summed squared error over summed squared distance to the mean, in raw and in final-normed units.

    ``alive_share``: of all (quantizer, distinct code) pairs, those that some token took. ``mean``: of the raw states.
    """

    raw: dict[int, float]
    normed: dict[int, float]
    alive_share: float
    mean: Float[Tensor, " d_model"]
    n_tokens: int


def measure_rqae_fit(
    model: RQAE, rows: Iterable[Float[Tensor, "row d_model"]], info: SubjectInfo, depths: Sequence[int]
) -> RqaeFit:
    """FVU over chunks of raw hidden states, all depths for one encoding. Sums in float64. Raises CorpusError on no rows."""
    kinds = ("raw", "normed")
    squares = {depth: dict.fromkeys(kinds, 0.0) for depth in depths}
    sums = {kind: torch.zeros(info.d_model, dtype=torch.float64) for kind in kinds}
    totals = dict.fromkeys(kinds, 0.0)
    used = torch.zeros(model.config.num_quantizers, model.config.num_codes, dtype=torch.bool)
    count = 0
    for chunk in rows:
        hidden = chunk.to(model.w_in.device)
        normed = normalise(hidden, info)
        for kind, values in zip(kinds, (hidden, normed), strict=True):
            sums[kind] += values.double().sum(0).cpu()
            totals[kind] += float(values.double().square().sum())
        codes = model.encode(normed)
        used[torch.arange(len(used)).expand(codes.shape), codes.cpu()] = True
        for depth, found in model.reconstructions(codes, depths):
            squares[depth]["normed"] += float((found - normed).double().square().sum())
            squares[depth]["raw"] += float((denormalise(found, hidden, info) - hidden).double().square().sum())
        count += len(hidden)
    if not count:
        raise CorpusError("hidden states", expected="at least one row", seen="none", fix="use a longer corpus")
    variance = {kind: totals[kind] - float(sums[kind].square().sum()) / count for kind in kinds}
    by_depth = {kind: {depth: row[kind] / variance[kind] for depth, row in squares.items()} for kind in kinds}
    alive = float(used.sum()) / (len(used) * distinct_codes(model.config))
    return RqaeFit(by_depth["raw"], by_depth["normed"], alive, sums["raw"] / count, count)
