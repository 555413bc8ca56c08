"""How a transformer block adds up: which modules give what is added to the residual stream, and what reads it in between.

Model families differ: some normalise what attention and MLP return before it is added (OLMo-2, Gemma 2), multiply it
(Granite), add it inside the attention module (BLOOM), or run both on the same input (GPT-NeoX). So the parts are found by
arithmetic in a trial pass: mid = input + attn_out and output = mid + mlp_out, or output = input + attn_out + mlp_out for
parallel blocks. Where neither holds, the parts are refused with the reason. Knows events of one block; loads nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from evalkit.subject.probe import Event, tolerance
from evalkit.subject.sites import ATTN_OUT, MLP_OUT, PRE_MLP_NORM, RESID_MID

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["ATTN_PROJECTION", "MLP_PROJECTION", "BlockParts", "Part", "find_parts"]

ATTN_PROJECTION, MLP_PROJECTION = "self_attn.o_proj", "mlp.down_proj"
_ATTENTION = re.compile(r"(?:.*\.)?(?!\w*(?:norm|ln|dropout))\w*(?:attn|attention)\w*")
_MATRIX = 2  # dimensions of the weight of a linear layer


@dataclass(frozen=True, slots=True)
class Part:
    """A module of the block, by its path there, or its input; its states are multiplied by ``factor``."""

    path: str
    is_input: bool = False
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class BlockParts:
    """The parts of a block by site name, and the reason for those that it has not.

    ``stream``: (path, is_input) of all states that are the residual stream or, times a positive factor, added to it.
    ``holding``: modules that return the residual stream, so that their output is not just their own contribution.
    """

    parts: Mapping[str, Part]
    reasons: Mapping[str, str]
    stream: frozenset[tuple[str, bool]]
    holding: frozenset[str]


@dataclass(slots=True, eq=False)
class _Group:
    """Events of equal states, in order: modules that pass on what they get, such as dropout, add events, not states."""

    states: Tensor
    events: list[tuple[int, Event]] = field(default_factory=list)

    def first(self) -> int:
        return self.events[0][0]

    def outputs(self) -> list[tuple[int, Event]]:
        return [(index, event) for index, event in self.events if not event.is_input and event.path]

    def within(self, path: str | None) -> bool:
        """Whether a module at or below ``path`` returns these states."""
        return path is not None and any(_below(event.path, path) for _, event in self.outputs())


@dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """output = input + first + second, with the stream between them if there is such a state; misfit is relative."""

    misfit: float
    mid: _Group | None
    first: tuple[_Group, float]
    second: tuple[_Group, float]


def find_parts(block: nn.Module, events: Sequence[Event], mlp: str | None) -> BlockParts:
    """The parts of ``block`` from all events in it. ``mlp``: the path of its MLP, None if it has no such module."""
    calls = Counter((event.path, event.is_input) for event in events)
    once = [event for event in events if calls[event.path, event.is_input] == 1]
    start = next((event.states for event in once if not event.path and event.is_input), None)
    end = next((event.states for event in once if not event.path and not event.is_input), None)
    if start is None or end is None or start.shape != end.shape:
        return _refused("its blocks do not map one state per token to one state per token", frozenset(), frozenset())
    groups = _grouped(once, start)
    attention = next((event.path for event in once if event.is_input and _ATTENTION.fullmatch(event.path)), None)
    limit = tolerance(next(event.dtype for event in once if not event.path))
    constants = [value for value in vars(block).values() if isinstance(value, float)]
    found = _sequential(groups, start, end, limit, constants)
    if found is None:
        found = _parallel(groups, start, end, limit, attention)
    around = [group for group in groups if torch.equal(group.states, start) or torch.equal(group.states, end)]
    if found is None:
        why = "the block's output is not its input plus what one of its modules returns plus what another returns"
        refused = _refused(why, _members(around), _returning(around))
        return replace(refused, parts=_projections(block, once, None, None, attention, mlp))
    return _named(block, once, groups, around, found, attention, mlp)


def _refused(why: str, stream: frozenset[tuple[str, bool]], holding: frozenset[str]) -> BlockParts:
    names = (RESID_MID, ATTN_OUT, MLP_OUT, PRE_MLP_NORM, ATTN_PROJECTION, MLP_PROJECTION)
    return BlockParts({}, dict.fromkeys(names, why), stream, holding)


def _grouped(events: Sequence[Event], like: Tensor) -> list[_Group]:
    groups: list[_Group] = []
    for index, event in enumerate(events):
        if event.states is None or event.states.shape != like.shape:
            continue
        group = next((group for group in groups if torch.equal(group.states, event.states)), None)
        if group is None:
            groups.append(group := _Group(event.states))
        group.events.append((index, event))
    return groups


def _sequential(
    groups: Sequence[_Group], start: Tensor, end: Tensor, limit: float, constants: Sequence[float]
) -> _Sum | None:
    """The best mid with input + A = mid and mid + F = output, where A is returned before mid is seen and F after."""
    best = None
    for mid in groups:
        if torch.equal(mid.states, start) or torch.equal(mid.states, end):
            continue
        before = [group for group in groups if any(index < mid.first() for index, _ in group.outputs())]
        after = [group for group in groups if any(index > mid.first() for index, _ in group.outputs())]
        first = _closest(mid.states, start, before, limit, constants)
        second = first and _closest(end, mid.states, after, limit, constants)
        if first and second and first[2] is not second[2]:
            total = first[0] + second[0]
            if best is None or total < best.misfit:
                best = _Sum(total, mid, (first[2], first[1]), (second[2], second[1]))
    return best


def _closest(
    total: Tensor, start: Tensor, groups: Sequence[_Group], limit: float, constants: Sequence[float]
) -> tuple[float, float, _Group] | None:
    """Misfit, factor and group of the best start + factor · group = total within the limit."""
    change, weight = total - start, _weight(total, start)
    best = None
    for group in groups:
        factor, misfit = 1.0, _misfit(change - group.states, weight)
        if misfit > limit:
            factor = _factor(change / weight, group.states / weight, constants, limit)
            misfit = _misfit(change - factor * group.states, weight)
        if misfit <= limit and factor > 0 and (best is None or misfit < best[0]):
            best = (misfit, factor, group)
    return best


def _weight(*terms: Tensor) -> Tensor:
    """The size of each number's terms, which rounding errors are in proportion to."""
    size = torch.stack([term.abs() for term in terms]).sum(dim=0)
    return size + 1e-6 * size.max().clamp(min=1e-30)


