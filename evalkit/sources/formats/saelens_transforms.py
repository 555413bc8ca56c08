"""What a SAELens config says of the states that a dictionary was trained on: centred, normalised, scaled; as input steps.

Knows configs of sae-lens and TransformerLens, no files. Activations of TransformerLens models whose writing weights were
centred have no mean over the dimensions: dictionaries trained on them get the step ``Centre``, so that they can be given
the states of the model as Hugging Face has it.
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
from evalkit.subject.sites import EMBED, parse_site, site_of_hook

if TYPE_CHECKING:
    from evalkit.records import Site
    from evalkit.sources.sae.weights import SaeWeights

__all__ = ["SCALED", "SCALER", "SKIPPING", "TRANSCODERS", "centring", "model_of", "normalisation", "normalised_hook"]

SCALED = "expected_average_only_in"
SCALER = "activation_scaler.json"
SKIPPING = frozenset({"skip_transcoder", "jumprelu_skip_transcoder"})
TRANSCODERS = SKIPPING | {"transcoder", "jumprelu_transcoder"}
_ON_RESIDUAL = ("", ".mlp", ".self_attn", ".pre_mlp_norm:in", ":in")  # sites in a block whose states centring changes
_RMS_NORMED = re.compile(r"gemma|(?:meta-)?llama|mistral|mixtral|qwen|deepseek|smollm|yi-|phi-3|olmo-?2|gpt-oss")
_LAYER_NORMED = re.compile(
    r"(?:distil)?gpt-?2|gpt-?neo|gpt-?j|pythia|opt-|bloom|gelu-|solu-|attn-only|tiny-?stories|phi-[12]"
)
_NO_PROCESSING_SINCE = (3, 19, 2)  # the version from which sae-lens trains on unprocessed models unless told otherwise


def model_of(config: Mapping[str, Any]) -> str:
    """The model's bare name in lower case, empty where the config has none."""
    return str(config.get("model_name") or "").lower().split("/")[-1]


def centring(where: Path, config: Mapping[str, Any], site: Site, options: Mapping[str, Any]) -> tuple[Step, ...]:
    """``Centre`` where the dictionary was trained on states without a mean, or the option ``centre`` says so. BadConfig."""
    given = options.get("centre")
    if given is not None and not isinstance(given, bool):
        raise BadConfig(str(where), expected="centre=true or centre=false", seen=repr(given), fix="correct that option")
    wanted = given if given is not None else _on_residual(site.path) and _trained_centred(config)
    return (Centre(),) if wanted else ()


def _on_residual(path: str) -> bool:
    block = parse_site(path)
    return path == EMBED if block is None else block.within in _ON_RESIDUAL


def _trained_centred(config: Mapping[str, Any]) -> bool:
    """Whether the states of training had no mean: TransformerLens centres where a model has LayerNorm and it is asked to.

    Configs that do not say are older than the version that stopped asking for it, or of other makers; those of GPT-2 were
    trained on centred states, those of other models in sae-lens's registry on the states of Hugging Face's model.
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
    """What TransformerLens calls the normalised state: the norm before the MLP without its gain."""
    hook = config.get("hook_name")
    if not (isinstance(hook, str) and hook.endswith("ln2.hook_normalized") and site.path == site_of_hook(hook)):
        return ()
    model = site.model.lower()
    norm = RmsNorm(1e-6 if model.startswith(("gemma", "qwen")) else 1e-5)
    return (Centre(), norm) if _LAYER_NORMED.match(model) else (norm,)


def normalisation(
    where: Path, config: Mapping[str, Any], weights: SaeWeights, options: Mapping[str, Any], factor: float | None
) -> tuple[Step, ...]:
    """The step that ``normalize_activations`` names. ``factor``: √d over the mean norm of training, where it is known.

    Raises BadFile (an unknown kind, one that does not fit the architecture), BadConfig (no factor where one is needed).
    """
    kind = config.get("normalize_activations")
    if isinstance(kind, bool) or kind is None:  # of the first versions
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
                fix="leave it out",
            )
        if fixed[kind] and config["architecture"] in SKIPPING:
            raise bad_key(where, "normalize_activations", "none beside a skip path, which reads the raw state", kind)
        return fixed[kind]
    if config["architecture"] in TRANSCODERS:
        raise bad_key(where, "normalize_activations", f"one of {', '.join(fixed)} for a transcoder", kind)
    if norm is not None:
        factor = math.sqrt(weights.d_model) / positive(where, "the option norm", norm)
    if factor is None:
        raise BadConfig(
            str(where),
            expected=f"a scaling factor beside {SCALED}: {SCALER}, or the option norm=",
            seen="weights that it has not been folded into",
            fix=f"give norm=, the mean norm of the training states ({math.sqrt(weights.d_model):.6g} if folded)",
        )
    return (Scale(factor),)
