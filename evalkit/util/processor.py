"""Which dtypes this machine's processor computes fast, according to torch. Writes nothing."""

from __future__ import annotations

__all__ = ["emulates_bfloat16"]


def emulates_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are slower than in float32 on this CPU.

    torch's kernels for bfloat16 need AVX-512. On an x86 processor without it, a forward pass of a language model takes at
    least about eight times as long in bfloat16 as in float32.
    """
    import torch

    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("architecture") == "x86_64" and not capabilities.get("avx512_bw", False)
