"""Matrix products in float32 with the fastest available library, which on a CPU is not always torch's default.

torch multiplies float32 matrices with MKL. On an AMD processor with AVX-512, MKL was measured at half the speed of oneDNN,
which torch also ships. Both compute in true float32 and differ by rounding. The choice depends on the machine only, not on
timings or shapes, so equal inputs give bit-equal results. With two or more columns, oneDNN sums every column in the same
order whatever the other columns are; MKL does so for large products only.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["added_product", "has_wide_products", "product"]


def product(left: Tensor, right: Tensor) -> Tensor:
    """left (M, K) times right (K, N) → (M, N), on one device. Fastest if ``right`` or its transpose is contiguous."""
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
    """Whether torch has oneDNN's products and the processor has AVX-512, with which they are faster than MKL's."""
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
