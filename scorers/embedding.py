"""Embedding: how well does the similarity of explanation and whole window separate active from inactive windows?

Uses the windows of detection and compares each as a whole. A feature for single words therefore scores lower than in
detection with the embedding judge, which compares pieces of windows; a feature for topics may score higher. Always uses
its own judge, whichever judges the run has.
"""

from __future__ import annotations

from scorers.detection import DetectionScorer

__all__ = ["EmbeddingScorer"]


class EmbeddingScorer(DetectionScorer):
    """Embedding similarity of whole windows. The main metric is AUROC; calibration windows give the match cut-off."""

    name = "embedding"
    version = "1"
    own_judge = "embedding:pieces=whole"
