"""The third stage: judgements for every explanation, by every test (a scorer with a judge).

Skips scores that are recorded already; a failed feature is recorded and retried by the next command. Knows scorers and
judges only through their contracts; reads ``explanations`` and writes ``scores`` and ``judgements`` through the store.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from evalkit.abilities import ListingScorer, PreparingJudge, asked_method, needs_explanation
from evalkit.evaluate.runner import FATAL, concurrency_limit, failure_reason, run_jobs
from evalkit.protocols import Judge, Progress, Scorer
from evalkit.records import (
    NO_EXPLAINER,
    REAL,
    SHUFFLED,
    Explanation,
    FeatureExamples,
    FeatureId,
    JudgeItem,
    ScoreExamples,
)
from evalkit.seeds import derive
from evalkit.store.run_store import RunStore
from evalkit.store.tables import ScoreKey
from evalkit.util.progress import SILENT

__all__ = ["Test", "score_features", "shuffled_partners"]

_LOG = logging.getLogger(__name__)

Examples = Mapping[str, Mapping[FeatureId, FeatureExamples]]  # by source, then feature


@dataclass(frozen=True, slots=True)
class Test:
    """A scorer with a judge, and their recorded names.

    repeat: number of the repeat, from 0; each repeat has another order of questions and another seed.
    explainers: names of the explainers whose explanations are tested; None for all.
    """

    __test__ = False  # not a pytest class

    scorer_name: str
    scorer: Scorer
    judge_name: str
    judge: Judge
    repeat: int = 0
    explainers: tuple[str, ...] | None = None

    @property
    def needs_explanation(self) -> bool:
        """Whether the scorer tests an explanation; False if it tests the feature alone."""
        return needs_explanation(self.scorer)


@dataclass(frozen=True, slots=True)
class _ScoreJob:
    key: ScoreKey
    explanation: Explanation
    examples: ScoreExamples
    test: Test


def shuffled_partners(features: Iterable[FeatureId], source: str, seed: int) -> dict[FeatureId, FeatureId]:
    """For each feature, the feature whose explanation it gets in the control "shuffled".

    The partners form a single random cycle, so no feature keeps its own explanation. Empty for fewer than two features.
    """
    ordered = sorted(features, key=lambda feature: derive(seed, "shuffled", source, feature))
    if len(ordered) < 2:
        return {}
    return dict(zip(ordered, [*ordered[1:], ordered[0]], strict=True))


async def score_features(
    store: RunStore,
    examples: Examples,
    explainers: Sequence[str],
    tests: Sequence[Test],
    *,
    shuffled: bool,
    seed: int,
    progress: Progress = SILENT,
) -> None:
    """Score every (source, feature, scorer, explainer, judge, control, repeat) that has no current score yet.

    examples: by source, then feature.
    explainers: recorded names of the explainers to score.
    shuffled: whether to also score each feature with the explanation of its partner.

    Raises StageFailed if a judge fails for every feature.
    """
    recorded = store.finished_scores()
    missing = {
        job.key: job
        for job in _score_jobs(store, examples, explainers, tests, shuffled=shuffled, seed=seed)
        if recorded.get(job.key) != (job.test.scorer.version, job.test.judge.version)
    }
    jobs = list(missing.values())
    await _prepare_judges(jobs, progress)

    async def score(job: _ScoreJob) -> str | None:
        try:
            result = await job.test.scorer.score(job.explanation, job.examples, job.test.judge)
        except FATAL:
            raise
        except Exception as error:  # a plug-in may fail in any way; that must not stop the other features
            reason = failure_reason(error)
            _LOG.warning("%s %s: %s gave no score: %s", *job.key[:2], job.test.scorer_name, reason)
            store.write_failed_score(job.key, reason)
            return reason
        store.write_score(job.key, result, judge_version=job.test.judge.version)
        return None

    clients = [getattr(test.judge, "client", None) for test in tests]
    await run_jobs(
        "score", jobs, score, progress, lambda job: f"judge {job.test.judge_name}", limit=concurrency_limit(clients)
    )


def _score_jobs(
    store: RunStore,
    examples: Examples,
    explainers: Sequence[str],
    tests: Sequence[Test],
    *,
    shuffled: bool,
    seed: int,
) -> Iterable[_ScoreJob]:
    all_explainers = dict.fromkeys([*explainers, *(name for test in tests for name in test.explainers or ())])
    for source, by_feature in examples.items():
        for test in tests:
            if not test.needs_explanation:
                for feature in by_feature:
                    yield _job(Explanation(source, feature, NO_EXPLAINER, "", ""), REAL, by_feature[feature], test)
        for explainer in all_explainers:
            explanations = store.explanations(source, explainer)
            partners_by_control = {REAL: {feature: feature for feature in by_feature}}
            if shuffled:  # over all features, so that a feature explained later changes no partner
                partners_by_control[SHUFFLED] = shuffled_partners(by_feature, source, seed)
            explainer_tests = [
                test
                for test in tests
                if test.needs_explanation and explainer in (explainers if test.explainers is None else test.explainers)
            ]
            for control, partners in partners_by_control.items():
                for feature, partner in partners.items():
                    if feature in explanations and partner in explanations:
                        explanation = replace(explanations[partner], feature=feature)
                        for test in explainer_tests:
                            yield _job(explanation, control, by_feature[feature], test)


def _job(explanation: Explanation, control: str, examples: FeatureExamples, test: Test) -> _ScoreJob:
    key = (explanation.source, explanation.feature, test.scorer_name, explanation.explainer, test.judge_name, control)
    return _ScoreJob((*key, test.repeat), explanation, replace(examples.score, repeat=test.repeat), test)


async def _prepare_judges(jobs: Sequence[_ScoreJob], progress: Progress) -> None:
    """Pass all questions of the stage to judges with a bulk ``prepare``, so that each distinct text is embedded once."""
    for judge in {id(job.test.judge): job.test.judge for job in jobs}.values():
        if not isinstance(judge, PreparingJudge):
            continue
        own = [job for job in jobs if job.test.judge is judge and asked_method(job.test.scorer) == "judge"]
        # The questions of a feature and scorer are the same for every explanation.
        distinct = {(job.test.scorer_name, *job.key[:2]): job for job in own}
        items = dict.fromkeys(item for job in distinct.values() for item in _items(job))
        explanations = dict.fromkeys(job.explanation.text for job in own)
        await judge.prepare(list(items), explanations=list(explanations), progress=progress)


def _items(job: _ScoreJob) -> Iterable[JudgeItem]:
    """The questions of a job: the scorer's ``items`` if it has that method, else every window in full."""
    if isinstance(job.test.scorer, ListingScorer):
        return job.test.scorer.items(job.examples)
    parts = (job.examples.test, job.examples.calibration)
    return [JudgeItem(e.text) for part in parts for e in (*part.positives, *part.decoys, *part.negatives)]
