"""Checkpoints of unfinished training: written atomically, read with torch's ``weights_only``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from rqae.errors import RqaeError
from rqae.training.config import RqaeTrainingConfig

__all__ = ["resume", "save"]


def _fingerprint(config: RqaeTrainingConfig, data: str) -> str:
    """The settings that must be equal to resume: all options except where and how often to save and to evaluate."""
    left_out = ("checkpoint", "checkpoint_every", "evaluate_every")
    values = {name: value for name, value in asdict(config).items() if name not in left_out}
    return repr([*sorted(values.items()), data])


def save(path: Path, config: RqaeTrainingConfig, data: str, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors needed to resume. ``data``: a digest of the activations."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        torch.save({"config": _fingerprint(config, data), "tensors": dict(tensors)}, partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def resume(path: Path, config: RqaeTrainingConfig, data: str) -> dict[str, Tensor]:
    """Read the tensors that ``save`` wrote. Raises RqaeError for a damaged file or another configuration."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        seen, tensors = saved["config"], saved["tensors"]
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise RqaeError(
            str(path),
            expected="a training checkpoint",
            seen=f"a file that torch cannot load ({type(error).__name__})",
            fix="delete it to start over",
        ) from error
    if seen != _fingerprint(config, data):
        raise RqaeError(
            str(path),
            expected="a checkpoint of this training configuration and these activations",
            seen="another configuration, or other activations",
            fix="delete it to start over, or give another checkpoint path",
        )
    state: dict[str, Tensor] = tensors
    return state
