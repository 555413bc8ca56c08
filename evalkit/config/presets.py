"""Presets that imitate published protocols as closely as a run can: option values, metrics, and known limitations.

Knows names and numbers only; reads and writes nothing. Facts about eai-delphi refer to version 0.1.3, those about SAEBench
to its automated interpretability evaluation (2024), and those about the paper to H. Kamath, Residual Quantization
Autoencoders, 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evalkit.errors import BadConfig

__all__ = ["PRESETS", "Preset", "find_preset"]


@dataclass(frozen=True, slots=True)
class Preset:
    """One preset.

    ``options``: values of ``RunConfig`` fields that the user does not set.
    ``metrics``: the metrics that the table shows.
    ``wrong``: limitations of the protocol and differences from the original, printed in the table's footer.
    ``pooled``: whether a metric pools all judgements of a dictionary, instead of averaging over features.
    """

    options: Mapping[str, Any]
    metrics: tuple[str, ...]
    wrong: str
    pooled: bool = False


PRESETS: dict[str, Preset] = {
    "delphi": Preset(
        {
            "window_length": 32,
            "n_explain": 40,
            "n_positives": 50,
            "n_negatives": 50,
            "explainers": ("default",),
            "judges": ("llm:batch_size=5",),
            "scorers": ("detection", "fuzzing"),
        },
        ("balanced_accuracy", "f1", "accuracy"),
        "numbers of examples and questions as in eai-delphi, and metrics pooled over all judgements. Pooling gives more "
        "weight to features with more answers and hides differences between features; the errors printed here are still "
        "clustered by feature and window. Windows, marks, prompts and negatives are ours. eai-delphi drops a feature's "
        "last batch if it is shorter, drops replies it cannot parse without counting them, and may reuse the explainer's "
        "examples.",
        pooled=True,
    ),
    "saebench": Preset(
        {
            "window_length": 21,
            "max_tokens": 2_000_000,
            "n_explain": 15,
            "explain_by": "mixed",
            "n_positives": 4,
            "positives_by": "mixed",
            "n_negatives": 10,
            "explainers": ("default",),
            "judges": ("llm:batch_size=14",),
            "scorers": ("detection",),
        },
        ("accuracy",),
        "one question per feature with 14 windows, 4 of them active, and plain accuracy, as in SAEBench. A judge that "
        "always says no scores 0.714, so that is the floor, and a feature's score moves in steps of 0.07. SAEBench does "
        "not check that the feature is inactive on its negatives; this run does.",
    ),
    "paper": Preset(
        {
            "window_length": 17,
            "n_features": 100,
            "n_positives": 3,
            "n_negatives": 2,
            "explainers": ("default",),
            "judges": ("llm:batch_size=5",),
            "scorers": ("detection", "fuzzing"),
        },
        ("accuracy",),
        "five judgements per feature on windows of radius 8, and accuracy as mean ± SE over 100 features, as in the RQAE "
        "paper. Five judgements say little about a feature; with three positives among them, a judge that always says "
        "yes scores 0.6 in detection. The paper sets intensities below the 90th percentile of each window to zero; here "
        "a feature has one threshold θ for all windows.",
    ),
}


def find_preset(name: object) -> Preset | None:
    """The preset called ``name``; None if ``name`` is None. Raises BadConfig if there is no such preset."""
    if name is None:
        return None
    if not isinstance(name, str) or name not in PRESETS:
        raise BadConfig("preset", expected=f"one of {', '.join(PRESETS)}", seen=repr(name), fix="use one of these")
    return PRESETS[name]