def _misfit(error: Tensor, weight: Tensor) -> float:
    return float((error / weight).square().mean().sqrt())


def _factor(change: Tensor, part: Tensor, constants: Sequence[float], limit: float) -> float:
    """The factor by least squares, or the block's own constant if that is equal to rounding."""
    fitted = float((change * part).sum() / part.square().sum().clamp(min=1e-30))
    near = [value for value in constants if value and abs(fitted / value - 1) <= limit]
    return min(near, key=lambda value: abs(fitted - value), default=fitted)


def _parallel(groups: Sequence[_Group], start: Tensor, end: Tensor, limit: float, attention: str | None) -> _Sum | None:
    """output = input + A + F, where just one of the two comes from attention."""
    usable = [group for group in groups if group.outputs() and not torch.equal(group.states, end)]
    weight, best = _weight(end, start), None
    for index, one in enumerate(usable):
        for other in usable[index + 1 :]:
            misfit = _misfit(end - start - one.states - other.states, weight)
            if misfit > limit or one.within(attention) == other.within(attention):
                continue
            pair = (one, other) if one.within(attention) else (other, one)
            if best is None or misfit < best.misfit:
                best = _Sum(misfit, None, (pair[0], 1.0), (pair[1], 1.0))
    return best


def _named(
    block: nn.Module,
    events: Sequence[Event],
    groups: Sequence[_Group],
    around: Sequence[_Group],
    found: _Sum,
    attention: str | None,
    mlp: str | None,
) -> BlockParts:
    (first, first_factor), (second, second_factor) = found.first, found.second
    parts: dict[str, Part] = {}
    reasons: dict[str, str] = {}
    if found.mid is None:
        reasons[RESID_MID] = "attention and MLP are added to the block's input at once, so no state lies between them"
        stream = [*around, first, second]
        returned = first.outputs()[-1]
    else:
        seen = found.mid.events[0][1]
        parts[RESID_MID] = Part(seen.path, seen.is_input)
        stream = [*around, found.mid, first, second]
        returned = [each for each in first.outputs() if each[0] < found.mid.first()][-1]
    called = next((index for index, event in enumerate(events) if attention and event.path == attention), None)
    if called is None or returned[0] < called:
        reasons[ATTN_OUT] = f"what the block adds first comes from {returned[1].path}, which is no attention"
    else:
        parts[ATTN_OUT] = Part(returned[1].path, factor=first_factor)
    last = second.outputs()[-1][1]
    if second.within(attention):
        reasons[MLP_OUT] = f"what the block adds last comes from {last.path}, which is no MLP"
    else:
        parts[MLP_OUT] = Part(last.path, factor=second_factor)
    parts |= _projections(block, events, first, second, attention, mlp)
    if (norm := _norm_before(block, events, found.mid, mlp)) is not None:
        parts[PRE_MLP_NORM] = Part(norm)
    reasons.setdefault(PRE_MLP_NORM, "no norm gives what the MLP reads")
    for name, of in ((ATTN_PROJECTION, "attention"), (MLP_PROJECTION, "MLP")):
        reasons.setdefault(name, f"no one matrix gives what the {of} returns")
    holding = [*around, *([found.mid] if found.mid else [])]
    return BlockParts(parts, reasons, _members(stream), _returning(holding))


