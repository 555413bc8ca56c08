"""Residual quantization autoencoders: the model, exact encoding, features, search and training.

Needs torch; numba makes it faster. Imports nothing of evalkit.
"""

from rqae.config import RqaeConfig
from rqae.errors import RqaeError
from rqae.feature_sets import FeatureSet
from rqae.features import intensity, layer_weights, random_codes, scaled_vectors
from rqae.model import RQAE
from rqae.searching.code_store import CodeStore
from rqae.searching.scan import Hits, activity_thresholds, search
from rqae.splits import SplitTree, m_split, parting_depth, similarity_by_depth
from rqae.training.config import RqaeTrainingConfig
from rqae.training.loop import TrainingReport, held_out_fvu, train_rqae
from rqae.vmf import VmfFeatures, fit_vmf, relevance

__all__ = [
    "RQAE",
    "CodeStore",
    "FeatureSet",
    "Hits",
    "RqaeConfig",
    "RqaeError",
    "RqaeTrainingConfig",
    "SplitTree",
    "TrainingReport",
    "VmfFeatures",
    "activity_thresholds",
    "fit_vmf",
    "held_out_fvu",
    "intensity",
    "layer_weights",
    "m_split",
    "parting_depth",
    "random_codes",
    "relevance",
    "scaled_vectors",
    "search",
    "similarity_by_depth",
    "train_rqae",
]
