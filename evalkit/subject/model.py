"""The subject model: computes hidden states at named sites from token ids.

Loads any causal language model of transformers (hub id, local folder or GGUF file) and reads it with forward hooks. The
forward pass stops after the last requested site, so later blocks are never computed; blocks after the neighbours of the
requested sites are dropped on loading. Within ``replaced``, a site's hidden states are replaced by others. Knows nothing
of corpora, dictionaries, features or output heads. Reads model files only.

Contexts are padded on the right. The models are causal, so a valid position never sees padding and no attention mask is
passed. Batches are padded to a multiple of 128 rows before the forward pass: matrix products of other row counts are not
bit-identical on CPU, and hidden states must not depend on how the corpus is cut into batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from evalkit.errors import BadConfig, BadShape, CorpusError
from evalkit.records import SubjectInfo
from evalkit.subject.final_norm import denormalise, measure_norm, normalise
from evalkit.subject.loading import load_model
from evalkit.subject.module_paths import Places, block_index, depth_check, find_blocks, list_sites
from evalkit.subject.probe import Place, token_states, trial_ids
from evalkit.subject.sites import parse_site

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Dtype", "Subject", "denormalise", "normalise", "torch_dtype", "usable_device"]

Dtype: TypeAlias = Literal["bfloat16", "float32"]

ROWS = 128  # matrix products of a multiple of this many rows are bit-identical in every batch
ALIGN = 32  # contexts are padded on the right to a multiple of this, so that few contexts fill a multiple of ROWS


class _Captured(Exception):
    """Ends a forward pass as soon as every requested site has been read."""


class Subject:
    """A causal language model read at some of its module paths.

    ``sites`` are names such as ``layers.15`` (the residual stream after block 15), ``layers.15.mlp``,
    ``layers.15.self_attn``, or full module paths (``model.layers.15``, ``transformer.h.3.attn``). The suffix ``:in``
    means the input of the module instead of its output. ``layers.15.pre_mlp_norm`` is the norm before the MLP, whatever the
    model family calls it. ``embed`` is the stored rows of the token embedding, before the factor that some families apply.
    """

    def __init__(
        self,
        decoder: nn.Module,
        tokenizer: Any,
        *,
        name: str,
        sites: Sequence[str],
        device: str,
        keep_blocks: bool = False,
    ) -> None:
        """``keep_blocks``: keep the blocks after the sites, because the decoder is used elsewhere too."""
        self._decoder = decoder
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.sites = tuple(sites)
        self._blocks = find_blocks(decoder)
        self._n_layers = len(self._blocks)
        self._embedding: nn.Embedding = decoder.get_input_embeddings()  # type: ignore[operator]
        longest = getattr(decoder.config, "max_position_embeddings", None)
        self._max_positions = longest if longest and longest > 0 else None  # -1 stands for no limit in some configs
        width, no_gain = self._embedding.embedding_dim, np.zeros(0, dtype=np.float32)
        info = SubjectInfo(name, width, self._n_layers, no_gain, 0.0, tuple(list_sites(self._blocks)))
        ids = trial_ids(self.vocab_size, self._max_positions, getattr(tokenizer, "all_special_ids", ()))
        self._places = Places(decoder, self._blocks, self._embedding, info, ids.to(self.device))
        for site in self.sites:
            self._places.module(site)
        indices = [block_index(site) for site in self.sites]
        if self.sites and not keep_blocks and all(index is not None for index in indices):
            del self._blocks[max(index for index in indices if index is not None) + 2 :]
        decoder.eval().requires_grad_(False).to(self.device)
        self._places.try_out(self.sites)
        width = self._places.d_model or width
        gain, eps = measure_norm(decoder, width)
        widths = {site: found for site in self.sites if (found := self._places.width(site)) is not None}
        self.info = replace(info, d_model=width, norm_gain=gain, norm_eps=eps, widths=widths)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        sites: Sequence[str],
        dtype: Dtype = "bfloat16",
        device: str = "auto",
        revision: str | None = None,
        gguf_file: str | None = None,
    ) -> Subject:
        """Load a model to be read at ``sites``.

        model: a hub id, a folder, or a ``.gguf`` file
        dtype: of the computation; hidden states are returned in float32
        device: "auto" uses CUDA if there is one
        gguf_file: the name of a GGUF file inside the folder or hub repository

        Raises MissingFile, BadFile (not a model), BadConfig (no such site, unknown dtype or device).
        """
        computed_in = torch_dtype(dtype)
        if isinstance(sites, str):
            sites = (sites,)
        device = usable_device(device)
        name, decoder, tokenizer = load_model(
            model, dtype=computed_in, revision=revision, gguf_file=gguf_file, check=depth_check(sites)
        )
        return cls(decoder, tokenizer, name=name, sites=sites, device=device)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids must be below it (it may exceed the tokenizer's own vocabulary)."""
        return self._embedding.num_embeddings

    def layer_neighbours(self, site: str) -> tuple[str, ...]:
        """The same site one block earlier and one block later, where these exist; () for a site outside the blocks."""
        block = parse_site(site)
        self._places.place(site)
        if block is None:
            return ()
        near = [layer for layer in (block.layer - 1, block.layer + 1) if 0 <= layer < self._n_layers]
        return tuple(f"layers.{layer}{block.within}" for layer in near if self._reads(f"layers.{layer}{block.within}"))

    def in_stream(self, site: str) -> bool:
        """Whether the states at a site are the residual stream, or are added to it up to a positive factor."""
        return self._places.in_stream(site)

    def _reads(self, site: str) -> bool:
        try:
            self._places.place(site)
        except BadConfig:
            return False
        return True

    def hidden(
        self,
        token_ids: NDArray[np.integer[Any]],
        *,
        lengths: NDArray[np.integer[Any]] | None = None,
        sites: Sequence[str] | None = None,
    ) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """Raw hidden states, float32, on the subject's device, keyed by the site names as given.

        token_ids: (batch, pos)
        lengths: (batch,) positions of each row that hold tokens; hidden states after them are meaningless
        sites: by default those given to ``load``; their layer neighbours are allowed too

        Raises CorpusError for ids outside the vocabulary or rows that are too long, BadConfig for an unknown site.
        """
        ids = self._checked(np.asarray(token_ids), lengths)
        wanted = tuple(dict.fromkeys(self.sites if sites is None else sites))
        places = {site: self._places.place(site) for site in wanted}
        batch, pos = ids.shape
        if not batch or not pos or not wanted:
            empty = torch.zeros(batch, pos, self.info.d_model, device=self.device)
            return {site: empty.clone() for site in wanted}
        captured = self._forward(torch.from_numpy(_aligned(ids, self._max_positions)).to(self.device), places)
        # copied outside inference mode, because training differentiates through computations on them
        return {site: captured[site][:batch, :pos].to(torch.float32, copy=True).contiguous() for site in wanted}

    @contextmanager
    def replaced(self, site: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """A context in which every forward pass replaces the hidden states at ``site`` by ``replace(states)``.

        ``replace`` receives float32 states (batch, pos, d_model), padding included, and returns the same shape; the pass
        continues in the model's own dtype. Raises BadConfig for an unknown site; the forward pass raises BadShape if
        ``replace`` returns another shape.
        """
        with self._places.place(site).replaced(site, replace):
            yield

    def _forward(self, ids: Tensor, places: dict[str, Place]) -> dict[str, Tensor]:
        captured: dict[str, Tensor] = {}

        def keep(site: str, states: Any) -> None:
            found = token_states(states, *ids.shape)
            if found is None:
                raise BadShape(
                    f"site {site!r}",
                    expected="one state per token",
                    seen=f"shape {tuple(getattr(states, 'shape', ()))}",
                    fix="use the residual stream after a block, such as layers.0",
                )
            captured[site] = found
            if len(captured) == len(places):
                raise _Captured

        handles = [place.on_read(partial(keep, site)) for site, place in places.items()]
        try:
            with torch.inference_mode():
                self._decoder(input_ids=ids, use_cache=False)
        except _Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return captured

    def _checked(self, ids: NDArray[np.integer[Any]], lengths: NDArray[np.integer[Any]] | None) -> NDArray[np.int64]:
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise CorpusError(
                "token ids",
                expected="an integer array (batch, pos)",
                seen=f"shape {ids.shape}, {ids.dtype}",
                fix="pass one row of token ids per context",
            )
        checked: NDArray[np.int64] = ids.astype(np.int64)
        if lengths is not None:
            checked = np.where(np.arange(checked.shape[1]) < np.asarray(lengths).reshape(-1, 1), checked, 0)
        if checked.size and not 0 <= int(checked.min()) <= int(checked.max()) < self.vocab_size:
            bad = int(checked.min()) if checked.min() < 0 else int(checked.max())
            raise CorpusError(
                f"token id {bad}",
                expected=f"ids from 0 to {self.vocab_size - 1}, the vocabulary of {self.info.model}",
                seen=str(bad),
                fix="tokenise the corpus with this model's own tokenizer",
            )
        if self._max_positions and checked.shape[1] > self._max_positions:
            raise CorpusError(
                f"contexts of {checked.shape[1]} tokens",
                expected=f"at most {self._max_positions}, the positions of {self.info.model}",
                seen=str(checked.shape[1]),
                fix="use a smaller context length",
            )
        return checked


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype for bfloat16 or float32. Raises BadConfig for any other name."""
    if dtype not in ("bfloat16", "float32"):
        raise BadConfig(f"dtype {dtype!r}", expected="bfloat16 or float32", seen=repr(dtype), fix="use one of these")
    found: torch.dtype = getattr(torch, dtype)
    return found


def usable_device(device: str) -> str:
    """The device, with "auto" resolved. Raises BadConfig for a device that torch cannot use."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadConfig(
            f"device {device!r}",
            expected="a device that this torch can use",
            seen=str(error).splitlines()[0],
            fix="use --device cpu or auto",
        ) from error
    return device


def _aligned(ids: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """The ids padded with zeros on the right and below so that rows × positions is a multiple of ROWS."""
    batch, pos = ids.shape
    width = math.ceil(pos / ALIGN) * ALIGN
    if limit and width > limit:
        width = pos
    group = ROWS // math.gcd(width, ROWS)
    padded = np.zeros((math.ceil(batch / group) * group, width), dtype=np.int64)
    padded[:batch, :pos] = ids
    return padded
