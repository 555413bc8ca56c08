import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rqae import RQAE, RqaeConfig, RqaeError, random_codes, splits
from rqae.feature_sets import FeatureSet
from rqae.features import intensity_literal
from rqae.splits import SplitTree, m_split, parting_depth, similarity_by_depth
from tests.support.random_rqae import random_rqae

DEPTH = 10
MODEL = random_rqae(RqaeConfig(16, num_quantizers=DEPTH))


def family(model, count, seed):
    """Features that share prefixes: each copies an earlier one up to a random depth."""
    codes = random_codes(model, count, seed)
    rng = np.random.default_rng(seed)
    for row in range(1, count):
        shared = int(rng.integers(codes.shape[1] + 1))
        codes[row, :shared] = codes[int(rng.integers(row)), :shared]
    return codes


def named(model, codes, labels=None):
    labels = [f"f{row}" for row in range(len(codes))] if labels is None else labels
    return FeatureSet(model.config, codes, tuple(labels), ("token",) * len(codes))


def literal(model, codes, threshold):
    """C of every pair at every depth, and how many leading depths each pair is together for, straight from the words."""
    similar = torch.stack([intensity_literal(model, codes, codes, depth + 1) for depth in range(codes.shape[1])])
    count = len(codes)
    shared = torch.full((count, count), codes.shape[1])
    for f in range(count):
        for g in range(count):
            for depth in range(codes.shape[1]):
                if f != g and similar[depth, f, g] < threshold:
                    shared[f, g] = depth
                    break
    return similar, shared


@pytest.mark.parametrize(
    "config", [RqaeConfig(16, 4, 5, DEPTH), RqaeConfig(16, 3, 4, 6, "fsq"), RqaeConfig(16, 4, 30, 6, "vq")]
)
@pytest.mark.parametrize("threshold", [-0.123, 0.3217, 0.7123])
def test_against_the_definition(config, threshold):
    model = random_rqae(config)
    codes = family(model, 12, 1)
    similar, shared = literal(model, codes, threshold)
    torch.testing.assert_close(similarity_by_depth(model, codes), similar, rtol=0, atol=2e-6)
    torch.testing.assert_close(similarity_by_depth(model, codes, (3, 1)), similar[[2, 0]], rtol=0, atol=2e-6)
    for depth in range(1, config.num_quantizers + 1):
        expected = (similar[depth - 1] >= threshold).fill_diagonal_(True)
        assert torch.equal(m_split(model, codes, depth, threshold), expected)
    found = parting_depth(model, codes, threshold)
    assert found.dtype == torch.int32 and torch.equal(found.long(), shared)


def test_tiles_change_nothing(monkeypatch):
    codes = family(MODEL, 30, 2)
    whole = parting_depth(MODEL, codes, 0.4)
    tokens = random_codes(MODEL, 50, 1)
    tree = SplitTree.build(MODEL, named(MODEL, codes), 0.4, tokens=tokens)
    monkeypatch.setattr(splits, "_TILE", 70)
    assert torch.equal(parting_depth(MODEL, codes, 0.4), whole)
    assert SplitTree.build(MODEL, named(MODEL, codes), 0.4, tokens=tokens) == tree


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_at_threshold_one_features_part_where_their_codes_first_differ(seed):
    codes = family(MODEL, 10, seed)
    expected = (codes[:, None] == codes[None]).long().cumprod(dim=-1).sum(dim=-1)
    assert torch.equal(parting_depth(MODEL, codes, 1).long(), expected)
    assert bool((parting_depth(MODEL, codes, -1) == DEPTH).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1, 1), st.floats(-1, 1))
def test_parting_is_symmetric_and_earlier_for_higher_thresholds(seed, one, other):
    codes = family(MODEL, 8, seed)
    loose, strict = parting_depth(MODEL, codes, min(one, other)), parting_depth(MODEL, codes, max(one, other))
    assert torch.equal(loose, loose.T) and bool((loose >= strict).all())
    assert loose.diagonal().tolist() == [DEPTH] * 8


