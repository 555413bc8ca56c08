"""Marks results that rest on a language model too small to judge: they show that everything is connected, nothing else.

Goes by the size in a model's name. A 135M model was seen to answer at chance, whatever the description.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["labelled", "notes"]

_LEAST = 1e9  # parameters
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])", re.IGNORECASE)
_MARK = " (plumbing)"
_NO_LANGUAGE_MODEL = frozenset({"embedding"})  # parts whose model is of another kind, and small by nature


def labelled(name: str) -> str:
    """The name of an explainer or judge as tables and plots show it: with a mark if its model is too small."""
    return name + _MARK if _too_small(name) and not name.endswith(_MARK) else name


def notes(names: Iterable[str]) -> list[str]:
    """A footer line per model that is too small."""
    models = sorted({name.removesuffix(_MARK).partition("@")[2] for name in names if _too_small(name)})
    return [
        f"{model}: plumbing only. A model of so few parameters explains badly and judges at chance; its rows say that the "
        "pipeline works, and nothing about the features."
        for model in models
    ]


def _too_small(name: str) -> bool:
    part, _, model = name.partition("@")
    if part.partition(":")[0] in _NO_LANGUAGE_MODEL:
        return False
    model = model.split(";")[0]
    sizes = [float(number) * (1e6 if unit.lower() == "m" else 1e9) for number, unit in _SIZE.findall(model)]
    return bool(sizes) and max(sizes) < _LEAST  # "7b-1m" reads a million tokens
