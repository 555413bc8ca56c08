from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import special
from scipy import stats as scipy_stats
from sklearn.metrics import f1_score, roc_auc_score

from evalkit.errors import BadConfig, InputError
from evalkit.report.compare import compare_rows
from evalkit.report.footer import footer
from evalkit.report.render import FORMATS, render
from evalkit.report.small_model_marks import labelled, notes
from evalkit.report.tables import TABLE_COLUMNS, headline, headline_rows, summary_table
from evalkit.store.frames import RunFrames
from tests.support.simulated import NAMES, simulate

SAE, RQAE, PLANTED = NAMES[4], NAMES[0], NAMES[-1]


@pytest.fixture(scope="module")
def frames() -> RunFrames:
    return simulate(n_features=12, n_each=8, unscored=0.02)


@pytest.fixture(scope="module")
def table(frames: RunFrames) -> pd.DataFrame:
    return summary_table(frames)


def row_of(table: pd.DataFrame, dictionary: str, scorer: str = "detection", metric: str = "auroc") -> pd.Series:
    rows = table.query("dictionary == @dictionary and scorer == @scorer and metric == @metric")
    assert len(rows) == 1
    return rows.iloc[0]


def test_columns_are_the_published_ones_and_every_row_is_there_once(table: pd.DataFrame) -> None:
    expected = (
        "dictionary kind width l0 depth scorer explainer judge metric n_tried n_ineligible n_features n_judgements "
        "n_unscored mean se ci_low ci_high null_mean null_se z"
    )
    assert list(table.columns) == expected.split() == list(TABLE_COLUMNS)
    keys = ["dictionary", "scorer", "explainer", "judge", "metric"]
    assert len(table) == len(NAMES) * 2 * 4 == len(table[keys].drop_duplicates())


def test_rqaes_come_first_by_depth_then_saes_by_width_and_l0_then_controls(table: pd.DataFrame) -> None:
    order = table["dictionary"].drop_duplicates().tolist()
    assert order[:8] == NAMES[:8]
    assert set(order[8:]) == set(NAMES[8:])


def test_numbers_agree_with_a_computation_by_hand(frames: RunFrames, table: pd.DataFrame) -> None:
    judged = frames.judgements.query("source == @SAE and scorer == 'detection'").dropna(subset=["confidence"])
    means = {}
    for control in ("", "shuffled"):
        part = judged[judged["control"] == control]
        means[control] = {f: roc_auc_score(g["label"], g["confidence"]) for f, g in part.groupby("feature")}
    row = row_of(table, SAE)
    values = np.array(list(means[""].values()))
    assert row["mean"] == pytest.approx(values.mean())
    assert row["null_mean"] == pytest.approx(np.mean(list(means["shuffled"].values())))
    assert row["se"] >= values.std(ddof=1) / math.sqrt(len(values)) - 1e-12
    mean = row["mean"]  # on the scale of the logit, with the delta method
    interval = scipy_stats.t.interval(0.95, len(values) - 1, special.logit(mean), row["se"] / (mean * (1 - mean)))
    assert (row["ci_low"], row["ci_high"]) == pytest.approx(special.expit(interval))
    paired = values - np.array([means["shuffled"][feature] for feature in means[""]])
    upper = paired.mean() / (paired.std(ddof=1) / math.sqrt(len(paired)))
    assert 0.5 < row["z"] / upper <= 1 + 1e-9  # the clustered error is at least that over features


def test_counts_show_who_was_tried_and_what_is_missing(frames: RunFrames, table: pd.DataFrame) -> None:
    row = row_of(table, SAE, metric="balanced_accuracy")
    real = frames.judgements.query("source == @SAE and scorer == 'detection' and control == ''")
    assert row["n_tried"] == 12
    assert row["n_ineligible"] == (frames.features.query("source == @SAE")["status"] != "ok").sum() > 0
    assert row["n_features"] == real["feature"].nunique()
    assert row["n_judgements"] == len(real) == 16 * row["n_features"]
    assert row["n_unscored"] == real["match"].isna().sum() > 0


