"""Checkpoints in the published layout: ``config.json`` and ``model.safetensors`` in one folder, nothing else.

Tensors: ``codebook [n_q, K, c]``, ``codebook_counts [n_q, K]``, and for each quantizer ``layers.{i}.0.weight [c, d]``,
``layers.{i}.0.bias [c]``, ``layers.{i}.1.weight [d, c]``, ``layers.{i}.1.bias [d]``. Every shape is checked from the file's
header before any tensor is read. Safetensors only: nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rqae.config import RqaeConfig
from rqae.errors import RqaeError

__all__ = ["CONFIG_FILE", "STACKED", "WEIGHTS_FILE", "read_checkpoint", "read_config", "write_checkpoint"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
STACKED = {"w_in": "0.weight", "b_in": "0.bias", "w_out": "1.weight", "b_out": "1.bias"}
_FLOATS = ("F16", "BF16", "F32", "F64")
_DOWNLOAD = "download the checkpoint again, or save it with RQAE.save_pretrained"


def read_config(folder: Path) -> RqaeConfig:
    """Read the config of a checkpoint folder. Ignores unknown keys, like the original implementation. Raises RqaeError."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise RqaeError(
            str(path),
            expected=f"a folder with {CONFIG_FILE} and {WEIGHTS_FILE}",
            seen="no such file",
            fix="check the path",
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RqaeError(str(path), expected="a JSON object", seen="invalid JSON", fix=_DOWNLOAD) from error
    names = [field.name for field in fields(RqaeConfig)]
    if not isinstance(values, dict) or (missing := [name for name in names if name not in values]):
        seen = f"no {', '.join(missing)}" if isinstance(values, dict) else type(values).__name__
        raise RqaeError(str(path), expected=f"an object with {', '.join(names)}", seen=seen, fix=_DOWNLOAD)
    return RqaeConfig(**{name: values[name] for name in names})


def expected_shapes(config: RqaeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of every tensor in a checkpoint."""
    count, width, dim = config.num_quantizers, config.codebook_dim, config.dim
    yield "codebook", (count, config.num_codes, width)
    yield "codebook_counts", (count, config.num_codes)
    shapes = {"w_in": (width, dim), "b_in": (width,), "w_out": (dim, width), "b_out": (dim,)}
    for layer in range(count):
        for name, suffix in STACKED.items():
            yield f"layers.{layer}.{suffix}", shapes[name]


def _check(path: Path, file: Any, config: RqaeConfig) -> None:
    present = set(file.keys())
    for name, shape in expected_shapes(config):
        if name not in present:
            raise RqaeError(
                f"{path}: tensor {name!r}", expected=f"shape {list(shape)}", seen="no such tensor", fix=_DOWNLOAD
            )
        entry = file.get_slice(name)
        seen, dtype = list(entry.get_shape()), entry.get_dtype()
        if seen != list(shape):
            raise RqaeError(
                f"{path}: tensor {name!r}",
                expected=f"shape {list(shape)}",
                seen=f"shape {seen}",
                fix=f"use {CONFIG_FILE} and {WEIGHTS_FILE} from the same checkpoint",
            )
        if dtype not in _FLOATS:
            raise RqaeError(
                f"{path}: tensor {name!r}", expected=f"dtype {', '.join(_FLOATS)}", seen=f"dtype {dtype}", fix=_DOWNLOAD
            )
        present.remove(name)
    if present:
        raise RqaeError(
            f"{path}: tensor {min(present)!r}",
            expected=f"only the tensors of {config.num_quantizers} quantizers",
            seen=f"{len(present)} more",
            fix=f"correct num_quantizers in {CONFIG_FILE} to match the weights",
        )


def _read(file: Any, path: Path, name: str) -> Tensor:
    tensor: Tensor = file.get_tensor(name).to(torch.float32)
    if not bool(tensor.isfinite().all()):
        raise RqaeError(f"{path}: tensor {name!r}", expected="finite numbers", seen="NaN or infinity", fix=_DOWNLOAD)
    return tensor


def read_checkpoint(folder: Path) -> tuple[RqaeConfig, dict[str, Tensor]]:
    """Read the config and the tensors: codebook, codebook_counts and, stacked over quantizers, w_in, b_in, w_out, b_out.

    Tensors are float32. Raises RqaeError naming the file and the tensor if one is missing, not finite, or of another shape.
    """
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise RqaeError(str(path), expected="a safetensors file", seen="no such file", fix=_DOWNLOAD)
    try:
        with safe_open(path, framework="pt") as file:
            _check(path, file, config)
            tensors = {name: _read(file, path, name) for name in ("codebook", "codebook_counts")}
            for name, suffix in STACKED.items():
                names = [f"layers.{layer}.{suffix}" for layer in range(config.num_quantizers)]
                tensors[name] = torch.stack([_read(file, path, each) for each in names])
    except (SafetensorError, OSError) as error:
        raise RqaeError(str(path), expected="a safetensors file", seen=str(error)[:160], fix=_DOWNLOAD) from error
    return config, tensors


def write_checkpoint(folder: Path, config: RqaeConfig, tensors: dict[str, Tensor], dtype: torch.dtype | None) -> None:
    """Write the folder, each file atomically. ``dtype``: of every tensor; None: float32."""
    dtype = dtype or torch.float32
    flat = {name: tensors[name].to(dtype) for name in ("codebook", "codebook_counts")}
    for name, suffix in STACKED.items():
        flat |= {f"layers.{layer}.{suffix}": row.to(dtype) for layer, row in enumerate(tensors[name])}
    for name, tensor in flat.items():
        if not bool(tensor.isfinite().all()):
            raise RqaeError(
                f"tensor {name!r}", expected=f"finite numbers in {dtype}", seen="NaN or infinity", fix="save as float32"
            )
    folder.mkdir(parents=True, exist_ok=True)
    weights, settings = folder / f".{WEIGHTS_FILE}.partial", folder / f".{CONFIG_FILE}.partial"
    try:
        save_file(
            {name: tensor.contiguous().cpu() for name, tensor in flat.items()}, weights, metadata={"format": "pt"}
        )
        weights.chmod(0o644)  # safetensors creates files that only the owner can read
        settings.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        weights.replace(folder / WEIGHTS_FILE)
        settings.replace(folder / CONFIG_FILE)
    finally:
        weights.unlink(missing_ok=True)
        settings.unlink(missing_ok=True)
