"""Training an RQAE."""

from __future__ import annotations

from rqae.training.loop import RqaeTrainingConfig, TrainingReport, held_out_fvu, train_rqae

__all__ = ["RqaeTrainingConfig", "TrainingReport", "held_out_fvu", "train_rqae"]
