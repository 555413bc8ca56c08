"""The subject model's final RMS norm: measures its gain and eps, and applies the norm and its inverse.

The gain is computed from the module's output for known vectors instead of being looked up by class name, so Llama-type
norms (gain = weight), Gemma-type norms (1 + weight) and future ones need no list. Knows tensors and one module; reads no
files.

A model whose final norm is not an RMS norm (GPT-2's LayerNorm subtracts the mean and adds a bias) gets a gain of shape
(0,). Only raw hidden states can be used with such a model; normalising them is an error instead of a wrong number.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from evalkit.errors import BadConfig, BadShape

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

    from evalkit.records import SubjectInfo

__all__ = ["denormalise", "measure_norm", "normalise"]

_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f", "ln_out")
_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


def normalise(hidden: Float[Tensor, "*rows d_model"], info: SubjectInfo) -> Float[Tensor, "*rows d_model"]:
    """The subject model's final norm, gain included, in float32: h · rsqrt(mean(h²) + eps) · gain.

    Raises BadConfig for a model without a final RMS norm, BadShape for another width.
    """
    gain, scale = _gain_and_scale(hidden, info)
    return hidden.float() * scale * gain


def denormalise(
    normed: Float[Tensor, "*rows d_model"], hidden: Float[Tensor, "*rows d_model"], info: SubjectInfo
) -> Float[Tensor, "*rows d_model"]:
    """Convert back to the units of ``hidden``: divide by the gain and by the scale that ``normalise`` gives ``hidden``.

    A dimension whose gain is 0 is lost in the norm and becomes 0. Raises the errors of ``normalise``.
    """
    gain, scale = _gain_and_scale(hidden, info)
    inverse = torch.where(gain == 0, torch.zeros_like(gain), 1 / gain)
    return normed.float() * inverse / scale


def _gain_and_scale(hidden: Tensor, info: SubjectInfo) -> tuple[Tensor, Tensor]:
    if not info.norm_gain.size:
        raise BadConfig(
            info.model,
            expected="a model whose final norm is an RMS norm",
            seen="another kind of norm (a LayerNorm, as in GPT-2)",
            fix="use a dictionary that reads raw hidden states",
        )
    if hidden.shape[-1] != info.d_model:
        raise BadShape(
            "hidden states",
            expected=f"a last dimension of {info.d_model}, the width of {info.model}",
            seen=str(tuple(hidden.shape)),
            fix="pass hidden states of this subject model",
        )
    gain = torch.from_numpy(info.norm_gain).to(hidden.device)
    scale = torch.rsqrt(hidden.float().pow(2).mean(-1, keepdim=True) + info.norm_eps)
    return gain, scale


def measure_norm(decoder: nn.Module, d_model: int) -> tuple[NDArray[np.float32], float]:
    """Gain (d_model,) and eps of the decoder's final norm, measured from its outputs for known vectors.

    Gain of shape (0,) and eps 0 if the module does not compute h · rsqrt(mean(h²) + eps) · gain to float32 precision.
    """
    module = next((found for name in _NAMES if (found := getattr(decoder, name, None)) is not None), None)
    none = np.zeros(0, dtype=np.float32)
    if module is None:
        return none, 0.0
    module = copy.deepcopy(module).to("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(2, d_model, generator=generator) * 3 + 1  # with a non-zero mean, to detect a LayerNorm
    probes = probes.sign() * probes.abs().clamp(min=0.1)
    with torch.no_grad():
        eps = _eps(module, probes[0])
        unit = probes.double() * torch.rsqrt(probes.double().pow(2).mean(-1, keepdim=True) + eps)
        answers = _first(module(probes)).double()
    gain = answers[0] / unit[0]
    error = (gain * unit[1] - answers[1]).abs().max() / answers[1].abs().max().clamp(min=1e-30)
    if not torch.isfinite(gain).all() or float(error) > 1e-5:
        return none, 0.0
    return _snap(gain, module), eps


def _snap(gain: Tensor, module: nn.Module) -> NDArray[np.float32]:
    """The stored vector (weight, or 1 + weight) that equals the measured gain up to rounding, else the measured gain."""
    measured = gain.float()
    weight = getattr(module, "weight", None)
    if weight is not None:
        for exact in (weight.detach(), 1 + weight.detach()):
            if exact.shape == measured.shape and torch.allclose(exact, measured, rtol=1e-5, atol=1e-6):
                return np.asarray(exact.numpy(), dtype=np.float32)
    return np.asarray(measured.numpy(), dtype=np.float32)


def _eps(module: nn.Module, probe: Tensor) -> float:
    for name in _EPS_NAMES:
        if isinstance(value := getattr(module, name, None), float):
            return value
    # gain · x · rsqrt(m + eps) at two scales: with r = (answer / x)², r(large) · m(large) = r(small) · (m(small) + eps)
    small = probe * 1e-3
    large = probe * 1e3
    ratio_small = (_first(module(small)).double() / small.double()).pow(2)
    ratio_large = (_first(module(large)).double() / large.double()).pow(2)
    gain_squared = ratio_large * large.double().pow(2).mean()
    return float((gain_squared / ratio_small).median() - small.double().pow(2).mean())


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
