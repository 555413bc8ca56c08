"""Reads SAEs and transcoders in Gemma Scope 2's layout: ``resid_post/layer_12_width_16k_l0_medium/params.safetensors``.

Each file holds w_enc (d_in, n), b_enc (n,), w_dec (n, d_out), b_dec (d_out,), threshold (n,). Transcoders with a skip
connection also have affine_skip_connection A (d_in, d_out); x A is added to the output. A ``config.json`` in the same
folder has ``model_name``, ``width``, ``l0``, ``affine_connection``, ``type``, and ``hf_hook_point_in`` and
``hf_hook_point_out``: a module with ``.input`` or ``.output`` appended (the output of a norm includes its gain). Keys that
it lacks are taken from folder names (``resid_post``, ``attn_out``, ``mlp_out``, ``transcoder``, each also with ``_all``).
Matrices stay on disk. Rejects cross-layer transcoders and crosscoders. Knows nothing of the hub; writes nothing.

Layout: the repositories google/gemma-scope-2-* and public programs that read them; not verified on the published weights.
The orientation of the skip connection follows those programs; one of them reports that, on the published weights, the
transposed matrix fits far worse.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evalkit.errors import BadConfig, BadFile, BadShape
from evalkit.records import Site
from evalkit.sources.formats.common import COMMON, check_one, check_options, find_beside, matrix, read_json, site_from
from evalkit.sources.formats.gemma_scope import jumprelu
from evalkit.sources.sae.source import SaeSource
from evalkit.subject.sites import parse_site, site_of_hook
from evalkit.util.tensor_files import Stored, open_safetensors

__all__ = ["GemmaScope2Reader"]

PARAMS = "params.safetensors"
TENSORS = ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")
SKIP = "affine_skip_connection"
_CROSS = "params_layer_*.safetensors"  # one file per layer: a cross-layer transcoder or a crosscoder
_DEEPEST = 3
_FOLDER = re.compile(r"layer_(\d+)_width_(\d+)([km]?)_l0_([a-z]+|\d+)(_affine)?")
_SITES = {
    "resid_post": ("layers.{layer}", None),
    "attn_out": ("layers.{layer}.self_attn.o_proj:in", None),
    "mlp_out": ("layers.{layer}.post_feedforward_layernorm", None),
    "transcoder": ("layers.{layer}.pre_feedforward_layernorm", "layers.{layer}.post_feedforward_layernorm"),
}
_SIZES = {"": 1, "k": 2**10, "m": 2**20}


class GemmaScope2Reader:
    """Opens a ``params.safetensors``, its folder, or a folder above several."""

    format = "gemma-scope-2"
    options = COMMON | {"out"}

    def matches(self, path: Path) -> bool:
        """Whether there is a ``params.safetensors``, or a cross-layer file, at ``path`` or up to three levels below."""
        try:
            if path.name == PARAMS:
                return path.is_file()
            depths = ["/".join("*" * depth) + "/" * (depth > 0) for depth in range(_DEEPEST + 1)]
            return any(any(path.glob(f"{above}{name}")) for name in (PARAMS, _CROSS) for above in depths)
        except OSError:
            return False

    def read(self, path: Path, **options: Any) -> Sequence[SaeSource]:
        """Every SAE and transcoder at or below ``path``, sorted by site, width and L0.

        ``options``: ``model``, ``site`` and ``out`` override the config and the folders; ``l0`` and ``name`` are for a
        single dictionary; ``subject`` is the model's name if nothing else gives it. Raises MissingFile, BadFile, BadShape,
        BadConfig.
        """
        check_options(path, options, self.options)
        found = find_beside(path, (PARAMS,))
        if not found and any(path.rglob(_CROSS)):
            raise BadConfig(
                str(path),
                expected="a dictionary that reads one layer",
                seen=f"a cross-layer transcoder or a crosscoder ({_CROSS})",
                fix="give a folder in resid_post, attn_out, mlp_out or transcoder",
            )
        check_one(path, found, options, PARAMS)
        return sorted((_source(folder, options) for folder in found), key=_order)


@dataclass(frozen=True, slots=True)
class _Named:
    """The facts in the names of the folders; each may be missing."""

    kind: str | None = None
    of_all_layers: bool = False
    layer: int | None = None
    width: int | None = None
    l0: str | None = None


def _named(folder: Path) -> _Named:
    parts = folder.absolute().parts[::-1]
    of_kind = next((hit for part in parts if (hit := re.fullmatch(rf"({'|'.join(_SITES)})(_all)?", part))), None)
    kind, whole = (of_kind[1], bool(of_kind[2])) if of_kind else (None, False)
    found = next((hit for part in parts if (hit := _FOLDER.fullmatch(part))), None)
    if not found:
        return _Named(kind, whole)
    return _Named(kind, whole, int(found[1]), int(found[2]) * _SIZES[found[3]], found[4])


def _source(folder: Path, options: Mapping[str, Any]) -> SaeSource:
    file = folder / PARAMS
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    _check_kind(folder, config)
    tensors, named = open_safetensors(file), _named(folder)
    site = _site(folder, config, named, options)
    weights = jumprelu(file, tensors, TENSORS, transcoder=site.reconstructs is not None)
    if _has_skip(file, config, tensors):
        stored = matrix(file, tensors, SKIP, (weights.d_model, weights.d_out))
        weights = replace(weights, w_skip=stored.T.read())
    _check_width(file, weights.width, config.get("width"), named.width)
    l0 = _l0(options.get("l0"), config.get("l0"), named.l0)
    declared = {"l0": l0} if l0 is not None else {}
    kind = "sae" if site.reconstructs is None else "transcoder"
    word = f"{l0:g}" if l0 is not None else named.l0 or folder.name
    parts = [str(site), kind, f"width-{weights.width}", f"l0-{word}"]
    parts += ["affine"] * (weights.w_skip is not None) + ["all"] * named.of_all_layers
    label = options.get("name") or "/".join(parts)
    return SaeSource(weights, site, l0, declared, label, format=GemmaScope2Reader.format)


def _order(source: SaeSource) -> tuple[str, int, str, int, float, str]:
    block = parse_site(source.site.path)
    place = (block.layer, block.within) if block else (-1, source.site.path)
    return (source.site.model, *place, source.weights.width, source.l0 or 0.0, source.name)


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    architecture = config.get("architecture", "jump_relu")
    if str(architecture).replace("_", "") != "jumprelu":
        raise BadConfig(
            f"{folder / 'config.json'}: architecture",
            expected="jump_relu",
            seen=repr(architecture),
            fix="set the format of these files",
        )
    kind = config.get("type", "sae")
    if re.search("clt|cross", str(kind)):
        raise BadConfig(
            f"{folder / 'config.json'}: type",
            expected="sae or transcoder, which read one layer",
            seen=repr(kind),
            fix="give a folder in resid_post, attn_out, mlp_out or transcoder",
        )


def _site(folder: Path, config: Mapping[str, Any], named: _Named, options: Mapping[str, Any]) -> Site:
    reads, makes = _SITES.get(named.kind or "", (None, None)) if named.layer is not None else (None, None)
    hook = _hook(config.get("hf_hook_point_in")) or (reads and reads.format(layer=named.layer))
    out = _hook(config.get("hf_hook_point_out")) or (makes and makes.format(layer=named.layer))
    out = options.get("out") or out
    if options.get("site") and out == hook and not options.get("out"):
        out = None
    return site_from(folder, options, hook=hook, out=out, model=_model(folder, config))


def _hook(name: Any) -> str | None:
    """``model.layers.11.self_attn.o_proj.input`` → ``layers.11.self_attn.o_proj:in``."""
    if not isinstance(name, str) or not name:
        return None
    bare = f"{name.removesuffix('.input')}:in" if name.endswith(".input") else name.removesuffix(".output")
    return site_of_hook(bare) or bare


def _model(folder: Path, config: Mapping[str, Any]) -> str | None:
    if isinstance(config.get("model_name"), str):
        return str(config["model_name"]).replace("gemma-v3-", "gemma-3-")
    pattern = re.compile(r"(?:.*--)?gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)")
    found = next((hit for part in folder.absolute().parts[::-1] if (hit := pattern.fullmatch(part))), None)
    return f"gemma-3-{found[1]}-{found[2]}" if found else None


def _has_skip(file: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> bool:
    claimed = config.get("affine_connection", SKIP in tensors)
    if bool(claimed) != (SKIP in tensors):
        raise BadFile(
            f"{file}: {SKIP}",
            expected="this tensor if and only if config.json has affine_connection true",
            seen=f"affine_connection {claimed!r} in config.json, and {'this' if SKIP in tensors else 'no such'} tensor",
            fix="check that config.json belongs to this file",
        )
    return SKIP in tensors


def _check_width(file: Path, width: int, claimed: Any, named: int | None) -> None:
    wrong = isinstance(claimed, int) and claimed != width
    if wrong or (named is not None and not 0.9 * named <= width <= 1.1 * named):
        says = f"{claimed} latents, as in config.json" if wrong else f"about {named} latents, as in the folder's name"
        raise BadShape(
            f"{file}: w_enc", expected=says, seen=str(width), fix="check the path, or download the file again"
        )


def _l0(given: Any, configured: Any, named: str | None) -> float | None:
    """L0 from the option, else from the config, else from the folder's name if it is a number there."""
    for value in (given, configured):
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return float(named) if named and named.isdecimal() else None
