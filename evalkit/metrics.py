"""Per-feature scores from judgements, and how much each judgement moves them.

Pure and vectorised over features. Knows nothing of windows, dictionaries, standard errors or data frames.

A judgement has a label y (the explanation should match), a match m (what the judge said, missing when unscored) and a
confidence c (orders items, missing when the judge gave none). Decision metrics use m, ranking metrics use c as it is;
a judgement without what its metric needs is left out of that metric and counted. Per feature, with n₊ positives and n₋
negatives among those used, TP and FP matches:

    balanced_accuracy  (TPR + TNR) / 2, TPR = TP/n₊, TNR = 1 − FP/n₋
    f1                 2·TP / (n₊ + TP + FP); 0 when nothing matches
    auroc              P(c₊ > c₋) + P(c₊ = c₋)/2 over pairs of a positive and a negative
    auprc              average precision: the mean over positives of the precision among items with c ≥ theirs

A feature with only one class among its used judgements has no score (NaN).

The influence ψ of a judgement is the first-order change of its feature's score when the judgement gains weight, the
number of positives and of negatives being fixed, as the protocol fixes them: it sums to zero within each class of each
feature, and Σψ² estimates the score's variance if judgements were independent. With precision P(c) = TP(c)/N(c) among
the N(c) items at least as confident as c, and "−mean" meaning "centred within the class":

    balanced_accuracy  (m − TPR)/(2n₊) for positives, (FPR − m)/(2n₋) for negatives
    f1                 (2 − F)(m − TPR)/D for positives, −F(m − FPR)/D for negatives, D = n₊ + TP + FP (delta method)
    auroc              (V₁₀ − A)/n₊ and (V₀₁ − A)/n₋: the structural components of DeLong, DeLong & Clarke-Pearson 1988
    auprc              [y(P(c) − AP) + Σ_{positives i, cᵢ ≤ c} (y − P(cᵢ))/N(cᵢ)]/n₊ − mean (linearised)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import BadConfig

__all__ = ["DECISION_METRICS", "METRICS", "RANKING_METRICS", "Scores", "score_features"]

DECISION_METRICS = ("balanced_accuracy", "f1")
RANKING_METRICS = ("auroc", "auprc")
METRICS = (*DECISION_METRICS, *RANKING_METRICS)

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """The scores of one metric, with what their standard error is made of.

    ``features`` (feature,) are the ids of the features that have a score, sorted, ``values`` (feature,) their scores.
    One entry per judgement used: ``feature`` (judgement,) indexes ``features``, ``window`` (judgement,) is its window
    id, ``influence`` (judgement,) its ψ. ``n_unscored`` judgements, of any feature, lacked what the metric needs;
    ``n_one_class`` features had judgements but no score.
    """

    features: NDArray[Any]
    values: Floats
    feature: Ints
    window: Ints
    influence: Floats
    n_unscored: int
    n_one_class: int


def score_features(
    metric: str, feature: NDArray[Any], window: Ints, label: Bools, match: Floats, confidence: Floats
) -> Scores:
    """Score every feature. All arrays are (judgement,), in any order; NaN in ``match`` and ``confidence`` is missing.

    ``match`` is 1 where the judge said that the explanation matches, 0 where not. Raises BadConfig for an unknown
    metric. Sources: sklearn's definitions of the four metrics; DeLong et al. 1988 for the components of the AUROC.
    """
    if metric not in METRICS:
        raise BadConfig("metric", expected=f"one of {', '.join(METRICS)}", seen=repr(metric), fix=f"use {METRICS[0]!r}")
    value = match if metric in DECISION_METRICS else confidence
    used = ~np.isnan(value)
    ids, code = np.unique(feature[used], return_inverse=True)
    code, label, value = code.astype(np.int64), label[used].astype(np.bool_), value[used].astype(np.float64)
    n_pos, n_neg = _count(code, label, len(ids)), _count(code, ~label, len(ids))
    both = (n_pos > 0) & (n_neg > 0)
    keep = both[code]
    renumber = np.cumsum(both) - 1
    code, label, value = renumber[code[keep]], label[keep], value[keep]
    values, influence = _FUNCTIONS[metric](code, label, value, n_pos[both], n_neg[both])
    n_judged = len(np.unique(feature))
    return Scores(
        features=ids[both],
        values=values,
        feature=code,
        window=window[used][keep],
        influence=influence,
        n_unscored=int((~used).sum()),
        n_one_class=n_judged - int(both.sum()),
    )


def _count(code: Ints, mask: Bools, n: int) -> Floats:
    """How many entries of each feature are in the mask. (feature,)"""
    return np.bincount(code[mask], minlength=n).astype(np.float64)


def _balanced_accuracy(code: Ints, label: Bools, match: Floats, n_pos: Floats, n_neg: Floats) -> tuple[Floats, Floats]:
    tpr = np.bincount(code, match * label, len(n_pos)) / n_pos
    fpr = np.bincount(code, match * ~label, len(n_pos)) / n_neg
    influence = np.where(label, (match - tpr[code]) / (2 * n_pos[code]), (fpr[code] - match) / (2 * n_neg[code]))
    return (tpr + 1 - fpr) / 2, influence


def _f1(code: Ints, label: Bools, match: Floats, n_pos: Floats, n_neg: Floats) -> tuple[Floats, Floats]:
    tp = np.bincount(code, match * label, len(n_pos))
    fp = np.bincount(code, match * ~label, len(n_pos))
    denominator = n_pos + tp + fp
    f1 = 2 * tp / denominator
    slope = np.where(label, (2 - f1[code]), -f1[code]) / denominator[code]
    rate = np.where(label, (tp / n_pos)[code], (fp / n_neg)[code])
    return f1, slope * (match - rate)


def _auroc(code: Ints, label: Bools, confidence: Floats, n_pos: Floats, n_neg: Floats) -> tuple[Floats, Floats]:
    block, owner, pos, neg = _tie_blocks(code, label, confidence)
    pos_below, neg_below = _below(pos, owner, len(n_pos)), _below(neg, owner, len(n_pos))
    beaten = (neg_below + neg / 2) / n_neg[owner]  # (block,) share of negatives that a positive here beats: V10
    losing = 1 - (pos_below + pos / 2) / n_pos[owner]  # (block,) share of positives that beat a negative here: V01
    auroc = np.bincount(owner, pos * beaten, len(n_pos)) / n_pos
    influence = np.where(
        label, (beaten[block] - auroc[code]) / n_pos[code], (losing[block] - auroc[code]) / n_neg[code]
    )
    return auroc, influence


def _auprc(code: Ints, label: Bools, confidence: Floats, n_pos: Floats, n_neg: Floats) -> tuple[Floats, Floats]:
    n = len(n_pos)
    block, owner, pos, neg = _tie_blocks(code, label, confidence)
    true = n_pos[owner] - _below(pos, owner, n)  # (block,) positives at least as confident
    total = (n_pos + n_neg)[owner] - _below(pos + neg, owner, n)
    precision = true / total
    average = np.bincount(owner, pos * precision, n) / n_pos
    # A judgement counts in the precision at every block not above its own.
    reach = _below(pos / total, owner, n) + pos / total
    drag = _below(pos * precision / total, owner, n) + pos * precision / total
    raw = np.where(label, precision[block] - average[code] + reach[block], 0.0) - drag[block]
    raw /= n_pos[code]
    centre_pos = np.bincount(code, raw * label, n) / n_pos
    centre_neg = np.bincount(code, raw * ~label, n) / n_neg
    return average, raw - np.where(label, centre_pos[code], centre_neg[code])


def _tie_blocks(code: Ints, label: Bools, confidence: Floats) -> tuple[Ints, Ints, Floats, Floats]:
    """Group judgements of one feature with equal confidence; blocks rise by feature, then confidence.

    Returns each judgement's block (judgement,), each block's feature, positives and negatives (block,).
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
    """Per block, the sum of ``amount`` over the lower blocks of the same feature. (block,)"""
    totals = np.bincount(owner, amount, n)
    before = np.cumsum(totals) - totals  # (feature,) everything of earlier features
    return np.asarray(np.cumsum(amount) - amount - before[owner], np.float64)


_FUNCTIONS = {"balanced_accuracy": _balanced_accuracy, "f1": _f1, "auroc": _auroc, "auprc": _auprc}
