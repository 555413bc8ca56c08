from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.collect.example_files import FeatureExamples
from evalkit.errors import ClientError, StageFailed, StorageError
from evalkit.evaluate.explain_stage import explain_features
from evalkit.evaluate.score_stage import score_features, shuffled_partners
from evalkit.records import (
    REAL,
    SHUFFLED,
    Answer,
    Example,
    ExplainExamples,
    Explanation,
    JudgeItem,
    Judgement,
    Score,
    ScoreExamples,
    TestExamples,
)
from evalkit.store.run_store import RunStore
from tests.support.run_folders import each_with_each

SOURCE = "m/layers.1/sae"
FEATURES = ("3", "5", "8", "9")


def windows(feature: str, first: int, active: bool) -> tuple[Example, ...]:
    text = f"feature {feature}" if active else "nothing here"
    return tuple(Example(first + i, i, (text,), (1.0 if active else 0.0,)) for i in range(3))


def make_examples() -> dict[str, dict[str, FeatureExamples]]:
    found = {}
    for feature in FEATURES:
        test = TestExamples(windows(feature, 0, True), windows(feature, 10, True), windows(feature, 20, False))
        found[feature] = FeatureExamples(
            ExplainExamples(SOURCE, feature, 0.0, 1.0, windows(feature, 30, True)),
            ScoreExamples(SOURCE, feature, 0.0, 7, test, test),
        )
    return {SOURCE: found}


@dataclass
class FirstWindow:
    """Explains a feature by its first window; refuses the features it is told to."""

    refuses: tuple[str, ...] = ()
    asked: list[str] = field(default_factory=list)
    name: str = "first-window"
    version: str = "1"

    async def explain(self, feature: str, examples: ExplainExamples, client: object) -> Explanation:
        self.asked.append(feature)
        if feature in self.refuses:
            raise ZeroDivisionError("no idea")
        return Explanation(SOURCE, feature, self.name, self.version, examples.positives[0].text)


@dataclass
class Contains:
    """Matches when the text contains the explanation."""

    name: str = "contains"
    version: str = "1"
    probabilistic: bool = True
    fails: type[Exception] | None = None

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        if self.fails:
            raise self.fails("disk", expected="a", seen="b", fix="c")
        return [Answer(explanation in item.text, float(explanation in item.text)) for item in items]


class Plain:
    """Positives against negatives, unmarked."""

    name = "plain"
    version = "1"

    async def score(self, explanation: Explanation, examples: ScoreExamples, judge: Contains) -> Score:
        labelled = [(e, True) for e in examples.test.positives] + [(e, False) for e in examples.test.negatives]
        answers = await judge.judge(explanation.text, [JudgeItem(e.text) for e, _ in labelled])
        judgements = tuple(
            Judgement(i, e.window, label, a.match, a.confidence, None)
            for i, ((e, label), a) in enumerate(zip(labelled, answers, strict=True))
        )
        return Score(explanation.source, explanation.feature, self.name, self.version, judgements)


def run(store: RunStore, explainer: FirstWindow, judge: Contains) -> None:
    examples = make_examples()
    asyncio.run(explain_features(store, examples, {explainer.name: explainer}, None))
    asyncio.run(
        score_features(
            store, examples, [explainer.name], each_with_each({"contains": judge}, [Plain()]), shuffled=True, seed=0
        )
    )


def test_every_feature_gets_its_score_and_a_shuffled_one(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, {"a": 1}) as store:
        run(store, FirstWindow(), Contains())
        frame = store.frames().judgements
    real, shuffled = frame[frame["control"] == REAL], frame[frame["control"] == SHUFFLED]
    assert len(real) == len(shuffled) == len(FEATURES) * 6
    assert (real["match"].astype(bool) == real["label"]).all()
    assert not shuffled["match"].astype(bool).any()  # another feature's text is nowhere in the windows


def test_a_second_pass_asks_nobody(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, {"a": 1}) as store:
        run(store, FirstWindow(), Contains())
        again = FirstWindow()
        run(store, again, Contains(fails=StorageError))
    assert again.asked == []


def test_one_failing_feature_is_recorded_and_tried_again(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, {"a": 1}) as store:
        run(store, FirstWindow(refuses=("5",)), Contains())
        frames = store.frames()
        failed = frames.explanations[frames.explanations["text"].isna()]
        assert failed["reason"].tolist() == ["ZeroDivisionError: no idea"]
        assert set(frames.judgements["feature"]) == {"3", "8", "9"}
        healed = FirstWindow()
        run(store, healed, Contains())
        assert healed.asked == ["5"]
        assert set(store.frames().judgements["feature"]) == set(FEATURES)


def test_a_failing_judge_is_this_feature_s_alone_but_a_full_disk_stops_the_run(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, {"a": 1}) as store:
        with pytest.raises(StageFailed, match="expected at least one of 8 features to succeed; seen all failed"):
            run(store, FirstWindow(), Contains(fails=ClientError))
        assert set(store.frames().features["status"]) <= {"failed"}
        assert store.finished_scores() == {}
        with pytest.raises(ExceptionGroup) as caught:
            run(store, FirstWindow(), Contains(fails=StorageError))
        assert caught.value.subgroup(StorageError) is not None


@given(st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=30, unique=True), st.integers(0, 100))
def test_nobody_keeps_its_own_explanation(features: list[str], seed: int) -> None:
    partners = shuffled_partners(features, SOURCE, seed)
    assert sorted(partners) == sorted(partners.values()) == sorted(features)
    assert all(feature != partner for feature, partner in partners.items())
    assert partners == shuffled_partners(reversed(features), SOURCE, seed)


def test_one_feature_has_no_partner() -> None:
    assert shuffled_partners(["only"], SOURCE, 0) == {}
