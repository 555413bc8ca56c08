"""Reads SAEs and transcoders in Gemma Scope's on-disk layout: ``layer_12/width_16k/average_l0_82/params.npz``.

Each file holds W_enc (d, n), b_enc (n,), W_dec (n, d), b_dec (d,), threshold (n,). A folder above several gives all of
them, sorted by layer, width and L0. The site comes from the repository's name (``-res``, ``-att``, ``-mlp``,
``-transcoders``) or from a folder ``embedding``, the width and L0 from the path; an optional ``card.json`` beside the file
(``model``, ``site``, ``fvu``, ``l0``) and the options come before both. Matrices stay on disk; no file can run code. Knows
nothing of the hub.

Layout and sites: Gemma Scope, arXiv 2408.05147, sections 3 and 4, and the cards of google/gemma-scope-2b-pt-res and
google/gemma-scope-2b-pt-transcoders. From the descriptions, not verified with the published weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.errors import BadConfig, BadFile, BadShape, MissingFile
from evalkit.records import Site
from evalkit.sources.formats.common import COMMON, check_options, read_card
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.transforms import RmsNorm
from evalkit.sources.sae.weights import SaeWeights
from evalkit.subject.sites import site_of_hook
from evalkit.util.npz_files import open_npz
from evalkit.util.tensor_files import Stored, whole

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GemmaScopeReader", "jumprelu", "read_weights"]

PARAMS = "params.npz"
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_EPS = 1e-6  # of every RMSNorm in Gemma 2
_SIZES = {"": 1, "k": 2**10, "m": 2**20}
_DEEPEST = 3  # folders between one that is asked about and its params.npz


class GemmaScopeReader:
    """Opens a ``params.npz``, its folder, or a folder above several of them."""

    format = "gemma-scope"
    options = COMMON | {"out"}

    def matches(self, path: Path) -> bool:
        """Whether there is a ``params.npz`` at or (up to three folders) below ``path``."""
        try:
            if path.name == PARAMS:
                return path.is_file()
            return any(any(path.glob("/".join([*"*" * depth, PARAMS]))) for depth in range(_DEEPEST + 1))
        except OSError:
            return False

    def read(self, path: Path, **options: Any) -> Sequence[SaeSource]:
        """Every SAE at or below ``path``.

        ``options``: ``model``, ``site`` and ``out`` (what it reads and, for a transcoder, reconstructs) instead of what
        path and card say; ``l0`` and ``name`` (one SAE only); ``subject``, the model's name where nothing else says it.
        Raises MissingFile, BadFile, BadShape (naming file and tensor), BadConfig (an unknown option, no site).
        """
        check_options(path, options, self.options)
        files = sorted(_find(path), key=_sort_key)
        if not files:
            raise MissingFile(
                str(path),
                expected="a params.npz, or a folder such as layer_12/width_16k/average_l0_82 with one",
                seen="no params.npz there" if path.exists() else "no such file or folder",
                fix="check the path, or download the folder again",
            )
        if len(files) > 1 and {"name", "l0"} & options.keys():
            raise BadConfig(
                str(path),
                expected="one SAE with the options name= and l0=",
                seen=f"{len(files)} SAEs",
                fix="name one folder",
            )
        return [_source(file, options) for file in files]


def read_weights(file: Path) -> SaeWeights:
    """The weights of an SAE in one ``params.npz``, all in memory, float32. Raises MissingFile, BadFile, BadShape."""
    weights = jumprelu(file, open_npz(file))
    return replace(weights, w_enc=whole(weights.w_enc), w_dec=whole(weights.w_dec))


def jumprelu(
    file: Path,
    tensors: Mapping[str, Stored],
    names: Sequence[str] = TENSORS,
    *,
    transcoder: bool = False,
) -> SaeWeights:
    """The record of the five tensors, which are called ``names``; vectors are read, matrices stay where they are.

    Shapes: (d_in, n), (n,), (n, d_out), (d_out,), (n,), with d_out = d_in but for a ``transcoder``.
    Raises BadFile (one missing, not finite), BadShape.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise BadFile(
            f"{file}: {missing[0]}",
            expected=f"the tensors {', '.join(names)}",
            seen=f"only {', '.join(sorted(tensors)) or 'an empty file'}"[:300],
            fix="download or save the dictionary again",
        )
    w_enc, b_enc, w_dec, b_dec, threshold = names
    shape = tensors[w_enc].shape
    if len(shape) != 2 or 0 in shape:
        raise _wrong_shape(file, w_enc, "a matrix (d_model, width)", shape)
    out = tensors[w_dec].shape
    d_out = out[1] if transcoder and len(out) == 2 and out[1] else shape[0]
    expected = {b_enc: (shape[1],), w_dec: (shape[1], d_out), b_dec: (d_out,), threshold: (shape[1],)}
    for name, wanted in expected.items():
        if tensors[name].shape != wanted:
            raise _wrong_shape(file, name, f"shape {wanted}, as {w_enc} is {shape}", tensors[name].shape)
    for name in names:
        tensors[name].check_dtype()
    read: dict[str, Tensor] = {name: tensors[name].read() for name in (b_enc, b_dec, threshold)}
    return SaeWeights(tensors[w_enc], read[b_enc], tensors[w_dec], read[b_dec], read[threshold])


