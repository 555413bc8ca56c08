"""Reads sparse coders in EleutherAI's sparsify layout: ``layers.12.mlp/{cfg.json,sae.safetensors}``.

The folder's name is the hook point, a module path. Folders ``seed0`` below it and ``best`` above it become part of the
source's name. The folder of a training run opens all of its hook points. The model comes from the options, ``card.json``,
or the training run's ``config.json`` above the hook points. A transcoder reads its module's input and predicts the output.
Tensors: encoder.weight (n, d), encoder.bias (n,), W_dec (n, d), b_dec (d,), and W_skip (d, d) with a skip connection.
Knows nothing of the hub; writes nothing. Source: eai-sparsify 1.3.3, https://github.com/EleutherAI/sparsify.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evalkit.errors import BadConfig, BadFile, InputError
from evalkit.records import Site
from evalkit.sources.formats.common import (
    FolderReader,
    matrix,
    read_card,
    read_json,
    site_from,
    vector,
    whole_number,
)
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.weights import SaeWeights
from evalkit.subject.sites import INPUT
from evalkit.util.tensor_files import open_safetensors

__all__ = ["SparsifyReader", "read_weights"]

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
_SEED = re.compile(r"seed\d+")
_ABOVE = 4  # parent folders in which a training run's config is searched


class SparsifyReader(FolderReader):
    """Opens the folder of one hook point, one of its two files, or a folder above several hook points.

    The option ``site`` overrides the folder's name. A site that ends in ``:in``, such as ``layers.5.mlp:in``, makes the
    source a transcoder of that module.
    """

    format = "sparsify"
    files = (CONFIG, WEIGHTS)

    def open(self, folder: Path, options: Mapping[str, Any]) -> SaeSource:
        """Open the sparse coder of one hook point."""
        return _source(folder, options)


def read_weights(folder: Path) -> SaeWeights:
    """The weights in one hook point's folder; matrices stay on disk. Raises MissingFile, BadFile, BadShape, BadConfig.

    As in sparsify's ``SparseCoder.encode`` and ``forward``: relu, then the k largest, or the largest in each of k groups.
    """
    file, path = folder / WEIGHTS, folder / CONFIG
    config = read_json(path)
    tensors = open_safetensors(file)
    d_in = whole_number(f"{path}: ", config, "d_in")
    n = whole_number(f"{path}: ", config, "num_latents", 0) or None
    if n is None and d_in is not None and (factor := whole_number(f"{path}: ", config, "expansion_factor")) is not None:
        n = d_in * factor
    w_enc = matrix(file, tensors, "encoder.weight", (n, d_in))
    n, d_in = w_enc.shape
    w_dec = matrix(file, tensors, "W_dec", (n, d_in))
    b_dec = vector(file, tensors, "b_dec", d_in)
    skip = bool(config.get("skip_connection", False))
    if skip != ("W_skip" in tensors):
        raise BadFile(
            f"{file}: W_skip",
            expected=f"this tensor if and only if {CONFIG} has skip_connection true",
            seen=f"skip_connection {skip} and {'no such' if skip else 'this'} tensor",
            fix="check that the config belongs to the weights",
        )
    return SaeWeights(
        w_enc.T,
        vector(file, tensors, "encoder.bias", n),
        w_dec,
        b_dec,
        k=_active(path, config, n),
        grouped=config.get("activation", "topk") == "groupmax",
        shift=None if config.get("transcode") else b_dec,
        w_skip=matrix(file, tensors, "W_skip", (d_in, d_in)) if skip else None,
    )


def _active(path: Path, config: Mapping[str, Any], width: int) -> int:
    """The number of active latents per token. Raises BadConfig for an unsupported activation."""
    activation = config.get("activation", "topk")
    if activation not in ("topk", "groupmax") or config.get("signed"):
        raise BadConfig(
            f"{path}: {'signed' if config.get('signed') else 'activation'}",
            expected="unsigned topk or groupmax",
            seen=f"signed {activation}" if config.get("signed") else repr(activation)[:80],
            fix="choose a dictionary with one of these activations",
        )
    k = whole_number(f"{path}: ", config, "k")
    if k is None or k > width or (activation == "groupmax" and width % k):
        raise BadConfig(
            f"{path}: k",
            expected=f"1 to {width}, the width" + (", and a divisor of it" if activation == "groupmax" else ""),
            seen="none" if k is None else str(k),
            fix="check that the config belongs to the weights",
        )
    return k


def _source(folder: Path, options: Mapping[str, Any]) -> SaeSource:
    config, card = read_json(folder / CONFIG), read_card(folder)
    weights = read_weights(folder)
    run = _run_config(folder)
    site = _site(folder, config, run, card, options)
    variant = _variant(folder)
    l0 = float(options.get("l0", weights.k))
    label = options.get("name") or card.get("name")
    if label is None and variant:
        kind = "transcoder" if site.reconstructs else "sae"
        label = f"{site}/{kind}/width-{weights.width}/l0-{l0:g}/{variant}"
    declared = {key: card[key] for key in ("fvu", "l0", "alive_share") if isinstance(card.get(key), int | float)}
    return SaeSource(weights, site, l0, {"l0": weights.k, **declared}, label, format=SparsifyReader.format)


def _site(
    folder: Path, config: Mapping[str, Any], run: Mapping[str, Any], card: Mapping[str, Any], options: Mapping[str, Any]
) -> Site:
    """The site. Early versions stored ``transcode`` in the run's config, not in ``cfg.json``.

    Without either, a skip connection marks a transcoder, as only transcoders have one. Early transcoders were trained
    with ``b_dec`` subtracted from their input, so ``read_weights`` keeps that subtraction for them.
    """
    hook = folder.parent.name if _SEED.fullmatch(folder.name) else folder.name
    given = options.get("site") or card.get("site")
    early = "transcode" not in config and (run.get("transcode") or config.get("skip_connection"))
    file, model = folder / CONFIG, run.get("model")
    if not (config.get("transcode") or early or str(given or "").endswith(INPUT)):
        return site_from(file, options, hook=hook, model=model, card=card)
    module = str(given or hook).removesuffix(INPUT)
    place = {**options, "site": module + INPUT} if given else options
    return site_from(file, place, hook=module + INPUT, model=model, out=module.split("/")[-1], card=card)


def _run_config(folder: Path) -> dict[str, Any]:
    """The config that training wrote above its hook points; empty if there is none."""
    for above in [folder, *folder.parents][: _ABOVE + 1]:
        try:
            held = read_json(above / RUN)
        except InputError:
            continue
        if isinstance(held.get("sae"), dict) and isinstance(held.get("model"), str):
            return held
    return {}


def _variant(folder: Path) -> str:
    """``best``, ``seed1``, ``best/seed1`` or empty: distinguishes the sparse coders of one hook point."""
    seed = folder.name if _SEED.fullmatch(folder.name) else ""
    above = [each.name for each in folder.parents][:3]
    return "/".join(part for part in ("best" if "best" in above else "", seed) if part)
