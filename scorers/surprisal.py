"""Surprisal: does the explanation lower the subject model's loss more on windows where the feature fires than elsewhere?

Uses the windows of detection. The judge is the subject model itself (``scorers.judges.subject``). It is not prompted with
questions: its confidence is the decrease of the window's loss, in nats per token, when the explanation precedes the
window. With a small subject model the opposite direction (``direction="explanation"``) separates features better.

Source: surprisal scoring in Paulo et al. 2024, arXiv 2410.13928.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from evalkit.errors import BadConfig
from scorers.detection import DetectionScorer

__all__ = ["SurprisalScorer"]

Direction: TypeAlias = Literal["text", "explanation"]


class SurprisalScorer(DetectionScorer):
    """Scores by surprisal.

    ``direction``: "text" measures the loss of the window after the explanation, "explanation" the reverse.
    """

    name = "surprisal"
    version = "1"
    main_option = "direction"
    own_judge = "subject"

    def __init__(self, direction: Direction = "text") -> None:
        if direction not in ("text", "explanation"):
            raise BadConfig(
                "direction of scorer 'surprisal'",
                expected="text or explanation",
                seen=repr(direction),
                fix="use one of these",
            )
        self.own_judge = "subject" if direction == "text" else f"subject:{direction}"