def _members(groups: Iterable[_Group]) -> frozenset[tuple[str, bool]]:
    return frozenset((event.path, event.is_input) for group in groups for _, event in group.events)


def _returning(groups: Iterable[_Group]) -> frozenset[str]:
    return frozenset(event.path for group in groups for _, event in group.outputs())


def _projections(
    block: nn.Module,
    events: Sequence[Event],
    first: _Group | None,
    second: _Group | None,
    attention: str | None,
    mlp: str | None,
) -> dict[str, Part]:
    """The last matrix of attention and of the MLP: it gives what the module returns, or what is added."""
    modules = dict(block.named_modules())
    found = {}
    for name, path, group in ((ATTN_PROJECTION, attention, first), (MLP_PROJECTION, mlp, second)):
        own = [event.states for event in events if path and event.path == path and not event.is_input]
        given = (*own, group.states if group is not None else None)
        wanted = [states for states in given if states is not None]
        for event in events:
            if event.is_input or event.states is None or (path and not _below(event.path, path)):
                continue
            weight = getattr(modules[event.path], "weight", None)
            matrix = weight is not None and weight.ndim == _MATRIX
            if matrix and any(torch.equal(event.states, states) for states in wanted):
                found[name] = Part(event.path)
    return found


def _norm_before(block: nn.Module, events: Sequence[Event], mid: _Group | None, mlp: str | None) -> str | None:
    """The module outside the MLP whose output the MLP reads; without a module for it, the norm that reads ``mid``."""
    read = next((event.states for event in events if event.is_input and mlp and event.path == mlp), None)
    modules, found = dict(block.named_modules()), None
    given = {event.path: event.states for event in events if event.is_input}
    for event in events:
        states, before = event.states, given.get(event.path)
        if event.is_input or not event.path or states is None or before is None or before.shape != states.shape:
            continue
        if torch.equal(before, states) or (mlp and _below(event.path, mlp)):
            continue
        if mlp is None:
            gain = getattr(modules[event.path], "weight", None)
            if mid is not None and torch.equal(before, mid.states) and gain is not None and gain.ndim == 1:
                return event.path
        elif read is not None and torch.equal(states, read):
            found = event.path
    return found


def _below(path: str, above: str) -> bool:
    return path == above or path.startswith(f"{above}.")
