"""The two stages after collection: explanations for features, judgements for explanations.

Skips every record that is there; one feature's failure is recorded and the rest goes on. Knows explainers, judges and
scorers only through their contracts; reads and writes records only through the store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from evalkit.collect.example_files import FeatureExamples
from evalkit.errors import (
    BadConfig,
    BudgetSpent,
    ClientDown,
    EvalkitError,
    MissingExtra,
    MissingFile,
    PluginError,
    StageFailed,
    StorageError,
)
from evalkit.protocols import Client, Explainer, Judge, Progress, Scorer
from evalkit.records import NO_EXPLAINER, REAL, SHUFFLED, Explanation, FeatureId, JudgeItem, ScoreExamples
from evalkit.seeds import derive
from evalkit.store.run_store import RunStore, ScoreKey
from evalkit.util.progress import SILENT

__all__ = ["Test", "explain_features", "score_features", "shuffled_partners"]

_LOG = logging.getLogger(__name__)
CONCURRENCY = 64  # features in flight, or as many as the client takes requests; clients have their own limits
# these would fail for every feature, or end the run on purpose
_FATAL = (BadConfig, BudgetSpent, ClientDown, MissingExtra, MissingFile, PluginError, StorageError)

Examples = Mapping[str, Mapping[FeatureId, FeatureExamples]]  # by source, then feature
Job = TypeVar("Job")


@dataclass(frozen=True, slots=True)
class Test:
    """A scorer with a judge, under the names that records carry. ``explainers``: only theirs are tested; None: all.

    ``repeat`` counts how often the same test is held before this one, with another order and another seed of the judge.
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
        """Whether the scorer tests an explanation, and not the feature alone."""
        return bool(getattr(self.scorer, "needs_explanation", True))


@dataclass(frozen=True, slots=True)
class _ScoreJob:
    key: ScoreKey
    explanation: Explanation
    examples: ScoreExamples
    test: Test


def shuffled_partners(features: Iterable[FeatureId], source: str, seed: int) -> dict[FeatureId, FeatureId]:
    """Gives every feature another one's explanation: a single random cycle, so nobody keeps its own.

    Empty below two features.
    """
    ordered = sorted(features, key=lambda feature: derive(seed, "shuffled", source, feature))
    if len(ordered) < 2:
        return {}
    return dict(zip(ordered, [*ordered[1:], ordered[0]], strict=True))