def test_failed_features_and_features_without_judgements_count_as_ineligible_and_are_named(frames: RunFrames) -> None:
    gone = frames.judgements.query("source == @SAE")["feature"].iloc[0]
    features = frames.features.copy()
    features.loc[(features["source"] == SAE) & (features["feature"] == gone), "status"] = "failed"
    kept = frames.judgements.query("not (source == @SAE and feature == @gone)")
    changed = replace(frames, features=features, judgements=kept)
    before, after = row_of(summary_table(frames), SAE), row_of(summary_table(changed), SAE)
    assert after["n_ineligible"] == before["n_ineligible"] + 1
    assert f"Features that failed with an error, counted as ineligible: {SAE} 1." in footer(
        changed, summary_table(changed)
    )


def test_a_dictionary_that_no_scorer_could_score_still_has_its_rows(frames: RunFrames) -> None:
    left = replace(frames, judgements=frames.judgements.query("source != @SAE"))
    row = row_of(summary_table(left), SAE)
    assert (row["n_tried"], row["n_ineligible"], row["n_features"], row["n_judgements"]) == (12, 12, 0, 0)
    assert row[["mean", "se", "ci_low", "null_mean", "z"]].isna().all()


def test_one_feature_has_no_error_and_a_run_without_a_null_no_z() -> None:
    frames = simulate(n_features=1, names=[SAE])
    row = row_of(summary_table(frames), SAE)
    assert row["n_features"] == 1
    assert not math.isnan(row["mean"]) and math.isnan(row["se"]) and math.isnan(row["ci_low"])
    bare = replace(frames, judgements=frames.judgements.query("control == ''"))
    table = summary_table(bare)
    assert table[["null_mean", "null_se", "z"]].isna().all(axis=None)
    assert any(line.startswith("No shuffled null was run: ") for line in footer(bare, table))


def test_a_judge_without_confidences_has_no_ranking_rows(frames: RunFrames) -> None:
    plain = replace(frames, judgements=frames.judgements.assign(confidence=None))
    assert set(summary_table(plain)["metric"]) == {"balanced_accuracy", "f1"}


@pytest.mark.parametrize("seed", range(3))
def test_row_order_changes_nothing(frames: RunFrames, table: pd.DataFrame, seed: int) -> None:
    names = ("sources", "features", "judgements")
    mixed = {name: getattr(frames, name).sample(frac=1, random_state=seed) for name in names}
    pd.testing.assert_frame_equal(summary_table(replace(frames, **mixed)), table, check_exact=True)


def test_dtypes_of_other_stores_give_the_same_table(frames: RunFrames, table: pd.DataFrame) -> None:
    loose = frames.judgements.astype({"match": "object", "confidence": "object", "label": "int64"})
    loose["match"] = [None if pd.isna(value) else int(value) for value in loose["match"]]
    pd.testing.assert_frame_equal(summary_table(replace(frames, judgements=loose)), table)
    extra = replace(frames, judgements=frames.judgements.assign(weather="fine"))
    pd.testing.assert_frame_equal(summary_table(extra), table)


