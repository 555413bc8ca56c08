"""Creates the explainers, judges and scorers that a configuration names, with the names used in records.

Finds them in the registry and decides which scorer uses which judge. Makes no API calls and loads no model. Raises
PluginError, BadConfig, MissingFile and MissingExtra if one cannot be created.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from evalkit import registry
from evalkit.abilities import asked_method, own_judge_of, uses_client, uses_sources, uses_subject, variant_of
from evalkit.collect.stage import open_sources
from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig
from evalkit.evaluate.score_stage import Test
from evalkit.protocols import Client, Explainer, Judge, Scorer
from evalkit.records import BASELINE

__all__ = ["make_explainers", "make_tests", "recorded_as"]


def make_explainers(config: RunConfig, client: Client | None) -> dict[str, Explainer]:
    """The configured explainers by recorded name."""
    parts = [registry.parse_part("explainers", text) for text in config.explainers]
    return dict(recorded_as(part, _explainer(part, config), client) for part in parts)


def _explainer(part: registry.Part, config: RunConfig) -> Any:
    given: dict[str, Any] = {}
    if uses_sources(registry.load_class("explainers", part.name)):
        given["sources"] = partial(open_sources, config)
    return registry.create("explainers", part.name, **given, **part.options)


def make_tests(config: RunConfig, client: Client | None) -> list[Test]:
    """Every configured scorer with every judge that can answer it, or with the scorer's own judge.

    Judges that query a model use ``client`` and come ``config.repeats`` times; the others would repeat their answers. With
    the control "lexical", includes the tests of that baseline. Raises BadConfig for a scorer that no judge can answer.
    """
    judges = [(repeat, *made) for text in config.judges for repeat, made in _repeated(text, config, client)]
    tests: list[Test] = []
    for text in config.scorers:
        part = registry.parse_part("scorers", text)
        scorer: Scorer = registry.create("scorers", part.name, **part.options)
        own = own_judge_of(scorer)
        asked = judges if own is None else [(repeat, *made) for repeat, made in _repeated(own, config, client)]
        method = asked_method(scorer)
        fitting = [(repeat, name, judge) for repeat, name, judge in asked if hasattr(judge, method)]
        if asked and not fitting:
            raise BadConfig(
                f"scorer {text!r}",
                expected=f"a judge with a method {method}",
                seen=f"{', '.join(dict.fromkeys(name for _, name, _ in asked))}",
                fix="add another --judge, or leave this scorer out",
            )
        tests += [Test(part.label, scorer, name, judge, repeat) for repeat, name, judge in fitting]
        if "lexical" in config.controls and own is None and method == "judge":
            tests.append(_baseline(part.label, scorer, config, tests))
    return tests


def _baseline(label: str, scorer: Scorer, config: RunConfig, tests: list[Test]) -> Test:
    explainer, name = BASELINE
    judge = next((test.judge for test in tests if test.judge_name == name), None) or _judge(
        registry.parse_part("judges", name), config, None
    )
    return Test(label, scorer, name, judge, explainers=(explainer,))


def _repeated(text: str, config: RunConfig, client: Client | None) -> list[tuple[int, tuple[str, Judge]]]:
    """A judge for each repeat. All repeats have the same name; records distinguish them by number."""
    part = registry.parse_part("judges", text)
    made = [(0, recorded_as(part, _judge(part, config, client), client))]
    cls = registry.load_class("judges", part.name)
    if not uses_client(cls):
        return made
    seeded = "seed" in inspect.signature(cls).parameters
    for repeat in range(1, config.repeats):
        options = {**part.options, "seed": int(part.options.get("seed", 0)) + repeat} if seeded else part.options
        other = _judge(registry.Part(part.name, part.label, options), config, client)
        made.append((repeat, recorded_as(part, other, client)))
    return made


def _judge(part: registry.Part, config: RunConfig, client: Client | None) -> Any:
    cls = registry.load_class("judges", part.name)
    given: dict[str, Any] = {}
    if uses_client(cls):
        given["client"] = client
    elif part.name == "embedding":
        given = {"model": config.embedding_model, "device": config.device}
    elif uses_subject(cls):
        given = {"model": config.subject(), "dtype": config.dtype, "device": config.device, "revision": config.revision}
    return registry.create("judges", part.name, **{**given, **part.options})


def recorded_as(part: registry.Part, made: Any, client: Client | None) -> tuple[str, Any]:
    """A part with its name in records, which includes the model it uses, so that two models never share a record.

    The model is the client's for parts that query it (``uses_client``), else the part's ``variant``.
    """
    behind = client.name if client and uses_client(made) else variant_of(made)
    return (f"{part.label}@{behind}" if behind else part.label), made
