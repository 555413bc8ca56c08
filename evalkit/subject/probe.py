"""Hooks on a loaded model: where states are read and written, and what modules read and return in one trial pass.

The trial pass runs over two rows of a few random tokens that begin alike, so that it also shows whether earlier states
depend on later tokens. Knows modules and tensors; nothing of site names or of model families. Reads no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from evalkit.errors import BadConfig, BadShape
from evalkit.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

__all__ = ["Event", "Place", "check_causal", "record", "token_states", "tolerance", "trial_ids"]

TRIAL_TOKENS = 16  # per row; the rows differ from the middle on
_LEAK = {torch.float32: 1e-4}  # of a state's length: what rounding may change in it; in other dtypes 1e-2


class _Enough(Exception):
    """Ends a forward pass as soon as the last wanted module has returned."""


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """What a module read (``is_input``) or returned: (row, pos, width), float32; None if it is not one state per token."""

    path: str
    is_input: bool
    states: Tensor | None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where the states of a site are in a loaded model.

    ``is_input``: what the module reads instead of what it returns. ``factor``: what its states are multiplied by before
    they are added to the residual stream. ``rows``: an embedding, read as its stored rows; it returns them times
    ``factor``. ``added``: the states are the input of ``block`` plus those at this place, which is where they are written.
    """

    module: nn.Module
    is_input: bool = False
    factor: float = 1.0
    rows: bool = False
    block: nn.Module | None = None
    added: Place | None = None

    def on_read(self, keep: Callable[[Any], None]) -> RemovableHandle:
        """Call ``keep`` with the states in every forward pass."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keep(_scaled(_input(args, kwargs), self.factor))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            keep(_rows(module, args) if self.rows else _scaled(_first(output), self.factor))

        if self.is_input:
            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        return self.module.register_forward_hook(after)

    @contextmanager
    def replaced(self, site: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """A context in which the model continues with ``replace(states)``. Raises BadShape for states of another shape."""
        handles = self._writers(lambda states: _replacement(site, replace, states))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _writers(self, replace: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
        """Hooks that put ``replace(states)``, float32, in the place of the states."""
        if self.added is not None and self.block is not None:
            return self._writers_between(self.added, replace)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            old = _input(args, kwargs)
            new = replace(old.float() * self.factor).div(self.factor).to(old.dtype)
            return tuple(new if each is old else each for each in args), {
                name: new if each is old else each for name, each in kwargs.items()
            }

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            old: Tensor = _first(output)
            if self.rows:
                new = replace(_rows(module, args).float()).mul(self.factor).to(old.dtype)
            else:
                new = replace(old.float() * self.factor).div(self.factor).to(old.dtype)
            return type(output)((new, *output[1:])) if isinstance(output, tuple | list) else new

        if self.is_input:
            return [self.module.register_forward_pre_hook(before, with_kwargs=True)]
        return [self.module.register_forward_hook(after)]

    def _writers_between(self, added: Place, replace: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
        """The stream in mid-block is no module's own output: what is added to the block's input is changed instead."""
        assert self.block is not None
        held: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held[:] = [_input(args, kwargs).float()]

        def change(part: Tensor) -> Tensor:
            start = held[0].reshape(part.shape)
            return replace(start + part) - start

        return [self.block.register_forward_pre_hook(keep, with_kwargs=True), *added._writers(change)]


def _replacement(site: str, replace: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    after = replace(states)
    if after.shape != states.shape:
        raise BadShape(
            f"replacement at {site}",
            expected=f"shape {tuple(states.shape)}",
            seen=f"shape {tuple(after.shape)}",
            fix="return one state per given state",
        )
    return after


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first tensor that a module is given: by position, as ``hidden_states``, or under any other name."""
    given = (*args, kwargs.get("hidden_states"), *kwargs.values())
    return next((each for each in given if isinstance(each, torch.Tensor)), None)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _rows(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    return nn.functional.embedding(args[0], cast("nn.Embedding", module).weight)


def _scaled(states: Any, factor: float) -> Any:
    """A copy, because some blocks add to what their modules returned in place."""
    if not isinstance(states, torch.Tensor):
        return None
    return states.clone() if factor == 1 else states.float() * factor


def token_states(states: Any, rows: int, pos: int) -> Tensor | None:
    """(row, pos, width), also where a module sees all tokens in one row; None if these are no states of the tokens."""
    if not isinstance(states, torch.Tensor) or not states.is_floating_point():
        return None
    if states.ndim == 3 and states.shape[:2] == (rows, pos):
        return states
    return states.reshape(rows, pos, -1) if states.ndim == 2 and states.shape[0] == rows * pos else None


def tolerance(dtype: torch.dtype) -> float:
    """What rounding may change in a sum of states computed in this dtype, relative to its terms."""
    return max(1e-5, torch.finfo(dtype).eps)


def trial_ids(vocab_size: int, longest: int | None, avoided: Iterable[int] = ()) -> Tensor:
    """Token ids (2, pos) of which the first half is the same in both rows. Special tokens may change how a model reads."""
    length = min(TRIAL_TOKENS, longest or TRIAL_TOKENS)
    usable = sorted(set(range(vocab_size)) - set(avoided)) or list(range(vocab_size))
    ids = torch.tensor(usable)[torch.from_numpy(generator(0, "trial pass").integers(0, len(usable), (2, length)))]
    ids[1, : length // 2] = ids[0, : length // 2]
    differs = ids[0, length // 2 :] == ids[1, length // 2 :]
    ids[1, length // 2 :][differs] = next((each for each in usable if each not in ids[0].tolist()), usable[0])
    return ids


def record(
    model: str, decoder: nn.Module, watched: Mapping[str, nn.Module], ids: Tensor, last: nn.Module | None
) -> list[Event]:
    """What the watched modules read and return, in the order in which it happens; the pass ends after ``last``.

    Raises BadConfig for a model that cannot be run on token ids alone.
    """
    events: list[Event] = []
    rows, pos = ids.shape

    def note(path: str, is_input: bool, value: Any) -> None:
        states = token_states(value, rows, pos)
        dtype = torch.float32 if states is None else states.dtype
        events.append(Event(path, is_input, None if states is None else states.to(torch.float32, copy=True), dtype))

    def watch(path: str, module: nn.Module) -> list[RemovableHandle]:
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(path, True, _input(args, kwargs))

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            note(path, False, _first(output))
            if module is last:
                raise _Enough

        return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]

    handles = [handle for path, module in watched.items() for handle in watch(path, module)]
    try:
        with torch.inference_mode():
            decoder(input_ids=ids, use_cache=False)
    except _Enough:
        pass
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise BadConfig(
            model,
            expected="a causal language model that computes states from token ids alone",
            seen=f"{type(error).__name__} in its own code on {rows} rows of {pos} tokens",
            fix="use a decoder-only language model that transformers can run",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return events


def check_causal(model: str, events: Sequence[Event]) -> None:
    """Raises BadConfig if states of the trial's first half, which is the same in both rows, differ between the rows."""
    for event in events:
        if event.states is None:
            continue
        half = event.states.shape[1] // 2
        one, other = event.states[:, :half]
        length = torch.maximum(one.norm(dim=-1), other.norm(dim=-1)).clamp(min=1e-30)
        change = float(((one - other).norm(dim=-1) / length).max()) if half else 0.0
        if change > _LEAK.get(event.dtype, 1e-2):
            raise BadConfig(
                model,
                expected="a causal language model, in which no state depends on later tokens",
                seen=f"states at {event.path} that change by {change:.0%} of their length when only later tokens change",
                fix="use a decoder-only model, or the configuration in which this one reads from left to right",
            )
