"""The inner step of encoding on a CPU, compiled with numba: choose the codes of a block and subtract them within it.

Prepares the tables of a codebook for the compiled loops in ``fused_kernel``. Needs numba, which is optional and imported
when the first block is solved.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rqae.config import RqaeConfig
from rqae.encoding.codebook import TIE, SortedGrid
from rqae.encoding.compiled import has_compiler

__all__ = ["FusedGridBlock", "is_available"]


def is_available(config: RqaeConfig, device: torch.device) -> bool:
    """Whether this kernel supports the codebook and the device."""
    return SortedGrid.serves(config) and device.type == "cpu" and has_compiler()


class FusedGridBlock:
    """Solves blocks of quantizers of a normalised grid. Safe to call from several threads."""

    # Quantizers per block: larger blocks move work out of the fast matrix products, smaller ones need more of them.
    size = 16

    def __init__(self, config: RqaeConfig, codebook: Tensor, canonical: Tensor, diagonal: Tensor) -> None:
        self._grid = SortedGrid.of(config, diagonal.device)
        self._canonical = canonical.numpy().astype(np.int32)
        self._book = np.ascontiguousarray(codebook[0].numpy().T)  # (c, K)
        self._diagonal = diagonal.numpy()  # (m, size · c): each row of G, restricted to the columns of its own block

    def solve(self, p: Tensor, codes: Tensor, vectors: Tensor, low: int, high: int) -> None:
        """Fix the codes of quantizers low..high-1; p ((high - low) · c, N), codes (n_q, N) int32, vectors (m, N)."""
        from rqae.encoding.fused_kernel import solve_block

        solve_block(
            p.numpy(),
            codes.numpy(),
            vectors.numpy(),
            low,
            high,
            self._diagonal,
            self._grid.patterns.numpy(),
            self._grid.steps.numpy(),
            self._grid.places.numpy(),
            np.float32(self._grid.centre),
            self._canonical,
            self._book,
            np.float32(TIE),
        )
