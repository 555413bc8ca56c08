"""The second stage: an explanation for every collected feature, by every explainer.

Skips explanations that are recorded already; a failed feature is recorded and retried by the next command. Knows explainers
only through their contract; reads and writes the table ``explanations`` through the store.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace

from evalkit.abilities import ControlAwareExplainer, PreparingExplainer, SelectiveExplainer
from evalkit.evaluate.runner import FATAL, concurrency_limit, failure_reason, run_jobs
from evalkit.protocols import Client, Explainer, Progress
from evalkit.records import FeatureExamples, FeatureId
from evalkit.store.run_store import RunStore
from evalkit.util.progress import SILENT

__all__ = ["explain_features"]

_LOG = logging.getLogger(__name__)

Job = tuple[str, FeatureId, str]  # source, feature, recorded name of the explainer


async def explain_features(
    store: RunStore,
    examples: Mapping[str, Mapping[FeatureId, FeatureExamples]],
    explainers: Mapping[str, Explainer],
    client: Client | None,
    *,
    progress: Progress = SILENT,
) -> None:
    """Explain every feature that has no explanation of the explainer's current version.

    examples: by source, then feature.
    explainers: by recorded name.

    Raises StageFailed if an explainer that has never succeeded in this run fails for every feature.
    """
    jobs = _missing(store, examples, explainers)
    jobs = await _prepare(jobs, list(examples), explainers, store.control_names())

    async def explain(job: Job) -> str | None:
        source, feature, name = job
        try:
            explanation = await explainers[name].explain(feature, examples[source][feature].explain, client)
        except FATAL:
            raise
        except Exception as error:  # a plug-in may fail in any way; that must not stop the other features
            reason = failure_reason(error)
            _LOG.warning("%s %s: %s gave no explanation: %s", source, feature, name, reason)
            store.write_failed_explanation(source, feature, name, reason)
            return reason
        store.write_explanation(replace(explanation, source=source, feature=feature, explainer=name))
        return None

    # For an explainer that succeeded before, the remaining features may be those that it can never explain.
    succeeded = [name for name in explainers if any(store.explanations(source, name) for source in examples)]
    await run_jobs(
        "explain",
        jobs,
        explain,
        progress,
        lambda job: f"explainer {job[2]}",
        limit=concurrency_limit([client]),
        may_fail=[f"explainer {name}" for name in succeeded],
    )


def _missing(
    store: RunStore, examples: Mapping[str, Mapping[FeatureId, FeatureExamples]], explainers: Mapping[str, Explainer]
) -> list[Job]:
    jobs = []
    for source, by_feature in examples.items():
        for name, explainer in explainers.items():
            recorded = store.explanations(source, name)
            jobs += [
                (source, feature, name)
                for feature in by_feature
                if feature not in recorded or recorded[feature].version != explainer.version
            ]
    return jobs


async def _prepare(
    jobs: list[Job], sources: list[str], explainers: Mapping[str, Explainer], controls: Collection[str]
) -> list[Job]:
    """Call the explainers' optional ``prepare`` and drop jobs on sources that they do not explain."""
    for name in dict.fromkeys(name for _, _, name in jobs):
        explainer = explainers[name]
        if isinstance(explainer, ControlAwareExplainer):
            explainer.set_controls(controls)
        if isinstance(explainer, PreparingExplainer):
            await explainer.prepare(sources)
        if isinstance(explainer, SelectiveExplainer):
            jobs = [job for job in jobs if job[2] != name or explainer.explains(job[0])]
    return jobs
