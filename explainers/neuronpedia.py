"""The explainer that imports the explanations of a Neuronpedia export, by the index of the feature. Makes no API calls.

Either the source of the run is itself an export, or ``path`` is an export of the run's dictionary, of which only
``explanations/`` is read. Texts are used as they are, joined to one line; a text that is not a phrase is rejected. The code
cannot check that an export and a dictionary have the same features, so a run with several dictionaries must name the
dictionary that the export explains. Other dictionaries and controls get no explanation. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any

from evalkit.abilities import ExplainedSource
from evalkit.errors import BadConfig, CorpusError, UnknownFeature
from evalkit.protocols import Client
from evalkit.records import CONTROL_KIND, ExplainExamples, Explanation, FeatureId
from evalkit.sources.dumps.neuronpedia_explanations import ExportedExplanations
from explainers.asking import LONGEST, phrase

__all__ = ["NeuronpediaExplainer"]


class NeuronpediaExplainer:
    """Takes the first explanation of a feature, in file order.

    ``path``: the folder of one source of an export, or its folder ``explanations``; by default, the run's own source.
    ``by``: only explanations by this model or method, such as ``gpt-4o-mini``.
    ``source``: the dictionary that the export explains, as a name or a pattern (``*/l0-32``); needed if a run has several.
    ``sources``: opens the run's own sources; passed by the run.

    Raises MissingFile, BadConfig.
    """

    name = "neuronpedia"
    main_option = "path"
    uses_sources = True
    version = "1"

    def __init__(
        self,
        path: str | None = None,
        by: str | None = None,
        source: str | None = None,
        sources: Callable[[], Sequence[Any]] | None = None,
    ) -> None:
        self.path, self.by, self.source = path, by, source
        self._sources = sources
        self._export = None if path is None else ExportedExplanations.find(path)
        self._own: dict[str, ExplainedSource] | None = None
        self._controls: frozenset[str] | None = None

    def set_controls(self, controls: Collection[str]) -> None:
        """``controls``: sources of the run that the export is never about."""
        self._controls = frozenset(controls)

    async def prepare(self, sources: Sequence[str]) -> None:
        """Check the export before the first feature. ``sources``: the names of all sources of the run.

        Raises BadConfig if the export could belong to several sources or if there are no explanations at all; BadFile.
        """
        explained = [name for name in sources if self.explains(name)]
        if self._export is None:
            return
        if len(explained) != 1:
            raise BadConfig(
                f"explainer 'neuronpedia' with {self.path}",
                expected="exactly one dictionary that the export explains",
                seen=f"{len(explained)}: {', '.join(explained[:3])}" if explained else f"none in {', '.join(sources)}",
                fix="name the dictionary: --explainer neuronpedia:FOLDER,source=NAME (or a pattern, '*/l0-32')",
            )
        self._export.of("0")

    def explains(self, source: str) -> bool:
        """Whether there are explanations of features of this source. Raises BadConfig if no source has explanations."""
        if self._export is None:
            return source in self._opened()
        if f"/{CONTROL_KIND}" in source if self._controls is None else source in self._controls:
            return False
        return self.source is None or source == self.source or fnmatchcase(source, self.source)

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None = None) -> Explanation:
        """The export's explanation. Raises UnknownFeature if there is none, CorpusError if it is not a phrase."""
        said = self._said(examples.source, feature)
        chosen = [one for one in said if self.by in (None, one.version, _writer(one))]
        if not chosen:
            theirs = ", ".join(dict.fromkeys(f"{_writer(one)} ({one.version})" for one in said))
            raise UnknownFeature(
                f"{examples.source} feature {feature}",
                expected=f"an explanation by {self.by}" if self.by else "an explanation in the export",
                seen=f"explanations by {theirs}" if said else "none",
                fix="leave this feature out, or use another explainer",
            )
        text = phrase(chosen[0].text)
        if text is None:
            raise CorpusError(
                f"{examples.source} feature {feature}",
                expected=f"a phrase of at most {LONGEST} characters in the export",
                seen=f"{len(chosen[0].text)} characters, {chosen[0].text[:40]!r}",
                fix="leave this feature out, or use the explanations of another model with by=MODEL",
            )
        note = f"by {_writer(chosen[0]) or 'an unnamed model'}, {chosen[0].version or 'an unnamed method'}"
        more = f"; the first of {len(chosen)}" if len(chosen) > 1 else ""
        return Explanation(examples.source, feature, self.name, self.version, text, note + more)

    def _said(self, source: str, feature: FeatureId) -> Sequence[Explanation]:
        if not self.explains(source):
            return []
        return self._opened()[source].explanations(feature) if self._export is None else self._export.of(feature)

    def _opened(self) -> dict[str, ExplainedSource]:
        """The run's own sources that have explanations, by name. Raises BadConfig if none has any."""
        if self._own is None:
            there = [] if self._sources is None else self._sources()
            self._own = {one.name: one for one in there if isinstance(one, ExplainedSource)}
        if not self._own:
            raise BadConfig(
                "explainer 'neuronpedia'",
                expected="a run on an export, or the folder of an export",
                seen="neither",
                fix="give the folder of an export: --explainer neuronpedia:FOLDER",
            )
        return self._own


def _writer(explanation: Explanation) -> str:
    """The model that wrote the explanation."""
    return explanation.explainer.partition(":")[2]