def test_two_versions_of_a_scorer_are_never_averaged(frames: RunFrames) -> None:
    newer = frames.judgements.query("scorer == 'fuzzing'").assign(scorer_version="2")
    both = replace(frames, judgements=pd.concat([frames.judgements, newer]))
    assert set(summary_table(both)["scorer"]) == {"detection", "fuzzing@1", "fuzzing@2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: {"judgements": f.judgements.iloc[:0]},
            "run: expected sources, features and judgements; seen no judgements; fix: let `evalkit run` finish first",
        ),
        (
            lambda f: {"judgements": f.judgements.drop(columns="window")},
            "frame judgements: expected columns source, feature, scorer, scorer_version, explainer, judge, control, "
            "repeat, item, window, label, match, confidence, probability, decile, reason, moments; seen no window; fix: "
            "read the run with evalkit.read_run",
        ),
        (
            lambda f: {"sources": pd.concat([f.sources, f.sources[["kind"]]], axis=1)},
            "frame sources: expected every column once; seen kind more than once; fix: read the run with evalkit.read_run",
        ),
        (
            lambda f: {"features": pd.concat([f.features, f.features.iloc[[0]]])},
            "frame features: expected one row per source, feature; seen 1 repeated, such as ",
        ),
        (
            lambda f: {"judgements": pd.concat([f.judgements, f.judgements.iloc[[5]]])},
            "frame judgements: expected one row per source, feature, scorer, scorer_version, explainer, judge, control, ",
        ),
        (
            lambda f: {"features": f.features.query("source != @SAE")},
            "frame judgements: expected source and feature that the frame features lists; seen ",
        ),
    ],
)
def test_frames_that_do_not_fit_are_refused(frames: RunFrames, change: object, message: str) -> None:
    with pytest.raises(InputError) as error:
        summary_table(replace(frames, **change(frames)))  # type: ignore[operator]
    assert str(error.value).startswith(message)


def test_the_footer_says_what_was_run_and_warns(frames: RunFrames, table: pd.DataFrame) -> None:
    lines = footer(frames, table)
    calls = f"{len(frames.judgements):,}"
    assert lines[0] == f"Protocol 1; explainer words; judge embedding; cost: judge calls {calls}, USD 0.00."
    assert lines[1].endswith("it does not contain the spread between training seeds.")
    beaten = next(line for line in lines if line.startswith("Does not beat its shuffled null (paired t test, 97.5%): "))
    assert PLANTED not in beaten
    for row in table.query("scorer == 'detection' and metric == 'auroc'").to_dict("records"):
        assert (row["dictionary"] in beaten) or row["z"] >= scipy_stats.t.ppf(0.975, row["n_features"] - 1)
    assert not any("unscored" in line for line in lines)
    bare = footer(replace(frames, meta={}), table)
    assert bare[0] == "Protocol unknown; explainer words; judge embedding; cost: not recorded."


def test_more_than_five_percent_unscored_is_said() -> None:
    frames = simulate(n_features=6, unscored=0.2, names=[SAE], scorers=["detection"])
    line = next(line for line in footer(frames, summary_table(frames)) if "unscored" in line)
    assert line.startswith("More than 5% of judgements unscored (up to ")
    assert line.endswith(f"{SAE} detection (balanced_accuracy, f1, auroc, auprc).")


def test_features_with_one_class_only_are_left_out_and_said(frames: RunFrames) -> None:
    feature = frames.judgements.query("source == @RQAE")["feature"].iloc[0]
    judgements = frames.judgements.copy()
    cut = (judgements["source"] == RQAE) & (judgements["feature"] == feature) & ~judgements["label"]
    judgements.loc[cut, ["match", "confidence"]] = None
    changed = replace(frames, judgements=judgements)
    before, after = row_of(summary_table(frames), RQAE), row_of(summary_table(changed), RQAE)
    assert after["n_features"] == before["n_features"] - 1
    assert after["n_ineligible"] == before["n_ineligible"]
    lines = footer(changed, summary_table(changed))
    assert any(
        line.startswith("Some features have no score, because answers or one of the two classes are missing: ")
        for line in lines
    )


def test_machine_formats_keep_every_digit(table: pd.DataFrame) -> None:
    lines = list(csv.DictReader(io.StringIO(str(render(table, "csv")))))
    assert [float(line["mean"]) for line in lines] == table["mean"].tolist()
    assert tuple(lines[0]) == TABLE_COLUMNS
    raw = render(table, "parquet")
    assert isinstance(raw, bytes)
    pd.testing.assert_frame_equal(pd.read_parquet(io.BytesIO(raw)), table)
    records = json.loads(render(table, "json"))
    assert [record["z"] for record in records] == table["z"].tolist()
    assert records[0]["width"] is None and records[0]["depth"] == 16 and isinstance(records[0]["n_tried"], int)


