"""Training of RQAEs."""

from __future__ import annotations

from rqae.training.config import RqaeTrainingConfig
from rqae.training.loop import TrainingReport, held_out_fvu, train_rqae

__all__ = ["RqaeTrainingConfig", "TrainingReport", "held_out_fvu", "train_rqae"]
