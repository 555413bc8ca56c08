"""What the processor that tests run on is good at."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evalkit.subject.model import Dtype


def quick_dtype() -> Dtype:
    """The dtype that a language model computes in fastest here."""
    from evalkit.util.processor import emulates_bfloat16

    return "float32" if emulates_bfloat16() else "bfloat16"