def test_infinite_and_missing_values_are_null_in_json_and_signs_elsewhere(table: pd.DataFrame) -> None:
    odd = table.iloc[:2].assign(z=[math.inf, -math.inf], se=math.nan)
    assert [record["z"] for record in json.loads(render(odd, "json"))] == [None, None]
    markdown = str(render(odd, "markdown")).splitlines()
    assert [line.split("|")[-2].strip() for line in markdown[2:]] == ["∞", "-∞"]
    assert r"$\infty$" in str(render(odd, "latex"))


def test_markdown_is_aligned_rounded_and_escaped(table: pd.DataFrame) -> None:
    named = table.iloc[:3].assign(dictionary="a|b", mean=0.64149)
    text = str(render(named, "markdown", ["One note.", "Another."]))
    lines = text.splitlines()
    assert len({len(line) for line in lines[:5]}) == 1
    assert "a\\|b" in lines[2] and " 0.641 |" in lines[2] and " – |" in lines[2]
    assert lines[-3:] == ["", "- One note.", "- Another."]


def test_latex_is_booktabs_with_signs_escaped(table: pd.DataFrame) -> None:
    text = str(render(table.iloc[:1].assign(dictionary=r"50%_&\{x}"), "latex", ["z < 1.96"]))
    assert text.startswith("\\begin{tabular}{llrrrllllrrrrrrrrrrrr}\n\\toprule\ndictionary & kind &")
    assert r"50\%\_\&\textbackslash{}\{x\} & rqae & -- & -- & 16 &" in text
    assert text.endswith("\\end{tabular}\n\\par\\smallskip{\\footnotesize z \\textless{} 1.96\\par}\n")


def test_every_format_is_deterministic_and_an_unknown_one_is_refused(table: pd.DataFrame) -> None:
    for name in FORMATS:
        assert render(table, name) == render(table.copy(), name)
    with pytest.raises(BadConfig) as error:
        render(table, "html")
    assert str(error.value) == (
        "format: expected one of markdown, csv, json, latex, parquet; seen 'html'; fix: use 'markdown'"
    )


def test_judgements_of_two_versions_of_a_judge_are_not_mixed(frames: RunFrames) -> None:
    versions = np.where(frames.judgements["feature"].astype(int) % 2 == 0, "list-1", "list-2")
    table = summary_table(replace(frames, judgements=frames.judgements.assign(judge_version=versions)))
    judge = frames.judgements["judge"].iloc[0]
    assert set(table["judge"]) == {f"{judge}@list-1", f"{judge}@list-2"}
    whole, keys = summary_table(frames), ["dictionary", "scorer", "metric"]
    assert table.groupby(keys)["n_judgements"].sum().equals(whole.groupby(keys)["n_judgements"].sum())
    same = summary_table(replace(frames, judgements=frames.judgements.assign(judge_version="list-2")))
    assert set(same["judge"]) == {judge}


def test_a_dictionary_that_only_the_lexical_baseline_was_made_of_keeps_its_empty_row(frames: RunFrames) -> None:
    judgements = frames.judgements
    baseline = judgements.assign(explainer="words", judge="lexical")
    of_all = judgements[judgements["source"] != SAE].assign(explainer="default", judge="llm")
    table = summary_table(replace(frames, judgements=pd.concat([of_all, baseline], ignore_index=True)))
    (row,) = table.query(
        "dictionary == @SAE and judge == 'llm' and scorer == 'detection' and metric == 'auroc'"
    ).to_dict("records")
    assert (row["n_features"], row["n_ineligible"]) == (0, row["n_tried"])


def test_the_headline_is_one_line_per_dictionary_and_scorer(table: pd.DataFrame) -> None:
    view = headline(table)
    assert list(view.columns) == [
        *("dictionary", "scorer", "features", "AUROC", "AUROC null", "AUROC z"),
        "balanced acc.",
    ]
    assert len(view) == len(NAMES) * 2
    row = row_of(table, RQAE)
    assert view.loc[0, "AUROC"] == f"{row['mean']:.3f} ± {row['se']:.3f}"
    assert view.loc[0, "features"] == f"{row['n_features']}/12"
    two = pd.concat([table, table.assign(judge="other")])
    assert list(headline(two).columns[:3]) == ["dictionary", "scorer", "judge"]
    alone = headline(table[table["metric"] == "balanced_accuracy"])
    assert list(alone.columns[3:]) == ["balanced acc.", "balanced acc. null", "balanced acc. z"]


