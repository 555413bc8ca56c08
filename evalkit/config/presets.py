"""Protocols of others, as far as they can be had with ours: how a run is set, how its table counts, what is wrong with it.

Knows names and numbers only. Facts about eai-delphi are of version 0.1.3, those of SAEBench of its automated
interpretability evaluation (2024), those of the paper of H. Kamath, Residual Quantization Autoencoders, 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evalkit.errors import BadConfig

__all__ = ["PRESETS", "Preset", "find_preset"]


@dataclass(frozen=True, slots=True)
class Preset:
    """``options``: fields of a run's configuration, where they are not given. ``metrics``: what the table shows.

    ``pooled``: metrics over all judgements of a dictionary at once, instead of the mean over features. ``wrong``: what a
    reader must know, for the table's footer.
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
        "examples and questions as eai-delphi asks them, metrics pooled over all judgements. Pooling lets features with "
        "more answers weigh more and hides that features differ; the errors printed here are clustered by feature and "
        "window all the same. Windows, marks, prompts and negatives are ours: theirs drops the last, shorter batch of a "
        "feature, loses replies it cannot read without counting them, and may show the explainer's examples again.",
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
        "14 windows per feature in one question, 4 of them active, plain accuracy as SAEBench counts it. A judge that "
        "always says no scores 0.714, so that is the floor, and a feature's score moves in steps of 0.07. Their negatives "
        "are not checked to be inactive; ours are.",
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
        "five judgements of windows of radius 8 per feature, accuracy, mean ± SE over 100 features, as in the paper on "
        "RQAE. Five judgements tell little about a feature, and with three positives of five a judge that always says "
        "yes scores 0.6 in detection. The paper zeroes intensities below the 90th percentile of each window; here a "
        "feature's θ is the same everywhere.",
    ),
}


def find_preset(name: object) -> Preset | None:
    """The preset of this name, None for None. Raises BadConfig for an unknown name."""
    if name is None:
        return None
    if not isinstance(name, str) or name not in PRESETS:
        raise BadConfig("preset", expected=f"one of {', '.join(PRESETS)}", seen=repr(name), fix="use one of these")
    return PRESETS[name]
