"""Makes tests/sources/data/dictionary_learning: one tiny dictionary of every class, and what it computes.

Run where dictionary-learning is installed: ``python tests/sources/data/make_dictionary_learning.py``. Folders, configs and
weights are those that its own ``trainSAE`` writes; parameters are random.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dictionary_learning.dictionary import AutoEncoderNew
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.utils import load_dictionary

HERE = Path(__file__).parent / "dictionary_learning"
D, N, TOKENS, LAYER = 12, 32, 9, 8
COMMON: dict[str, Any] = {
    "activation_dim": D,
    "dict_size": N,
    "layer": LAYER,
    "lm_name": "EleutherAI/pythia-160m-deduped",
    "submodule_name": f"resid_post_layer_{LAYER}",
    "device": "cpu",
    "steps": 100,
    "warmup_steps": 5,
}
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "Standard/trainer_0": (StandardTrainer, {"sparsity_warmup_steps": 5}),
    "New/trainer_0": (StandardTrainer, {"sparsity_warmup_steps": 5}),
    "Gated/trainer_0": (GatedSAETrainer, {"sparsity_warmup_steps": 5}),
    "JumpRelu/trainer_0": (JumpReluTrainer, {"sparsity_warmup_steps": 5, "target_l0": 20.0}),
    "TopK/trainer_0": (TopKTrainer, {"k": 4}),
    "TopK/trainer_1": (TopKTrainer, {"k": 7}),
    "BatchTopK/trainer_0": (BatchTopKTrainer, {"k": 4}),
    "BatchTopKUnset/trainer_0": (BatchTopKTrainer, {"k": 4}),
    "Matryoshka/trainer_0": (MatryoshkaBatchTopKTrainer, {"k": 4, "group_fractions": [0.25, 0.75]}),
}


def make(place: str, trainer_class: type, settings: dict[str, Any]) -> None:
    """One dictionary of random weights, its decoder rows of many lengths."""
    trainer = trainer_class(**{**COMMON, **settings})
    config, dictionary = dict(trainer.config), trainer.ae
    if place.startswith("New"):
        config, dictionary = config | {"dict_class": "AutoEncoderNew"}, AutoEncoderNew(D, N)
    state = dictionary.state_dict()
    for name, value in state.items():
        if name == "threshold":
            limit = torch.rand(value.shape) + 0.5 if value.ndim else torch.tensor(0.9)
            state[name] = torch.tensor(-1.0) if place.startswith("BatchTopKUnset") else limit
        elif value.is_floating_point():
            state[name] = torch.randn(value.shape) * (0.5 if value.ndim == 2 else 0.3)
    name, trainer_folder = place.split("/")
    folder = HERE / name / f"resid_post_layer_{LAYER}" / trainer_folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    buffer = {"d_submodule": D, "io": "out", "n_ctxs": 30, "ctx_len": 128, "device": "cpu"}
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": buffer}, indent=1) + "\n")
    if config["dict_class"] == "AutoEncoder":  # load_dictionary would make its decoder rows unit vectors
        loaded = type(dictionary).from_pretrained(folder / "ae.pt", normalize_decoder=False)
    else:
        loaded, _ = load_dictionary(str(folder), "cpu")
    x = torch.randn(TOKENS, D)
    with torch.no_grad():
        activations = loaded.encode(x)
        reconstruction = loaded.decode(activations)
    found = {"x": x, "activations": activations, "reconstruction": reconstruction}
    np.savez(folder / "expected.npz", **{name: value.numpy() for name, value in found.items()})


if __name__ == "__main__":
    torch.manual_seed(0)
    for case, (trainer_class, settings) in CASES.items():
        make(case, trainer_class, settings)
    made_by = {"dictionary-learning": version("dictionary-learning"), "torch": torch.__version__}
    (HERE / "made_by.json").write_text(json.dumps(made_by, indent=1) + "\n")