def test_scorers_with_metrics_of_their_own_share_the_columns_of_the_headline(table: pd.DataFrame) -> None:
    own = table[(table["scorer"] == "fuzzing") & (table["metric"] == "auroc")].assign(
        scorer="simulation", metric="pearson"
    )
    view = headline(pd.concat([table, own], ignore_index=True))
    assert list(view.columns) == [
        *("dictionary", "scorer", "features", "metric", "score", "score null", "score z", "balanced acc.")
    ]
    assert len(view) == len(NAMES) * 3 and set(view["metric"]) == {"AUROC", "Pearson r"}
    assert set(view.loc[view["metric"] == "Pearson r", "balanced acc."]) == {"–"}
    plain = headline(table)
    mine = view[view["scorer"] != "simulation"].reset_index(drop=True)
    assert mine["score"].tolist() == plain["AUROC"].tolist() and mine["score z"].tolist() == plain["AUROC z"].tolist()


def test_in_the_headline_the_lexical_baseline_is_a_column(table: pd.DataFrame) -> None:
    """In the other views it keeps its rows; where it is the only judge it has them in the headline too."""
    lexical = table.assign(explainer="words", judge="lexical", mean=0.25, se=0.125)
    both = pd.concat([table, lexical])
    view = headline(both)
    assert len(view) == len(NAMES) * 2 and "judge" not in view
    assert set(view["AUROC lexical"]) == {"0.250 ± 0.125"}
    assert view.loc[0, "AUROC"] == headline(table).loc[0, "AUROC"]
    assert set(headline_rows(both)["judge"]) == set(table["judge"])
    assert "AUROC lexical" not in headline(lexical) and len(headline(lexical)) == len(view)


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("llm@smollm2-135m", True),
        ("llm:single@HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("llm@Qwen2.5-0.5B;temperature=0.7", True),
        ("default@gemma-3-270m-it", True),
        ("llm@llama-3.1-8b-instruct", False),
        ("llm@gpt-4.1-mini", False),
        ("llm@phi-3-mini-128k", False),
        ("llm@mixtral-8x7b", False),
        ("embedding", False),
        ("words-135m", False),
        ("llm@Qwen2.5-7B-Instruct-1M", False),
        ("embedding@embeddinggemma-300m", False),
    ],
)
def test_models_too_small_to_judge_are_marked(name: str, small: bool) -> None:
    assert labelled(name) == (f"{name} (plumbing)" if small else name) == labelled(labelled(name))
    assert bool(notes([labelled(name)])) == small


def test_the_mark_stands_in_every_row_and_in_the_footer() -> None:
    frames = simulate(n_features=6, n_each=6)
    frames.judgements["judge"] = "llm@smollm2-135m"
    table = summary_table(frames)
    assert set(table["judge"]) == {"llm@smollm2-135m (plumbing)"}
    assert any(line.startswith("smollm2-135m: plumbing only.") for line in footer(frames, table))


