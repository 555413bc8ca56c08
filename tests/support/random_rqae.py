"""RQAEs with random weights or with identity layers, and an independent encoding of them in float64."""

import numpy as np
import torch

from rqae import RQAE, RqaeConfig


def random_rqae(config: RqaeConfig, seed: int = 0) -> RQAE:
    """Weights in the proportions of a trained one: the first quantizers matter most."""
    g = torch.Generator().manual_seed(seed)
    n, c, d = config.num_quantizers, config.codebook_dim, config.dim
    fade = torch.linspace(1, 0.1, n)[:, None, None]
    codebook = None if config.is_grid else torch.randn(n, config.num_codes, c, generator=g)
    return RQAE(
        config,
        torch.randn(n, c, d, generator=g) / d**0.5,
        torch.randn(n, c, generator=g) * 0.1,
        torch.randn(n, d, c, generator=g) / d**0.5 * fade,
        torch.randn(n, d, generator=g) * 0.01,
        codebook,
    )


def identity_rqae(levels: int = 5, width: int = 4) -> RQAE:
    """One quantizer that reads and writes its codebook vector unchanged."""
    eye = torch.eye(width)[None]
    return RQAE(RqaeConfig(width, width, levels, 1), eye, torch.zeros(1, width), eye, torch.zeros(1, width))


def in_float64(model: RQAE, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes from the definition, one token at a time in float64, and the margin of each choice."""
    codes = np.zeros((len(x), model.config.num_quantizers), dtype=np.int64)
    margins = np.zeros(codes.shape)
    layers = [t.double().numpy() for t in (model.w_in, model.b_in, model.w_out, model.b_out, model.codebook)]
    canonical = model.canonical.numpy()
    for row, token in enumerate(x.double().numpy()):
        residual = token.copy()
        for i, (w_in, b_in, w_out, b_out, book) in enumerate(zip(*layers, strict=True)):
            p = w_in @ residual + b_in
            scores = book @ (p / np.linalg.norm(p))
            best = canonical[int(scores.argmax())]
            margins[row, i] = scores[best] - scores[canonical != best].max()
            codes[row, i] = best
            residual -= w_out @ book[best] + b_out
    return codes, margins
