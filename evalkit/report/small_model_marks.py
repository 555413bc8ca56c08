"""Marks results from language models that are too small to judge: such results only show that the pipeline works.

Takes the size from the model's name. A 135M model was seen to answer at chance whatever the description said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["labelled", "notes"]

_LEAST = 1e9  # minimum number of parameters for results without a mark
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", re.IGNORECASE)
_MARK = " (plumbing)"
_NO_LANGUAGE_MODEL = frozenset({"embedding"})  # parts that use another kind of model, for which a small size is normal


def labelled(name: str) -> str:
    """The name of an explainer or judge for tables and plots, marked if its model is too small."""
    return name + _MARK if _too_small(name) and not name.endswith(_MARK) else name


def notes(names: Iterable[str]) -> list[str]:
    """One footer line for each model that is too small."""
    models = sorted({name.removesuffix(_MARK).partition("@")[2] for name in names if _too_small(name)})
    return [
        f"{model}: plumbing only. A model this small explains badly and judges at chance; its rows show that the "
        "pipeline works, but nothing about the features."
        for model in models
    ]


def _too_small(name: str) -> bool:
    part, _, model = name.partition("@")
    if part.partition(":")[0] in _NO_LANGUAGE_MODEL:
        return False
    model = model.split(";")[0]
    sizes = [float(number) * (1e6 if unit.lower() == "m" else 1e9) for number, unit in _SIZE.findall(model)]
    return bool(sizes) and max(sizes) < _LEAST  # the largest, because "1m" in "7b-1m" is the context length
