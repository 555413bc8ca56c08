"""Measures how well an RQAE reconstructs hidden states, in raw and in final-normed units, by depth.

Training writes the result on the card and ``evalkit inspect`` prints it. ``rqae.held_out_fvu``, which training watches,
has no raw units. Knows tensors and the subject model's final norm; no corpora or files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from evalkit.errors import CorpusError
from evalkit.fit.fvu import Spread, fvu
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
    """The fit of an RQAE by depth.

    ``raw``, ``normed``: FVU (see ``evalkit.fit.fvu``) in raw and in final-normed units.
    ``alive_share``: share of the (quantizer, distinct code) pairs that at least one token took.
    ``mean``: of the raw states, in float64.
    """

    raw: dict[int, float]
    normed: dict[int, float]
    alive_share: float
    mean: Float[Tensor, " d_model"]
    n_tokens: int


def measure_rqae_fit(
    model: RQAE, rows: Iterable[Float[Tensor, "row d_model"]], info: SubjectInfo, depths: Sequence[int]
) -> RqaeFit:
    """The fit over chunks of raw hidden states; one encoding serves all depths. Sums are in float64.

    Raises CorpusError on no rows.
    """
    kinds = ("raw", "normed")
    squares = {depth: dict.fromkeys(kinds, 0.0) for depth in depths}
    spreads = {kind: Spread() for kind in kinds}
    used = torch.zeros(model.config.num_quantizers, model.config.num_codes, dtype=torch.bool)
    for chunk in rows:
        hidden = chunk.to(model.w_in.device)
        normed = normalise(hidden, info)
        for kind, values in zip(kinds, (hidden, normed), strict=True):
            spreads[kind].add(values)
        codes = model.encode(normed)
        used[torch.arange(len(used)).expand(codes.shape), codes.cpu()] = True
        for depth, found in model.reconstructions(codes, depths):
            squares[depth]["normed"] += float((found - normed).double().square().sum())
            squares[depth]["raw"] += float((denormalise(found, hidden, info) - hidden).double().square().sum())
    if not spreads["raw"].n_rows:
        raise CorpusError("hidden states", expected="at least one row", seen="none", fix="use a longer corpus")
    by_depth = {kind: {depth: fvu(row[kind], spreads[kind]) for depth, row in squares.items()} for kind in kinds}
    alive = float(used.sum()) / (len(used) * distinct_codes(model.config))
    raw = spreads["raw"]
    return RqaeFit(by_depth["raw"], by_depth["normed"], alive, raw.mean.cpu(), raw.n_rows)
