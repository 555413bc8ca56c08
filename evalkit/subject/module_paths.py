"""Finds the place of a site in a subject model, although model families name and order their modules differently.

Names of modules are looked up; names of parts of the residual stream are found by arithmetic in a trial pass of the loaded
model (``block_parts``), and every other site is checked in the same pass. Knows the modules of transformers models; reads
no files.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from evalkit.errors import BadConfig
from evalkit.records import SubjectInfo
from evalkit.subject.block_parts import ATTN_PROJECTION, MLP_PROJECTION, BlockParts, find_parts
from evalkit.subject.probe import Event, Place, check_causal, record, tolerance
from evalkit.subject.sites import (
    ATTN_OUT,
    EMBED,
    INPUT,
    MLP_OUT,
    PRE_MLP_NORM,
    RESID_MID,
    BlockSite,
    parse_site,
    site_of_hook,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Places", "block_index", "depth_check", "find_blocks", "list_sites", "no_site_error", "submodule"]

_ALIASES = (  # names of the same module in different families; the first one that exists is used
    ("self_attn", "attn", "attention", "self_attention"),
    ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    ("o_proj", "c_proj", "out_proj", "dense"),
    ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out"),
)
_SUMMED = {  # what the names of parts of the residual stream promise
    RESID_MID: "its input plus what attention adds",
    ATTN_OUT: "what attention adds to the residual stream",
    MLP_OUT: "what the MLP adds to the residual stream",
    PRE_MLP_NORM: "a norm before the MLP",
    ATTN_PROJECTION: "the output projection of attention",
    MLP_PROJECTION: "the output projection of the MLP",
}


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
        names = (part, *(name for group in _ALIASES if part in group for name in group))
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


@dataclass(slots=True, eq=False)
class Places:
    """The places of sites in one loaded model, each checked in a trial pass the first time that it is asked for.

    ``ids`` (2, pos) are the tokens of the trial; ``blocks`` are those that were loaded. ``d_model`` is the width of the
    states that go into the first block, None where these are not one state per token.
    """

    decoder: nn.Module
    blocks: nn.ModuleList
    embedding: nn.Embedding
    info: SubjectInfo
    ids: Tensor
    d_model: int | None = None
    _parts: dict[int, BlockParts] = field(default_factory=dict)
    _places: dict[str, Place] = field(default_factory=dict)
    _broken: dict[int, str] = field(default_factory=dict)  # blocks whose output is not the next one's input
    _calls: dict[tuple[str, bool], list[int | None]] = field(default_factory=dict)  # widths of the states of every call

    def try_out(self, sites: Sequence[str]) -> None:
        """One trial pass for these sites and their neighbours. Raises BadConfig for a model that is not causal."""
        layers = {index + step for site in sites if (index := block_index(site)) is not None for step in (-1, 0, 1)}
        layers = {index for index in layers if 0 <= index < len(self.blocks)} or {0}
        outside = {}
        for site in sites:
            if parse_site(site) is None:
                module = self.module(site)
                outside[self._path(site, module)] = module
        events = self._record(layers, outside)
        check_causal(self.info.model, [event for event in events if event.path.count(".") == 1 and not event.is_input])
        first = next((event.states for event in events if event.path == "layers.0" and event.is_input), None)
        self.d_model = None if first is None else first.shape[-1]

    def module(self, site: str) -> nn.Module:
        """The module that a site names, before any pass; for parts of the residual stream, their block. BadConfig."""
        block = parse_site(site)
        if site_of_hook(site) == EMBED:
            return self.embedding
        if block is None:
            names: dict[str, nn.Module] = dict(self.decoder.named_modules())
            short = site.removesuffix(INPUT).removeprefix(f"{self.decoder.base_model_prefix}.")
            if short and short in names:
                return names[short]
        elif block.layer < len(self.blocks):
            within = self.blocks[block.layer]
            if (found := submodule(within, block.part)) is not None and _has(within, block.part):
                return found
            if block.part in _SUMMED and (not block.is_input or block.part not in (RESID_MID, ATTN_OUT, MLP_OUT)):
                return within
            if found is not None:
                return found
        raise no_site_error(site, self.info, len(self.blocks))

    def place(self, site: str) -> Place:
        """Where the states of a site are read. Raises BadConfig for a name that means nothing in this model, with why."""
        if site not in self._places:
            self._places[site] = self._find(site)
        return self._places[site]

    def width(self, site: str) -> int | None:
        """The width of a site's states; None for what has none."""
        place = self.place(site)
        if place.rows:
            return self.embedding.embedding_dim
        path = self._path(site, place.module)
        return next(iter(self._calls.get((path, place.is_input), ())), None)

    def in_stream(self, site: str) -> bool:
        """Whether the states at a site are, or times a positive factor are added to, the residual stream."""
        if (block := parse_site(site)) is None:
            return site_of_hook(site) == EMBED
        try:
            place = self.place(site)
        except BadConfig:
            return False
        path = self._path(site, place.module).removeprefix(f"layers.{block.layer}").removeprefix(".")
        return (path, place.is_input) in self._parts[block.layer].stream

    def _path(self, site: str, module: nn.Module) -> str:
        if (block := parse_site(site)) is None:
            return EMBED if module is self.embedding else site.removesuffix(INPUT)
        named = self.blocks[block.layer].named_modules()
        inner = next(name for name, each in named if each is module)
        return f"layers.{block.layer}.{inner}" if inner else f"layers.{block.layer}"

    def _record(self, layers: Iterable[int], outside: dict[str, nn.Module]) -> list[Event]:
        """A trial pass: all modules of some blocks, the blocks before them, and modules outside the blocks."""
        layers = sorted(layers)
        watched: dict[str, nn.Module] = {EMBED: self.embedding, **outside}
        for index in range(layers[-1] + 1):
            inner = self.blocks[index].named_modules() if index in layers else [("", self.blocks[index])]
            watched |= {f"layers.{index}.{name}" if name else f"layers.{index}": module for name, module in inner}
        last = None if set(outside) - {EMBED} else self.blocks[layers[-1]]
        events = record(self.info.model, self.decoder, watched, self.ids, last)
        for path, is_input in {(event.path, event.is_input) for event in events}:
            calls = [event.states for event in events if (event.path, event.is_input) == (path, is_input)]
            self._calls[path, is_input] = [None if states is None else states.shape[-1] for states in calls]
        for index in layers:
            self._parts[index] = self._read_block(index, events)
        self._join(events)
        return events

    def _read_block(self, index: int, events: Sequence[Event]) -> BlockParts:
        prefix, block = f"layers.{index}", self.blocks[index]
        inside = [
            Event(event.path.removeprefix(prefix).removeprefix("."), event.is_input, event.states, event.dtype)
            for event in events
            if event.path == prefix or event.path.startswith(f"{prefix}.")
        ]
        mlp = submodule(block, "mlp")
        return find_parts(block, inside, next((name for name, each in block.named_modules() if each is mlp), None))

    def _join(self, events: Sequence[Event]) -> None:
        """Note the blocks whose output is not what the next block reads: nothing is the residual stream between these."""
        ends = {(event.path, event.is_input): event for event in events}
        for index in range(len(self.blocks) - 1):
            out, following = ends.get((f"layers.{index}", False)), ends.get((f"layers.{index + 1}", True))
            if out is None or following is None or out.states is None or following.states is None:
                continue
            same = out.states.shape == following.states.shape and torch.allclose(
                out.states, following.states, rtol=tolerance(out.dtype)
            )
            if not same:
                self._broken[index] = f"block {index} returns other states than block {index + 1} reads"

    def _find(self, site: str) -> Place:
        block = parse_site(site)
        module = self.module(site)  # before anything else: a misspelt name is reported as such
        if block is None:
            return self._outside(site, module)
        if block.layer not in self._parts:
            self._record([block.layer], {})
        if not block.part:
            if not block.is_input and block.layer in self._broken:
                raise _refusal(site, self.info.model, "the residual stream after a block", self._broken[block.layer])
            return self._once(site, Place(module, block.is_input))
        owner, parts = self.blocks[block.layer], self._parts[block.layer]
        if block.part in _SUMMED and not _has(owner, block.part):
            return self._once(site, self._summed(site, block, parts))
        if not block.is_input:
            self._check_own(site, block, module, parts)
        return self._once(site, Place(module, block.is_input))

    def _summed(self, site: str, block: BlockSite, parts: BlockParts) -> Place:
        """The place of a part that was found by arithmetic."""
        owner = self.blocks[block.layer]
        found = parts.parts.get(block.part)
        if found is None:
            raise _refusal(site, self.info.model, _SUMMED[block.part], parts.reasons[block.part])
        modules = dict(owner.named_modules())
        if block.part != RESID_MID:
            return Place(modules[found.path], found.is_input or block.is_input, found.factor)
        added = parts.parts.get(ATTN_OUT)
        if added is None:
            raise _refusal(site, self.info.model, _SUMMED[RESID_MID], parts.reasons[ATTN_OUT])
        what = Place(modules[added.path], factor=added.factor)
        return Place(modules[found.path], found.is_input, block=owner, added=what)

    def _check_own(self, site: str, block: BlockSite, module: nn.Module, parts: BlockParts) -> None:
        """Refuse the output of an attention or MLP module that holds the residual stream beside what the module adds."""
        owner = self.blocks[block.layer]
        for name, added in (("self_attn", ATTN_OUT), ("mlp", MLP_OUT)):
            if module is submodule(owner, name) and self._inner(owner, module) in parts.holding:
                raise BadConfig(
                    f"site {site!r}",
                    expected=f"a module of {self.info.model} that returns its own contribution",
                    seen="one that returns the residual stream, with its contribution added",
                    fix=f"use layers.{block.layer}.{added} for what is added, or layers.{block.layer} for the stream",
                )

    @staticmethod
    def _inner(owner: nn.Module, module: nn.Module) -> str:
        found: str = next(name for name, each in owner.named_modules() if each is module)
        return found

    def _outside(self, site: str, module: nn.Module) -> Place:
        path = self._path(site, module)
        if (path, False) not in self._calls:
            self._record([0], {path: module})
        if module is not self.embedding:
            return self._once(site, Place(module, site.endswith(INPUT)))
        return self._once(site, Place(module, rows=True, factor=self._embedding_factor()))

    def _embedding_factor(self) -> float:
        """What the model multiplies the rows of its embedding by in the embedding module."""
        with torch.inference_mode():
            rows = nn.functional.embedding(self.ids, self.embedding.weight).float()
            given = self.embedding(self.ids).float()
        factor = float((rows * given).sum() / rows.square().sum().clamp(min=1e-30))
        return 1.0 if torch.equal(rows, given) or not factor else factor

    def _once(self, site: str, place: Place) -> Place:
        """The place, if a pass reads or gives it once, as one state per token."""
        path = self._path(site, place.module)
        calls = self._calls.get((path, place.is_input), [])
        if place.rows or (len(calls) == 1 and calls[0] is not None):
            return place
        seen = "states of another shape" if len(calls) == 1 else f"{len(calls)} calls"
        raise _refusal(site, self.info.model, "a module that is called once, with one state per token", seen)


def _has(block: nn.Module, path: str) -> bool:
    """Whether a block has a module of just this name."""
    return any(name == path for name, _ in block.named_modules())


def _refusal(site: str, model: str, what: str, why: str) -> BadConfig:
    block, fix = parse_site(site), "use a module by its own path"
    if block and block.part:
        fix = f"use layers.{block.layer}, the residual stream after the block, or a module by its own path"
    return BadConfig(f"site {site!r}", expected=f"{what} in {model}", seen=why, fix=fix)
