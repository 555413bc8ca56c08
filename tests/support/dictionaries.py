"""Little random dictionaries on disk, for tests of the whole pipeline. They fit nothing: runs of them need --force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


def write_sae(folder: Path, d_model: int, width: int, l0: int, *, seed: int = 0, bias: float = -0.05) -> Path:
    """A random SAE in Gemma Scope's layout: ``layer_3/width_W/average_l0_L/params.npz`` under ``folder``."""
    generator = np.random.default_rng(seed)
    encoder = generator.normal(size=(d_model, width)).astype(np.float32)
    encoder /= np.linalg.norm(encoder, axis=0)
    target = folder / "layer_3" / f"width_{width}" / f"average_l0_{l0}"
    target.mkdir(parents=True, exist_ok=True)
    np.savez(
        target / "params.npz",
        W_enc=encoder,
        b_enc=np.full(width, bias, dtype=np.float32),
        W_dec=encoder.T.copy(),
        b_dec=np.zeros(d_model, dtype=np.float32),
        threshold=np.zeros(width, dtype=np.float32),
    )
    return target


def write_rqae(folder: Path, d_model: int, n_q: int, *, model: str, site: str, seed: int = 0) -> Path:
    """A random RQAE checkpoint with a card."""
    import json

    from rqae import RQAE
    from rqae.config import RqaeConfig

    generator = torch.Generator().manual_seed(seed)
    w_in = torch.randn(n_q, 4, d_model, generator=generator) / d_model**0.5
    weights = (w_in, torch.zeros(n_q, 4), 0.3 * w_in.transpose(1, 2).contiguous(), torch.zeros(n_q, d_model))
    RQAE(RqaeConfig(d_model, 4, 5, n_q, "round_fsq"), *weights).save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps({"model": model, "site": site}))
    return folder
