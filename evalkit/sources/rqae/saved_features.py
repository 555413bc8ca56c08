"""Keeps the features of an RQAE source on disk: ids, codes and thresholds in one safetensors file.

Knows nothing of models or text. Nothing is unpickled.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from evalkit.errors import BadFile, MissingFile
from evalkit.sources.rqae.source import RqaeSource
from evalkit.util.atomic_files import write_bytes

__all__ = ["load_features", "save_features"]


def save_features(source: RqaeSource, path: Path) -> None:
    """Write the source's features and, where they are set, thresholds. Raises StorageError."""
    codes = torch.empty(0, source.depth) if source.codes is None else source.codes
    thresholds = torch.tensor([source.thresholds.get(name, torch.nan) for name in source.ids], dtype=torch.float64)
    tensors = {"codes": codes.to(torch.uint16).contiguous(), "thresholds": thresholds}
    write_bytes(path, save(tensors, metadata={"ids": json.dumps(source.ids)}))


def load_features(source: RqaeSource, path: Path) -> RqaeSource:
    """A copy of ``source`` with the features at ``path``, which may be deeper. Raises MissingFile, BadFile, BadShape."""
    try:
        with safe_open(path, framework="pt") as stored:
            ids = json.loads((stored.metadata() or {})["ids"])
            codes, thresholds = stored.get_tensor("codes"), stored.get_tensor("thresholds")
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise ValueError("ids that are no list of strings")
        if codes.dtype != torch.uint16 or thresholds.shape != (len(ids),):
            raise ValueError("tensors of another type or length")
    except FileNotFoundError as error:
        raise MissingFile(
            str(path), expected="features of an RQAE", seen="no such file", fix="check the path"
        ) from error
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise BadFile(
            str(path), expected="features saved by save_features", seen=str(error)[:200], fix="save them again"
        ) from error
    loaded = source.with_features(ids, codes.long())
    known = {name: value for name, value in zip(ids, thresholds.tolist(), strict=True) if value == value}
    same_depth = codes.shape[1] == source.depth  # a threshold belongs to one depth
    return loaded.with_thresholds(known) if same_depth else loaded