def components(shared, depth):
    """The sets of features that are joined by chains of pairs which share ``depth`` quantizers or more."""
    left, found = set(range(len(shared))), set()
    while left:
        reached, edge = set(), {min(left)}
        while edge:
            reached |= edge
            edge = {g for f in edge for g in left - reached if shared[f][g] >= depth}
        found.add(frozenset(reached))
        left -= reached
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.sampled_from([-1, 0.1373, 0.4181, 0.8012, 1]))
def test_tree_against_components_at_every_depth(seed, count, threshold):
    codes = family(MODEL, count, seed)
    similar, shared = literal(MODEL, codes, threshold - 1e-5 if abs(threshold) == 1 else threshold)
    tree = SplitTree.build(MODEL, named(MODEL, codes), threshold)
    last = {}  # each set of features, and the depth up to which it is one component
    for depth in range(DEPTH + 1):
        last |= dict.fromkeys(components(shared.tolist(), depth), depth)
    last |= {frozenset({feature}): DEPTH for feature in range(count)}
    assert {frozenset(node.features): node.depth for node in tree.nodes} == last
    assert len(tree.nodes) == len(last) and set(tree.nodes[0].features) == set(range(count))
    for place, node in enumerate(tree.nodes):
        assert node.features == tuple(sorted(node.features))
        assert bool(node.children) == (len(node.features) > 1)
        kids = [tree.nodes[child] for child in node.children]
        assert all(kid.parent == place for kid in kids) and all(child > place for child in node.children)
        assert sorted(f for kid in kids for f in kid.features) == (sorted(node.features) if kids else [])
        if node.parent is None:
            assert place == 0 and node.parts_at is None and node.intensity is None
            continue
        outer = tree.nodes[node.parent]
        never = outer.depth == DEPTH
        assert node.parts_at == (None if never else outer.depth + 1)
        pairs = [(f, g) for f in node.features for g in set(outer.features) - set(node.features)]
        at = DEPTH - 1 if never else outer.depth
        expected = max(float(similar[at, f, g]) for f, g in pairs if shared[f, g] == outer.depth)
        assert node.intensity == pytest.approx(expected, abs=3e-6)
        assert never or node.intensity < threshold


def fan(*angles):
    """One quantizer for each tuple of angles; feature r takes the direction of angle r in every layer."""
    count, size = len(angles), len(angles[0])
    codebook = torch.tensor([[[math.cos(a), math.sin(a)] for a in map(math.radians, layer)] for layer in angles])
    model = RQAE(
        RqaeConfig(2, 2, size, count, "vq"),
        torch.eye(2).repeat(count, 1, 1),
        torch.zeros(count, 2),
        torch.eye(2).repeat(count, 1, 1),
        torch.zeros(count, 2),
        codebook,
    )
    return model, torch.arange(size)[:, None].repeat(1, count)


def test_parting_is_not_transitive_but_the_tree_is():
    """At 0, 40 and 80 degrees neighbours are together at cos 60°, the ends are not: the one between holds them."""
    model, codes = fan((0, 40, 80))
    assert m_split(model, codes, 1, 0.5).tolist() == [[True, True, False], [True, True, True], [False, True, True]]
    tree = SplitTree.build(model, named(model, codes), 0.5)
    assert [node.features for node in tree.nodes] == [(0, 1, 2), (0,), (1,), (2,)]
    assert tree.nodes[0].depth == 1 and tree.nodes[3].parts_at is None
    assert tree.nodes[3].intensity == pytest.approx(math.cos(math.radians(40)), abs=1e-6)


def test_an_edge_carries_the_intensity_of_those_that_part_there():
    """The first and the last part at depth 1, just below the threshold; the last leaves the one between at depth 2."""
    model, codes = fan((0, 30, 61), (0, 0, 180))
    tree = SplitTree.build(model, named(model, codes), 0.5)
    assert [(node.features, node.depth) for node in tree.nodes] == [
        ((0, 1, 2), 1),
        ((0, 1), 2),
        ((0,), 2),
        ((1,), 2),
        ((2,), 2),
    ]
    for leaving in (tree.nodes[1], tree.nodes[4]):
        assert leaving.parts_at == 2
        assert leaving.intensity == pytest.approx((math.cos(math.radians(31)) - 1) / 2, abs=1e-6)


def test_a_pair_that_comes_back_stays_parted():
    model, codes = fan((0, 90), (0, 0), (0, 0))  # C = 0, 1/2, 2/3
    assert parting_depth(model, codes, 0.5).tolist() == [[3, 0], [0, 3]]
    assert m_split(model, codes, 2, 0.5).all() and not m_split(model, codes, 1, 0.5).all()


