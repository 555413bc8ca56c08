"""Per-feature scores from judgements, and the influence of each judgement on its feature's score.

Pure functions, vectorised over features. Knows nothing of window contents, dictionaries, standard errors or data frames.

A judgement has a label y (whether the explanation should match), a match m (the judge's decision; missing if unscored) and
a confidence c (orders items; missing if the judge gave none). Decision metrics use m, ranking metrics use only the order
of c. A judgement that lacks the value a metric needs is left out of that metric and counted. Per feature, with n₊
positives and n₋ negatives among the judgements used, of which TP and FP match:

    balanced_accuracy  (TPR + TNR) / 2, TPR = TP/n₊, TNR = 1 − FP/n₋
    f1                 2·TP / (n₊ + TP + FP); 0 when nothing matches
    auroc              P(c₊ > c₋) + P(c₊ = c₋)/2 over pairs of a positive and a negative
    auprc              average precision: the mean over positives of the precision among items with c ≥ theirs
    accuracy           the share of judgements with m = y; one class is enough
    pearson            the correlation of predicted x with true y over all tokens of all windows; 0 if x or y is constant

A feature whose used judgements have only one class has no score, except in accuracy and pearson. The ``…_base_rate``
metrics are F1 and average precision as if a share π of the items were positives, where π is the feature's share of
positives among all windows: positives get the weight w₊ = π/n₊ and negatives w₋ = (1 − π)/n₋ instead of 1. Balanced
accuracy and AUROC do not depend on this share.

The influence ψ of a judgement is the first-order change of its feature's score when the judgement gains weight. The
numbers of positives and negatives count as fixed, because the protocol fixes them: so ψ sums to zero within each class of
each feature, and Σψ² estimates the variance that the score would have if judgements were independent. P(c) = w₊TP(c)/W(c)
is the precision among the items with confidence c or more, whose total weight is W(c); "− mean" means "centred within the
class":

    balanced_accuracy  (m − TPR)/(2n₊) for positives, (FPR − m)/(2n₋) for negatives
    f1                 w₊(2 − F)(m − TPR)/D for positives, −w₋F(m − FPR)/D for negatives, D = w₊n₊ + w₊TP + w₋FP
    auroc              (V₁₀ − A)/n₊ and (V₀₁ − A)/n₋: the structural components of DeLong, DeLong & Clarke-Pearson 1988
    auprc              [y(P(c) − AP) + Σ_{positives i, cᵢ ≤ c} w(y − P(cᵢ))/W(cᵢ)]/n₊ − mean (linearised)
    accuracy           (1{m = y} − share of m = y in the class)/n
    pearson            Σ over the window's tokens of [zₓz_y − r(zₓ² + z_y²)/2]/N (Fisher's expansion), for N tokens in total
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import BadConfig

__all__ = [
    "ALL_METRICS",
    "BASE_RATE_METRICS",
    "DECISION_METRICS",
    "METRICS",
    "RANKING_METRICS",
    "Scores",
    "score_features",
]

METRICS = ("balanced_accuracy", "f1", "auroc", "auprc")  # the default metrics; they need both labels
BASE_RATE_METRICS = ("f1_base_rate", "auprc_base_rate")
DECISION_METRICS = ("balanced_accuracy", "f1", "f1_base_rate", "accuracy")
RANKING_METRICS = ("auroc", "auprc", "auprc_base_rate")
ALL_METRICS = (*METRICS, *BASE_RATE_METRICS, "accuracy", "pearson")
_ONE_CLASS = ("accuracy", "pearson")  # metrics for which one class is enough

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """The scores of one metric, and the influences that their standard error is computed from.

    ``features``: (feature,), the sorted ids of the features that have a score.
    ``values``: (feature,), their scores.
    ``feature``: (judgement,), for each judgement used, the index of its feature in ``features``.
    ``window``: (judgement,), its window id.
    ``influence``: (judgement,), its ψ.
    ``n_unscored``: number of judgements, of any feature, that lack the value the metric needs.
    ``n_one_class``: number of features with judgements but no score.
    ``bounds``: lowest and highest possible score; None if unknown.
    ``n_classes``: number of label classes; the influences leave out their means, which cost a degree of freedom each.
    """

    features: NDArray[Any]
    values: Floats
    feature: Ints
    window: Ints
    influence: Floats
    n_unscored: int
    n_one_class: int
    bounds: tuple[float, float] | None = None
    n_classes: int = 2


def score_features(
    metric: str,
    feature: NDArray[Any],
    window: Ints,
    label: Bools,
    match: Floats,
    confidence: Floats,
    *,
    base_rate: Floats | None = None,
    moments: Floats | None = None,
    pooled: bool = False,
) -> Scores:
    """Score every feature. All arrays are (judgement,) unless noted, in any order.

    ``match``: 1 if the judge said that the explanation matches, 0 if not, NaN if missing.
    ``confidence``: the judge's confidence; NaN if missing.
    ``base_rate``: the share of positives among all windows of the judgement's feature, for the ``…_base_rate`` metrics;
        a feature without it has no score in these.
    ``moments``: (judgement, 6), for pearson; see ``Judgement``.
    ``pooled``: give every feature the score of all judgements together; the influences are scaled so that the mean over
        features has the standard error of that score.

    Raises BadConfig for an unknown metric. Sources: sklearn's definitions of the metrics; DeLong et al. 1988 for the
    components of the AUROC.
    """
    if metric not in ALL_METRICS:
        raise BadConfig(
            "metric", expected=f"one of {', '.join(ALL_METRICS)}", seen=repr(metric), fix=f"use {METRICS[0]!r}"
        )
    missing = np.full(len(feature), np.nan)
    rate = missing if base_rate is None else base_rate
    told = np.full((len(feature), 6), np.nan) if moments is None else moments
    value = told[:, 0] if metric == "pearson" else match if metric in DECISION_METRICS else confidence
    used = ~np.isnan(value)
    if pooled:
        together = np.zeros(len(feature), np.int64)
        columns = (window, label, match, confidence)
        known = rate[used & ~np.isnan(rate)]
        share = None if not len(known) else np.full(len(feature), known.mean())  # mean over judgements, not features
        return _shared(score_features(metric, together, *columns, base_rate=share, moments=moments), feature, used)
    ids, code = np.unique(feature[used], return_inverse=True)
    code, label, value = code.astype(np.int64), label[used].astype(np.bool_), value[used].astype(np.float64)
    n_pos, n_neg = _count(code, label, len(ids)), _count(code, ~label, len(ids))
    both = (n_pos > 0) & (n_neg > 0) | (metric in _ONE_CLASS)
    if metric in BASE_RATE_METRICS:
        rates = np.full(len(ids), np.nan)
        rates[code] = rate[used]
        both &= rates > 0
    keep = both[code]
    renumber = np.cumsum(both) - 1
    code, label, value = renumber[code[keep]], label[keep], value[keep]
    n_pos, n_neg = n_pos[both], n_neg[both]
    match metric:
        case "f1" | "auprc":
            ones = np.ones(len(n_pos))
            values, influence = _WEIGHTED[metric](code, label, value, n_pos, n_neg, ones, ones)
        case "f1_base_rate" | "auprc_base_rate":
            weights = rates[both] / n_pos, (1 - rates[both]) / n_neg
            values, influence = _WEIGHTED[metric.removesuffix("_base_rate")](code, label, value, n_pos, n_neg, *weights)
        case "pearson":
            values, influence = _pearson(code, told[used][keep], len(n_pos))
        case _:
            values, influence = _PLAIN[metric](code, label, value, n_pos, n_neg)
    n_judged = len(np.unique(feature))
    return Scores(
        features=ids[both],
        values=values,
        feature=code,
        window=window[used][keep],
        influence=influence,
        n_unscored=int((~used).sum()),
        n_one_class=n_judged - int(both.sum()),
        bounds=(-1.0, 1.0) if metric == "pearson" else (0.0, 1.0),
        n_classes=2 if metric == "pearson" else max(1, len(np.unique(label))),
    )


def _shared(whole: Scores, feature: NDArray[Any], used: Bools) -> Scores:
    """Gives the single score of ``whole`` to every feature with a used judgement."""
    n_judged = len(np.unique(feature))
    if not len(whole.values):
        return replace(whole, features=feature[:0], n_one_class=n_judged)
    ids, code = np.unique(feature[used], return_inverse=True)
    n = len(ids)
    return replace(
        whole,
        features=ids,
        values=np.full(n, whole.values[0]),
        feature=code.astype(np.int64),
        influence=n * whole.influence,
        n_one_class=n_judged - n,
    )


def _count(code: Ints, mask: Bools, n: int) -> Floats:
    """The number of entries of each feature that ``mask`` selects. (feature,)"""
    return np.bincount(code[mask], minlength=n).astype(np.float64)


def _balanced_accuracy(code: Ints, label: Bools, match: Floats, n_pos: Floats, n_neg: Floats) -> tuple[Floats, Floats]:
    tpr = np.bincount(code, match * label, len(n_pos)) / n_pos
    fpr = np.bincount(code, match * ~label, len(n_pos)) / n_neg
    influence = np.where(label, (match - tpr[code]) / (2 * n_pos[code]), (fpr[code] - match) / (2 * n_neg[code]))
    return (tpr + 1 - fpr) / 2, influence


def _f1(
    code: Ints, label: Bools, match: Floats, n_pos: Floats, n_neg: Floats, w_pos: Floats, w_neg: Floats
) -> tuple[Floats, Floats]:
    tp = np.bincount(code, match * label, len(n_pos))
    fp = np.bincount(code, match * ~label, len(n_pos))
    denominator = w_pos * (n_pos + tp) + w_neg * fp
    f1 = 2 * w_pos * tp / denominator
    slope = np.where(label, (w_pos * (2 - f1))[code], -(w_neg * f1)[code]) / denominator[code]
    rate = np.where(label, (tp / n_pos)[code], (fp / n_neg)[code])
    return f1, slope * (match - rate)


def _accuracy(code: Ints, label: Bools, match: Floats, n_pos: Floats, n_neg: Floats) -> tuple[Floats, Floats]:
    n = n_pos + n_neg
    right = np.asarray(match == label, np.float64)
    true_pos, true_neg = np.bincount(code, right * label, len(n)), np.bincount(code, right * ~label, len(n))
    own = np.where(label, (true_pos / np.maximum(n_pos, 1))[code], (true_neg / np.maximum(n_neg, 1))[code])
    return (true_pos + true_neg) / n, (right - own) / n[code]


def _pearson(code: Ints, moments: Floats, n_features: int) -> tuple[Floats, Floats]:
    n, x, y, xx, yy, xy = (np.bincount(code, column, n_features) for column in moments.T)
    mean_x, mean_y = x / n, y / n
    # Treat a variance as zero if it is no more than rounding error.
    var_x = np.where(xx / n - mean_x**2 > 1e-12 * xx / n, xx / n - mean_x**2, 0.0)
    var_y = np.where(yy / n - mean_y**2 > 1e-12 * yy / n, yy / n - mean_y**2, 0.0)
    varies = (var_x > 0) & (var_y > 0)
    var_x, var_y = np.where(varies, var_x, 1.0), np.where(varies, var_y, 1.0)
    r = np.where(varies, (xy / n - mean_x * mean_y) / np.sqrt(var_x * var_y), 0.0)
    m_n, m_x, m_y, m_xx, m_yy, m_xy = moments.T
    a, b = mean_x[code], mean_y[code]
    z_xx = (m_xx - 2 * a * m_x + m_n * a**2) / var_x[code]
    z_yy = (m_yy - 2 * b * m_y + m_n * b**2) / var_y[code]
    z_xy = (m_xy - a * m_y - b * m_x + m_n * a * b) / np.sqrt(var_x * var_y)[code]
    influence = (z_xy - r[code] * (z_xx + z_yy) / 2) / n[code]
    return r, np.where(varies[code], influence, 0.0)


def _auroc(code: Ints, label: Bools, confidence: Floats, n_pos: Floats, n_neg: Floats) -> tuple[Floats, Floats]:
    block, owner, pos, neg = _tie_blocks(code, label, confidence)
    pos_below, neg_below = _below(pos, owner, len(n_pos)), _below(neg, owner, len(n_pos))
    # (block,) V10: share of negatives ranked below a positive of this block
    beaten = (neg_below + neg / 2) / n_neg[owner]
    # (block,) V01: share of positives ranked above a negative of this block
    losing = 1 - (pos_below + pos / 2) / n_pos[owner]
    auroc = np.bincount(owner, pos * beaten, len(n_pos)) / n_pos
    influence = np.where(
        label, (beaten[block] - auroc[code]) / n_pos[code], (losing[block] - auroc[code]) / n_neg[code]
    )
    return auroc, influence


def _auprc(
    code: Ints, label: Bools, confidence: Floats, n_pos: Floats, n_neg: Floats, w_pos: Floats, w_neg: Floats
) -> tuple[Floats, Floats]:
    n = len(n_pos)
    block, owner, pos, neg = _tie_blocks(code, label, confidence)
    # (block,) weights of the positives and of the negatives with this confidence or more
    true = w_pos[owner] * (n_pos[owner] - _below(pos, owner, n))
    false = w_neg[owner] * (n_neg[owner] - _below(neg, owner, n))
    total = true + false
    total = np.where(total > 0, total, 1.0)  # if all items with this confidence or more have weight 0, precision is 0
    precision = true / total
    average = np.bincount(owner, pos * precision, n) / n_pos
    # A judgement affects the precision at its own block and at every lower block.
    gain, loss = (pos * w_pos[owner] * (1 - precision) / total, pos * w_neg[owner] * precision / total)
    gains, losses = _below(gain, owner, n) + gain, _below(loss, owner, n) + loss
    raw = np.where(label, precision[block] - average[code] + gains[block], -losses[block]) / n_pos[code]
    centre_pos = np.bincount(code, raw * label, n) / n_pos
    centre_neg = np.bincount(code, raw * ~label, n) / n_neg
    return average, raw - np.where(label, centre_pos[code], centre_neg[code])


def _tie_blocks(code: Ints, label: Bools, confidence: Floats) -> tuple[Ints, Ints, Floats, Floats]:
    """Group judgements of the same feature with equal confidence into blocks, ordered by feature, then confidence.

    Returns the block of each judgement (judgement,), and for each block its feature, its number of positives and its number
    of negatives, all (block,).
    """
    order = np.lexsort((confidence, code))
    owner, level = code[order], confidence[order]
    starts = np.ones(len(order), np.bool_)
    starts[1:] = (owner[1:] != owner[:-1]) | (level[1:] != level[:-1])
    block = np.empty(len(order), np.int64)
    block[order] = np.cumsum(starts) - 1
    n_blocks = int(starts.sum())
    return block, owner[starts], _count(block, label, n_blocks), _count(block, ~label, n_blocks)


def _below(amount: Floats, owner: Ints, n: int) -> Floats:
    """For each block, the sum of ``amount`` over the lower blocks of the same feature. (block,)"""
    totals = np.bincount(owner, amount, n)
    before = np.cumsum(totals) - totals  # (feature,) the sum over all earlier features
    return np.asarray(np.cumsum(amount) - amount - before[owner], np.float64)


_PLAIN = {"balanced_accuracy": _balanced_accuracy, "auroc": _auroc, "accuracy": _accuracy}
_WEIGHTED = {"f1": _f1, "auprc": _auprc}
