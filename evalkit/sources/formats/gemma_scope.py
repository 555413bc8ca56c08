"""Reads SAEs and transcoders in Gemma Scope's on-disk layout: ``layer_12/width_16k/average_l0_82/params.npz``.

Each file holds W_enc (d, n), b_enc (n,), W_dec (n, d), b_dec (d,), threshold (n,). A folder above several opens all of
them, sorted by layer, width and L0. The site comes from the repository's name (``-res``, ``-att``, ``-mlp``,
``-transcoders``) or from a folder ``embedding``; width and L0 come from the path. The options and an optional ``card.json``
in the same folder (``model``, ``site``, ``fvu``, ``l0``) take precedence. Matrices stay on disk; opening a file cannot run
code from it. Knows nothing of the hub; writes nothing.

Layout and sites: Gemma Scope, arXiv 2408.05147, sections 3 and 4, and the cards of google/gemma-scope-2b-pt-res and
google/gemma-scope-2b-pt-transcoders. Written from these descriptions, not verified on the published weights.
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
_EPS = 1e-6  # eps of every RMSNorm in Gemma 2
_SIZES = {"": 1, "k": 2**10, "m": 2**20}
_DEEPEST = 3  # levels of subfolders in which ``matches`` looks for params.npz


class GemmaScopeReader:
    """Opens a ``params.npz``, its folder, or a folder above several."""

    format = "gemma-scope"
    options = COMMON | {"out"}

    def matches(self, path: Path) -> bool:
        """Whether there is a ``params.npz`` at ``path`` or up to three levels below."""
        try:
            if path.name == PARAMS:
                return path.is_file()
            return any(any(path.glob("/".join([*"*" * depth, PARAMS]))) for depth in range(_DEEPEST + 1))
        except OSError:
            return False

    def read(self, path: Path, **options: Any) -> Sequence[SaeSource]:
        """Every SAE and transcoder at or below ``path``.

        ``options``: ``model``, ``site`` (where it reads) and ``out`` (where a transcoder writes) override path and card;
        ``l0`` and ``name`` are for a single dictionary; ``subject`` is the model's name if nothing else gives it.
        Raises MissingFile, BadFile, BadShape (naming file and tensor), BadConfig (an unknown option, no site).
        """
        check_options(path, options, self.options)
        files = sorted(_find(path), key=_sort_key)
        if not files:
            raise MissingFile(
                str(path),
                expected="a params.npz, or a folder such as layer_12/width_16k/average_l0_82 with one",
                seen="no params.npz in this folder" if path.exists() else "no such file or folder",
                fix="check the path, or download the folder again",
            )
        if len(files) > 1 and {"name", "l0"} & options.keys():
            raise BadConfig(
                str(path),
                expected="one SAE, because the option name= or l0= is given",
                seen=f"{len(files)} SAEs",
                fix="give the folder of one SAE",
            )
        return [_source(file, options) for file in files]


def read_weights(file: Path) -> SaeWeights:
    """Read the weights in one ``params.npz`` into memory, as float32. Raises MissingFile, BadFile, BadShape."""
    weights = jumprelu(file, open_npz(file))
    return replace(weights, w_enc=whole(weights.w_enc), w_dec=whole(weights.w_dec))


def jumprelu(
    file: Path,
    tensors: Mapping[str, Stored],
    names: Sequence[str] = TENSORS,
    *,
    transcoder: bool = False,
) -> SaeWeights:
    """The weights made of the five tensors in ``names``; vectors are read, matrices are not.

    Shapes: (d_in, n), (n,), (n, d_out), (d_out,), (n,); d_out may differ from d_in only for a ``transcoder``.
    Raises BadFile (a tensor is missing or not finite), BadShape.
    """
    missing = [name for name in names if name not in tensors]
    if missing:
        raise BadFile(
            f"{file}: {missing[0]}",
            expected=f"the tensors {', '.join(names)}",
            seen=f"only {', '.join(sorted(tensors)) or 'no tensors'}"[:300],
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
    """Where the SAEs of one repository read, what they reconstruct, and whether their input is normalised."""

    site: str
    out: str | None = None
    normed: bool = False  # input divided by its root mean square, without a gain


_PLACES = {
    "res": _Place("layers.{layer}"),
    "att": _Place("layers.{layer}.self_attn.o_proj:in"),  # the heads' outputs side by side, before W_O
    "mlp": _Place("layers.{layer}.post_feedforward_layernorm"),  # the MLP's output as added to the residual stream
    "transcoders": _Place(  # the gain of the pre-MLP norm is folded into the MLP, so the input is normed without it
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
    """Match of the innermost parent folder whose whole name fits ``pattern``; folders further up may have any name."""
    return next((found for name in reversed(file.parts[:-1]) if (found := re.fullmatch(pattern, name))), None)


def _repository(file: Path) -> re.Match[str] | None:
    """Match of the repository's name: a folder's name or, in a cache of the hub, the end of one."""
    return _part(file, r"(?:.*--)?gemma-scope-(2b|9b|27b)-(pt|it)-(\w+).*")


def _width_of(file: Path) -> int | None:
    """The width in the folder's name; 1k is 1,024, 1m is 1,048,576."""
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
            fix="give the path of the module that it reads, such as site=layers.12",
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
        fix="give the subject model, such as model=gemma-2-2b",
    )


def _check_width(file: Path, width: int) -> None:
    named = _width_of(file)
    if named is not None and not 0.9 * named <= width <= 1.1 * named:
        raise BadShape(
            f"{file}: W_enc",
            expected=f"about {named} latents, as in the folder's name",
            seen=str(width),
            fix="check the path",
        )


def _wrong_shape(file: Path, name: str, expected: str, seen: tuple[int, ...]) -> BadShape:
    return BadShape(
        f"{file}: {name}",
        expected=expected,
        seen=f"shape {seen}",
        fix="check that the tensor is not transposed or truncated",
    )
