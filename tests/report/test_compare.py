"""Pairwise differences against scipy's tests by hand, Holm against statsmodels, and which rows are held together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from evalkit.errors import BadConfig, InputError
from evalkit.report.compare import COMPARE_COLUMNS, compare_notes, compare_rows, holm
from evalkit.report.deciles import decile_table
from evalkit.report.rows import score_rows
from evalkit.store.frames import RunFrames
from tests.support.simulated import NAMES, simulate

FIRST, SECOND = "smollm2/layers.15/sae/2k/l0-16", "smollm2/layers.15/sae/2k/l0-64"
RQAES = [name for name in NAMES if "/rqae/" in name]


@pytest.fixture(scope="module")
def frames() -> RunFrames:
    return simulate(n_features=30, n_each=10)


def values(frames: RunFrames, name: str, scorer: str = "detection", metric: str = "auroc") -> pd.Series:
    (row,) = [r for r in score_rows(frames, (metric,)) if (r.source.name, r.scorer) == (name, scorer)]
    return pd.Series(row.real.values, row.real.features)


def test_every_pair_of_dictionaries_of_every_scorer_is_there_once(frames: RunFrames) -> None:
    table = compare_rows(frames)
    assert list(table.columns) == list(COMPARE_COLUMNS)
    real = [name for name in NAMES if "null" not in name]
    assert len(table) == 2 * len(real) * (len(real) - 1) // 2
    assert len({frozenset((row.first, row.second, row.scorer)) for row in table.itertuples()}) == len(table)
    with_controls = compare_rows(frames, controls=True)
    assert len(with_controls) == 2 * len(NAMES) * (len(NAMES) - 1) // 2


def test_a_difference_of_two_saes_is_near_the_test_of_welch(frames: RunFrames) -> None:
    table = compare_rows(frames).set_index(["first", "second", "scorer"])
    row = table.loc[(FIRST, SECOND, "detection")]
    a, b = values(frames, FIRST), values(frames, SECOND)
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert not row["paired"] and (row["n_first"], row["n_second"]) == (len(a), len(b))
    assert row["difference"] == pytest.approx(a.mean() - b.mean())
    # windows shared by features are in our error too, so it may only be the larger one
    assert abs(row["difference"]) / row["se"] <= abs(welch.statistic) + 1e-9
    assert row["p"] == pytest.approx(welch.pvalue, rel=0.6) and row["p"] >= welch.pvalue * 0.5


def test_depths_of_an_rqae_are_paired_by_feature(frames: RunFrames) -> None:
    shared = frames.judgements.copy()
    features = frames.features.copy()
    for frame in (shared, features):  # the same features at every depth
        chosen = frame["source"].isin(RQAES)
        order = {
            (source, feature): str(rank)
            for source in RQAES
            for rank, feature in enumerate(frames.features.query("source == @source and status == 'ok'")["feature"])
        }
        names = [order.get(key, f"x{key[1]}") for key in zip(frame["source"], frame["feature"], strict=True)]
        frame.loc[chosen, "feature"] = pd.Series(names, frame.index)[chosen]
    paired = replace(frames, judgements=shared, features=features)
    table = compare_rows(paired).set_index(["first", "second", "scorer"])
    row = table.loc[(RQAES[0], RQAES[1], "fuzzing")]
    a, b = (values(paired, name, "fuzzing") for name in RQAES[:2])
    both = a.index.intersection(b.index)
    expected = stats.ttest_rel(a[both], b[both])
    assert row["paired"] and row["n_first"] == row["n_second"] == len(both)
    assert row["difference"] == pytest.approx((a[both] - b[both]).mean())
    assert row["se"] >= (a[both] - b[both]).std() / np.sqrt(len(both)) - 1e-12
    assert row["p"] >= expected.pvalue * 0.999


def test_rqaes_without_common_features_are_compared_as_strangers(frames: RunFrames) -> None:
    features, judgements = frames.features.copy(), frames.judgements.copy()
    for frame in (features, judgements):
        mine = frame["source"] == RQAES[0]
        frame.loc[mine, "feature"] = "x" + frame.loc[mine, "feature"].astype(str)
    table = compare_rows(replace(frames, features=features, judgements=judgements))
    rows = table[table["first"].isin(RQAES) & table["second"].isin(RQAES)]
    assert set(rows.loc[rows["first"] == RQAES[0], "paired"]) == {False} and rows["p"].notna().all()


def test_explainers_and_judges_are_paired_on_one_dictionary(frames: RunFrames) -> None:
    worse = frames.judgements.assign(explainer="other")
    worse = worse.loc[worse["source"] == FIRST].assign(confidence=worse["confidence"] * -1)
    third = frames.judgements.loc[frames.judgements["source"] == FIRST].assign(judge="second")
    both = replace(frames, judgements=pd.concat([frames.judgements, worse, third], ignore_index=True))
    table = compare_rows(both, between=("explainers", "judges"))
    assert set(table["between"]) == {"explainers", "judges"} and table["paired"].all()
    (explainers,) = table.query("between == 'explainers' and scorer == 'detection'").to_dict("records")
    assert {explainers["first"], explainers["second"]} == {"words", "other"} and explainers["dictionary"] == FIRST
    score = values(frames, FIRST)
    sign = 1 if explainers["first"] == "words" else -1
    assert explainers["difference"] == pytest.approx(sign * (2 * score.mean() - 1))
    same = table.query("between == 'judges'")  # the same answers under another name
    assert (same["difference"] == 0).all() and (same["se"] == 0).all() and (same["p"] == 1).all()


def test_features_of_an_rqaes_density_are_held_against_rqaes_only(frames: RunFrames) -> None:
    features, judgements = frames.features.copy(), frames.judgements.copy()
    mine = features.index[features["source"] == FIRST]
    features.loc[mine[:6], "density"] = 0.01
    two = replace(frames, features=features, judgements=pd.concat([judgements, judgements.assign(judge="other")]))
    table = compare_rows(two)
    matched = table[table["first"].str.contains("density") | table["second"].str.contains("density")]
    assert {frozenset((row.first, row.second)) for row in matched.itertuples()} == {
        frozenset((f"{FIRST} (density 0.50% to 2.00%)", rqae)) for rqae in RQAES
    }
    assert not table.loc[table["between"] == "judges", "dictionary"].str.contains("density").any()


def test_a_baseline_stands_second_in_each_of_its_pairs(frames: RunFrames) -> None:
    table = compare_rows(frames, baseline=SECOND)
    assert set(table["second"]) == {SECOND} and len(table) == 2 * 7
    whole = compare_rows(frames).set_index(["first", "second", "scorer"])
    row = table.set_index(["first", "scorer"]).loc[(FIRST, "detection")]
    assert row["difference"] == whole.loc[(FIRST, SECOND, "detection")]["difference"]
    assert row["p_holm"] <= whole.loc[(FIRST, SECOND, "detection")]["p_holm"]  # a smaller family


def test_holm_is_that_of_statsmodels() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 40):
        p = rng.uniform(size=n) ** 3
        p[0] = p[-1]  # ties
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    missing = holm(np.array([0.01, np.nan, 0.04]))
    assert missing[[0, 2]] == pytest.approx([0.02, 0.04]) and np.isnan(missing[1])


def test_notes_count_what_is_beyond_doubt(frames: RunFrames) -> None:
    table = compare_rows(frames)
    assert (
        f"over the {len(table)} rows of this table, {(table['p_holm'] < 0.05).sum()} of them" in compare_notes(table)[1]
    )


def test_mistakes_are_one_line(frames: RunFrames) -> None:
    with pytest.raises(BadConfig, match="between: expected some of dictionaries, explainers, judges; seen 'layers'"):
        compare_rows(frames, between=("layers",))
    with pytest.raises(BadConfig, match="seen 'precision'"):
        compare_rows(frames, "precision")
    with pytest.raises(InputError, match="one of them 'nobody', with scores; seen scores of smollm2"):
        compare_rows(frames, baseline="nobody")
    with pytest.raises(InputError, match="expected two judges, with scores"):
        compare_rows(frames, between=("judges",))


def test_deciles_test_their_positives_against_all_negatives(frames: RunFrames) -> None:
    judgements = frames.judgements.copy()
    judgements.loc[judgements["label"], "decile"] = judgements.loc[judgements["label"], "item"] % 10
    table = (
        decile_table(replace(frames, judgements=judgements)).set_index(["dictionary", "scorer", "decile"]).sort_index()
    )
    mine = judgements.query("source == @FIRST and scorer == 'fuzzing' and control == ''")
    expected = []
    for _, group in mine.groupby("feature"):
        group = group.dropna(subset=["confidence"])
        ones = group.loc[group["label"] & (group["decile"] == 3), "confidence"].to_numpy(float)
        zeros = group.loc[~group["label"], "confidence"].to_numpy(float)
        if len(ones) and len(zeros):
            expected.append(np.heaviside(np.subtract.outer(ones, zeros), 0.5).mean())
    row = table.loc[(FIRST, "fuzzing", 3)]
    assert row["mean"] == pytest.approx(np.mean(expected)) and row["n_features"] == len(expected)
    assert row["n_judgements"] == (mine["decile"] == 3).sum()
    assert list(table.loc[(FIRST, "fuzzing")].index) == list(range(10))
    with pytest.raises(InputError, match="expected judgements with activation deciles"):
        decile_table(frames)
