"""Estimates how long the subject model takes to read a corpus, from its shape and a probe of this machine.

Accurate to a factor of two. Loads no model.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

__all__ = ["forward_rate"]

_PROBE_S = 0.2
_ROWS = 1024
_EFFICIENCY = 0.5  # share of the probe's rate that a forward pass reaches; measured at width 576 on two cores


def forward_rate(folder: Path, layers: int | None, *, dtype: str, device: str) -> float | None:
    """Tokens per second through the first ``layers`` blocks (None: all); None if the model's shape is unknown."""
    try:
        shape: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        width, inner = int(shape["hidden_size"]), int(shape["intermediate_size"])
        blocks = layers if layers is not None else int(shape["num_hidden_layers"])
        heads = int(shape["num_attention_heads"])
        head = int(shape.get("head_dim") or width // heads)
        keys = int(shape.get("num_key_value_heads") or heads)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    weights = blocks * (2 * width * head * (heads + keys) + 3 * width * inner)
    return _EFFICIENCY * _flops(width, inner, dtype, device) / (2 * weights)


def _flops(width: int, inner: int, dtype: str, device: str) -> float:
    """Floating-point operations per second of a matrix product of this shape on this machine."""
    import torch

    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    kind = getattr(torch, dtype)
    left = torch.ones(_ROWS, width, dtype=kind, device=where)
    right = torch.ones(width, inner, dtype=kind, device=where)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < _PROBE_S:
        result = left @ right
        if where != "cpu":
            torch.cuda.synchronize()
        done += 1
    del result
    return 2.0 * _ROWS * width * inner * done / (time.perf_counter() - started)
