"""A configuration and all the parts it names, which are created once per command and passed to all stages.

Knows which explainers, tests and controls a run has, and their names in records; both ``run`` and ``--dry-run`` use it.
Makes no API calls, loads no model, writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from evalkit import registry
from evalkit.collect.dump_windows import check_ready
from evalkit.config.run_config import NULL_SOURCES, RunConfig
from evalkit.evaluate.components import make_explainers, make_tests
from evalkit.evaluate.score_stage import Test
from evalkit.llm.accounting.prices import Price
from evalkit.llm.session import make_client, price_of
from evalkit.protocols import Client, Explainer, FeatureSource
from evalkit.records import BASELINE

__all__ = ["ResolvedRun"]


@dataclass(frozen=True, eq=False)  # no slots: parts are made on first use and kept
class ResolvedRun:
    """The parts of a run, each created on first use. That raises PluginError, BadConfig, MissingFile or MissingExtra."""

    config: RunConfig

    def check(self, stages: Sequence[str]) -> None:
        """Make every part that the stages need, so that a wrong name fails before the expensive work."""
        if {"explain", "score"} & set(stages):
            _ = self.price
        if "explain" in stages:
            _ = self.explainers
        if "score" in stages:
            _ = self.tests

    @cached_property
    def client(self) -> Client | None:
        """The configured client, without recording and budget; None if the run names none."""
        return make_client(self.config)

    @cached_property
    def price(self) -> Price | None:
        """The price of the client's model; None without a client or a listed price.

        Raises BadConfig if --max-cost is set and the price is not listed.
        """
        return None if self.client is None else price_of(self.config, self.client.name)

    @cached_property
    def explainers(self) -> dict[str, Explainer]:
        """The configured explainers by recorded name."""
        return make_explainers(self.config, self.client)

    @cached_property
    def baseline_explainers(self) -> dict[str, Explainer]:
        """The explainer of the control "lexical", by recorded name; empty without that control."""
        if "lexical" not in self.config.controls:
            return {}
        return make_explainers(self.config.model_copy(update={"explainers": BASELINE[:1]}), None)

    @cached_property
    def tests(self) -> list[Test]:
        """The configured scorers with their judges. Use ``tests_with`` to query a model through a recording."""
        return make_tests(self.config, self.client)

    def tests_with(self, client: Client | None) -> list[Test]:
        """The same tests, with judges that send their requests to ``client``."""
        return self.tests if client is None and self.client is None else make_tests(self.config, client)

    @property
    def with_shuffled(self) -> bool:
        """Whether every feature is also scored with another feature's explanation."""
        return "shuffled" in self.config.controls

    def scored_explainers(self, recorded: Sequence[str]) -> list[str]:
        """Names of the explainers whose explanations are scored; all of ``recorded`` if none is configured.

        recorded: names of the explainers that the run folder has explanations of.

        A configured explainer selects the recorded one of the same name and options, even if that was recorded with
        another client than this command's or with none. One without a record is listed under the name that its record
        will have.
        """
        if not self.config.explainers:
            return list(recorded)
        names: list[str] = []
        labels = dict.fromkeys(registry.parse_part("explainers", text).label for text in self.config.explainers)
        for label, name in zip(labels, self.explainers, strict=True):  # equal labels share a name
            others = [other for other in recorded if other.rpartition("@")[0] == label]
            names += [name] if name in recorded or not others else others
        return names

    def controls(self, sources: Sequence[FeatureSource]) -> list[str]:
        """The controls that this run will have in addition to ``sources``."""
        dictionaries = self.control_dictionaries(sources)
        return [name for name in self.config.controls if name in dictionaries or name not in NULL_SOURCES]

    def control_dictionaries(self, sources: Sequence[FeatureSource]) -> list[str]:
        """The controls that are additional dictionaries.

        "random-codes" needs an RQAE. A run on dumps has no such control, because no model computes activations for it.
        """
        if check_ready(sources):
            return []
        has_rqae = any(source.info.kind == "rqae" for source in sources)
        return list(self.config.control_dictionaries(has_rqae=has_rqae))
