"""How features split with depth: similarity of prefixes, the depth at which pairs part, and the tree of a set.

Two features are m-split if the intensity of their m-prefixes with each other, C(A_m(f), A_m(g)), is θ or more: at depth m
they still count as one feature. They part at the first depth where it is less than θ, and stay parted even if C rises
above θ again at greater depth. Being together is not transitive: f and h can each be together with g but not with each
other. The tree therefore uses connected components (single linkage): features are together at depth m if a chain of pairs
that have not parted up to m joins them. Computes in float64. Uses no language model, text or files.
Source: H. Kamath, Residual Quantization Autoencoders, 2024.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from rqae.encoding.codebook import normalised
from rqae.errors import RqaeError
from rqae.feature_sets import FeatureSet, check_codes
from rqae.features import intensity, layer_weights
from rqae.model import RQAE

__all__ = ["SplitNode", "SplitTree", "m_split", "parting_depth", "similarity_by_depth"]

_ROUNDING = 1e-9  # tolerance below θ, so that equal prefixes are together at θ = 1
_TILE = 1 << 16  # intensities computed at a time


def similarity_by_depth(model: RQAE, codes: Tensor, depths: Sequence[int] | None = None) -> Tensor:
    """Intensity of every pair of features at each depth: (F, k) codes → (D, F, F) float32. ``depths``: None for all."""
    check_codes(model.config, codes, "codes of features")
    return intensity(model, codes, codes, range(1, codes.shape[1] + 1) if depths is None else depths)


def m_split(model: RQAE, codes: Tensor, depth: int, threshold: float) -> Tensor:
    """Which pairs still count as one feature at m = ``depth``: (F, k) codes → (F, F) bool, true on the diagonal.

    Considers this depth only, so a pair that parted earlier can be m-split again. Raises RqaeError.
    """
    check_codes(model.config, codes, "codes of features")
    if not 0 < depth <= codes.shape[1]:
        raise RqaeError("depth", expected=f"1 to {codes.shape[1]}", seen=str(depth), fix="encode deeper")
    _check_threshold(threshold)
    rows = _scaled(model, codes[:, :depth])
    together: Tensor = rows @ rows.T >= (threshold - _ROUNDING) * _totals(model)[depth - 1]
    return together.fill_diagonal_(True)


def parting_depth(model: RQAE, codes: Tensor, threshold: float) -> Tensor:
    """The number of leading quantizers through which each pair is together: (F, k) codes → (F, F) int32 in [0, k].

    A value m means that the prefixes have intensity θ or more at depths 1 to m, and less at m + 1; k means that they never
    part. Makes one pass over the depths, in tiles. Memory: two (F, F) arrays of 4-byte numbers. Raises RqaeError.
    """
    return _parting(model, codes, threshold)[0]


def _scaled(model: RQAE, codes: Tensor) -> Tensor:
    """``features.scaled_vectors`` in float64, (N, k · c)."""
    weights = layer_weights(model)[: codes.shape[1], None].double()
    return (normalised(model.vectors(codes).double()) * weights.sqrt()).flatten(1)


def _totals(model: RQAE) -> Tensor:
    return layer_weights(model).double().cumsum(dim=0)


def _by_depth(model: RQAE, left: Tensor, right: Tensor, depths: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield each depth (ascending) with the intensities (A, B) of scaled rows (A, k·c) with scaled rows (B, k·c)."""
    width, totals = model.config.codebook_dim, _totals(model).tolist()
    running = left.new_zeros(len(left), len(right))
    done = 0
    for depth in depths:
        columns = slice(done * width, depth * width)
        running.addmm_(left[:, columns], right[:, columns].T)
        yield depth, running / totals[depth - 1]
        done = depth