async def explain_features(
    store: RunStore,
    examples: Examples,
    explainers: Mapping[str, Explainer],
    client: Client | None,
    *,
    progress: Progress = SILENT,
) -> None:
    """An explanation per (source, feature, explainer) that has none yet. ``explainers``: by recorded name."""
    jobs, known = [], set()
    for source, by_feature in examples.items():
        for name in explainers:
            done = store.explanations(source, name)
            known |= {name} if done else set()
            version = explainers[name].version
            jobs += [
                (source, feature, name)
                for feature in by_feature
                if feature not in done or done[feature].version != version
            ]

    for name in dict.fromkeys(name for _, _, name in jobs):
        prepare: Callable[..., Awaitable[None]] | None = getattr(explainers[name], "prepare", None)
        if prepare is not None:
            await prepare(list(examples))
        explains: Callable[[str], bool] | None = getattr(explainers[name], "explains", None)
        if explains is not None:
            jobs = [job for job in jobs if job[2] != name or explains(job[0])]

    async def explain(job: tuple[str, FeatureId, str]) -> str | None:
        source, feature, name = job
        try:
            explanation = await explainers[name].explain(feature, examples[source][feature].explain, client)
        except _FATAL:
            raise
        except Exception as error:  # an explainer may be anybody's code; its failure is this feature's alone
            _LOG.warning("%s %s: %s gave no explanation: %s", source, feature, name, _reason(error))
            store.write_failed_explanation(source, feature, name, _reason(error))
            return _reason(error)
        store.write_explanation(replace(explanation, source=source, feature=feature, explainer=name))
        return None

    # where an explainer has succeeded before, what is left may be what it can never explain: the run goes on without
    await _run_all(
        "explain",
        jobs,
        explain,
        progress,
        lambda job: f"explainer {job[2]}",
        at_once=_at_once([client]),
        may_fail=[f"explainer {name}" for name in known],
    )


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
    """A score per (source, feature, scorer, explainer, judge, control, repeat) that has none yet. Names as recorded."""
    done = store.finished_scores()
    wanted = {
        job.key: job
        for job in _score_jobs(store, examples, explainers, tests, shuffled=shuffled, seed=seed)
        if done.get(job.key) != (job.test.scorer.version, job.test.judge.version)
    }
    jobs = list(wanted.values())
    await _prepare_judges(jobs, progress)

    async def score(job: _ScoreJob) -> str | None:
        try:
            result = await job.test.scorer.score(job.explanation, job.examples, job.test.judge)
        except _FATAL:
            raise
        except Exception as error:  # as above: a scorer or judge may be anybody's code
            _LOG.warning("%s %s: %s gave no score: %s", *job.key[:2], job.test.scorer_name, _reason(error))
            store.write_failed_score(job.key, _reason(error))
            return _reason(error)
        store.write_score(job.key, result, judge_version=job.test.judge.version)
        return None

    clients = [getattr(test.judge, "client", None) for test in tests]
    await _run_all(
        "score", jobs, score, progress, lambda job: f"judge {job.test.judge_name}", at_once=_at_once(clients)
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
    every = dict.fromkeys([*explainers, *(name for test in tests for name in test.explainers or ())])
    for source, by_feature in examples.items():
        for test in tests:
            if not test.needs_explanation:
                for feature in by_feature:
                    yield _job(Explanation(source, feature, NO_EXPLAINER, "", ""), REAL, by_feature[feature], test)
        for explainer in every:
            explanations = store.explanations(source, explainer)
            controls = {REAL: {feature: feature for feature in by_feature}}
            if shuffled:  # over all features, so that one that is explained later changes nobody's partner
                controls[SHUFFLED] = shuffled_partners(by_feature, source, seed)
            mine = [
                test
                for test in tests
                if test.needs_explanation and explainer in (explainers if test.explainers is None else test.explainers)
            ]
            for control, partners in controls.items():
                for feature, partner in partners.items():
                    if feature in explanations and partner in explanations:
                        explanation = replace(explanations[partner], feature=feature)
                        yield from (_job(explanation, control, by_feature[feature], test) for test in mine)


def _job(explanation: Explanation, control: str, examples: FeatureExamples, test: Test) -> _ScoreJob:
    key = (explanation.source, explanation.feature, test.scorer_name, explanation.explainer, test.judge_name, control)
    return _ScoreJob((*key, test.repeat), explanation, replace(examples.score, repeat=test.repeat), test)


async def _prepare_judges(jobs: Sequence[_ScoreJob], progress: Progress) -> None:
    """Judges that embed have a ``prepare``: all questions of the stage at once, so each distinct text is embedded once."""
    for judge in {id(job.test.judge): job.test.judge for job in jobs}.values():
        prepare: Callable[..., Awaitable[None]] | None = getattr(judge, "prepare", None)
        if prepare is None:
            continue
        mine = [job for job in jobs if job.test.judge is judge and getattr(job.test.scorer, "asks", "judge") == "judge"]
        tests = {(job.test.scorer_name, *job.key[:2]): job for job in mine}  # the same for every explanation
        items = dict.fromkeys(item for job in tests.values() for item in _items(job))
        explanations = dict.fromkeys(job.explanation.text for job in mine)
        await prepare(list(items), explanations=list(explanations), progress=progress)


def _items(job: _ScoreJob) -> Iterable[JudgeItem]:
    """What a scorer will ask: its own ``items`` where it can tell, else every window whole."""
    listed: Callable[[ScoreExamples], Sequence[JudgeItem]] | None = getattr(job.test.scorer, "items", None)
    if listed is not None:
        return listed(job.examples)
    parts = (job.examples.test, job.examples.calibration)
    return [JudgeItem(e.text) for part in parts for e in (*part.positives, *part.decoys, *part.negatives)]


def _at_once(clients: Iterable[Client | None]) -> int:
    """How many features are in flight: one that asks in batches answers nothing before it was asked everything."""
    return max([CONCURRENCY, *(getattr(client, "concurrency", None) or 0 for client in clients)])


async def _run_all(
    stage: str,
    jobs: Sequence[Job],
    work: Callable[[Job], Awaitable[str | None]],
    progress: Progress,
    group: Callable[[Job], str],
    *,
    at_once: int = CONCURRENCY,
    may_fail: Collection[str] = (),
) -> None:
    """Every job, some at a time. Raises StageFailed afterwards where a whole ``group`` failed that may not."""
    if not jobs:
        return
    started = time.monotonic()
    task = progress.start(stage, len(jobs), "features")
    gate = asyncio.Semaphore(at_once)
    failures: dict[str, list[str]] = {}

    async def guarded(job: Job) -> None:
        async with gate:
            if reason := await work(job):
                failures.setdefault(group(job), []).append(reason)
            progress.advance(task)

    async with asyncio.TaskGroup() as tasks:
        for job in jobs:
            tasks.create_task(guarded(job))
    progress.finish(task)
    sizes = Counter(map(group, jobs))
    for name, reasons in failures.items():
        if len(reasons) == sizes[name] and name not in may_fail:
            raise StageFailed(
                f"{stage}: {name}",
                expected=f"at least one of {len(reasons)} features to succeed",
                seen=f"every one failed; the first: {reasons[0]}",
                fix="mend that and run the same command again",
            )
    failed = sum(map(len, failures.values()))
    if failed:
        _LOG.warning("%s: %d of %d features failed; the same command tries them again", stage, failed, len(jobs))
    _LOG.info("%s: %d records in %.1f s", stage, len(jobs) - failed, time.monotonic() - started)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, EvalkitError) else f"{type(error).__name__}: {error}"
