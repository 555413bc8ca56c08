"""The subject model: token ids in, hidden states at named sites out.

Loads any causal language model of transformers (hub id, local folder or GGUF file) and reads it with forward hooks. The
forward stops after the last site asked for, so later blocks are never computed, and blocks past the neighbours of the
asked sites are dropped when loading. ``replaced`` puts other states in the place of a site's own for as long as it is
open. Knows nothing of corpora, dictionaries, features or output heads. Reads model files only.

Contexts are padded on the right. The models are causal, so a valid position never sees padding and no attention mask is
passed. Batches are padded to whole groups of 128 rows before the forward: matrix products of other row counts are not
bit-identical on CPU, and hidden states must not depend on how the corpus is cut into batches.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
import torch
from torch import nn

from evalkit.errors import BadConfig, BadShape, CorpusError
from evalkit.records import SubjectInfo
from evalkit.subject.final_norm import denormalise, measure_norm, normalise
from evalkit.subject.loading import load_model

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["Dtype", "Subject", "denormalise", "normalise", "torch_dtype", "usable_device"]

Dtype: TypeAlias = Literal["bfloat16", "float32"]

ROWS = 128  # row counts that are multiples of this give the same bits whatever the batch
ALIGN = 32  # contexts are padded on the right to a multiple of this, so that few of them make whole ROWS
_EMBED = "embed"
_INPUT = ":in"  # behind a site: what goes into the module
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(0|[1-9][0-9]*)(?:\.([^:]+))?(?::in)?$")
_ALIASES = (  # one name for what families name differently; the first that is there
    ("self_attn", "attn", "attention", "self_attention"),
    ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    ("o_proj", "c_proj", "out_proj", "dense"),
    ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out"),
)
_PRE_MLP_NORM = ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm", "post_attn_norm", "norm2")


class _Captured(Exception):
    """Ends a forward as soon as every wanted site has been seen."""


class Subject:
    """A causal language model read at some of its module paths.

    ``sites`` are names such as ``layers.15`` (the residual stream after block 15), ``layers.15.mlp``,
    ``layers.15.self_attn``, or full module paths (``model.layers.15``, ``transformer.h.3.attn``); with ``:in`` behind,
    what goes into the module. ``layers.15.pre_mlp_norm`` is the norm before the MLP, whatever a family calls it; ``embed``
    are rows of the token embedding as they are stored, without the factor that some families give them.
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
        """``keep_blocks`` leaves the blocks after the sites in place, for a decoder that is used further."""
        self._decoder = decoder
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.sites = tuple(sites)
        self._blocks = _find_blocks(decoder)
        self._n_layers = len(self._blocks)
        self._embedding: nn.Embedding = decoder.get_input_embeddings()  # type: ignore[operator]
        self._max_positions = getattr(decoder.config, "max_position_embeddings", None)
        all_sites = tuple(_list_sites(self._blocks))
        gain, eps = measure_norm(decoder, self._embedding.embedding_dim)
        self.info = SubjectInfo(name, self._embedding.embedding_dim, self._n_layers, gain, eps, all_sites)
        for site in self.sites:
            self._module(site)
        indices = [_block_index(site) for site in self.sites]
        if self.sites and not keep_blocks and all(index is not None for index in indices):
            del self._blocks[max(index for index in indices if index is not None) + 2 :]
        decoder.eval().requires_grad_(False).to(self.device)

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

        ``model``: a hub id, a folder, or a ``.gguf`` file (``gguf_file`` names one inside a folder or hub repository).
        ``dtype`` is that of the computation; hidden states come back in float32. ``device`` "auto" takes CUDA if there
        is one. Raises MissingFile, BadFile (not a model), BadConfig (no such site, unknown dtype or device).
        """
        computed_in = torch_dtype(dtype)
        if isinstance(sites, str):
            sites = (sites,)
        device = usable_device(device)
        name, decoder, tokenizer = load_model(
            model, dtype=computed_in, revision=revision, gguf_file=gguf_file, check=_depth_check(sites)
        )
        return cls(decoder, tokenizer, name=name, sites=sites, device=device)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: token ids must be below it (it may exceed the tokenizer's own vocabulary)."""
        return self._embedding.num_embeddings

    def layer_neighbours(self, site: str) -> tuple[str, ...]:
        """The same place one block earlier and one later, where these exist; () for a site outside the blocks."""
        match = _BLOCK.search(site)
        self._module(site)
        if match is None:
            return ()
        index, rest = int(match[1]), f".{match[2]}" if match[2] else ""
        rest += _INPUT if site.endswith(_INPUT) else ""
        return tuple(f"layers.{near}{rest}" for near in (index - 1, index + 1) if 0 <= near < self._n_layers)

    def hidden(
        self,
        token_ids: NDArray[np.integer[Any]],
        *,
        lengths: NDArray[np.integer[Any]] | None = None,
        sites: Sequence[str] | None = None,
    ) -> dict[str, Float[Tensor, "batch pos d_model"]]:
        """Raw hidden states, float32, on the subject's device, keyed by the site names as given.

        ``token_ids`` (batch, pos). ``lengths`` (batch,): how many positions of each row are real; what stands after
        them is ignored and its hidden states mean nothing. ``sites``: by default those given to ``load``; their layer
        neighbours may be asked for too. Raises CorpusError for ids outside the vocabulary or rows too long, BadConfig
        for a site that is not there.
        """
        ids = self._checked(np.asarray(token_ids), lengths)
        wanted = tuple(dict.fromkeys(self.sites if sites is None else sites))
        modules = {site: self._module(site) for site in wanted}
        batch, pos = ids.shape
        if not batch or not pos or not wanted:
            empty = torch.zeros(batch, pos, self.info.d_model, device=self.device)
            return {site: empty.clone() for site in wanted}
        captured = self._forward(torch.from_numpy(_aligned(ids, self._max_positions)).to(self.device), modules)
        # copied outside inference mode, so that what is computed from them may be differentiated (training)
        return {site: captured[site][:batch, :pos].to(torch.float32, copy=True).contiguous() for site in wanted}

    @contextmanager
    def replaced(self, site: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While open, every forward goes on from what ``replace`` makes of the hidden states at ``site``.

        ``replace`` gets them in float32, (batch, pos, d_model), padding of the forward included, and returns as many; the
        forward goes on in the model's own dtype. Raises BadConfig for a site that is not there; the forward raises
        BadShape for an answer of another shape.
        """

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            before: Tensor = output[0] if isinstance(output, tuple) else output
            after = replace(before.float())
            if after.shape != before.shape:
                raise BadShape(
                    f"replacement at {site}",
                    expected=f"shape {tuple(before.shape)}",
                    seen=f"shape {tuple(after.shape)}",
                    fix="return one state for each that was given",
                )
            after = after.to(before.dtype)
            return (after, *output[1:]) if isinstance(output, tuple) else after

        handle = self._module(site).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _forward(self, ids: Tensor, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
        captured: dict[str, Tensor] = {}

        def keep(site: str, states: Tensor) -> None:
            captured[site] = states
            if len(captured) == len(modules):
                raise _Captured

        handles = []
        for site, module in modules.items():
            if site == _EMBED:
                handles.append(module.register_forward_hook(_on_ids(partial(keep, site))))
            elif site.endswith(_INPUT):
                handles.append(module.register_forward_pre_hook(_on_input(partial(keep, site)), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(_on_output(partial(keep, site))))
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

    def _module(self, site: str) -> nn.Module:
        match = _BLOCK.search(site)
        if site == _EMBED:
            return self._embedding
        if match is None:
            names: dict[str, nn.Module] = dict(self._decoder.named_modules())
            short = site.removesuffix(_INPUT).removeprefix(f"{self._decoder.base_model_prefix}.")
            if short and short in names:
                return names[short]
        elif (index := int(match[1])) < len(self._blocks) and (
            found := _submodule(self._blocks[index], match[2] or "")
        ) is not None:
            return found
        raise _no_site(site, self.info, len(self._blocks))


def _on_input(keep: Callable[[Tensor], None]) -> Any:
    """A hook that hands over what a module is called with: its first argument, or the hidden states by name."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else kwargs["hidden_states"])

    return hook


def _on_ids(keep: Callable[[Tensor], None]) -> Any:
    """A hook on an embedding that hands over the stored rows of the ids it is called with."""

    def hook(module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        keep(nn.functional.embedding(args[0], cast("nn.Embedding", module).weight))

    return hook


def _on_output(keep: Callable[[Tensor], None]) -> Any:
    """A hook that hands over what a module returns; of several things the first."""

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    return hook


def torch_dtype(dtype: str) -> torch.dtype:
    """The dtype of a model's computation. Raises BadConfig for any other name than bfloat16 and float32."""
    if dtype not in ("bfloat16", "float32"):
        raise BadConfig(f"dtype {dtype!r}", expected="bfloat16 or float32", seen=repr(dtype), fix="use one of these")
    found: torch.dtype = getattr(torch, dtype)
    return found


def usable_device(device: str) -> str:
    """The device, "auto" resolved. Raises BadConfig for one that is not there."""
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


def _find_blocks(decoder: Any) -> nn.ModuleList:
    depth = decoder.config.get_text_config().num_hidden_layers
    for _, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise BadConfig(
        type(decoder).__name__,
        expected=f"a model with a list of {depth} blocks",
        seen="no such list of modules",
        fix="use a decoder-only transformer",
    )


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path`` below a block; every part may be any of its usual names."""
    module = block
    for part in path.split(".") if path else ():
        names: tuple[str, ...] = _PRE_MLP_NORM if part == "pre_mlp_norm" else (part,)
        names += tuple(name for group in _ALIASES if part in group for name in group)
        found = next((child for name in names if (child := getattr(module, name, None)) is not None), None)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module


def _list_sites(blocks: nn.ModuleList) -> Iterable[str]:
    for index, block in enumerate(blocks):
        yield f"layers.{index}"
        for part in ("self_attn", "mlp"):
            if _submodule(block, part) is not None:
                yield f"layers.{index}.{part}"


def _block_index(site: str) -> int | None:
    match = _BLOCK.search(site)
    return int(match[1]) if match else None


def _depth_check(sites: Sequence[str]) -> Any:
    """A check of the sites against a model's config, so that a wrong layer is reported before its weights are read."""

    def check(name: str, config: Any) -> None:
        depth = config.get_text_config().num_hidden_layers
        for site in sites:
            if (index := _block_index(site)) is not None and index >= depth:
                listed = tuple(f"layers.{i}" for i in range(depth))
                info = SubjectInfo(name, 0, depth, np.zeros(0, dtype=np.float32), 0.0, listed)
                raise _no_site(site, info, depth)

    return check


def _no_site(site: str, info: SubjectInfo, n_loaded: int) -> BadConfig:
    index = _block_index(site)
    if index is not None and n_loaded <= index < info.n_layers:
        return BadConfig(
            f"site {site!r}",
            expected="a site whose block was loaded",
            seen=f"blocks 0 to {n_loaded - 1} of {info.n_layers}",
            fix="name this site when loading the subject model",
        )
    near = list(info.sites[-2:])
    if index is None or index < info.n_layers:
        near = difflib.get_close_matches(site, info.sites, n=3, cutoff=0.5) or near
    return BadConfig(
        f"site {site!r}",
        expected=f"a module path of {info.model}, layers.0 to layers.{info.n_layers - 1}",
        seen="no such module",
        fix=f"use one of {', '.join(near)}, …",
    )
