"""evalkit: how interpretable are the features of a dictionary of a language model, and how sure are we?

This module is the whole public Python API. Every name is imported on first use, so ``import evalkit`` needs neither torch
nor pandas.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evalkit.api import collect_examples as collect_examples
    from evalkit.api import load_client as load_client
    from evalkit.api import load_explainer as load_explainer
    from evalkit.api import load_judge as load_judge
    from evalkit.api import load_scorer as load_scorer
    from evalkit.api import load_source as load_source
    from evalkit.api import run as run
    from evalkit.config.run_config import RunConfig as RunConfig
    from evalkit.errors import ClientDown as ClientDown
    from evalkit.errors import ContextOverflow as ContextOverflow
    from evalkit.errors import EvalkitError as EvalkitError
    from evalkit.errors import NoAnswer as NoAnswer
    from evalkit.errors import RequestRefused as RequestRefused
    from evalkit.records import Answer as Answer
    from evalkit.records import Example as Example
    from evalkit.records import ExplainExamples as ExplainExamples
    from evalkit.records import Explanation as Explanation
    from evalkit.records import JudgeItem as JudgeItem
    from evalkit.records import Judgement as Judgement
    from evalkit.records import Message as Message
    from evalkit.records import Response as Response
    from evalkit.records import Score as Score
    from evalkit.records import ScoreExamples as ScoreExamples
    from evalkit.records import Site as Site
    from evalkit.records import SourceInfo as SourceInfo
    from evalkit.records import SubjectInfo as SubjectInfo
    from evalkit.store.run_store import read_run as read_run

__version__ = "0.1.0"

_HOMES = {
    "evalkit.api": (
        "collect_examples",
        "load_client",
        "load_explainer",
        "load_judge",
        "load_scorer",
        "load_source",
        "run",
    ),
    "evalkit.config.run_config": ("RunConfig",),
    "evalkit.errors": ("ClientDown", "ContextOverflow", "EvalkitError", "NoAnswer", "RequestRefused"),
    "evalkit.records": (
        "Answer",
        "Example",
        "ExplainExamples",
        "Explanation",
        "JudgeItem",
        "Judgement",
        "Message",
        "Response",
        "Score",
        "ScoreExamples",
        "Site",
        "SourceInfo",
        "SubjectInfo",
    ),
    "evalkit.store.run_store": ("read_run",),
}
_HOME_OF = {name: module for module, exported in _HOMES.items() for name in exported}

__all__ = [
    "Answer",
    "ClientDown",
    "ContextOverflow",
    "EvalkitError",
    "Example",
    "ExplainExamples",
    "Explanation",
    "JudgeItem",
    "Judgement",
    "Message",
    "NoAnswer",
    "RequestRefused",
    "Response",
    "RunConfig",
    "Score",
    "ScoreExamples",
    "Site",
    "SourceInfo",
    "SubjectInfo",
    "collect_examples",
    "load_client",
    "load_explainer",
    "load_judge",
    "load_scorer",
    "load_source",
    "read_run",
    "run",
]


def __getattr__(name: str) -> Any:
    if module := _HOME_OF.get(name):
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'evalkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
