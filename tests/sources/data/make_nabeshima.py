"""Makes tests/sources/data/nabeshima: a tiny Matryoshka SAE after some steps of its own training, with its activations.

Run as ``python tests/sources/data/make_nabeshima.py FOLDER COMMIT``, FOLDER being a checkout of
https://github.com/noanabeshima/matryoshka-saes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "nabeshima"
D, N, SUBSET = 12, 32, [3, 4, 20]

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    from sae import MatryoshkaSAE

    torch.manual_seed(0)
    np.random.seed(0)
    HERE.mkdir(exist_ok=True)
    for name, permuted in (("layers.2", True), ("layers.3", False)):
        sae = MatryoshkaSAE(D, N, n_prefixes=4, target_l0=6, n_steps=400, permute_latents=permuted)
        for _ in range(400):
            sae.step(torch.randn(64, D) * 3 + 1)
        state = {key: value.detach().contiguous() for key, value in sae.state_dict().items()}
        if permuted:
            torch.save(state, HERE / f"{name}.pt")
        else:
            save_file(state, HERE / f"{name}.safetensors")
        x = torch.randn(9, D) * 3 + 1
        found = {"x": x, "activations": sae.get_acts(x), "subset": sae.get_acts(x, SUBSET)}
        np.savez(HERE / f"{name}.expected.npz", **{key: value.numpy() for key, value in found.items()})
    made_by = {"matryoshka-saes": sys.argv[2], "torch": torch.__version__}
    (HERE / "made_by.json").write_text(json.dumps(made_by, indent=1) + "\n")
