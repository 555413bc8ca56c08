"""Input steps of a SAELens dictionary: how its config says the training states were centred, normalised and scaled.

TransformerLens can centre the weights that write to the residual stream. Its activations then have mean 0 over the
dimensions, unlike those of the Hugging Face model. Dictionaries trained on such states get the step ``Centre``, so that
they can read the states of the Hugging Face model. Knows the configs of sae-lens and TransformerLens; reads no files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.errors import BadConfig
from evalkit.sources.formats.common import bad_key, positive
from evalkit.sources.sae.transforms import Centre, LayerNorm, RmsNorm, Scale, Step, UnitNorm
from evalkit.subject.sites import ATTN_OUT, EMBED, MLP_OUT, RESID_MID, parse_site, site_of_hook

if TYPE_CHECKING:
    from evalkit.records import Site
    from evalkit.sources.sae.weights import SaeWeights

__all__ = ["SCALED", "SCALER", "SKIPPING", "TRANSCODERS", "centring", "model_of", "normalisation", "normalised_hook"]

SCALED = "expected_average_only_in"
SCALER = "activation_scaler.json"
SKIPPING = frozenset({"skip_transcoder", "jumprelu_skip_transcoder"})
TRANSCODERS = SKIPPING | {"transcoder", "jumprelu_transcoder"}
_PARTS = tuple(f".{part}" for part in (RESID_MID, ATTN_OUT, MLP_OUT))
# Sites in a block that centring affects.
_ON_RESIDUAL = ("", *_PARTS, ".mlp", ".self_attn", ".pre_mlp_norm:in", ":in")
_RMS_NORMED = re.compile(r"gemma|(?:meta-)?llama|mistral|mixtral|qwen|deepseek|smollm|yi-|phi-3|olmo-?2|gpt-oss")
_LAYER_NORMED = re.compile(
    r"(?:distil)?gpt-?2|gpt-?neo|gpt-?j|pythia|opt-|bloom|gelu-|solu-|attn-only|tiny-?stories|phi-[12]"
)
_NO_PROCESSING_SINCE = (3, 19, 2)  # from this version on, sae-lens trains on unprocessed models by default


def model_of(config: Mapping[str, Any]) -> str:
    """The model's name in lower case, without its owner; empty if the config has none."""
    return str(config.get("model_name") or "").lower().split("/")[-1]


def centring(where: Path, config: Mapping[str, Any], site: Site, options: Mapping[str, Any]) -> tuple[Step, ...]:
    """``Centre`` if the dictionary was trained on centred states; the option ``centre`` overrides. Raises BadConfig."""
    given = options.get("centre")
    if given is not None and not isinstance(given, bool):
        raise BadConfig(str(where), expected="centre=true or centre=false", seen=repr(given), fix="correct the option")
    wanted = given if given is not None else _on_residual(site.path) and _trained_centred(config)
    return (Centre(),) if wanted else ()


def _on_residual(path: str) -> bool:
    block = parse_site(path)
    return path == EMBED if block is None else block.within in _ON_RESIDUAL


def _trained_centred(config: Mapping[str, Any]) -> bool:
    """Whether the training states were centred. TransformerLens centres only models with LayerNorm, and only on request.

    A config without that setting comes from an older version of sae-lens, which requested centring, or from another
    library. Among those in sae-lens's registry, dictionaries of GPT-2 were trained on centred states, and dictionaries of
    other models on the states of the Hugging Face model.
    """
    model, hook = model_of(config), config.get("hook_name")
    if not (isinstance(hook, str) and hook.startswith(("blocks.", "hook_embed"))) or _RMS_NORMED.match(model):
        return False
    if (config.get("model_class_name") or "HookedTransformer") != "HookedTransformer":
        return False
    loaded = config.get("model_from_pretrained_kwargs")
    if isinstance(loaded, Mapping):
        return loaded.get("center_writing_weights") is True
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(config.get("sae_lens_training_version")))
    recent = version is not None and tuple(map(int, version.groups())) >= _NO_PROCESSING_SINCE
    return model.startswith("gpt2") and not recent


def normalised_hook(config: Mapping[str, Any], site: Site) -> tuple[Step, ...]:
    """Steps for TransformerLens's ``ln2.hook_normalized``, the state after the norm before the MLP, without its gain."""
    hook = config.get("hook_name")
    if not (isinstance(hook, str) and hook.endswith("ln2.hook_normalized") and site.path == site_of_hook(hook)):
        return ()
    model = site.model.lower()
    norm = RmsNorm(1e-6 if model.startswith(("gemma", "qwen")) else 1e-5)
    return (Centre(), norm) if _LAYER_NORMED.match(model) else (norm,)


def normalisation(
    where: Path, config: Mapping[str, Any], weights: SaeWeights, options: Mapping[str, Any], factor: float | None
) -> tuple[Step, ...]:
    """The step named by the config's ``normalize_activations``.

    ``factor``: √d over the mean norm of the training states; None if unknown. Raises BadFile (unknown kind, or a kind
    that the architecture does not support), BadConfig (a factor is needed but unknown).
    """
    kind = config.get("normalize_activations")
    if isinstance(kind, bool) or kind is None:  # the first versions of sae-lens wrote true or false
        kind = SCALED if kind else "none"
    fixed: dict[str, tuple[Step, ...]] = {
        "none": (),
        "constant_norm_rescale": (UnitNorm(),),
        "layer_norm": (LayerNorm(),),
    }
    if not isinstance(kind, str) or kind not in (*fixed, SCALED):
        raise bad_key(where, "normalize_activations", f"one of {', '.join((*fixed, SCALED))}", kind)
    norm = options.get("norm")
    if kind != SCALED:
        if norm is not None:
            raise BadConfig(
                str(where),
                expected=f"the option norm= only where normalize_activations is {SCALED}",
                seen=kind,
                fix="leave out the option",
            )
        if fixed[kind] and config["architecture"] in SKIPPING:
            raise bad_key(where, "normalize_activations", "none, because the skip path reads the raw state", kind)
        return fixed[kind]
    if config["architecture"] in TRANSCODERS:
        raise bad_key(where, "normalize_activations", f"one of {', '.join(fixed)} for a transcoder", kind)
    if norm is not None:
        factor = math.sqrt(weights.d_model) / positive(where, "the option norm", norm)
    if factor is None:
        raise BadConfig(
            str(where),
            expected=f"a scaling factor for {SCALED}: a file {SCALER}, or the option norm=",
            seen="neither",
            fix="give norm=, the mean norm of the training states, "
            f"or norm={math.sqrt(weights.d_model):.6g} if the factor is folded into the weights",
        )
    return (Scale(factor),)