def _parting(model: RQAE, codes: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The parting depth of each pair, and its intensity at the next depth (at k if it never parts), both (F, F)."""
    check_codes(model.config, codes, "codes of features")
    _check_threshold(threshold)
    rows, count, deepest = _scaled(model, codes), len(codes), codes.shape[1]
    shared = torch.zeros(count, count, dtype=torch.int32, device=rows.device)
    there = torch.ones(count, count, dtype=torch.float32, device=rows.device)
    height = max(1, _TILE // max(count, 1))
    for start in range(0, count, height):
        tile = rows[start : start + height]
        together = torch.ones(len(tile), count, dtype=torch.bool, device=rows.device)
        together[torch.arange(len(tile)), torch.arange(start, start + len(tile))] = False  # a feature with itself
        last, depths = there[start : start + height], shared[start : start + height]
        for _, values in _by_depth(model, tile, rows, range(1, deepest + 1)):
            torch.where(together, values.float(), last, out=last)
            together &= values >= threshold - _ROUNDING
            depths += together
            if not bool(together.any()):
                break
    return shared.fill_diagonal_(deepest), there


@dataclass(frozen=True, slots=True)
class SplitNode:
    """A group of features that are together for the first ``depth`` quantizers. A leaf is one feature, at full depth.

    features: indices of the features in the set.
    parent, children: indices of nodes; the root has no parent.
    parts_at: the depth at which it parts from its siblings; None for the root and for features that never part.
    intensity: the largest intensity at that depth between one of its features and one of a sibling; None for the root.
    tokens: the number of tokens that are active on it; None if not counted.
    """

    features: tuple[int, ...]
    depth: int
    parent: int | None
    children: tuple[int, ...]
    parts_at: int | None
    intensity: float | None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SplitTree:
    """The tree of a set of features.

    nodes: the root first, every node before its children.
    labels: names of the features.
    threshold: θ, the intensity below which features part.
    depth: number of quantizers in the codes.
    """

    nodes: tuple[SplitNode, ...]
    labels: tuple[str, ...]
    threshold: float
    depth: int

    @classmethod
    def build(
        cls,
        model: RQAE,
        features: FeatureSet,
        threshold: float,
        *,
        tokens: Tensor | None = None,
        active_above: float | Tensor | None = None,
    ) -> SplitTree:
        """Build the tree of a set. With a corpus's codes, ``tokens`` (N, k or more), also count active tokens per node.

        A token is active on a node of depth m if its intensity on the m-prefix of at least one of the node's features is
        ``active_above`` or more. This is one number, one per depth (k,), or None for θ, which counts the tokens that are
        m-split with a feature of the node. Every token is active on a root of depth 0. Memory: F². Raises RqaeError.
        """
        codes = features.codes.to(model.codebook.device)
        shared, there = (each.cpu() for each in _parting(model, codes, threshold))
        nodes = _tree(shared, there, features.depth)
        if tokens is not None:
            check_codes(model.config, tokens, "codes of tokens")
            limits = _limits(threshold if active_above is None else active_above, features.depth)
            if tokens.shape[1] < features.depth:
                raise RqaeError(
                    "codes of tokens",
                    expected=f"at least {features.depth} quantizers, like the features",
                    seen=str(tokens.shape[1]),
                    fix="encode deeper, or cut the features with prefix",
                )
            counts = _active_tokens(model, tokens, codes, nodes, limits)
            nodes = [replace(node, tokens=count) for node, count in zip(nodes, counts, strict=True)]
        return cls(tuple(nodes), features.labels, threshold, features.depth)

    def as_json(self) -> str:
        """The tree as one JSON object; nodes are a flat list that refers to parents and children by index."""
        return json.dumps(
            {
                "threshold": self.threshold,
                "depth": self.depth,
                "labels": self.labels,
                "nodes": [{name: getattr(node, name) for name in SplitNode.__slots__} for node in self.nodes],
            }
        )

    def draw(self) -> str:
        """The tree as text, one line per node. Control characters in labels are escaped."""
        lines = []
        waiting = [(0, "", "")]  # node, the text before it, the text before its children
        while waiting:
            place, before, below = waiting.pop()
            node = self.nodes[place]
            lines.append(before + self._line(node))
            last = node.children[-1:]
            for child in reversed(node.children):
                mark, rest = ("└─ ", "   ") if (child,) == last else ("├─ ", "│  ")
                waiting.append((child, below + mark, below + rest))
        return "\n".join(lines)

    def _line(self, node: SplitNode) -> str:
        if node.children:
            text = f"{len(node.features)} features together to depth {node.depth}"
        else:
            text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in self.labels[node.features[0]])
        if node.intensity is not None:
            edge = "never" if node.parts_at is None else f"at {node.parts_at}"
            text = f"{edge} ({node.intensity:.2f}): {text}"
        return text if node.tokens is None else f"{text} [{node.tokens:,} tokens]"


def _tree(shared: Tensor, there: Tensor, deepest: int) -> list[SplitNode]:
    """Merge features from the deepest parting depth upwards; number the nodes from the root down."""
    merged: list[tuple[list[int], int, list[int]]] = [([place], deepest, []) for place in range(len(shared))]
    above = list(range(len(shared)))  # a forest over features: each points towards its set's representative
    top = list(range(len(shared)))  # for each representative: the index of its set in ``merged``

    def find(feature: int) -> int:
        while above[feature] != feature:
            above[feature] = above[above[feature]]
            feature = above[feature]
        return feature

    for depth, pairs in groupby(sorted(_spanning(shared), reverse=True), key=lambda pair: pair[0]):
        joined: dict[int, list[int]] = {}
        for _, left, right in pairs:
            left, right = find(left), find(right)
            above[right] = left
            joined[left] = joined.pop(left, [top[left]]) + joined.pop(right, [top[right]])
        for representative, parts in joined.items():
            parts.sort(key=lambda part: merged[part][0])
            merged.append((sorted(feature for part in parts for feature in merged[part][0]), depth, parts))
            top[representative] = len(merged) - 1

    nodes: list[SplitNode] = []
    waiting: list[tuple[int, int | None]] = [(len(merged) - 1, None)]
    while waiting:
        place, parent = waiting.pop()
        features, depth, parts = merged[place]
        at, value = None, None
        if parent is not None:
            outer = nodes[parent]
            across = torch.tensor(features)[:, None], torch.tensor(sorted(set(outer.features) - set(features)))
            value = float(there[across][shared[across] == outer.depth].max())
            at = outer.depth + 1 if outer.depth < deepest else None
            nodes[parent] = replace(outer, children=(*outer.children, len(nodes)))
        waiting += [(part, len(nodes)) for part in reversed(parts)]
        nodes.append(SplitNode(tuple(features), depth, parent, (), at, value))
    return nodes


def _spanning(shared: Tensor) -> list[tuple[int, int, int]]:
    """A maximum spanning tree of the features by parting depth (Prim): F - 1 edges (depth, feature, feature)."""
    count = len(shared)
    best, link = shared[0].clone(), torch.zeros(count, dtype=torch.int64)
    best[0] = -1
    pairs = []
    for _ in range(count - 1):
        new = int(best.argmax())
        pairs.append((int(best[new]), int(link[new]), new))
        closer = (shared[new] > best) & (best >= 0)
        best = torch.where(closer, shared[new], best)
        link[closer] = new
        best[new] = -1
    return pairs


def _active_tokens(
    model: RQAE, tokens: Tensor, codes: Tensor, nodes: Sequence[SplitNode], limits: Sequence[float]
) -> list[int]:
    """For each node, the number of tokens that reach the limit of its depth on at least one of its features."""
    at_depth: dict[int, list[tuple[int, Tensor]]] = {}
    for place, node in enumerate(nodes):
        at_depth.setdefault(node.depth, []).append((place, torch.tensor(node.features, device=codes.device)))
    depths = sorted(set(at_depth) - {0})
    rows, deepest = _scaled(model, codes), codes.shape[1]
    counts = [len(tokens) if node.depth == 0 else 0 for node in nodes]
    length = max(1, _TILE // len(codes))
    for start in range(0, len(tokens), length):
        chunk = _scaled(model, tokens[start : start + length, :deepest].to(codes.device, torch.int64))
        for depth, values in _by_depth(model, rows, chunk, depths):  # (F, chunk)
            reached = values >= limits[depth - 1] - _ROUNDING
            for place, features in at_depth[depth]:
                counts[place] += int(reached[features].any(dim=0).sum())
    return counts


def _limits(value: float | Tensor, depth: int) -> list[float]:
    """An activity threshold for each depth from 1."""
    if not isinstance(value, Tensor):
        return [float(value)] * depth
    if tuple(value.shape) != (depth,):
        raise RqaeError(
            "active_above",
            expected=f"one number, or {depth} numbers",
            seen=f"shape {list(value.shape)}",
            fix="give one number, or one per depth",
        )
    return [float(each) for each in value]


def _check_threshold(threshold: float) -> None:
    if not (math.isfinite(threshold) and -1 <= threshold <= 1):
        raise RqaeError("threshold", expected="an intensity from -1 to 1", seen=str(threshold), fix="try 0.5")
