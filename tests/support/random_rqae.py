"""Random RQAEs for the tests."""

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
