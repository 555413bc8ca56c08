"""Residual quantization autoencoders: model, exact fast encoding, feature intensity, training. Torch only."""

from rqae.config import RqaeConfig
from rqae.errors import RqaeError
from rqae.model import RQAE

__all__ = ["RQAE", "RqaeConfig", "RqaeError"]
