"""Reads SAEs of dictionary_learning and the SAEBench suite: ``resid_post_layer_8/trainer_3/{ae.pt,config.json}``.

The config's ``trainer.dict_class`` determines the names of the tensors and the encoder. Decoder rows keep their lengths.
Site and model come from the options, a ``card.json`` in the same folder, or the config's ``submodule_name``, ``buffer.io``
and ``lm_name``. The declared L0 is ``k``, otherwise the L0 measured in ``eval_results.json``. Names of sources include the
trainer and the folder, because a suite has many dictionaries with the same site, width and L0. Knows nothing of the hub;
writes nothing. Source: dictionary-learning 0.1.0, https://github.com/saprmarks/dictionary_learning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from evalkit.errors import BadConfig, BadFile
from evalkit.records import Site
from evalkit.sources.formats.common import (
    FolderReader,
    is_number,
    matrix,
    read_card,
    read_json,
    site_from,
    vector,
    whole_number,
)
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.weights import Gate, SaeWeights
from evalkit.subject.sites import INPUT, site_of_hook
from evalkit.util.tensor_files import Stored, open_torch

__all__ = ["DictionaryLearningReader", "read_weights"]

WEIGHTS, CONFIG, RESULTS = "ae.pt", "config.json", "eval_results.json"
_PLACE = re.compile(r"(resid_pre|resid_post|resid_out|resid|mlp_out|mlp|attn_out|attn|att)_layer_?(\d+)")
# The library reads what modules return, so that the place is the module also where its output is normalised afterwards.
_PLACES = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "mlp": "layers.{}.mlp",
    "att": "layers.{}.self_attn",
    "resid": "layers.{}",
}
_PLAIN_NAME = re.compile(r"[^\w.-]+")


class DictionaryLearningReader(FolderReader):
    """Opens the folder of one trainer, one of its two files, or a folder above several trainers."""

    format = "dictionary-learning"
    files = (WEIGHTS, CONFIG)

    def open(self, folder: Path, options: Mapping[str, Any]) -> SaeSource:
        """Open the dictionary of one trainer."""
        return _source(folder, options)


def read_weights(folder: Path) -> SaeWeights:
    """The weights of one trainer; matrices stay on disk. Raises MissingFile, BadFile, BadShape, BadConfig.

    Encodes like the default mode of each class's ``encode``: AutoEncoderTopK takes the top k per token (its threshold is
    for another mode); BatchTopKSAE and MatryoshkaBatchTopKSAE apply one threshold to all latents.
    """
    return _weights(folder, _trainer(folder))[0]


@dataclass(frozen=True, slots=True)
class _Layout:
    """Names of the tensors of one class, and its encoder. ``linear``: matrices of torch linear layers, (n, d), (d, n)."""

    linear: bool
    b_enc: str | None
    b_dec: str
    subtracted: bool  # whether b_dec is subtracted from the input
    rule: Literal["relu", "gate", "threshold", "top-k", "one threshold"]


_CLASSES = {
    "AutoEncoder": _Layout(True, "encoder.bias", "bias", True, "relu"),
    "AutoEncoderNew": _Layout(True, "encoder.bias", "decoder.bias", False, "relu"),
    "GatedAutoEncoder": _Layout(True, None, "decoder_bias", True, "gate"),
    "JumpReluAutoEncoder": _Layout(False, "b_enc", "b_dec", False, "threshold"),
    "AutoEncoderTopK": _Layout(True, "encoder.bias", "b_dec", True, "top-k"),
    "BatchTopKSAE": _Layout(True, "encoder.bias", "b_dec", True, "one threshold"),
    "MatryoshkaBatchTopKSAE": _Layout(False, "b_enc", "b_dec", True, "one threshold"),
}


def _weights(folder: Path, trainer: Mapping[str, Any]) -> tuple[SaeWeights, int | None]:
    """The weights, and ``k`` if the class has one."""
    name = trainer.get("dict_class")
    layout = _CLASSES.get(name) if isinstance(name, str) else None
    if layout is None:
        raise BadConfig(
            f"{folder / CONFIG}: trainer.dict_class",
            expected=f"one of {', '.join(_CLASSES)}",
            seen="IdentityDict, which has no latents" if name == "IdentityDict" else repr(name)[:80],
            fix="choose a dictionary of one of these classes",
        )
    file = folder / WEIGHTS
    tensors = open_torch(file, select=_numbers_as_vectors)
    n, d = (
        whole_number(f"{folder / CONFIG}: trainer.", trainer, "dict_size"),
        whole_number(f"{folder / CONFIG}: trainer.", trainer, "activation_dim"),
    )
    if layout.linear:
        w_enc = matrix(file, tensors, "encoder.weight", (n, d)).T
        w_dec = matrix(file, tensors, "decoder.weight", w_enc.shape).T
    else:
        w_enc = matrix(file, tensors, "W_enc", (d, n))
        w_dec = matrix(file, tensors, "W_dec", w_enc.shape[::-1])
    d, n = w_enc.shape
    b_enc = torch.zeros(n) if layout.b_enc is None else vector(file, tensors, layout.b_enc, n)
    b_dec = vector(file, tensors, layout.b_dec, d)
    k = threshold = gate = None
    if layout.rule == "gate":
        gate = Gate(*(vector(file, tensors, part, n) for part in ("gate_bias", "r_mag", "mag_bias")))
    elif layout.rule == "threshold":
        threshold = vector(file, tensors, "threshold", n)
    elif layout.rule != "relu":
        k = _active(folder, trainer, tensors, n)
    if layout.rule == "one threshold":  # negative if training ended before it was set: then the encoder is a plain relu
        threshold = vector(file, tensors, "threshold", 1).expand(n).contiguous()
    shift = b_dec if layout.subtracted else None
    per_token = k if layout.rule == "top-k" else None
    return SaeWeights(w_enc, b_enc, w_dec, b_dec, threshold, gate, per_token, shift=shift), k


def _numbers_as_vectors(held: Any) -> Any:
    """Convert the scalars ``threshold`` and ``k`` (an integer) to float vectors of length 1; keep the other tensors."""
    if not isinstance(held, Mapping):
        return held
    single = {name: value for name, value in held.items() if isinstance(value, torch.Tensor) and value.numel() == 1}
    return {**held, **{name: single[name].double().reshape(1) for name in ("k", "threshold") if name in single}}


def _active(folder: Path, trainer: Mapping[str, Any], tensors: Mapping[str, Stored], width: int) -> int:
    """``k`` from the config or the weights; if both have it, they must agree. Raises BadConfig."""
    stored = int(vector(folder / WEIGHTS, tensors, "k", 1)) if "k" in tensors else None
    k = whole_number(f"{folder / CONFIG}: trainer.", trainer, "k")
    found = stored if k is None else k
    if found is None or not 0 < found <= width or stored not in (None, found):
        raise BadConfig(
            f"{folder / CONFIG}: trainer.k",
            expected=f"1 to {width}, the width" + ("" if stored is None else f", and {stored} as {WEIGHTS} has it"),
            seen="none" if found is None else str(found),
            fix="check that the config belongs to the weights",
        )
    return found


def _source(folder: Path, options: Mapping[str, Any]) -> SaeSource:
    trainer, card = _trainer(folder), read_card(folder)
    weights, k = _weights(folder, trainer)
    site = _site(folder, trainer, card, options)
    declared = _declared(folder, k, card)
    l0 = options.get("l0", declared.get("l0") if k is None else k)
    label = options.get("name") or card.get("name") or _label(folder, site, weights.width, trainer, l0)
    return SaeSource(
        weights,
        site,
        None if l0 is None else float(l0),
        declared,
        label,
        format=DictionaryLearningReader.format,
    )


def _trainer(folder: Path) -> dict[str, Any]:
    trainer = read_json(folder / CONFIG).get("trainer")
    if not isinstance(trainer, dict):
        raise BadFile(
            f"{folder / CONFIG}: trainer",
            expected="a JSON object with dict_class, activation_dim and dict_size",
            seen="none" if trainer is None else f"a {type(trainer).__name__}",
            fix="download that file again, or repair it",
        )
    return trainer


def _site(folder: Path, trainer: Mapping[str, Any], card: Mapping[str, Any], options: Mapping[str, Any]) -> Site:
    """The site from ``submodule_name``; if it is null, from the folders' names, which suites write the same way."""
    file = folder / CONFIG
    named = trainer.get("submodule_name")
    names = [named] if isinstance(named, str) else [folder.parent.name, folder.name]
    given = options.get("site") or card.get("site")
    hook = next((name for name in names if _hook(name) != name or site_of_hook(name)), str(named or ""))
    if not given:
        _check_layer(file, hook, trainer)
    buffer = read_json(file).get("buffer")
    io = buffer.get("io") if isinstance(buffer, dict) else None
    if not given and io not in (None, "out", "in"):
        raise BadConfig(
            f"{file}: buffer.io",
            expected="in or out",
            seen=repr(io)[:80],
            fix="give the path of the module that it reads with the option site=, such as site=layers.12.mlp:in",
        )
    model = trainer.get("lm_name")
    hook = _hook(hook)
    if io == "in" and hook:
        hook = (site_of_hook(hook) or hook) + INPUT
    return site_from(file, options, hook=hook or None, model=model if isinstance(model, str) else None, card=card)


