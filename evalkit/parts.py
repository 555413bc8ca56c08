"""The explainers, judges and scorers that a configuration names, under the names that records carry.

Finds them in the registry. Reaches no model; raises PluginError, BadConfig, MissingFile and MissingExtra where one cannot
be made.
"""

from __future__ import annotations

from typing import Any

from evalkit import registry
from evalkit.config import RunConfig
from evalkit.protocols import Client, Explainer, Judge, Scorer

__all__ = ["make_explainers", "make_judges", "make_scorers", "recorded_as"]


def make_explainers(config: RunConfig, client: Client | None) -> dict[str, Explainer]:
    """The configured explainers by recorded name."""
    parts = [registry.parse_part("explainers", text) for text in config.explainers]
    return dict(recorded_as(part, registry.create("explainers", part.name, **part.options), client) for part in parts)


def make_judges(config: RunConfig, client: Client | None) -> dict[str, Judge]:
    """The configured judges by recorded name; those that ask a model get ``client``."""
    parts = [registry.parse_part("judges", text) for text in config.judges]
    return dict(recorded_as(part, _judge(part, config, client), client) for part in parts)


def make_scorers(config: RunConfig) -> list[Scorer]:
    """The configured scorers."""
    return [registry.create("scorers", name) for name in config.scorers]


def _judge(part: registry.Part, config: RunConfig, client: Client | None) -> Any:
    given: dict[str, Any] = {}
    if getattr(registry.load_class("judges", part.name), "uses_client", False):
        given["client"] = client
    elif part.name == "embedding":
        given = {"model": config.embedding_model, "device": config.device}
    return registry.create("judges", part.name, **given, **part.options)


def recorded_as(part: registry.Part, made: Any, client: Client | None) -> tuple[str, Any]:
    """A part with the name it is recorded by: with that of the model behind it, so two models never share a record.

    That model is the client's for parts that ask it (``uses_client``), or what the part itself calls its ``variant``.
    """
    behind = client.name if client and getattr(made, "uses_client", False) else getattr(made, "variant", None)
    return (f"{part.label}@{behind}" if behind else part.label), made
