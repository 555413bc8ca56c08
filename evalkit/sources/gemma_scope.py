"""Reads SAEs in Gemma Scope's on-disk layout: ``layer_12/width_16k/average_l0_82/params.npz``.

Each file holds W_enc (d, n), b_enc (n,), W_dec (n, d), b_dec (d,), threshold (n,). A folder above several SAEs gives
all of them, sorted by layer, width and L0. The site, width and L0 come from the path, from an optional ``card.json``
beside the file (``model``, ``site``, ``fvu``, ``l0``), or from the options ``model``, ``site``, ``l0`` and ``name``.
Knows nothing of the hub. Reads .npz with ``allow_pickle=False``: a hostile file cannot run code.
Layout: Gemma Scope, arXiv 2408.05147, https://huggingface.co/google/gemma-scope-2b-pt-res.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.errors import BadConfig, BadFile, BadShape, MissingFile
from evalkit.records import Site
from evalkit.sources.sae import SaeSource, SaeWeights

__all__ = ["GemmaScopeReader", "read_weights"]

PARAMS = "params.npz"
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
Arrays: TypeAlias = dict[str, NDArray[Any]]
_UNREADABLE = (  # what numpy and zipfile raise on torn and hostile archives
    ValueError,
    OSError,
    EOFError,
    KeyError,
    MemoryError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class GemmaScopeReader:
    """Opens a ``params.npz``, its folder, or a folder above several of them."""

    format = "gemma-scope"
    options = frozenset({"model", "site", "l0", "name", "subject"})

    def matches(self, path: Path) -> bool:
        """Whether there is a ``params.npz`` at or (up to three folders) below ``path``."""
        try:
            if path.name == PARAMS:
                return path.is_file()
            return any(any(path.glob("/".join([*"*" * depth, PARAMS]))) for depth in range(4))
        except OSError:
            return False

    def read(self, path: Path, **options: Any) -> Sequence[SaeSource]:
        """Every SAE at or below ``path``.

        ``options``: ``model`` and ``site`` (where the path and card do not say), ``l0``, ``name`` (one SAE only).
        Raises MissingFile, BadFile, BadShape (naming file and tensor), BadConfig (an unknown option, no site, a
        shared name). ``subject`` is the model's name where nothing else says it.
        """
        _check_options(path, options)
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
        sources = [_source(file, options) for file in files]
        _check_names(path, sources)
        return sources


def read_weights(file: Path) -> SaeWeights:
    """The weights in one ``params.npz``, checked, in float32. Raises MissingFile, BadFile, BadShape."""
    arrays = _load(file)
    missing = [name for name in TENSORS if name not in arrays]
    if missing:
        raise BadFile(
            f"{file}: {missing[0]}",
            expected=f"the tensors {', '.join(TENSORS)}",
            seen=f"only {', '.join(sorted(arrays)) or 'an empty file'}",
            fix="download or save the dictionary again",
        )
    if arrays["W_enc"].ndim != 2 or 0 in arrays["W_enc"].shape:
        raise _wrong_shape(file, "W_enc", "a matrix (d_model, width)", arrays["W_enc"].shape)
    d_model, width = arrays["W_enc"].shape
    shapes = {"W_enc": (d_model, width), "b_enc": (width,), "W_dec": (width, d_model), "b_dec": (d_model,)}
    tensors = {}
    for name, shape in {**shapes, "threshold": (width,)}.items():
        array = arrays[name]
        if array.shape != shape:
            raise _wrong_shape(file, name, f"shape {shape}, as W_enc is {(d_model, width)}", array.shape)
        tensors[name] = _tensor(file, name, array)
    return SaeWeights(tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], tensors["threshold"])


def _tensor(file: Path, name: str, array: NDArray[Any]) -> torch.Tensor:
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise BadShape(
            f"{file}: {name}",
            expected="float16, float32 or float64",
            seen=str(array.dtype),
            fix="save the dictionary again in floating point",
        )
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(array, dtype=np.float32)
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise BadFile(
            f"{file}: {name}",
            expected="finite numbers",
            seen=f"{bad} of {values.size} are NaN or infinite",
            fix="download or train the dictionary again",
        )
    return torch.from_numpy(values)


def _load(file: Path) -> Arrays:
    try:
        found = np.load(file, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError("a single array instead of an archive of arrays")
        with found as archive:
            return {name: archive[name] for name in archive.files if name in TENSORS}
    except FileNotFoundError as error:
        raise MissingFile(str(file), expected="a params.npz", seen="no such file", fix="check the path") from error
    except _UNREADABLE as error:
        reason = "pickled objects" if "pickle" in str(error).lower() else str(error) or type(error).__name__
        raise BadFile(
            str(file),
            expected="an .npz archive of plain arrays",
            seen=reason.splitlines()[0][:200],
            fix="download or save the dictionary again",
        ) from error


def _source(file: Path, options: dict[str, Any]) -> SaeSource:
    weights = read_weights(file)
    card = _card(file.parent / "card.json")
    l0 = options.get("l0", _l0_of(file))
    if l0 is None and isinstance(card.get("l0"), int | float):
        l0 = round(card["l0"])
    _check_width(file, weights.width)
    declared = {key: card[key] for key in ("fvu", "l0", "alive_share") if isinstance(card.get(key), int | float)}
    path = _site_of(file, card, options)
    site = Site(_model_of(file, card, options), path)
    return SaeSource(weights, site, None if l0 is None else float(l0), declared, options.get("name"))


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


def _width_of(file: Path) -> int | None:
    """1k is 1,024; 1m is 1,048,576."""
    found = _part(file, r"width_(\d+)([km]?)")
    return int(found[1]) * {"": 1, "k": 2**10, "m": 2**20}[found[2]] if found else None


def _l0_of(file: Path) -> float | None:
    found = _part(file, r"(?:average_)?l0_(\d+(?:\.\d+)?)")
    return float(found[1]) if found else None


def _site_of(file: Path, card: dict[str, Any], options: dict[str, Any]) -> str:
    site = options.get("site", card.get("site"))
    if site:
        return str(site).split("/")[-1]
    layer = _part(file, r"layer_(\d+)")
    if layer and not re.search(r"-(?:mlp|att)(?=[/-])", file.as_posix()):
        return f"layers.{int(layer[1])}"
    raise BadConfig(
        str(file),
        expected="a folder layer_N of a residual-stream SAE, a card.json with a site, or the option site=",
        seen="none of these",
        fix="name the module path it reads, such as site=layers.12",
    )


def _model_of(file: Path, card: dict[str, Any], options: dict[str, Any]) -> str:
    model = options.get("model", card.get("model"))
    if model:
        return str(model)
    found = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-", file.as_posix())
    if found:
        return f"gemma-2-{found[1]}{'-it' if found[2] == 'it' else ''}"
    if options.get("subject"):
        return str(options["subject"])
    raise BadConfig(
        str(file),
        expected="a folder gemma-scope-*, a card.json with a model, or the option model=",
        seen="none of these",
        fix="name the subject model, such as model=gemma-2-2b",
    )


def _check_options(path: Path, options: dict[str, Any]) -> None:
    unknown = sorted(options.keys() - GemmaScopeReader.options)
    if unknown:
        raise BadConfig(
            str(path), expected="the options model, site, l0, name", seen=unknown[0], fix="remove or rename that option"
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


def _check_names(path: Path, sources: Sequence[SaeSource]) -> None:
    seen: set[str] = set()
    for source in sources:
        if source.name in seen:
            raise BadConfig(
                str(path),
                expected="SAEs that differ in site, width or L0",
                seen=f"two named {source.name}",
                fix="open them one by one with the option name=",
            )
        seen.add(source.name)


def _card(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise BadFile(
            str(path), expected="a JSON card", seen=str(error)[:200], fix="delete or repair the card"
        ) from error
    return card if isinstance(card, dict) else {}


def _wrong_shape(file: Path, name: str, expected: str, seen: tuple[int, ...]) -> BadShape:
    return BadShape(
        f"{file}: {name}", expected=expected, seen=f"shape {seen}", fix="check that the tensor is not transposed or cut"
    )
