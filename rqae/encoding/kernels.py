"""The inner step of encoding on a GPU, as a fused Triton kernel: choose the codes of a block and subtract them within it.

Each token has one thread, which chooses the codes of 16 quantizers one after the other and subtracts each from the later
ones. Triton is imported on first use, so this module imports without it. With TRITON_INTERPRET=1 set before that import,
Triton's interpreter runs the kernel slowly on a CPU, for tests. Reads and writes no files.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from rqae.config import RqaeConfig
from rqae.encoding.codebook import TIE, SortedGrid

__all__ = ["TritonGridBlock", "is_available"]

_MAX_WIDTH = 8  # the components of p are sorted in registers
_WARPS = 2
_TILE = 32 * _WARPS  # tokens per program: one per thread
_OLDEST_TRITON = (3, 3)  # the first version that supports tuples


def is_available(config: RqaeConfig, device: torch.device) -> bool:
    """Whether this kernel supports the codebook and the device."""
    there = device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return SortedGrid.serves(config) and config.codebook_dim <= _MAX_WIDTH and there and _has_triton()


def _has_triton() -> bool:
    """Whether Triton is installed and new enough; imports it."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= _OLDEST_TRITON


class TritonGridBlock:
    """Solves blocks of quantizers of a normalised grid."""

    size = 16  # quantizers per block

    def __init__(self, config: RqaeConfig, codebook: Tensor, canonical: Tensor, diagonal: Tensor) -> None:
        device = diagonal.device
        self._grid = SortedGrid.of(config, device)
        self._canonical = canonical.to(device, torch.int32)
        self._book = codebook[0].contiguous()  # (K, c)
        self._diagonal = (
            diagonal.contiguous()
        )  # (m, size · c): each row of G, restricted to the columns of its own block

    def solve(self, p: Tensor, codes: Tensor, vectors: Tensor, low: int, high: int) -> None:
        """Fix the codes of quantizers low..high-1; p ((high - low) · c, N), codes (n_q, N) int32, vectors (m, N)."""
        from rqae.encoding.triton_kernels import solve_tile

        tokens, width = p.shape[1], self._book.shape[1]
        programs = -(-tokens // _TILE)
        with _device_of(p):
            solve_tile[(programs,)](
                p,
                codes,
                vectors,
                self._diagonal,
                self._grid.patterns,
                self._grid.steps,
                self._grid.places,
                self._canonical,
                self._book,
                low,
                high,
                tokens,
                p.stride(0),
                codes.stride(0),
                vectors.stride(0),
                self._diagonal.stride(0),
                len(self._grid.patterns),
                len(self._book),
                self._grid.centre,
                TIE,
                C=width,
                TILE=_TILE,
                num_warps=_WARPS,
            )


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which the tensor's GPU is the current device, where Triton launches; does nothing on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
