"""Reads the Matryoshka SAEs of N. Nabeshima: one state dict in a torch file or a .safetensors file.

Tensors: W_enc (d, n), b_enc (n,), W_dec (n, d), b_dec (d,), normalizer.running_avg (1,), and usually sq_act_running_avg
(n,). ``running_avg`` is the mean norm of a state: the input is multiplied by √d / ``running_avg``, and the reconstruction
is divided by the same factor. An activation is relu(pre-activation) times the norm of the latent's decoder row, in the
units of the scaled input. (Upstream also multiplies activations by ``running_avg`` / √(number of requested latents). We do
not, so an activation does not depend on which other latents are requested.) Site and model come from options, a
``card.json`` in the same folder, or file names such as ``layers.8.pt``. Writes nothing.
Source: https://github.com/noanabeshima/matryoshka-saes, ``sae.py`` at 7b80f5f.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evalkit.errors import BadFile
from evalkit.sources.formats.common import COMMON, check_one, check_options, matrix, read_card, site_from, vector
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.transforms import Scale
from evalkit.sources.sae.weights import SaeWeights
from evalkit.subject.sites import site_of_hook
from evalkit.util.tensor_files import open_safetensors, open_torch

__all__ = ["NabeshimaReader", "read_weights"]

AVERAGE, SQUARES = "normalizer.running_avg", "sq_act_running_avg"
_SUFFIXES = (".pt", ".pth", ".safetensors")
_DEEPEST = 2  # levels of subfolders that are searched
_PEEK = 1 << 20  # bytes at the start of a file that are searched for the names of tensors


class NabeshimaReader:
    """Opens one state dict, or all state dicts in a folder and below."""

    format = "nabeshima"
    options = COMMON

    def matches(self, path: Path) -> bool:
        """Whether a file at or below ``path`` has the tensor ``normalizer.running_avg``. Does not unpickle anything."""
        try:
            return bool(_find(path))
        except OSError:
            return False

    def read(self, path: Path, **options: Any) -> Sequence[SaeSource]:
        """Every dictionary at or below ``path``; if ``path`` is a file, it is read whatever its name.

        ``options``: ``site``; ``model``; ``subject`` (the model's name if nothing else gives it); ``l0`` and ``name`` (only
        for a single dictionary). Raises MissingFile, BadFile, BadShape (naming file and tensor), BadConfig.
        """
        check_options(path, options, self.options)
        found = [path] if path.is_file() else _find(path)
        check_one(path, found, options, f".pt or .safetensors files that hold {AVERAGE}")
        return [_source(file.absolute(), options) for file in found]


def read_weights(file: Path) -> tuple[SaeWeights, Scale]:
    """The weights in one file (matrices stay on disk) and the scale of its input.

    Raises MissingFile, BadFile, BadShape. Source: ``RunningAvgNormalizer.normalize`` and ``MatryoshkaSAE.get_acts``.
    """
    tensors = open_safetensors(file) if file.suffix == ".safetensors" else open_torch(file)
    w_enc = matrix(file, tensors, "W_enc", (None, None))
    d_model, n = w_enc.shape
    w_dec = matrix(file, tensors, "W_dec", (n, d_model))
    if SQUARES in tensors:
        matrix(file, tensors, SQUARES, (n,))
    average = float(vector(file, tensors, AVERAGE, 1))
    if not average > 0:
        raise BadFile(
            f"{file}: {AVERAGE}",
            expected="the mean norm of a state, above 0",
            seen=f"{average:g}",
            fix="use a dictionary that has been trained",
        )
    b_enc, b_dec = vector(file, tensors, "b_enc", n), vector(file, tensors, "b_dec", d_model)
    return SaeWeights(w_enc, b_enc, w_dec, b_dec, decoder_scaled=True), Scale(math.sqrt(d_model) / average)


def _source(file: Path, options: Mapping[str, Any]) -> SaeSource:
    card = read_card(file.parent)
    weights, scale = read_weights(file)
    names = (file.stem, *(above.name for above in file.parents[:_DEEPEST]))
    hook = next((name for name in names if site_of_hook(name)), None)
    site = site_from(file, options, hook=hook, card=card)
    declared = {key: card[key] for key in ("fvu", "l0", "alive_share") if isinstance(card.get(key), int | float)}
    l0 = options.get("l0", declared.get("l0"))
    label = options.get("name") or card.get("name")
    if label is None and l0 is None:
        label = f"{site}/sae/width-{weights.width}/{file.stem}"
    return SaeSource(
        weights, site, None if l0 is None else float(l0), declared, label, (scale,), NabeshimaReader.format
    )


def _find(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in _SUFFIXES and _names_average(path) else []
    below = ("/".join([*"*" * depth, f"*{suffix}"]) for depth in range(_DEEPEST + 1) for suffix in _SUFFIXES)
    return sorted(file for pattern in below for file in path.glob(pattern) if file.is_file() and _names_average(file))


def _names_average(file: Path) -> bool:
    """Whether the tensor's name is in the part of the file where torch and safetensors store names."""
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                name = next((each for each in archive.namelist() if each.endswith("data.pkl")), None)
                if name is None:
                    return False
                with archive.open(name) as stream:
                    head = stream.read(_PEEK)
        else:
            with file.open("rb") as stream:
                head = stream.read(_PEEK)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error):
        return False
    return AVERAGE.encode() in head
