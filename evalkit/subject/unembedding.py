"""The effect of a direction of the residual stream on the logits: the final norm's gain, then the unembedding's rows.

``Subject`` does not load the output head, so the unembedding is read from the model's checkpoint, row by row and only when
it is needed. A checkpoint without an output head shares the token embedding, as in transformers. Knows names of tensors;
nothing of sites, features, tokens or text. Reads safetensors and torch checkpoints, never the network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from evalkit.records import SubjectInfo
from evalkit.util.tensor_files import Stored, open_safetensors, open_torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["OutputHead", "read_output_head"]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # one file, or several with an .index.json
_HEADS = ("lm_head", "embed_out", "output")
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
_LAYER_NORMS = ("ln_f", "final_layer_norm", "final_layernorm")  # RMS norms are measured, not read
_IN_BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """The final norm and the unembedding of a model.

    ``unembedding``: (vocab, d_model), on disk.
    ``gain``: (d_model,) factors of the final norm.
    ``centred``: whether the final norm subtracts the mean over dimensions first (a LayerNorm).
    """

    unembedding: Stored
    gain: Tensor
    centred: bool = False

    def before_unembedding(self, directions: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Directions after the final norm, without its positive scale, which differs per token."""
        if self.centred:
            directions = directions - directions.mean(dim=-1, keepdim=True)
        return directions * self.gain.to(directions)


def read_output_head(
    model: str, info: SubjectInfo, *, vocab_size: int, revision: str | None = None
) -> OutputHead | None:
    """The output head of ``model``, a folder or the hub id of a model in the local cache; None if no head is found.

    That is also the case if head or final norm cannot be identified by name and shape, or if the head is not stored in
    floating point. Raises BadFile, MissingFile (a shard).
    """
    names, tensors = _checkpoint(model, revision)
    shape = (vocab_size, info.d_model)
    rows = _first(names, tensors, _HEADS, shape)
    if rows is None and not any(_is(name, _HEADS) for name in names):
        rows = _first(names, tensors, _EMBEDDINGS, shape)
    if rows is None:
        return None
    if info.norm_gain.size:
        return OutputHead(rows, torch.from_numpy(info.norm_gain))
    gain = _first(names, tensors, _LAYER_NORMS, (info.d_model,))
    return None if gain is None else OutputHead(rows, gain.read(), centred=True)


def _is(name: str, wanted: Iterable[str]) -> bool:
    """Whether ``name`` is the weight of a module with one of these names, outside the blocks."""
    parts = name.split(".")
    return len(parts) > 1 and parts[-1] == "weight" and parts[-2] in wanted and not _IN_BLOCK.search(name)


def _first(
    names: Mapping[str, Path], tensors: dict[Path, dict[str, Stored]], wanted: Iterable[str], shape: tuple[int, ...]
) -> Stored | None:
    """The first weight of the wanted modules that has this shape; None if none has."""
    for module in wanted:
        for name in sorted((name for name in names if _is(name, (module,))), key=lambda name: (len(name), name)):
            path = names[name]
            if path not in tensors:
                tensors[path] = open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)
            stored = tensors[path].get(name)
            if stored is not None and stored.shape == shape:
                return stored
    return None


def _checkpoint(model: str, revision: str | None) -> tuple[dict[str, Path], dict[Path, dict[str, Stored]]]:
    """The file of every tensor, by the tensor's name, and the tensors of the files that had to be opened."""
    for weights in _WEIGHTS:
        if (index := _local(model, f"{weights}.index.json", revision)) is not None:
            listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {name: index.parent / file for name, file in listed.items()}, {}
        if (path := _local(model, weights, revision)) is not None:
            tensors = open_safetensors(path) if path.suffix == ".safetensors" else open_torch(path)
            return dict.fromkeys(_names(path, tensors), path), {path: tensors}
    return {}, {}


def _names(path: Path, tensors: Mapping[str, Stored]) -> list[str]:
    """All tensors of a file, also those that are not floating point."""
    if path.suffix != ".safetensors":
        return list(tensors)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _local(model: str, name: str, revision: str | None) -> Path | None:
    """A file of the model on this machine: in its folder, or in the hub's cache."""
    if Path(model).exists():
        path = Path(model) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, name, revision=revision)
    return Path(found) if isinstance(found, str) else None
