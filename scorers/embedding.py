"""Embedding: how well does the similarity of explanation and whole window separate active from inactive windows?

The windows are those of detection. Each window is compared as a whole. A feature for single words therefore scores lower
than in detection with the embedding judge, which compares pieces of windows; a feature for topics may score higher.
Always uses its own judge, whichever judges the run has.
"""

from __future__ import annotations

from scorers.detection import DetectionScorer

__all__ = ["EmbeddingScorer"]


class EmbeddingScorer(DetectionScorer):
    """AUROC is the main metric; the cut-off for match decisions is fitted on the calibration windows."""

    name = "embedding"
    version = "1"
    own_judge = "embedding:pieces=whole"
