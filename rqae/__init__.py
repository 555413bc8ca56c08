"""Residual quantization autoencoders: model, exact fast encoding, feature intensity, training. Torch only."""

from rqae.config import RqaeConfig
from rqae.errors import RqaeError
from rqae.features import intensity, layer_weights, random_codes, scaled_vectors
from rqae.model import RQAE
from rqae.training import RqaeTrainingConfig, TrainingReport, held_out_fvu, train_rqae

__all__ = [
    "RQAE",
    "RqaeConfig",
    "RqaeError",
    "RqaeTrainingConfig",
    "TrainingReport",
    "held_out_fvu",
    "intensity",
    "layer_weights",
    "random_codes",
    "scaled_vectors",
    "train_rqae",
]
