"""A small dictionary in the layout of Gemma Scope 2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

D, N = 8, 64


def tensors() -> dict[str, np.ndarray]:
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "threshold": (N,)}
    return {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def write_gemma_scope_2(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file({name.lower(): value for name, value in tensors().items()}, folder / "params.safetensors")
    config = {"model_name": "google/gemma-3-1b-pt", "hf_hook_point_in": "model.layers.3.output", "l0": 9}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
