"""Reads SAEs and transcoders as sae-lens saves them: ``cfg.json`` and ``sae_weights.safetensors`` in one folder.

Supports every inference architecture of sae-lens 6 with non-negative activations, training checkpoints, and the configs of
older versions. Matrices stay on disk. Optional files in the same folder: ``sparsity.safetensors`` (log10 of firing rates),
``activation_scaler.json`` (in training checkpoints) and ``card.json``. ``describe_source`` interprets the config; it also
serves ``saelens_registry``, where the library has loaded the files. Writes nothing.
Source: sae-lens 6.54 (``saes/*.py``, ``loading/pretrained_sae_loaders.py``), https://github.com/decoderesearch/SAELens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evalkit.corpus.bos import PREPEND_BOS
from evalkit.errors import BadConfig, BadFile
from evalkit.sources.formats.common import (
    COMMON,
    FolderReader,
    bad_key,
    is_number,
    matrix,
    positive,
    read_card,
    read_json,
    site_from,
    vector,
)
from evalkit.sources.formats.saelens_transforms import (
    SCALER,
    SKIPPING,
    TRANSCODERS,
    centring,
    normalisation,
    normalised_hook,
)
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.weights import Gate, SaeWeights
from evalkit.subject.sites import site_of_hook
from evalkit.util.tensor_files import open_safetensors

if TYPE_CHECKING:
    from torch import Tensor

    from evalkit.records import Site
    from evalkit.util.tensor_files import Stored

__all__ = ["CONFIG", "WEIGHTS", "SaeLensReader", "describe_source", "open_folder"]

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
_SPARSITY = "sparsity.safetensors"
_JUMPRELU = frozenset({"jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder"})
_BATCH_TOPK = frozenset({"batchtopk", "matryoshka_batchtopk"})  # only in checkpoints: saved as jumprelu for inference
_ARCHITECTURES = _JUMPRELU | _BATCH_TOPK | TRANSCODERS | {"standard", "gated", "topk"}
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn_str": "activation_fn",
}
_DEAD = 1e-9  # firing rates up to this count as dead; the library stores log10(rate + 1e-10)


class SaeLensReader(FolderReader):
    """Opens a folder with ``cfg.json`` and ``sae_weights.safetensors``, one of these files, or a folder above several.

    Options besides the common ones:
    ``out``: the module that a transcoder reconstructs.
    ``centre``: whether to subtract each state's mean first; by default as in the config.
    ``norm``: mean norm of the training states, for configs that scale by it.
    """

    format = "saelens"
    files = (CONFIG, WEIGHTS)
    options = COMMON | {"norm", "centre", "out"}

    def open(self, folder: Path, options: Mapping[str, Any]) -> SaeSource:
        """Open the dictionary in one folder."""
        return open_folder(folder, options)


def open_folder(
    folder: Path,
    options: Mapping[str, Any],
    *,
    card: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    factor: float | None = None,
) -> SaeSource:
    """Open the dictionary in one folder.

    ``card``: defaults for keys that the folder's ``card.json`` does not have.
    ``overrides``: keys that replace those of the config.
    ``factor``: the scale of the inputs, used if the config scales them; None: read from the folder.

    Raises MissingFile, BadFile, BadShape, BadConfig.
    """
    config = {**read_json(folder / CONFIG), **(overrides or {})}
    sparsity = folder / _SPARSITY
    rates = open_safetensors(sparsity) if sparsity.exists() else {}
    if factor is None and (folder / SCALER).exists():
        stored = read_json(folder / SCALER).get("scaling_factor")  # null if it has been folded into the weights
        factor = None if stored is None else positive(folder / SCALER, "scaling_factor", stored)
    tensors = open_safetensors(folder / WEIGHTS)
    rate = rates.get("sparsity")
    card = {**(card or {}), **read_card(folder)}
    return describe_source(folder / WEIGHTS, folder / CONFIG, config, tensors, options, rate, card, factor)


def describe_source(
    file: Path,
    where: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    options: Mapping[str, Any],
    sparsity: Stored | None = None,
    card: Mapping[str, Any] | None = None,
    factor: float | None = None,
) -> SaeSource:
    """Make the source from a config and named tensors: W_enc (d, n), W_dec (n, d_out) and so on.

    ``file``, ``where``: names of the weights and of the config in errors.
    ``sparsity``: (n,), log10 of the firing rates.
    ``factor``: √d over the mean norm of the training states; None if unknown.

    Raises BadFile, BadShape, BadConfig.
    """
    card = card or {}
    settled = _settle(where, config)
    weights = _weights(file, where, settled, tensors)
    site = _site(where, settled, options, card)
    steps = centring(where, settled, site, options)
    steps += normalised_hook(settled, site)
    steps += normalisation(where, settled, weights, options, factor)
    declared = {key: card[key] for key in ("fvu", "l0", "alive_share") if is_number(card.get(key))}
    if (bos := settled.get(PREPEND_BOS)) is not None:
        declared[PREPEND_BOS] = bos
    if (k := _declared_k(settled, weights)) is not None:
        declared.setdefault("l0", float(k))
    declared = {**_rates(file, sparsity, weights.width), **declared}
    l0 = round(declared["l0"]) if "l0" in declared else None
    if "l0" in options:
        l0 = positive(where, "the option l0", options["l0"])
    source = SaeSource(
        weights, site, None if l0 is None else float(l0), declared, options.get("name"), steps, SaeLensReader.format
    )
    return (
        source if source.label or source.l0 is not None else replace(source, label=_name_by_folder(source, file.parent))
    )


def _settle(where: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a config of any version to one layout: flat, with the key names of version 6. Raises BadFile."""
    metadata = config.get("metadata")
    flat = {
        **(metadata if isinstance(metadata, Mapping) else {}),
        **{k: v for k, v in config.items() if k != "metadata"},
    }
    for old, new in _RENAMED.items():
        if old in flat:
            flat.setdefault(new, flat.pop(old))
    activation = flat.get("activation_fn") or "relu"
    if activation not in ("relu", "topk"):
        raise bad_key(where, "activation_fn", "relu or topk", activation)
    if activation == "topk":
        given = flat.get("activation_fn_kwargs")
        flat["architecture"] = "topk"
        flat["k"] = given.get("k") if isinstance(given, Mapping) else flat.get("k")
    architecture = flat.setdefault("architecture", "standard")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise bad_key(where, "architecture", f"one of {', '.join(sorted(_ARCHITECTURES))}", architecture)
    if flat.get("reshape_activations") not in (
        None,
        "none",
        "hook_z",
    ):  # hook_z needs no reshaping: states at o_proj:in already have their heads side by side
        raise bad_key(where, "reshape_activations", "none or hook_z", flat["reshape_activations"])
    if flat.get("hook_head_index") is not None:
        raise bad_key(
            where, "hook_head_index", "null: a dictionary of whole states, not of one head", flat["hook_head_index"]
        )
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", PREPEND_BOS):
        if not isinstance(flat.get(key, False), bool | None if key == PREPEND_BOS else bool):
            raise bad_key(where, key, "true or false", flat[key])
    layer, hook = flat.get("hook_layer"), flat.get("hook_name")
    if isinstance(hook, str) and isinstance(layer, int):
        flat["hook_name"] = hook.replace("{layer}", str(layer))
    return flat


