"""The judge that is the subject model: its definition by hand, what it is never told, and what its answers depend on."""

from __future__ import annotations

import asyncio
import json
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import scorers.judges.subject as subject
from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig, MissingFile
from evalkit.evaluate.components import make_tests
from evalkit.evaluate.score_stage import shuffled_partners
from evalkit.records import Answer, Explanation, JudgeItem, TestExamples
from evalkit.registry import create
from scorers.judges.causal import CausalModel
from scorers.judges.subject import SubjectJudge, before_explanation, before_text
from scorers.surprisal import SurprisalScorer
from tests.support.builders import EXPLANATION, OracleJudge, examples, random_test
from tests.support.hardware import quick_dtype
from tests.support.paths import GOLDEN_PROMPTS as GOLDEN
from tests.support.plain_forward import log_probabilities_by_hand
from tests.support.word_features import SOURCE, make_examples

TEXTS = [
    " the whale swam under the ship",
    "a number such as 1851",
    ' "quoted"\n(text)',
    " sea",
    " the sea was calm, the",
]


@pytest.fixture(scope="module")
def subject_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with room for the prompt, whose every letter is a token to it."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path_factory.mktemp("subject") / "tiny"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return folder


def judged(judge: SubjectJudge, explanation: str, items: Sequence[JudgeItem]) -> list[Answer]:
    return list(asyncio.run(judge.judge(explanation, items)))


def confidences(judge: SubjectJudge, explanation: str, texts: Sequence[str]) -> list[float]:
    answers = judged(judge, explanation, [JudgeItem(text) for text in texts])
    assert all(answer.match is None and answer.reason is None for answer in answers)
    return [answer.confidence for answer in answers if answer.confidence is not None]


def test_confidence_is_the_gain_in_nats_a_token(subject_model: Path) -> None:
    explanation = 'words such as "sea", whale'
    told, neutral = before_text(explanation), before_text("")
    expected = [
        log_probabilities_by_hand(subject_model, told, text).mean()
        - log_probabilities_by_hand(subject_model, neutral, text).mean()
        for text in TEXTS[:3]
    ]
    found = confidences(SubjectJudge(subject_model, "float32", "cpu"), explanation, TEXTS[:3])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(expected) > 1e-4  # large beside the tolerance


def test_the_other_way_round_it_is_the_gain_of_the_explanation(subject_model: Path) -> None:
    explanation = "whales"

    def told(quoted: str) -> float:
        return float(
            log_probabilities_by_hand(
                subject_model, f"{before_explanation()} {quoted}\nDescription:", ' "whales"'
            ).mean()
        )

    expected = [told('" sea"') - told('""'), told('" \\"quoted\\"\\n(text)"') - told('""')]
    judge = create("judges", "subject", model=subject_model, dtype="float32", device="cpu", direction="explanation")
    np.testing.assert_allclose(confidences(judge, explanation, [TEXTS[3], TEXTS[2]]), expected, atol=1e-5)


@pytest.mark.parametrize("direction", ["text", "explanation"])
def test_answers_depend_on_the_item_alone(subject_model: Path, direction: str) -> None:
    def judge(batch_size: int) -> SubjectJudge:
        return SubjectJudge(subject_model, "bfloat16", "cpu", direction=direction, batch_size=batch_size)  # type: ignore[arg-type]

    texts = [*TEXTS, *(f" whale {n} of {n * n * n}" for n in range(14))]
    together = confidences(judge(16), "whales", texts)
    other = judge(1)
    assert confidences(other, "whales", texts[::-1])[::-1] == together
    assert [confidences(other, "whales", [text])[0] for text in texts[:3]] == together[:3]
    prepared = judge(8)
    asyncio.run(prepared.prepare([JudgeItem(text) for text in texts], ["whales"]))
    assert confidences(prepared, "whales", texts) == together


