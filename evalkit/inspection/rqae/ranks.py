"""Compares two rankings of an RQAE feature's best tokens: by intensity, and by cosine with the feature's centre.

A feature is given by the codes of one token, its centre. At each depth, the ``top`` tokens by intensity, without the
centre, are ranked by intensity and by the cosine of their hidden state with that of the centre. Addresses tokens by row of
the code store; uses no text and no language model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from evalkit.errors import CorpusError
from evalkit.fit.estimates import over_features
from rqae import RQAE
from rqae.searching.scan import search

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NormedStates", "RankAgreement", "rank_agreement", "rank_correlations", "top_tokens"]

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
# For ascending rows of the code store, yields (positions within those rows, their final-normed states (n, d)).
NormedStates: TypeAlias = Callable[[Ints], Iterator[tuple[Ints, "Tensor"]]]


@dataclass(frozen=True, slots=True)
class RankAgreement:
    """Spearman's correlation at one depth: the mean and its SE over features.

    ``tried``: number of features.
    ``features``: number of features with a correlation; those with the same intensity on all their tokens have none.
    """

    depth: int
    tried: int
    features: int
    mean: float
    se: float


def rank_agreement(
    model: RQAE,
    codes: NDArray[np.integer[Any]],
    centres: Ints,
    normed: NormedStates,
    depths: Sequence[int],
    top: int,
) -> tuple[list[RankAgreement], Floats]:
    """One row for each of ``depths``, and the correlation of each feature (depth, feature), NaN if it has none.

    ``codes``: (token, quantizer).
    ``centres``: (feature,), rows of ``codes``.

    Raises CorpusError for fewer than three tokens.
    """
    rows, intensities = top_tokens(model, codes, centres, depths, top)
    cosines = _cosines(rows, centres, normed)
    values = rank_correlations(intensities, cosines)  # (depth, feature)
    found = []
    for depth, line in zip(depths, values, strict=True):
        mean = over_features(line)
        found.append(RankAgreement(depth, len(centres), mean.n, mean.mean, mean.se))
    return found, values


def top_tokens(
    model: RQAE, codes: NDArray[np.integer[Any]], centres: Ints, depths: Sequence[int], top: int
) -> tuple[Ints, Floats]:
    """Rows and intensities (depth, feature, top) of each feature's best tokens except its centre; ties in order of row."""
    if len(codes) < 3:
        raise CorpusError("corpus", expected="at least three tokens", seen=str(len(codes)), fix="use a longer corpus")
    features = torch.from_numpy(codes[centres].astype(np.int64))
    hits = search(model, codes, features, depths, top_k=min(top + 1, len(codes)))
    own = hits.rows == centres[:, None]
    # Drop the centre, which this puts last; if the centre is not among the hits, drop the last of them.
    order = np.argsort(own, axis=-1, kind="stable")[..., :-1]
    return np.take_along_axis(hits.rows, order, -1), np.take_along_axis(hits.scores, order, -1).astype(np.float64)


def _cosines(rows: Ints, centres: Ints, normed: NormedStates) -> Floats:
    """Cosine of each token's final-normed state with that of its feature's centre; ``rows`` is (depth, feature, token)."""
    middle, back = np.unique(centres, return_inverse=True)
    units = torch.cat([_unit(states) for _, states in normed(middle)])[torch.from_numpy(back)]  # (feature, d)
    wanted, places = np.unique(rows, return_inverse=True)
    places = places.reshape(-1)
    owners = np.broadcast_to(np.arange(len(centres))[:, None], rows.shape).reshape(-1)
    order = np.argsort(places, kind="stable")
    found = np.empty(rows.size)
    for which, states in normed(wanted):
        low, high = np.searchsorted(places[order], [which[0], which[-1] + 1])
        here = order[low:high]
        found[here] = (_unit(states) @ units.T).cpu().numpy()[places[here] - which[0], owners[here]]
    return found.reshape(rows.shape)


def _unit(states: Tensor) -> Tensor:
    return torch.nn.functional.normalize(states.float(), dim=-1)


def rank_correlations(first: Floats, second: Floats) -> Floats:
    """Spearman's correlation along the last axis; ties get their mean rank; NaN if one side is constant."""
    left, right = (rankdata(values, axis=-1) for values in (first, second))
    left, right = (ranks - ranks.mean(axis=-1, keepdims=True) for ranks in (left, right))
    lengths = np.sqrt((left**2).sum(axis=-1) * (right**2).sum(axis=-1))
    with np.errstate(invalid="ignore"):
        found: Floats = (left * right).sum(axis=-1) / np.where(lengths > 0, lengths, np.nan)
    return found
