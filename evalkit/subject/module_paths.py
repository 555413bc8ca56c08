"""Finds the module of a subject model for the name of a site, although model families name their modules differently.

Knows the modules of transformers models; reads no states and no files.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn

from evalkit.errors import BadConfig
from evalkit.records import SubjectInfo
from evalkit.subject.sites import parse_site

__all__ = ["block_index", "depth_check", "find_blocks", "list_sites", "no_site_error", "submodule"]

_ALIASES = (  # names of the same module in different families; the first one that exists is used
    ("self_attn", "attn", "attention", "self_attention"),
    ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    ("o_proj", "c_proj", "out_proj", "dense"),
    ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out"),
)
_PRE_MLP_NORM = ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm", "post_attn_norm", "norm2")


def find_blocks(decoder: Any) -> nn.ModuleList:
    """The list of transformer blocks of a decoder. Raises BadConfig if it has none."""
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


def submodule(block: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path`` inside a block, under any family's name for it; None if it does not exist."""
    module = block
    for part in path.split(".") if path else ():
        names: tuple[str, ...] = _PRE_MLP_NORM if part == "pre_mlp_norm" else (part,)
        names += tuple(name for group in _ALIASES if part in group for name in group)
        found = next((child for name in names if (child := getattr(module, name, None)) is not None), None)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module


def list_sites(blocks: nn.ModuleList) -> Iterable[str]:
    """The site names that every model offers: each block, its attention and its MLP."""
    for index, block in enumerate(blocks):
        yield f"layers.{index}"
        for part in ("self_attn", "mlp"):
            if submodule(block, part) is not None:
                yield f"layers.{index}.{part}"


def block_index(site: str) -> int | None:
    """The number of the block that a site is in; None for a site outside the blocks."""
    block = parse_site(site)
    return block.layer if block else None


def depth_check(sites: Sequence[str]) -> Any:
    """A check of the sites against a model's config: a wrong layer is reported before weights are read."""

    def check(name: str, config: Any) -> None:
        depth = config.get_text_config().num_hidden_layers
        for site in sites:
            if (index := block_index(site)) is not None and index >= depth:
                listed = tuple(f"layers.{i}" for i in range(depth))
                info = SubjectInfo(name, 0, depth, np.zeros(0, dtype=np.float32), 0.0, listed)
                raise no_site_error(site, info, depth)

    return check


def no_site_error(site: str, info: SubjectInfo, n_loaded: int) -> BadConfig:
    """The error for a site that the model does not have, or whose block was not loaded."""
    index = block_index(site)
    if index is not None and n_loaded <= index < info.n_layers:
        return BadConfig(
            f"site {site!r}",
            expected="a site whose block was loaded",
            seen=f"blocks 0 to {n_loaded - 1} of {info.n_layers}",
            fix="pass this site when loading the subject model",
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