def test_features_of_an_rqaes_density_have_rows_of_their_own(frames: RunFrames) -> None:
    features = frames.features.copy()
    mine = features.index[(features["source"] == SAE) & (features["status"] == "ok")]
    features.loc[mine[:6], "density"] = [0.005, 0.02, 0.01, 0.007, 0.012, 0.0051]
    features.loc[mine[6], "density"] = 0.0201
    changed = replace(frames, features=features)
    table = summary_table(changed)
    names = table["dictionary"].drop_duplicates().tolist()
    twin = f"{SAE} (density 0.50% to 2.00%)"
    assert names[names.index(SAE) + 1] == twin and len(names) == len(NAMES) + 1
    judged = frames.judgements.query("source == @SAE and scorer == 'detection' and control == ''")
    judged = judged.loc[judged["feature"].isin(features.loc[mine[:6], "feature"])]
    judged = judged.dropna(subset=["confidence"])
    expected = [roc_auc_score(g["label"], g["confidence"]) for _, g in judged.groupby("feature")]
    row = row_of(table, twin)
    assert (row["n_tried"], row["n_features"], row["mean"]) == (6, 6, pytest.approx(np.mean(expected)))
    compared = compare_rows(changed, between=("dictionaries",))
    partners = set(compared.loc[compared["first"] == twin, "second"]) | set(
        compared.loc[compared["second"] == twin, "first"]
    )
    assert partners == {name for name in NAMES if "/rqae/" in name}
    alone = replace(changed, sources=frames.sources.query("kind != 'rqae'"))
    kept = ~frames.features["source"].str.contains("/rqae/")
    judgements = frames.judgements.loc[~frames.judgements["source"].str.contains("/rqae/")]
    no_rqae = replace(alone, features=features.loc[kept], judgements=judgements)
    assert len(summary_table(no_rqae)["dictionary"].unique()) == len(NAMES) - 3


def test_the_footer_says_how_many_features_it_takes(frames: RunFrames, table: pd.DataFrame) -> None:
    (line,) = [line for line in footer(frames, table) if line.startswith("Features per dictionary needed")]
    real = table.query("metric == 'auroc' and scorer == 'detection' and not kind.str.startswith('null')")
    z = scipy_stats.norm.ppf(0.975) + scipy_stats.norm.ppf(0.8)
    expected = int(np.median(np.ceil(2 * real["n_features"] * real["se"] ** 2 * z**2 / 0.02**2)))
    assert f"detection (auroc) {expected:,}, fuzzing (auroc)" in line


def test_the_footer_splits_the_variance_where_questions_were_asked_again(
    frames: RunFrames, table: pd.DataFrame
) -> None:
    assert not any("Variance" in line for line in footer(frames, table))
    again = frames.judgements.assign(repeat=1)
    noise = np.random.default_rng(0).normal(size=len(again)) * 0.05
    again["confidence"] = again["confidence"] + noise
    both = replace(frames, judgements=pd.concat([frames.judgements, again], ignore_index=True))
    lines = [line for line in footer(both, summary_table(both)) if line.startswith("Variance of a feature's score")]
    assert len(lines) == 2
    shares = [int(part.split("%")[0]) for part in lines[0].replace(": ", ", ").split(", ")[2:]]
    assert sum(shares) == pytest.approx(100, abs=1) and shares[2] > 3
    twice = summary_table(both)
    assert row_of(twice, SAE)["n_judgements"] == 2 * row_of(table, SAE)["n_judgements"]


def test_a_preset_says_what_is_wrong_with_it_and_counts_as_it_does(frames: RunFrames) -> None:
    meta = {**frames.meta, "preset": "delphi"}
    table = summary_table(replace(frames, meta=meta))
    assert set(table["metric"]) == {"balanced_accuracy", "f1", "accuracy"}
    judged = frames.judgements.query("source == @SAE and scorer == 'detection' and control == ''").dropna(
        subset="match"
    )
    match = judged["match"].astype(bool)
    assert row_of(table, SAE, metric="f1")["mean"] == pytest.approx(f1_score(judged["label"], match))
    assert row_of(table, SAE, metric="accuracy")["mean"] == pytest.approx((judged["label"] == match).mean())
    assert any(
        line.startswith("Preset delphi: ") and "pooled" in line for line in footer(replace(frames, meta=meta), table)
    )


def test_the_chance_of_an_intruder_is_said(frames: RunFrames) -> None:
    judgements = frames.judgements.query("scorer == 'detection'").assign(scorer="intruder:n_texts=4")
    shown = replace(frames, judgements=judgements)
    assert any("Chance of intruder: one in as many" in line for line in footer(shown, summary_table(shown)))
    assert not any("intruder" in line for line in footer(frames, summary_table(frames)))
