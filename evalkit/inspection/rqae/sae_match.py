"""Measures how well an RQAE represents an SAE's latents: correlates RQAE intensities with latent activations.

A latent is matched with two RQAE features: its encoder column, quantised like a token, and the codes of the token on which
it fires most strongly. Each is correlated with the latent over all tokens of the latent's top contexts, and over all tokens
of contexts around the median of those in which it fires. Works on codes and activations; uses no text, files or hidden
states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.fit.estimates import over_features
from evalkit.records import Activations
from rqae import RQAE, intensity

__all__ = [
    "EXAMPLE_SETS",
    "MADE_FROM",
    "LatentExamples",
    "Match",
    "choose_examples",
    "match_latents",
    "pearson",
    "summarise",
]

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
MADE_FROM = ("encoder column", "top example")
EXAMPLE_SETS = ("top", "median")


@dataclass(frozen=True, slots=True, eq=False)
class LatentExamples:
    """The examples of one latent.

    ``latent``: its number among the recorded latents.
    ``best``: number of the token on which it fires most strongly.
    ``contexts``: contexts (example,) of each set; the sets are disjoint.
    ``tokens``, ``values``: the tokens on which it fires, ascending, and its activations there.
    """

    latent: int
    best: int
    contexts: dict[str, Ints]
    tokens: Ints
    values: Floats


@dataclass(frozen=True, slots=True)
class Match:
    """Pearson's correlation over tokens, mean and SE over latents, for one depth, kind of feature and set of examples."""

    depth: int
    made_from: str
    examples: str
    latents: int
    mean: float
    se: float


def choose_examples(
    found: Activations, context_length: int, latents: Sequence[int], wanted: int, examples: int
) -> list[LatentExamples]:
    """The first ``wanted`` of ``latents`` that fire in at least 3 × ``examples`` contexts, with their examples.

    Contexts are ranked by their strongest activation, ties by number. The examples are the ``examples`` top contexts and as
    many around the median.
    """
    order = np.argsort(found.features, kind="stable")
    bounds = np.searchsorted(found.features[order], [[latent, latent + 1] for latent in latents])
    chosen: list[LatentExamples] = []
    for latent, (low, high) in zip(latents, bounds.tolist(), strict=True):
        if len(chosen) == wanted:
            break
        tokens, values = found.tokens[order[low:high]], found.values[order[low:high]].astype(np.float64)
        contexts, owner = np.unique(tokens // context_length, return_inverse=True)
        if len(contexts) < 3 * examples:
            continue
        peaks = np.zeros(len(contexts))
        np.maximum.at(peaks, owner, values)
        ranked = contexts[np.argsort(-peaks, kind="stable")]
        middle = (len(ranked) - examples) // 2
        sets = {"top": np.sort(ranked[:examples]), "median": np.sort(ranked[middle : middle + examples])}
        chosen.append(LatentExamples(latent, int(tokens[values.argmax()]), sets, tokens, values))
    return chosen


def match_latents(
    model: RQAE,
    codes: NDArray[np.integer],
    tokens: Ints,
    context_length: int,
    examples: Sequence[LatentExamples],
    columns: NDArray[np.integer],
    depths: Sequence[int],
) -> Floats:
    """Correlations (made from, example set, depth, latent), in the order of MADE_FROM and EXAMPLE_SETS; NaN if undefined.

    ``codes``: (token, quantizer).
    ``tokens``: (token,), their numbers: context × context length + position, ascending.
    ``columns``: (latent, quantizer), the codes of the encoder columns, in the order of ``examples``.

    A feature made from a token is correlated over all other tokens.
    """
    values = np.full((len(MADE_FROM), len(EXAMPLE_SETS), len(depths), len(examples)), np.nan)
    for number, one in enumerate(examples):
        best = int(np.searchsorted(tokens, one.best))
        features = torch.from_numpy(np.stack([columns[number], codes[best]]).astype(np.int64))
        for place, name in enumerate(EXAMPLE_SETS):
            rows = _rows_of(tokens, one.contexts[name], context_length)
            activations = _dense(tokens[rows], one)
            here = torch.from_numpy(codes[rows].astype(np.int64)).to(model.w_out.device)
            found = intensity(model, here, features.to(here.device), depths).cpu().numpy()  # (depth, token, 2)
            values[0, place, :, number] = [pearson(activations, line[:, 0]) for line in found]
            others = rows != best
            values[1, place, :, number] = [pearson(activations[others], line[others, 1]) for line in found]
    return values


def _rows_of(tokens: Ints, contexts: Ints, context_length: int) -> Ints:
    """The rows of all tokens in these contexts."""
    ends = np.searchsorted(tokens, np.stack([contexts, contexts + 1]) * context_length)
    return np.concatenate([np.arange(low, high) for low, high in ends.T])


def _dense(tokens: Ints, one: LatentExamples) -> Floats:
    """The latent's activation on each of ``tokens``; 0 if it does not fire there."""
    places = np.minimum(np.searchsorted(one.tokens, tokens), len(one.tokens) - 1)
    return np.where(one.tokens[places] == tokens, one.values[places], 0.0)


def pearson(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Pearson's correlation; NaN if one side is constant."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    left, right = (np.asarray(values, np.float64) - np.mean(values, dtype=np.float64) for values in (first, second))
    return float(left @ right / np.sqrt((left @ left) * (right @ right)))


def summarise(values: Floats, depths: Sequence[int]) -> list[Match]:
    """The rows of the table, from the result of ``match_latents``."""
    rows = []
    for way, made_from in enumerate(MADE_FROM):
        for place, name in enumerate(EXAMPLE_SETS):
            for step, depth in enumerate(depths):
                mean = over_features(values[way, place, step])
                rows.append(Match(depth, made_from, name, mean.n, mean.mean, mean.se))
    return rows
