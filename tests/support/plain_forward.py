"""Log-probabilities by a plain forward of transformers: what the subject model's judge is held to."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np


@cache
def plain(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(folder), model.eval()


def log_probabilities_by_hand(folder: Path, prefix: str, text: str) -> np.ndarray:
    """One plain forward over prefix and text, unpadded and without a cache, in float32; sums in float64."""
    import torch

    tokenizer, model = plain(folder)
    before = tokenizer(prefix)["input_ids"]
    after = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([before + after]), use_cache=False).logits[0].double().numpy()
    rows = logits[len(before) - 1 : -1]
    normalisers = np.log(np.exp(rows - rows.max(axis=1, keepdims=True)).sum(axis=1)) + rows.max(axis=1)
    return np.asarray(rows[np.arange(len(after)), after] - normalisers)
