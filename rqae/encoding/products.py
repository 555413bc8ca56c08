"""Matrix products in float32 by the fastest library at hand, which on a CPU is not always the one torch multiplies with.

torch multiplies float32 matrices with MKL, which on an AMD processor with AVX-512 was measured at half the speed of
oneDNN, which comes with torch too. Both compute in float32 proper and differ by rounding. Which one serves is a matter of
the machine only, never of a timing or a shape: equal input, equal bits. And oneDNN sums every column of two and more in one
order, whatever stands beside it; MKL does so for large products only.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["added_product", "has_wide_products", "product"]


def product(left: Tensor, right: Tensor) -> Tensor:
    """left (M, K) times right (K, N) → (M, N), on one device. Quickest where ``right`` or its transpose is contiguous."""
    if has_wide_products() and _serves(left):
        return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")  # type: ignore[no-any-return]
    return left @ right


def added_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base (M, N) plus left (M, K) times right (K, N), as a new tensor; see ``product``."""
    if has_wide_products() and _serves(left):
        return torch.ops.mkldnn._linear_pointwise.binary(left, base, right.T, None, "add")  # type: ignore[no-any-return]
    return torch.addmm(base, left, right)


def _serves(left: Tensor) -> bool:
    return left.device.type == "cpu" and left.dtype == torch.float32 and left.numel() > 0


@cache
def has_wide_products() -> bool:
    """Whether this torch offers oneDNN's products, and the processor has the instructions that make them worth it."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    try:
        one = torch.ones(1, 1)
        torch.ops.mkldnn._linear_pointwise(one, one, None, "none", [], "")
        torch.ops.mkldnn._linear_pointwise.binary(one, one, one, None, "add")
    except (AttributeError, RuntimeError):
        return False
    return True
