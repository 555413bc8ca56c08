"""Compiles inner loops with numba: they run without the global interpreter lock, and are cached on disk.

Compilation changes results by rounding only: products may be fused with sums, but sums keep their order.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

__all__ = ["compiled", "has_compiler"]


def has_compiler() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as machine code, compiled at its first call (seconds) or read from numba's cache."""
    from numba import njit

    options: dict[str, Any] = {
        "nogil": True,
        "boundscheck": False,
        "error_model": "numpy",
        "fastmath": {"contract", "nnan", "ninf", "nsz"},
    }
    try:
        return njit(cache=True, **options)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # no writable cache folder: neither beside the file nor in the user's home
        return njit(**options)(function)  # type: ignore[no-any-return]
