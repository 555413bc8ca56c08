"""Makes tests/sources/data/saelens with sae-lens itself: random dictionaries, and what the library says they do.

    pip install sae-lens==6.54 && python tests/sources/data/make_saelens.py [folder]

One folder a dictionary, as the library saves it; ``expected.npz`` holds the input ``x`` (4, 12), and for each folder the
library's activations and reconstruction. Two configs are rewritten in the layout of versions before 6, which the library
still opens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sae_lens
import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

D, N, D_OUT, K, ROWS = 12, 32, 16, 5, 4
FACTOR = 0.37


def metadata(**more: Any) -> SAEMetadata:
    known = {"model_name": "google/gemma-2-2b", "hook_name": "blocks.12.hook_resid_post"}
    return SAEMetadata(**{**known, "model_from_pretrained_kwargs": {"center_writing_weights": False}, **more})


def filled(sae: Any, generator: torch.Generator) -> Any:
    """Every parameter random: biases, thresholds and gates that matter, decoder rows of lengths from 0.3 to 2."""
    for name, value in {**dict(sae.named_parameters()), **dict(sae.named_buffers())}.items():
        if name == "topk_threshold":
            value.data.fill_(1.4)
            continue
        random = torch.randn(value.shape, generator=generator)
        if name == "W_dec":
            lengths = 0.3 + 1.7 * torch.rand(len(random), 1, generator=generator)
            random = random / random.norm(dim=1, keepdim=True) * lengths
        elif name == "threshold":
            random = 2 * random.abs()
        elif name in ("W_enc", "r_mag"):
            random = random * 0.5
        elif name == "W_skip":
            random = random * 0.3
        value.data.copy_(random)
    return sae


def library(folder: Path) -> Any:
    return SAE.load_from_disk(folder)


def main(root: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, D, generator=generator) * 1.5 + 0.8  # neither centred nor of one length
    expected = {"x": x.numpy()}

    def keep(name: str, prepare: Callable[[Any], Any] = lambda sae: sae, given: torch.Tensor = x) -> None:
        sae = prepare(library(root / name)).eval()
        with torch.no_grad():
            expected[f"{name}.activations"] = sae.encode(given).reshape(ROWS, -1).numpy()
            expected[f"{name}.reconstruction"] = sae(given).reshape(ROWS, -1).numpy()

    def save(name: str, made: Any, config: Any, **more: Any) -> None:
        filled(made(config(d_in=D, d_sae=N, **{"metadata": metadata(), **more})), generator).save_model(root / name)

    lens, out = sae_lens, metadata(hook_name="blocks.12.mlp.hook_in", hook_name_out="blocks.12.hook_mlp_out")
    plain = {"apply_b_dec_to_input": False}
    crossing = {**plain, "d_out": D_OUT, "metadata": out}
    z = metadata(hook_name="blocks.3.attn.hook_z")
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "standard": (lens.StandardSAE, lens.StandardSAEConfig, {}),
        "standard_unshifted": (lens.StandardSAE, lens.StandardSAEConfig, plain),
        "standard_layer_norm": (lens.StandardSAE, lens.StandardSAEConfig, {"normalize_activations": "layer_norm"}),
        "gated": (lens.GatedSAE, lens.GatedSAEConfig, {}),
        "topk": (lens.TopKSAE, lens.TopKSAEConfig, {"k": K}),
        "topk_rescaled": (lens.TopKSAE, lens.TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": (lens.JumpReLUSAE, lens.JumpReLUSAEConfig, {}),
        "jumprelu_constant_norm": (
            lens.JumpReLUSAE,
            lens.JumpReLUSAEConfig,
            {**plain, "normalize_activations": "constant_norm_rescale"},
        ),
        "transcoder": (lens.Transcoder, lens.TranscoderConfig, crossing),
        "transcoder_layer_norm": (
            lens.Transcoder,
            lens.TranscoderConfig,
            {**crossing, "normalize_activations": "layer_norm"},
        ),
        "skip_transcoder": (lens.SkipTranscoder, lens.SkipTranscoderConfig, crossing),
        "jumprelu_transcoder": (lens.JumpReLUTranscoder, lens.JumpReLUTranscoderConfig, crossing),
        "jumprelu_skip_transcoder": (lens.JumpReLUSkipTranscoder, lens.JumpReLUSkipTranscoderConfig, crossing),
    }
    for name, (made, config, more) in cases.items():
        save(name, made, config, **more)
        keep(name)
    save("hook_z", lens.StandardSAE, lens.StandardSAEConfig, metadata=z, reshape_activations="hook_z")
    keep("hook_z", given=x.reshape(ROWS, 3, D // 3))

    batch = {"batchtopk": (lens.BatchTopKTrainingSAE, lens.BatchTopKTrainingSAEConfig)}
    batch["matryoshka"] = (lens.MatryoshkaBatchTopKTrainingSAE, lens.MatryoshkaBatchTopKTrainingSAEConfig)
    for name, (made, config) in batch.items():
        more = {"matryoshka_widths": [8, N]} if name == "matryoshka" else {}
        training = made(config(d_in=D, d_sae=N, k=K, rescale_acts_by_decoder_norm=True, metadata=metadata(), **more))
        filled(training, generator)
        if name == "batchtopk":
            training.save_model(root / "batchtopk_checkpoint")
        training.save_inference_model(root / name)
        keep(name)
    for what in ("activations", "reconstruction"):  # a checkpoint means what is made of it for inference
        expected[f"batchtopk_checkpoint.{what}"] = expected[f"batchtopk.{what}"]

    save(
        "scaled_checkpoint", lens.StandardSAE, lens.StandardSAEConfig, normalize_activations="expected_average_only_in"
    )
    (root / "scaled_checkpoint" / "activation_scaler.json").write_text(json.dumps({"scaling_factor": FACTOR}))

    def folded(sae: Any) -> Any:
        sae.fold_activation_norm_scaling_factor(FACTOR)
        return sae

    keep("scaled_checkpoint", folded)

    common = {"d_in": D, "d_sae": N, "dtype": "torch.float32", "device": "cpu", "use_ghost_grads": False}
    save("old_gpt2", lens.StandardSAE, lens.StandardSAEConfig)
    hook = {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8}
    old = {**common, **hook, "hook_point_head_index": None, "expansion_factor": 32, "l1_coefficient": 8e-05}
    (root / "old_gpt2" / "cfg.json").write_text(json.dumps(old))
    rates = torch.rand(N, generator=generator) * 0.1
    rates[:3] = 0
    save_file({"sparsity": torch.log10(rates + 1e-10)}, root / "old_gpt2" / "sparsity.safetensors")
    keep("old_gpt2", given=x - x.mean(dim=1, keepdim=True))

    save("old_topk", lens.TopKSAE, lens.TopKSAEConfig, k=K)
    old = {**common, "architecture": "standard", "model_name": "meta-llama/Meta-Llama-3-8B-Instruct"}
    old |= {"hook_name": "blocks.25.hook_resid_post", "hook_layer": 25, "hook_head_index": None}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": True}
    old |= {"normalize_activations": "none", "finetuning_scaling_factor": False, "prepend_bos": True}
    (root / "old_topk" / "cfg.json").write_text(json.dumps(old))
    keep("old_topk")

    np.savez(root / "expected.npz", **expected)
    made_by = {"sae_lens": sae_lens.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    (root / "made_by.json").write_text(json.dumps(made_by, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "saelens")
