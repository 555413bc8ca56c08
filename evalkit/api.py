"""The public functions of ``import evalkit``: load a plug-in or a dictionary, collect examples, run all stages.

Forwards to the registry and the pipeline; has no logic of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit import registry

if TYPE_CHECKING:
    from evalkit.config.run_config import RunConfig
    from evalkit.protocols import Client, Explainer, FeatureSource, Judge, Progress, Scorer
    from evalkit.records import FeatureExamples, FeatureId
    from evalkit.store.frames import RunFrames

__all__ = [
    "collect_examples",
    "load_client",
    "load_explainer",
    "load_judge",
    "load_scorer",
    "load_source",
    "run",
]


def load_source(path_or_id: str | Path, **options: Any) -> FeatureSource:
    """The feature source of a dictionary.

    Raises MissingFile, BadFile, BadShape, or BadConfig if there are several sources and the options do not select one.
    """
    from evalkit.sources import load_source as load

    return load(path_or_id, **options)


def load_explainer(name: str, **options: Any) -> Explainer:
    """An explainer by its registered name, or as ``NAME:key=value,…``. Raises PluginError."""
    explainer: Explainer = _load("explainers", name, options)
    return explainer


def load_judge(name: str, **options: Any) -> Judge:
    """A judge by its registered name, or as ``NAME:key=value,…``, such as ``llm:single``. Raises PluginError."""
    judge: Judge = _load("judges", name, options)
    return judge


def load_scorer(name: str) -> Scorer:
    """A scorer by its registered name. Raises PluginError."""
    scorer: Scorer = registry.create("scorers", name)
    return scorer


def load_client(name: str, **options: Any) -> Client:
    """A client by its registered name, or as ``NAME:MODEL``, such as ``openai:MODEL``. Raises PluginError."""
    client: Client = _load("clients", name, options)
    return client


def _load(kind: registry.Kind, name: str, options: dict[str, Any]) -> Any:
    part = registry.parse_part(kind, name)
    return registry.create(kind, part.name, **{**part.options, **options})


def collect_examples(
    config: RunConfig, folder: str | Path, *, progress: Progress | None = None
) -> dict[str, dict[FeatureId, FeatureExamples]]:
    """Collect the examples of a run into ``folder`` and return them by source name, then by feature.

    Steps that are already complete in ``folder`` are skipped.
    """
    from evalkit.collect import stage as collecting
    from evalkit.pipeline import stages as pipeline
    from evalkit.store.run_store import RunStore
    from evalkit.util.progress import SILENT

    pipeline.run(config, Path(folder), stages=("collect",), progress=progress or SILENT)
    with RunStore.open(Path(folder)) as store:
        return collecting.read_examples(store, config.seed)


def run(config: RunConfig, folder: str | Path, *, progress: Progress | None = None) -> RunFrames:
    """Run all stages in ``folder``, skipping completed steps, and return the records as data frames."""
    from evalkit.pipeline import stages as pipeline
    from evalkit.store.run_store import read_run
    from evalkit.util.progress import SILENT

    pipeline.run(config, Path(folder), progress=progress or SILENT)
    return read_run(folder)