def _weights(file: Path, where: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> SaeWeights:
    architecture = config["architecture"]
    transcoder = architecture in TRANSCODERS
    w_enc = matrix(file, tensors, "W_enc", (_size(where, config, "d_in"), _size(where, config, "d_sae")))
    d, n = w_enc.shape
    d_out = _size(where, config, "d_out") if transcoder else d
    w_dec = matrix(file, tensors, "W_dec", (n, d_out))
    b_dec = vector(file, tensors, "b_dec", w_dec.shape[1])
    _check_scaling(file, tensors, n)
    gate = None
    if architecture == "gated":
        gate = Gate(*(vector(file, tensors, name, n) for name in ("b_gate", "r_mag", "b_mag")))
    shifted = not transcoder and config.get("apply_b_dec_to_input", True)
    rescaled = architecture == "topk" or architecture in _BATCH_TOPK
    return SaeWeights(
        w_enc,
        torch.zeros(n) if gate is not None else vector(file, tensors, "b_enc", n),
        w_dec,
        b_dec,
        threshold=_threshold(file, architecture, tensors, n),
        gate=gate,
        k=_k(where, config, n) if architecture == "topk" else None,
        shift=b_dec if shifted else None,
        decoder_scaled=rescaled and config.get("rescale_acts_by_decoder_norm", False),
        w_skip=matrix(file, tensors, "W_skip", (w_dec.shape[1], d)) if architecture in SKIPPING else None,
    )


def _threshold(file: Path, architecture: str, tensors: Mapping[str, Stored], n: int) -> Tensor | None:
    if architecture in _BATCH_TOPK and "threshold" not in tensors:
        scalar = matrix(file, tensors, "topk_threshold", ())
        return replace(scalar, shape=(1,)).read().expand(n)
    if architecture in _JUMPRELU and "threshold" not in tensors and "log_threshold" in tensors:
        return vector(file, tensors, "log_threshold", n).exp()
    return vector(file, tensors, "threshold", n) if architecture in _JUMPRELU | _BATCH_TOPK else None


def _check_scaling(file: Path, tensors: Mapping[str, Stored], n: int) -> None:
    """Reject finetuned dictionaries of old versions, which scale activations after training; ones mean no scaling."""
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors and not torch.allclose(vector(file, tensors, name, n), torch.ones(n)):
            raise BadFile(
                f"{file}: {name}",
                expected="ones",
                seen="factors of a dictionary that was finetuned after training, which sae-lens 6 cannot open either",
                fix="fold the factors into W_dec and remove the tensor",
            )


def _site(where: Path, config: Mapping[str, Any], options: Mapping[str, Any], card: Mapping[str, Any]) -> Site:
    out = None
    if config["architecture"] in TRANSCODERS:
        out = options.get("out") or _hook(config, "hook_name_out", "hf_hook_name_out")
        if not out:
            raise BadConfig(
                str(where),
                expected="metadata with hook_name_out (where a transcoder writes), or the option out=",
                seen="neither",
                fix="give the path of the module that it reconstructs, such as out=layers.12.mlp",
            )
    model = config.get("model_name")
    return site_from(
        where,
        options,
        hook=_hook(config, "hook_name", "hf_hook_name"),
        model=model if isinstance(model, str) else None,
        out=out,
        card=card,
    )


def _hook(config: Mapping[str, Any], key: str, plain: str) -> str | None:
    """The hook's name, or the Hugging Face module's name (``plain``) if the hook is not known."""
    names = [config[name] for name in (key, plain) if isinstance(config.get(name), str) and config[name]]
    return next((name for name in names if site_of_hook(name)), names[0] if names else None)


def _declared_k(config: Mapping[str, Any], weights: SaeWeights) -> int | None:
    """k of a top-k dictionary: active latents per token, exactly or on average over a batch. None for others."""
    if weights.k is not None:
        return weights.k
    k = config.get("k") if config["architecture"] in _BATCH_TOPK else None
    if config.get("training_architecture") in _BATCH_TOPK:
        details = config.get("training_architecture_details")
        k = details.get("k") if isinstance(details, Mapping) else None
    return k if isinstance(k, int) and not isinstance(k, bool) and 0 < k <= weights.width else None


def _rates(file: Path, sparsity: Stored | None, n: int) -> dict[str, float]:
    """The share of latents that fired in training and the mean firing rate, from log10 of the rates (n,)."""
    if sparsity is None:
        return {}
    rates = 10 ** vector(file.parent / _SPARSITY, {"sparsity": sparsity}, "sparsity", n).double().clamp(max=0)
    return {"alive_share": float((rates > _DEAD).double().mean()), "mean_density": float(rates.mean())}


def _name_by_folder(source: SaeSource, folder: Path) -> str:
    return f"{source.site}/{source.kind}/width-{source.weights.width}/{folder.resolve().name}"


def _size(where: Path, config: Mapping[str, Any], key: str) -> int | None:
    size = config.get(key)
    if size is None:
        return None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise bad_key(where, key, "a whole number above 0", size)
    return size


def _k(where: Path, config: Mapping[str, Any], n: int) -> int:
    k = _size(where, config, "k")
    if k is None or k > n:
        raise bad_key(where, "k", f"1 to {n}, the width", k)
    return k
