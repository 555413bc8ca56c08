"""The fit check: does a dictionary belong to this model, site and normalisation?

A dictionary that reads the wrong layer, or lacks a normalisation, still produces activations, explanations and scores;
only its reconstruction error reveals the mistake. So the check, on a few thousand tokens, reconstructs the source's own
site and both neighbouring layers; for an SAE it also tries other normalisations and biases. The source passes if none of
these alternatives fits clearly better than the declared one and it reconstructs better than the mean. Knows no text.
Reads and writes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from evalkit.abilities import reconstructs
from evalkit.errors import SiteMismatch
from evalkit.fit.measure import Fit, States, measure
from evalkit.protocols import FeatureSource, Progress
from evalkit.records import Site, TokenBatch
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.transforms import Centre, LayerNorm, Scale, UnitNorm
from evalkit.subject.attention_sinks import sink_limit, valid_tokens
from evalkit.subject.sites import parse_site
from evalkit.util.progress import SILENT

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FitReport", "check_fit", "fit_sites", "gather_states"]

_LOG = logging.getLogger(__name__)
_TOKENS = 4096  # tokens to reconstruct at each site
_FEWEST = 512  # a very wide SAE gets fewer than _TOKENS, but at least this many
_OTHERWISE = 512  # tokens to reconstruct under each alternative declaration
_JUDGED = 64  # minimum number of tokens for a verdict

# Multiply-adds that the check of one SAE may take before it uses fewer tokens. Per token, a latent costs d_model of them,
# or _ACTIVATING if that is more.
_WORK = 1 << 37
_ACTIVATING = 512

# An alternative counts as better than the declaration if its FVU is below this fraction of the declared FVU.
_BETTER = 0.85  # other normalisations and biases
_NEARER = 0.98  # neighbouring layers; where one of them was the right layer, the fraction was 0.92 or less
_OFFSET = 0.7  # the same reconstruction after its mean error is subtracted
_TIE = 1e-4  # smaller differences of FVU are rounding, seen where a dictionary reconstructs any state

_LIKELY = "check the layer, the normalisation (√d, average norm), b_dec, the decoder and the model"
_DECLARED = 1.5  # factor by which measured FVU and L0 may deviate from the declared ones before there is a warning


class _Subject(Protocol):
    def layer_neighbours(self, site: str) -> tuple[str, ...]: ...

    def hidden(self, token_ids: Any, *, sites: Sequence[str] | None = None) -> dict[str, Tensor]: ...


@dataclass(frozen=True, slots=True)
class FitReport:
    """The result of the check for one source.

    ``own``: the fit at the source's own site; None if nothing was measured.
    ``neighbours``: FVU by neighbouring site.
    ``refusal``: the error that stops the run unless forced; None if the source passes.
    """

    name: str
    own: Fit | None = None
    neighbours: Mapping[str, float] = field(default_factory=dict)  # FVU by site
    warnings: tuple[str, ...] = ()
    refusal: SiteMismatch | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields that the run's record of the source gets."""
        found: dict[str, Any] = {"fit_neighbours": dict(self.neighbours)} if self.neighbours else {}
        if self.own is not None:
            measured = self.own.as_json()
            found |= {f"{name}_measured": value for name, value in measured.items() if name != "n_tokens"}
            found["fit_tokens"] = self.own.n_tokens
        if self.warnings:
            found["fit_warnings"] = list(self.warnings)
        if self.refusal is not None:
            found["fit_refused"] = {name: getattr(self.refusal, name) for name in ("expected", "seen", "fix")}
        return found


def fit_sites(subject: _Subject, site: Site) -> list[tuple[str, str]]:
    """Pairs (site read, site reconstructed): the source's own pair first, then those of the neighbouring layers."""
    pairs = [(site.path, site.out)]
    if site.reconstructs is None:
        return pairs + [(near, near) for near in subject.layer_neighbours(site.path)]
    near_in, near_out = (_by_step(path, subject.layer_neighbours(path)) for path in (site.path, site.out))
    return pairs + [(near_in[step], near_out[step]) for step in (-1, 1) if step in near_in and step in near_out]


