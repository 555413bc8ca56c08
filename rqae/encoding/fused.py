"""The inner step of encoding on a CPU, compiled with numba: choose the codes of a block, subtract them inside it.

Holds what the compiled loops (``fused_kernel``) need to know of a codebook. Knows nothing of models; needs numba, which is
optional and imported with the first block.
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
    """Whether this kernel computes the codes of such a codebook on such a device."""
    return SortedGrid.serves(config) and device.type == "cpu" and has_compiler()


class FusedGridBlock:
    """Solves blocks of quantizers of a normalised grid. Safe to call from several threads."""

    size = 16  # quantizers: larger ones leave less to the matrix products, smaller ones call more of them

    def __init__(self, config: RqaeConfig, codebook: Tensor, canonical: Tensor, diagonal: Tensor) -> None:
        self._grid = SortedGrid.of(config, diagonal.device)
        self._canonical = canonical.numpy().astype(np.int32)
        self._book = np.ascontiguousarray(codebook[0].numpy().T)  # (c, K)
        self._diagonal = diagonal.numpy()  # (m, size · c): rows of G, each in its own block

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