class Recorder:
    """A progress reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.total, self.done = 0, 0

    def start(self, description: str, total: int | None, unit: str) -> int:
        self.total += total or 0
        return 3

    def advance(self, task: int, amount: int = 1) -> None:
        self.done += amount

    def finish(self, task: int) -> None:
        assert task == 3


def test_a_window_is_read_without_explanation_once(subject_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, ...]] = []
    forward = CausalModel.log_probabilities

    def counting(self: CausalModel, prefix: tuple[int, ...], texts: Sequence[tuple[int, ...]], done: object) -> object:
        read.extend(texts)
        return forward(self, prefix, texts, done)  # type: ignore[arg-type]

    monkeypatch.setattr(CausalModel, "log_probabilities", counting)
    judge, progress = SubjectJudge(subject_model, "float32", "cpu"), Recorder()
    items = [JudgeItem(text) for text in (*TEXTS, *TEXTS)]
    asyncio.run(judge.prepare(items, ["whales"], progress))
    assert len(read) == progress.total == progress.done == len(TEXTS)
    judged(judge, "whales", items)
    judged(judge, "ships", items[:2])
    assert len(read) == len(TEXTS) + len(TEXTS) + 2


def test_odd_items(subject_model: Path) -> None:
    judge = SubjectJudge(subject_model, "float32", "cpu")
    items = [JudgeItem(""), JudgeItem(" sea"), JudgeItem(" sea", ((1, 4),)), JudgeItem("sea " * 800)]
    answers = judged(judge, "whales", items)
    assert [answer.reason for answer in answers] == [
        "the text is empty",
        None,
        "the judge 'subject' does not support marks",
        "explanation and text do not fit the subject model's context",
    ]
    assert answers[1].confidence is not None and judged(judge, "whales", []) == []
    assert {answer.reason for answer in judged(judge, " \n", items)} == {"the explanation is empty"}
    too_long = judged(judge, "whales " * 800, items[1:2])
    assert too_long == [Answer(None, reason="explanation and text do not fit the subject model's context")]


def test_many_at_once_are_answered_as_one_by_one(subject_model: Path) -> None:
    judge = SubjectJudge(subject_model, "float32", "cpu")
    items = [JudgeItem(text) for text in TEXTS]

    async def together() -> list[Sequence[Answer]]:
        return list(await asyncio.gather(*(judge.judge(one, items) for one in ("sea", "ship", "deck"))))

    assert asyncio.run(together()) == [judged(judge, one, items) for one in ("sea", "ship", "deck")]


def test_where_the_model_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert SubjectJudge("somebody/a-model").model == "somebody/a-model"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert SubjectJudge("tiny").model == "models/tiny"
    assert SubjectJudge(tmp_path / "models" / "tiny").model == str(tmp_path / "models" / "tiny")
    with pytest.raises(MissingFile, match="expected the subject model; seen no such file or folder"):
        SubjectJudge("./nowhere")
    with pytest.raises(BadConfig, match="expected text or explanation; seen 'both'"):
        SubjectJudge("tiny", direction="both")  # type: ignore[arg-type]


def test_golden_prompts() -> None:
    """A released prompt never changes: a difference here needs a new prompt version."""
    texts = [before_text('a "quoted"\npattern'), before_text(""), before_explanation()]
    assert "\n---\n".join(texts) == (GOLDEN / "judge-subject.txt").read_text(encoding="utf-8")


def test_the_neutral_prompt_differs_in_the_explanation_only() -> None:
    assert before_text("whales").replace('"whales"', '""') == before_text("")
    pairs = tomllib.loads((Path(subject.__file__).parent / "prompts/subject_v1.toml").read_text(encoding="utf-8"))[
        "pairs"
    ]
    assert all(before_text("").count(pair["text"]) == 1 for pair in pairs)


TEST = random_test(12, seed=0)


def test_surprisal_shows_the_windows_of_detection_without_marks_to_its_own_judge() -> None:
    judge = OracleJudge(lambda item: Answer(None, confidence=float(len(item.text))), probabilistic=False)
    score = asyncio.run(SurprisalScorer().score(EXPLANATION, examples(TEST, TEST), judge))
    texts = {example.text for example in (*TEST.positives, *TEST.negatives)}
    assert {item.text for item in judge.asked} == texts and all(item.marks is None for item in judge.asked)
    labels = {example.window: example.peak > 0 for example in (*TEST.positives, *TEST.negatives)}
    assert {one.window: one.label for one in score.judgements} == labels
    assert score.scorer == "surprisal" and len(score.judgements) == 24
    swapped = TestExamples(TEST.negatives, (), TEST.positives)
    other = OracleJudge(judge.answer, probabilistic=False)
    asyncio.run(SurprisalScorer().score(EXPLANATION, examples(swapped, swapped), other))
    assert {item.text for item in other.asked} == {item.text for item in judge.asked}  # labels are not in the items


def test_surprisal_is_only_given_the_runs_own_subject_model(subject_model: Path) -> None:
    config = RunConfig.create(
        model=str(subject_model),
        dictionaries=("none",),
        dtype="float32",
        judges=("lexical",),
        scorers=("surprisal", "surprisal:explanation", "detection"),
        controls=("shuffled",),
    )
    tests = make_tests(config, None)
    assert [(test.scorer_name, test.judge_name) for test in tests] == [
        ("surprisal", "subject"),
        ("surprisal:explanation", "subject:explanation"),
        ("detection", "lexical"),
    ]
    first, second = tests[0].judge, tests[1].judge
    assert isinstance(first, SubjectJudge) and isinstance(second, SubjectJudge)
    assert (first.model, first.dtype, first.direction) == (str(subject_model), "float32", "text")
    assert second.direction == "explanation"
    with pytest.raises(BadConfig, match="direction of scorer 'surprisal': expected text or explanation; seen 'both'"):
        SurprisalScorer("both")  # type: ignore[arg-type]


@pytest.mark.slow
def test_right_explanations_lower_the_loss_where_the_feature_fires_and_others_do_not(smollm2: Path) -> None:
    """Features of one word each, in real text, and the real subject model; every feature also with another's word."""
    features = make_examples(12)[SOURCE]
    partners = shuffled_partners(features, SOURCE, 0)
    judge = create("judges", "subject", model=smollm2, dtype=quick_dtype())

    def auroc(word: str, told: str) -> float:
        given = replace(features[word].score, calibration=TestExamples((), (), ()))
        score = asyncio.run(
            SurprisalScorer().score(Explanation(SOURCE, word, "", "", f"the word {told}"), given, judge)
        )
        found: dict[bool, list[float]] = {True: [], False: []}
        for one in score.judgements:
            assert one.confidence is not None
            found[one.label].append(one.confidence)
        return float(np.mean([(a > b) + (a == b) / 2 for a in found[True] for b in found[False]]))

    real = [auroc(word, word) for word in features]
    shuffled = [auroc(word, partners[word]) for word in features]
    assert abs(np.mean(shuffled) - 0.5) < 0.12
    assert np.mean(real) > 0.6 and np.mean(real) - np.mean(shuffled) > 0.15
