"""Writes the files of a trained dictionary: an SAE in Gemma Scope's folder layout, and a card with its measurements.

``inspect`` and the fit check compare a dictionary with its card, so the card's figures are measured on held-out text only.
Does no training. Writes ``layer_15/width_2k/average_l0_32/{params.npz,card.json}``, each file atomically.
"""

from __future__ import annotations

import datetime
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
from numpy.typing import NDArray

from evalkit.records import Site
from evalkit.sources.sae.weights import SaeWeights
from evalkit.util.atomic_files import write_bytes
from evalkit.util.tensor_files import whole

__all__ = ["Card", "CorpusPart", "sae_folder", "write_card", "write_sae"]


@dataclass(frozen=True, slots=True)
class CorpusPart:
    """One source of the training text and its licence."""

    source: str
    licence: str
    documents: int


@dataclass(frozen=True, slots=True)
class Card:
    """How a dictionary was trained, and its measurements.

    ``n_tokens``, ``n_distinct_tokens``: training tokens with and without repeats.
    ``fvu``, ``l0``, ``alive_share``: measured on ``held_out_tokens`` tokens of documents that were not trained on.
    ``further``: fields that only some kinds of dictionaries have.
    """

    model: str
    site: str
    name: str
    kind: str
    command: str
    corpus: Sequence[CorpusPart]
    n_tokens: int
    n_distinct_tokens: int
    held_out_tokens: int
    fvu: float
    l0: float | None
    alive_share: float | None
    width: int
    seed: int
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).date().isoformat())
    further: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The card as JSON: floats rounded to four decimal places, ``further`` merged in, None left out."""
        values = {key: _rounded(value) for key, value in asdict(self).items() if key != "further" and value is not None}
        return json.dumps({**values, **self.further}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def sae_folder(root: Path, site: Site, width: int, l0: float) -> Path:
    """The folder in Gemma Scope's layout for this site, width and measured L0. Width 2,048 is "2k", 3,000 is "3000"."""
    layer = re.fullmatch(r"(?:.*\.)?layers\.(\d+)", site.path)
    first = f"layer_{layer[1]}" if layer else site.path
    size = f"{width // 1024}k" if width % 1024 == 0 else str(width)
    return root / first / f"width_{size}" / f"average_l0_{round(l0)}"


def write_sae(root: Path, weights: SaeWeights, card: Card) -> Path:
    """Write an SAE and its card under ``root``; returns its folder. Matrices are float16, biases and threshold float32.

    Equal weights give equal bytes. Raises StorageError.
    """
    threshold = weights.threshold if weights.threshold is not None else weights.b_enc.new_zeros(weights.width)
    matrices = {"W_enc": whole(weights.w_enc).half(), "W_dec": whole(weights.w_dec).half()}
    vectors = {"b_enc": weights.b_enc, "b_dec": weights.b_dec, "threshold": threshold}
    folder = sae_folder(root, Site(card.model, card.site), weights.width, card.l0 or 0.0)
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in {**matrices, **vectors}.items()}
    write_bytes(folder / "params.npz", _npz(arrays))
    write_card(folder, card)
    return folder


def write_card(folder: Path, card: Card) -> None:
    """Write ``card.json``. Raises StorageError."""
    write_bytes(folder / "card.json", card.to_json().encode())


def _npz(arrays: dict[str, NDArray[Any]]) -> bytes:
    """A compressed .npz with a fixed time stamp, so that equal arrays give equal bytes."""
    whole = io.BytesIO()
    with ZipFile(whole, "w", ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            one = io.BytesIO()
            whole_array = np.ascontiguousarray(array)
            np.lib.format.write_array(one, whole_array, allow_pickle=False)  # type: ignore[no-untyped-call]
            entry = ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = ZIP_DEFLATED
            archive.writestr(entry, one.getvalue())
    return whole.getvalue()


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