def _hook(name: str) -> str:
    """``resid_post_layer_8`` → ``layers.8``, the name of a site or hook; other names stay as they are."""
    if not (found := _PLACE.fullmatch(name)):
        return name
    place = next(place for part, place in _PLACES.items() if found[1].startswith(part))
    return place.format(int(found[2]))


def _check_layer(file: Path, hook: str, trainer: Mapping[str, Any]) -> None:
    found, layer = _PLACE.fullmatch(hook), trainer.get("layer")
    if found and isinstance(layer, int) and layer != int(found[2]):
        raise BadConfig(
            f"{file}: trainer.layer",
            expected=f"{int(found[2])}, as in {hook}",
            seen=str(layer),
            fix="give the path of the module that it reads with the option site=, such as site=layers.12",
        )


def _declared(folder: Path, k: int | None, card: Mapping[str, Any]) -> dict[str, Any]:
    """Declared figures. The library's ``frac_variance_explained`` is 1 - FVU without the error of the mean."""
    results = read_json(folder / RESULTS) if (folder / RESULTS).exists() else {}
    found = {key: results[key] for key in ("l0", "frac_variance_explained") if is_number(results.get(key))}
    if k is not None:
        found.setdefault("l0", k)
    return found | {key: card[key] for key in ("fvu", "l0", "alive_share") if is_number(card.get(key))}


def _label(folder: Path, site: Site, width: int, trainer: Mapping[str, Any], l0: float | None) -> str:
    """The source's name, such as ``pythia-160m/layers.8/sae/width-4096/BatchTopK/trainer_1/l0-40``."""
    kind = str(trainer.get("trainer_class") or trainer["dict_class"]).replace("Trainer", "")
    parts = [f"{site}/sae/width-{width}", *(_PLAIN_NAME.sub("-", part)[:60] for part in (kind, folder.name) if part)]
    return "/".join(parts if l0 is None else [*parts, f"l0-{l0:g}"])
