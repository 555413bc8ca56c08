"""The name of a client: the model's name and every option that changes answers. Recordings and records use it as key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["name_with_options"]


def name_with_options(model: str, temperature: float | None, options: Mapping[str, Any]) -> str:
    """``MODEL;temperature=0.7;key=value``, with the options sorted by key.

    A temperature of 0 is left out; None, the server's own temperature, is written as ``default``.
    """
    told = [] if temperature == 0 else [f"temperature={'default' if temperature is None else format(temperature, 'g')}"]
    values = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in options.items()
    }
    return ";".join([model, *told, *(f"{key}={values[key]}" for key in sorted(values))])