def _by_step(path: str, neighbours: Sequence[str]) -> dict[int, str]:
    """Neighbours by how many blocks later they are: a model may have only one of them."""
    own = parse_site(path)
    found = {near: parse_site(near) for near in neighbours}
    return {block.layer - own.layer: near for near, block in found.items() if own is not None and block is not None}


def gather_states(
    subject: _Subject, batches: Sequence[TokenBatch], sites: Sequence[str], progress: Progress = SILENT
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """For each site and batch, the hidden states (batch, pos, d) and a mask of valid tokens (batch, pos).

    The mask excludes the corpus's masked tokens and attention sinks, which have extreme norms.
    """
    states: dict[str, list[Tensor]] = {site: [] for site in sites}
    task = progress.start("fit check: hidden states", sum(batch.token_ids.size for batch in batches), "tokens")
    for batch in batches:
        for site, found in subject.hidden(batch.token_ids, sites=sites).items():
            states[site].append(found)
        progress.advance(task, batch.token_ids.size)
    progress.finish(task)
    marked = {}
    for site, parts in states.items():
        norms = [part.norm(dim=-1)[torch.from_numpy(batch.valid)] for part, batch in zip(parts, batches, strict=True)]
        limit = sink_limit(torch.cat(norms)) if sum(map(len, norms)) else 0.0
        marked[site] = [(part, valid_tokens(part, batch, limit)) for part, batch in zip(parts, batches, strict=True)]
    return marked


def check_fit(
    source: FeatureSource, pairs: Sequence[tuple[str, str]], states: Mapping[str, list[tuple[Tensor, Tensor]]]
) -> FitReport:
    """The verdict on one bound source.

    ``pairs``: the result of ``fit_sites``.
    ``states``: the result of ``gather_states`` for all sites in ``pairs``.
    """
    if not reconstructs(source):
        return FitReport(source.name)
    sets = [_rows(states, read, out) for read, out in pairs]
    own = sets[0]
    if min(len(one.read) for one in sets) < _JUDGED:  # only a warning: other checks reject a corpus too small for a run
        return FitReport(
            source.name, warnings=(f"fit check skipped: it needs {_JUDGED} tokens, the sample has {len(own.read)}",)
        )
    if isinstance(source, SaeSource):
        count = _n_tokens(source, len(own.read))
        sets = [replace(one, read=one.read[:count], target=one.target[:count]) for one in sets]
    fits = measure(source, sets)
    others: dict[str, tuple[float, float]] = {}
    if isinstance(source, SaeSource):
        few = replace(own, read=own.read[:_OTHERWISE], target=own.target[:_OTHERWISE])
        otherwise = _otherwise(source, few)
        as_declared, *found = measure(source, [few, *otherwise.values()])
        others = {words: (fit.fvu, as_declared.fvu) for words, fit in zip(otherwise, found, strict=True)}
    return _judged(source, pairs, fits, others)


def _rows(states: Mapping[str, list[tuple[Tensor, Tensor]]], read: str, out: str) -> States:
    """The states of all tokens that are valid at both sites, concatenated over batches."""
    marks = [first[1] & second[1] for first, second in zip(states[read], states[out], strict=True)]
    x, target = (
        torch.cat([part[mark] for (part, _), mark in zip(states[site], marks, strict=True)]) for site in (read, out)
    )
    return States(x, target)


def _n_tokens(source: SaeSource, there: int) -> int:
    """How many of the ``there`` available tokens to use; fewer for a very wide dictionary."""
    affordable = _WORK // (source.weights.width * max(_ACTIVATING, source.weights.d_model))
    return max(min(there, _FEWEST), min(there, _TOKENS, affordable))


def _otherwise(source: SaeSource, own: States) -> dict[str, States]:
    """The same states under every alternative declaration, keyed by a description for messages."""
    d = own.read.shape[-1]
    norm = float(own.read.float().norm(dim=-1).mean())
    found = {
        f"scaled to an average norm of √d (times {d**0.5 / norm:.3g})": replace(own, further=(Scale(d**0.5 / norm),)),
        f"scaled to an average norm of 1 (times {1 / norm:.3g})": replace(own, further=(Scale(1 / norm),)),
        "multiplied by √d": replace(own, further=(Scale(d**0.5),)),
        "divided by √d": replace(own, further=(Scale(d**-0.5),)),
        "scaled to norm √d, each token": replace(own, further=(UnitNorm(),)),
        "layer-normalised": replace(own, further=(LayerNorm(),)),
        "centred": replace(own, further=(Centre(),)),
    }
    weights = source.weights
    if source.steps:
        found[f"read without the declared transform ({source.transform()})"] = replace(own, own_steps=False)
    if weights.shift is not None:
        found["read without subtracting b_dec"] = replace(own, offset=weights.shift)
    elif weights.d_model == weights.d_out:
        found["read with b_dec subtracted"] = replace(own, offset=-weights.b_dec)
    return found


def _judged(
    source: FeatureSource,
    pairs: Sequence[tuple[str, str]],
    fits: Sequence[Fit],
    others: Mapping[str, tuple[float, float]],
) -> FitReport:
    own, path = fits[0], pairs[0][0]
    near = {read: fit.fvu for (read, _), fit in zip(pairs[1:], fits[1:], strict=True)}
    found = _explanations(own, path, near, others)
    better = min(found, key=lambda one: one.fvu, default=None)
    refusal = None
    if own.fired is not None and not bool((own.fired > 0).any()):
        refusal = _refused(source, "latents that fire", f"no latent fires on {own.n_tokens} tokens", _LIKELY)
    elif better is not None and better.fvu < 1:
        refusal = _refused(source, better.expected, better.seen, better.fix)
    elif better is not None or not own.fvu < 1:
        refusal = _refused(source, "a reconstruction better than the mean (FVU below 1)", f"FVU {own.fvu:.3f}", _LIKELY)
    return FitReport(source.name, own, near, tuple(_warnings(source, own)), refusal)


@dataclass(frozen=True, slots=True)
class _Explanation:
    """An alternative with less error than the declaration: its FVU, and the parts of the message about it."""

    fvu: float
    expected: str
    seen: str
    fix: str


def _explanations(
    own: Fit, path: str, near: Mapping[str, float], others: Mapping[str, tuple[float, float]]
) -> list[_Explanation]:
    found = []
    for site, fvu in near.items():
        if fvu < _NEARER * own.fvu - _TIE:
            seen = f"FVU {own.fvu:.3f}, and {fvu:.3f} at {site}"
            found.append(_Explanation(fvu, f"the lowest error at its own site {path}", seen, f"try --site {site}"))
    for words, (fvu, declared) in others.items():
        if fvu < _BETTER * declared - _TIE:
            seen = f"FVU {declared:.3f}, and {fvu:.3f} when the states are {words}"
            fix = "correct the declared normalisation or bias, for example with --transform"
            found.append(_Explanation(fvu, "the lowest error with the declared transform", seen, fix))
    if own.fvu_centred < _OFFSET * own.fvu - _TIE:
        seen = f"FVU {own.fvu:.3f}, of which {1 - own.fvu_centred / own.fvu:.0%} is one constant vector"
        fix = "check whether b_dec is added twice and whether the input must be centred"
        found.append(_Explanation(own.fvu_centred, "a reconstruction error with a mean near zero", seen, fix))
    return found


def _refused(source: FeatureSource, expected: str, seen: str, fix: str) -> SiteMismatch:
    return SiteMismatch(
        source.name, expected=expected, seen=seen, fix=f"{fix}; --force continues and marks the results"
    )


def _warnings(source: FeatureSource, own: Fit) -> list[str]:
    info = source.info
    found = []
    if isinstance(fvu := info.declared.get("fvu"), int | float) and own.fvu > _DECLARED * fvu:
        found.append(f"FVU is {own.fvu:.3f} on this corpus, but declared as {fvu:.3f}")
    if info.l0 and own.l0 is not None and not 1 / _DECLARED < own.l0 / info.l0 < _DECLARED:
        found.append(f"L0 is {own.l0:.1f} on this corpus, but declared as {info.l0:g}")
    return found
