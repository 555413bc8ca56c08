"""What the processor of this machine computes fast. Reads what torch reports of it; writes nothing."""

from __future__ import annotations

__all__ = ["emulates_bfloat16"]


def emulates_bfloat16() -> bool:
    """Whether matrix products in bfloat16 are slower than in float32 on this CPU.

    torch's kernels for bfloat16 need AVX-512. On an x86 processor without it a forward pass of a language model in
    bfloat16 takes about eight times as long as in float32, or more.
    """
    import torch

    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("architecture") == "x86_64" and not capabilities.get("avx512_bw", False)
