"""Means with standard errors for the tables of an inspection, with the formulas of ``evalkit.stats.standard_errors``.

Pure functions. Knows nothing of the meaning or the source of the values.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.stats.metrics import Scores
from evalkit.stats.standard_errors import Estimate, macro_mean, two_way_variance

__all__ = ["over_features", "over_tokens"]


def over_features(values: NDArray[np.floating]) -> Estimate:
    """The mean of ``values`` (feature,), ignoring NaN, and its SE over features.

    The features were measured on the same tokens; the SE does not account for that.
    """
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    places = np.arange(len(known))
    return macro_mean(Scores(places, known, places, places, np.zeros(len(known)), 0, 0))


def over_tokens(values: NDArray[np.floating], documents: NDArray[np.integer[Any]]) -> tuple[float, float]:
    """The mean of ``values`` (token,) and its SE clustered by ``documents`` (token,).

    The SE is NaN if there are fewer than two documents; both are NaN if there are no values.
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        return math.nan, math.nan
    mean = float(values.mean())
    clusters = np.unique(documents, return_inverse=True)[1].astype(np.int64)
    if not clusters.any():
        return mean, math.nan
    return mean, math.sqrt(two_way_variance((values - mean) / len(values), clusters, clusters))
