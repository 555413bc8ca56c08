"""Makes tests/sources/data/sparsify: tiny sparse coders that eai-sparsify wrote, with its own activations and output.

Run where eai-sparsify is installed: ``python tests/sources/data/make_sparsify.py``. Folders are those of a training run.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from sparsify import SparseCoder, SparseCoderConfig
from sparsify.__main__ import RunConfig

HERE = Path(__file__).parent / "sparsify"
D, TOKENS = 12, 9
CASES: dict[str, tuple[str, dict[str, object], torch.dtype]] = {
    "topk/layers.3": ("topk", {"k": 4, "num_latents": 0, "expansion_factor": 4}, torch.float32),
    "groupmax/h.1.attn": ("groupmax", {"k": 8, "num_latents": 32}, torch.float32),
    "transcoder/layers.5.mlp": ("topk", {"k": 3, "num_latents": 32, "transcode": True}, torch.float32),
    "skip/layers.5.mlp": (
        "topk",
        {"k": 3, "num_latents": 32, "transcode": True, "skip_connection": True},
        torch.float32,
    ),
    "half/embed_tokens": ("topk", {"k": 5, "num_latents": 32}, torch.bfloat16),
    "seeds/layers.0/seed0": ("topk", {"k": 2, "num_latents": 32}, torch.float32),
    "seeds/layers.0/seed1": ("topk", {"k": 2, "num_latents": 32}, torch.float32),
    "seeds/best/layers.0/layers.0/seed1": ("topk", {"k": 2, "num_latents": 32}, torch.float32),
}


def make(place: str, activation: str, settings: dict[str, object], dtype: torch.dtype) -> None:
    """One sparse coder of random weights, none of them zero or of unit length."""
    config = SparseCoderConfig(activation=activation, **settings)
    coder = SparseCoder(D, config, dtype=dtype)
    for name, value in coder.named_parameters():
        value.data = torch.randn(value.shape).mul(0.3 if name.startswith("b_") else 0.5).to(dtype)
    coder.save_to_disk(HERE / place)
    hook = next(part for part in Path(place).parts[1:] if part != "best")
    run = RunConfig(coder.cfg, model="HuggingFaceTB/SmolLM2-135M", hookpoints=[hook])
    run.save_json(HERE / Path(place).parts[0] / "config.json")
    loaded = SparseCoder.load_from_disk(HERE / place).float()
    x = torch.randn(TOKENS, D)
    with torch.no_grad():
        top = loaded.encode(x)
        active = torch.zeros(TOKENS, loaded.num_latents).scatter_(-1, top.top_indices, top.top_acts)
        found = loaded(x)
    np.savez(
        HERE / place / "expected.npz",
        x=x.numpy(),
        activations=active.numpy(),
        reconstruction=found.sae_out.numpy(),
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    for case, (activation, settings, dtype) in CASES.items():
        make(case, activation, settings, dtype)
    made_by = {"eai-sparsify": version("eai-sparsify"), "torch": torch.__version__}
    (HERE / "made_by.json").write_text(json.dumps(made_by, indent=1) + "\n")
