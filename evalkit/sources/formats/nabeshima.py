"""Reads the Matryoshka SAEs of N. Nabeshima: one state dict, a file of torch or .safetensors.

It holds W_enc (d, n), b_enc (n,), W_dec (n, d), b_dec (d,), normalizer.running_avg (1,) and mostly sq_act_running_avg (n,).
``running_avg`` is the mean length of a state: the input is multiplied by √d over it, and the reconstruction divided again.
An activation is relu of the pre-activation times the length of the latent's decoder row, in the units of the scaled input.
(Upstream multiplies activations by ``running_avg`` / √(number of latents asked for) as well; here no activation depends on
which others are asked for.) Site and model come from options, a ``card.json`` beside the file, or names such as
``layers.8.pt``. Source: https://github.com/noanabeshima/matryoshka-saes, ``sae.py`` at 7b80f5f.
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
_DEEPEST = 2  # folders below the one named
_PEEK = 1 << 20  # bytes in which the names of tensors are looked for


class NabeshimaReader:
    """Opens one state dict, or all at or below a folder."""

    format = "nabeshima"
    options = COMMON

    def matches(self, path: Path) -> bool:
        """Whether a file at or below ``path`` names the tensor ``normalizer.running_avg``; nothing is unpickled."""
        try:
            return bool(_find(path))
        except OSError:
            return False

    def read(self, path: Path, **options: Any) -> Sequence[SaeSource]:
        """Every dictionary at or below ``path``; a file that is named is read whatever it is called.

        ``options``: ``site``, ``model``, ``subject`` (the model's name where nothing else says it), ``l0`` and ``name``
        (one only). Raises MissingFile, BadFile, BadShape (naming file and tensor), BadConfig.
        """
        check_options(path, options, self.options)
        found = [path] if path.is_file() else _find(path)
        check_one(path, found, options, f".pt or .safetensors of {AVERAGE}")
        return [_source(file.absolute(), options) for file in found]


def read_weights(file: Path) -> tuple[SaeWeights, Scale]:
    """The weights in one file, matrices on disk, and what its input is multiplied by.

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
            expected="the mean length of a state, above 0",
            seen=f"{average:g}",
            fix="take a dictionary that has been trained",
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
    """Whether the name of the tensor stands where torch and safetensors keep names."""
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
