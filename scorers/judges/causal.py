"""Log-probabilities of texts after a common prefix, under a causal language model of transformers.

The prefix goes through the model once, and its keys and values are reused for every text. A text is padded on the right to
a length that depends only on its own length, and batches consist of whole blocks of rows. Kernel shapes, and therefore the
exact bits of a result, depend only on the prefix and the text. Because the model is causal, padding does not affect the
tokens before it. Reads model files, writes nothing; does not know explanations or judges.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import BadConfig, BadFile, MissingFile, require
from scorers.judges.minilm import no_bars

__all__ = ["CausalModel"]

_LENGTH_STEP = 8  # tokens; lengths are rounded up to a multiple of this
_ROW_BLOCK = 8  # rows; measured: batches of any number of whole blocks give the same bits on a CPU


class CausalModel:
    """A loaded model.

    ``model``: a folder, a ``.gguf`` file or a hub id.
    ``dtype``: "bfloat16" or "float32".
    ``device``: "auto", "cpu" or "cuda".
    ``revision``: commit, branch or tag on the hub.
    ``batch_size``: rows, rounded up to whole blocks of 8.

    Raises MissingFile, BadFile, BadConfig.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "bfloat16",
        device: str = "auto",
        revision: str | None = None,
        batch_size: int = 16,
    ) -> None:
        torch = require("torch", "model")
        if dtype not in ("bfloat16", "float32"):
            raise BadConfig("dtype", expected="bfloat16 or float32", seen=repr(dtype), fix="use one of these")
        if batch_size < 1:
            raise BadConfig("batch_size", expected="at least 1 row", seen=str(batch_size), fix="use 16")
        self._torch = torch
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._rows = -(-batch_size // _ROW_BLOCK) * _ROW_BLOCK
        loaded, self._tokenizer = _load(model, getattr(torch, dtype), revision)
        self._model: Any = loaded.to(self.device).eval().requires_grad_(False)
        self.longest: int | None = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)

    def prefix_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a prefix, with the special tokens that the tokenizer adds at the start but not at the end."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        last = self._tokenizer.eos_token_id
        return tuple(ids[:-1] if ids and ids[-1] == last else ids)

    def ids(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of texts that follow a prefix, without special tokens."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [tuple(ids) for ids in encoded]

    def log_probabilities(
        self,
        prefix: tuple[int, ...],
        texts: Sequence[tuple[int, ...]],
        done: Callable[[int], None] = lambda rows: None,
    ) -> list[NDArray[np.float32]]:
        """The natural log-probability of every token of each text, given the prefix and the text's tokens before it.

        ``prefix`` and each text need at least one token each and at most ``longest`` together. Returns one array (token,)
        per text. ``done`` is called with the number of rows of every finished batch.
        """
        found: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(texts)
        with self._torch.inference_mode():
            cache = self._cache(prefix[:-1])
            for length, chosen in sorted(self._by_length(texts, len(prefix)).items()):
                for first in range(0, len(chosen), self._rows):
                    batch = chosen[first : first + self._rows]
                    rows = self._forward(prefix, cache, [texts[index] for index in batch], length)
                    for index, row in zip(batch, rows, strict=True):
                        found[index] = row
                    done(len(batch))
        return found

    def _by_length(self, texts: Sequence[tuple[int, ...]], before: int) -> dict[int, list[int]]:
        """Indices of the texts, by the length to which they are padded."""
        found: dict[int, list[int]] = {}
        for index, text in enumerate(texts):
            length = -(-len(text) // _LENGTH_STEP) * _LENGTH_STEP
            fits = self.longest is None or before + length <= self.longest
            found.setdefault(length if fits else len(text), []).append(index)
        return found

    def _cache(self, ids: tuple[int, ...]) -> Any:
        """Keys and values of these tokens; None if there are no tokens or the cache cannot be copied to all rows."""
        if not ids:
            return None
        tokens = self._torch.tensor([ids], device=self.device)
        cache = self._model(input_ids=tokens, use_cache=True).past_key_values
        layers = getattr(cache, "layers", None)  # other kinds of layers than attention cache other data
        shared = layers and all(hasattr(layer, "batch_repeat_interleave") for layer in layers)
        return cache if shared else None

    def _forward(
        self, prefix: tuple[int, ...], cache: Any, texts: Sequence[tuple[int, ...]], length: int
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities of texts padded to one length; the last block is filled up with copies of the first text."""
        torch = self._torch
        # on a GPU the choice of kernel may depend on the number of rows, so batches are always full there
        block = _ROW_BLOCK if self.device == "cpu" else self._rows
        padded = [*texts, *[texts[0]] * (-len(texts) % block)]
        before = prefix if cache is None else prefix[-1:]  # the last token of the prefix predicts the first of the text
        rows = [(*before, *text[:-1], *[0] * (length - len(text))) for text in padded]
        if cache is not None:
            cache = copy.deepcopy(cache)  # because the forward pass writes into it
            cache.batch_repeat_interleave(len(padded))
        ids = torch.tensor(rows, device=self.device)  # (B, T)
        logits = self._model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits  # (B, T, V)
        found = []
        for row, text in zip(logits[:, len(before) - 1 :], texts, strict=False):
            chosen = torch.tensor(text, device=self.device)[:, None]
            scores = torch.log_softmax(row[: len(text)].float(), dim=-1).gather(1, chosen)
            found.append(scores[:, 0].cpu().numpy())
        return found


def _load(model: str, dtype: Any, revision: str | None) -> tuple[Any, Any]:
    """The model and its tokenizer; for a hub id, from the local cache if possible, else from the hub."""
    transformers = require("transformers", "model")
    place, options, extra = model, {"revision": revision} if revision else {}, {}
    if model.endswith(".gguf"):
        place, options = str(Path(model).parent), {"gguf_file": Path(model).name}
        extra = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    there = Path(place).exists()
    for local in (True,) if there else (True, False):
        try:
            with no_bars():
                found = transformers.AutoModelForCausalLM.from_pretrained(
                    place, dtype=dtype, local_files_only=local, trust_remote_code=False, **extra, **options
                )
                return found, transformers.AutoTokenizer.from_pretrained(
                    place, local_files_only=local, trust_remote_code=False, **options
                )
        except (OSError, ValueError, KeyError) as error:
            failure = error
    kind = BadFile if there else MissingFile
    raise kind(
        f"subject model {model}",
        expected="a causal language model in a local folder or on a hub that can be reached",
        seen=str(failure).strip().splitlines()[0][:200],
        fix="name the model that the run was collected with",
    ) from failure