@dataclass(frozen=True, slots=True)
class _Place:
    """Where SAEs of one repository read, what they reconstruct, and how their input is prepared."""

    site: str
    out: str | None = None
    normed: bool = False  # by the root mean square, without a gain


_PLACES = {
    "res": _Place("layers.{layer}"),
    "att": _Place("layers.{layer}.self_attn.o_proj:in"),  # the heads' outputs side by side, before W_O
    "mlp": _Place("layers.{layer}.post_feedforward_layernorm"),  # as it is added to the residual stream
    "transcoders": _Place(  # the pre-MLP norm's gain is folded into the MLP, so the input has the norm without it
        "layers.{layer}.pre_mlp_norm:in", "layers.{layer}.post_feedforward_layernorm", normed=True
    ),
    "embedding": _Place("embed"),  # rows of the embedding matrix, before Gemma multiplies them by √d
}


def _source(file: Path, options: Mapping[str, Any]) -> SaeSource:
    card = read_card(file.parent)
    place = _place_of(file, card, options)
    weights = jumprelu(file, open_npz(file), transcoder=place.out is not None)
    _check_width(file, weights.width)
    l0 = options.get("l0", _l0_of(file))
    if l0 is None and isinstance(card.get("l0"), int | float):
        l0 = round(card["l0"])
    declared = {key: card[key] for key in ("fvu", "l0", "alive_share") if isinstance(card.get(key), int | float)}
    return SaeSource(
        weights,
        Site(_model_of(file, card, options), place.site, place.out),
        None if l0 is None else float(l0),
        declared,
        options.get("name"),
        (RmsNorm(_EPS),) if place.normed else (),
        GemmaScopeReader.format,
    )


def _find(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from path.rglob(PARAMS)


def _sort_key(file: Path) -> tuple[int, int, float, str]:
    layer = _part(file, r"layer_(\d+)")
    return (int(layer[1]) if layer else -1, _width_of(file) or 0, _l0_of(file) or 0.0, str(file))


def _part(file: Path, pattern: str) -> re.Match[str] | None:
    """The innermost folder above the file whose whole name is ``pattern``: folders further up may be called anything."""
    return next((found for name in reversed(file.parts[:-1]) if (found := re.fullmatch(pattern, name))), None)


def _repository(file: Path) -> re.Match[str] | None:
    """The repository's name, which is a folder of its own or, in a cache of the hub, the end of one."""
    return _part(file, r"(?:.*--)?gemma-scope-(2b|9b|27b)-(pt|it)-(\w+).*")


def _width_of(file: Path) -> int | None:
    """1k is 1,024; 1m is 1,048,576."""
    found = _part(file, r"width_(\d+)([km]?)")
    return int(found[1]) * _SIZES[found[2]] if found else None


def _l0_of(file: Path) -> float | None:
    found = _part(file, r"(?:average_)?l0_(\d+(?:\.\d+)?)")
    return float(found[1]) if found else None


def _place_of(file: Path, card: Mapping[str, Any], options: Mapping[str, Any]) -> _Place:
    repository, layer = _repository(file), _part(file, r"layer_(\d+)")
    kind = "embedding" if _part(file, "embedding") else repository[3] if repository else "res"
    known = _PLACES.get(kind) if kind == "embedding" or layer else None
    number = int(layer[1]) if layer else 0
    given = options.get("site") or card.get("site")
    if given:
        text = str(given).split("/")[-1]
        site = site_of_hook(text) or text
    elif known:
        site = known.site.format(layer=number)
    else:
        raise BadConfig(
            str(file),
            expected="a folder layer_N or embedding of Gemma Scope, a card.json with a site, or the option site=",
            seen=f"a repository of kind {kind!r}" if layer else "none of these",
            fix="name the module path it reads, such as site=layers.12",
        )
    out = known.out.format(layer=number) if known and known.out else None
    if options.get("out"):
        out = site_of_hook(str(options["out"])) or str(options["out"])
    return _Place(site, None if out == site else out, bool(known and known.normed))


def _model_of(file: Path, card: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    if model := options.get("model") or card.get("model"):
        return str(model)
    if found := _repository(file):
        return f"gemma-2-{found[1]}{'-it' if found[2] == 'it' else ''}"
    if options.get("subject"):
        return str(options["subject"])
    raise BadConfig(
        str(file),
        expected="a folder gemma-scope-*, a card.json with a model, or the option model=",
        seen="none of these",
        fix="name the subject model, such as model=gemma-2-2b",
    )


def _check_width(file: Path, width: int) -> None:
    named = _width_of(file)
    if named is not None and not 0.9 * named <= width <= 1.1 * named:
        raise BadShape(
            f"{file}: W_enc",
            expected=f"about {named} latents, as the folder says",
            seen=str(width),
            fix="check the path",
        )


def _wrong_shape(file: Path, name: str, expected: str, seen: tuple[int, ...]) -> BadShape:
    return BadShape(
        f"{file}: {name}", expected=expected, seen=f"shape {seen}", fix="check that the tensor is not transposed or cut"
    )
