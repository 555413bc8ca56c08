"""The explainer that imports what others wrote: the explanations of a Neuronpedia export, by the index of the feature.

No language model is asked. Either the run's source is itself an export, or ``path`` names one whose features are those of
the run's dictionary; then nothing but its ``explanations/`` is read. The text is taken on one line, else as it is; one that
is no phrase is refused. Nothing here can tell whether an export and a dictionary have the same features: a run of several
dictionaries has to say which of them the export explains. The others, and controls, get no explanation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from evalkit.abilities import ExplainedSource
from evalkit.errors import BadConfig, CorpusError, UnknownFeature
from evalkit.protocols import Client
from evalkit.records import CONTROL_MARK, ExplainExamples, Explanation, FeatureId
from evalkit.sources.dumps.neuronpedia_explanations import ExportedExplanations
from explainers.asking import LONGEST, phrase

__all__ = ["NeuronpediaExplainer"]


class NeuronpediaExplainer:
    """Takes the first explanation of a feature in file order, or the first ``by`` a model or method (``gpt-4o-mini``).

    ``path``: the folder of one source of an export, or its folder ``explanations``; without it the run's own source is
    asked, which ``sources`` opens. ``source``: the dictionary that the export at ``path`` explains, by its name or a
    pattern (``*/l0-32``), where a run has several. Raises MissingFile, BadConfig.
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

    async def prepare(self, sources: Sequence[str]) -> None:
        """Look at all there is before the first feature. ``sources``: the names of all sources of the run.

        Raises BadConfig where the export could be that of several, or nothing here has explanations; BadFile.
        """
        explained = [name for name in sources if self.explains(name)]
        if self._export is None:
            return
        if len(explained) != 1:
            raise BadConfig(
                f"explainer 'neuronpedia' with {self.path}",
                expected="one dictionary that it explains",
                seen=f"{len(explained)}: {', '.join(explained[:3])}" if explained else f"none in {', '.join(sources)}",
                fix="say whose features these are: --explainer neuronpedia:FOLDER,source=NAME (or a pattern, '*/l0-32')",
            )
        self._export.of("0")

    def explains(self, source: str) -> bool:
        """Whether there are explanations of the features of this source. Raises BadConfig where there are of none."""
        if self._export is None:
            return source in self._opened()
        if CONTROL_MARK in source:
            return False
        return self.source is None or source == self.source or fnmatchcase(source, self.source)

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None = None) -> Explanation:
        """What the export says. Raises UnknownFeature where it says nothing, CorpusError where that is no phrase."""
        said = self._said(examples.source, feature)
        chosen = [one for one in said if self.by in (None, one.version, _writer(one))]
        if not chosen:
            theirs = ", ".join(dict.fromkeys(f"{_writer(one)} ({one.version})" for one in said))
            raise UnknownFeature(
                f"{examples.source} feature {feature}",
                expected=f"an explanation by {self.by}" if self.by else "an explanation in the export",
                seen=f"those by {theirs}" if said else "none",
                fix="leave this feature out, or use another explainer",
            )
        text = phrase(chosen[0].text)
        if text is None:
            raise CorpusError(
                f"{examples.source} feature {feature}",
                expected=f"a phrase of at most {LONGEST} characters in the export",
                seen=f"{len(chosen[0].text)} characters, {chosen[0].text[:40]!r}",
                fix="leave this feature out, or choose others with by=MODEL",
            )
        note = f"by {_writer(chosen[0]) or 'an unnamed model'}, {chosen[0].version or 'an unnamed method'}"
        more = f"; the first of {len(chosen)}" if len(chosen) > 1 else ""
        return Explanation(examples.source, feature, self.name, self.version, text, note + more)

    def _said(self, source: str, feature: FeatureId) -> Sequence[Explanation]:
        if not self.explains(source):
            return []
        return self._opened()[source].explanations(feature) if self._export is None else self._export.of(feature)

    def _opened(self) -> dict[str, ExplainedSource]:
        """The run's own sources that have explanations. Raises BadConfig where none has."""
        if self._own is None:
            there = [] if self._sources is None else self._sources()
            self._own = {one.name: one for one in there if isinstance(one, ExplainedSource)}
        if not self._own:
            raise BadConfig(
                "explainer 'neuronpedia'",
                expected="the folder of an export, or a run of an export",
                seen="neither",
                fix="name one: --explainer neuronpedia:FOLDER",
            )
        return self._own


def _writer(explanation: Explanation) -> str:
    """The model that wrote it."""
    return explanation.explainer.partition(":")[2]
