"""Initial weights: quantizers fitted to data one after the other, each to the residual of the previous ones; or random.

For each quantizer, the c leading principal directions of the residual, whitened, give W_in; W_in gives the codes; W_out and
b_out are the least-squares map from codes to residual. The residual's covariance is updated in closed form, so a quantizer
costs a few passes over the sample. Even without training, this start is better than long training from a random start.
Reads and writes no files.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rqae.config import RqaeConfig
from rqae.encoding.blocked import quantiser_for
from rqae.encoding.codebook import canonical_indices
from rqae.progress import Progress

__all__ = ["greedy_layers", "random_layers"]

_EXTRA = 8  # extra columns, without which subspace iteration converges slowly
_ROUNDS = 4


def random_layers(config: RqaeConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Random layers as in the original implementation: uniform within ±1/√fan-in."""
    count, width, dim = config.num_quantizers, config.codebook_dim, config.dim

    def uniform(*shape: int, fan_in: int) -> Tensor:
        values: Tensor = (torch.rand(*shape, generator=generator) * 2 - 1) / fan_in**0.5
        return values

    return {
        "w_in": uniform(count, width, dim, fan_in=dim),
        "b_in": uniform(count, width, fan_in=dim),
        "w_out": uniform(count, dim, width, fan_in=width),
        "b_out": uniform(count, dim, fan_in=width),
    }


def _leading(covariance: Tensor, basis: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading eigenvalues (width,), eigenvectors (d, width), and the basis to start the next call from."""
    for _ in range(_ROUNDS):
        basis, _ = torch.linalg.qr(covariance @ basis)
    values, rotation = torch.linalg.eigh(basis.T @ covariance @ basis)
    basis = (basis @ rotation).flip(1)  # descending
    return values.flip(0)[:width], basis[:, :width], basis


def greedy_layers(
    sample: Tensor, config: RqaeConfig, codebook: Tensor, generator: torch.Generator, progress: Progress
) -> dict[str, Tensor]:
    """Layers fitted in sequence to sample (N, d): w_in, b_in, w_out, b_out stacked over quantizers."""
    width, dim = config.codebook_dim, config.dim
    quantise = quantiser_for(config, codebook, canonical_indices(config))
    residual = sample.clone()
    mean = residual.mean(dim=0)  # zero after the first fit, which has an intercept
    covariance = (residual.T @ residual).double() / len(residual) - torch.outer(mean, mean).double()
    basis = torch.randn(dim, min(dim, width + _EXTRA), generator=generator, dtype=torch.float64)
    layers: dict[str, list[Tensor]] = {"w_in": [], "b_in": [], "w_out": [], "b_out": []}
    task = progress.start("fitting quantizers in sequence", config.num_quantizers, "quantizers")
    floor = float(covariance.diagonal().mean()) * 1e-9 + 1e-30
    for layer in range(config.num_quantizers):
        values, vectors, basis = _leading(covariance, basis, width)
        w_in = (vectors / values.clamp_min(floor).sqrt()).T.float()  # (c, d): p has unit variance
        b_in = -(w_in @ mean)
        codes = codebook[layer][quantise(torch.addmm(b_in, residual, w_in.T), layer)]  # (N, c)
        design = torch.cat([codes, torch.ones(len(codes), 1)], dim=1)  # (N, c + 1)
        gram, moments = (design.T @ design).double(), (design.T @ residual).double()
        gram += 1e-6 * len(sample) * torch.eye(width + 1, dtype=torch.float64)
        solution = torch.linalg.solve(gram, moments)  # (c + 1, d)
        residual.addmm_(design, solution.float(), alpha=-1)
        covariance -= (moments.T @ solution) / len(sample)
        covariance = (covariance + covariance.T) / 2
        if layer == 0:
            covariance += torch.outer(
                mean, mean
            ).double()  # the covariance was about the mean; from now on the residual has mean zero
        mean = torch.zeros_like(mean)
        for name, value in zip(layers, (w_in, b_in, solution[:width].T.float(), solution[width].float()), strict=True):
            layers[name].append(value)
        progress.advance(task)
    progress.finish(task)
    return {name: torch.stack(values) for name, values in layers.items()}