def test_drawing_and_json():
    """Three directions in four layers: two part at depth 3 (C = 2/3), the third at once (C = 0); tokens like the first."""
    model, codes = fan((0, 0, 90), (0, 0, 90), (0, 90, 180), (0, 90, 180))
    tokens = codes[[0, 0, 1, 2, 2]]
    labels = ["pear", "plum\x1b[2J", "großes Auto"]
    tree = SplitTree.build(model, named(model, codes, labels), 0.75, tokens=tokens)
    assert tree.draw() == (
        "3 features together to depth 0 [5 tokens]\n"
        "├─ at 1 (0.00): 2 features together to depth 2 [3 tokens]\n"
        "│  ├─ at 3 (0.67): pear [2 tokens]\n"
        "│  └─ at 3 (0.67): plum\\x1b[2J [1 tokens]\n"
        "└─ at 1 (0.00): großes Auto [2 tokens]"
    )
    read = json.loads(tree.as_json())
    assert (read["threshold"], read["depth"], read["labels"]) == (0.75, 4, labels)
    assert [node["features"] for node in read["nodes"]] == [[0, 1, 2], [0, 1], [0], [1], [2]]
    assert [node["parent"] for node in read["nodes"]] == [None, 0, 1, 1, 0]
    assert [node["children"] for node in read["nodes"]] == [[1, 4], [2, 3], [], [], []]
    assert [node["tokens"] for node in read["nodes"]] == [5, 3, 2, 1, 2]
    alone = SplitTree.build(model, named(model, codes[:1]), 0.75)
    assert alone.draw() == "f0" and alone.nodes[0].tokens is None


@pytest.mark.parametrize("active", [None, 0.4181, torch.linspace(0.6, 0.3, DEPTH)])
def test_tokens_of_every_node(active):
    codes, threshold = family(MODEL, 9, 3), 0.5123
    tokens = torch.cat([family(MODEL, 60, 4), codes[:4]])
    tokens[10:40, :4] = codes[torch.arange(30) % 9, :4]
    tree = SplitTree.build(MODEL, named(MODEL, codes), threshold, tokens=tokens, active_above=active)
    for node in tree.nodes:
        if node.depth == 0:
            assert node.tokens == len(tokens)
            continue
        limit = threshold if active is None else active if isinstance(active, float) else float(active[node.depth - 1])
        values = intensity_literal(MODEL, tokens, codes[list(node.features)], node.depth)
        assert node.tokens == int((values >= limit).any(dim=1).sum())
    assert any(0 < node.tokens < len(tokens) for node in tree.nodes)
    stored = tokens.to(torch.uint16)
    assert SplitTree.build(MODEL, named(MODEL, codes), threshold, tokens=stored, active_above=active) == tree


def test_a_tree_deeper_than_the_interpreter_recurses():
    """Each feature leaves the others one quantizer later than the one before."""
    count = 1200
    place = torch.arange(count)
    shared = torch.minimum(place[:, None], place[None])
    tree = SplitTree(tuple(splits._tree(shared, shared / count, count)), ("f",) * count, 0.5, count)
    assert [node.depth for node in tree.nodes if node.children] == list(range(count - 1))
    assert len(tree.draw().splitlines()) == len(json.loads(tree.as_json())["nodes"]) == 2 * count - 1


def test_errors():
    codes = random_codes(MODEL, 3, 1)
    for threshold in (1.01, math.nan):
        with pytest.raises(RqaeError, match="threshold: expected an intensity from -1 to 1"):
            parting_depth(MODEL, codes, threshold)
    with pytest.raises(RqaeError, match="depth: expected 1 to 10; seen 11"):
        m_split(MODEL, codes, 11, 0.5)
    with pytest.raises(RqaeError, match="codes of features: expected 0 to 624; seen 7 to 625"):
        parting_depth(MODEL, torch.tensor([[7, 625]]), 0.5)
    with pytest.raises(RqaeError, match=r"codes of features: expected integers of shape \[any, 1 to 10\]"):
        similarity_by_depth(MODEL, codes.repeat(1, 2))
    with pytest.raises(RqaeError, match="codes of tokens: expected at least 10 quantizers, like the features; seen 9"):
        SplitTree.build(MODEL, named(MODEL, codes), 0.5, tokens=codes[:, :9])
    with pytest.raises(RqaeError, match=r"active_above: expected one number, or 10 numbers; seen shape \[9\]"):
        SplitTree.build(MODEL, named(MODEL, codes), 0.5, tokens=codes, active_above=torch.ones(9))
