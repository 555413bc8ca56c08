"""The optional abilities of plug-ins: what one may have beyond its contract, and how the harness asks whether it does.

A plug-in has an ability by having its attribute or method; it need not inherit anything. ``evalkit plugins`` shows what
each has. Flags are set on the class. Imports the contracts only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from evalkit.protocols import PickingJudge, Progress, SimulatingJudge
from evalkit.records import Explanation, FeatureId, JudgeItem, ScoreExamples

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "BatchClient",
    "ClosableClient",
    "ExplainedSource",
    "FinishingClient",
    "ListingScorer",
    "PreparingExplainer",
    "PreparingJudge",
    "SelectiveExplainer",
    "abilities_of",
    "asked_method",
    "close_client",
    "concurrency_of",
    "finish_client",
    "is_batched",
    "main_option_of",
    "needs_explanation",
    "own_judge_of",
    "reconstructs",
    "runs_in_process",
    "uses_client",
    "uses_sources",
    "uses_subject",
    "variant_of",
    "verifies_negatives",
]


@runtime_checkable
class _UsesClient(Protocol):
    uses_client: bool


@runtime_checkable
class _UsesSources(Protocol):
    uses_sources: bool


@runtime_checkable
class _UsesSubject(Protocol):
    uses_subject: bool


@runtime_checkable
class _HasVariant(Protocol):
    variant: str | None


@runtime_checkable
class _HasMainOption(Protocol):
    main_option: str | None


@runtime_checkable
class _HasOwnJudge(Protocol):
    own_judge: str | None


@runtime_checkable
class _AsksMethod(Protocol):
    asks: str


@runtime_checkable
class _MayNeedExplanation(Protocol):
    needs_explanation: bool


@runtime_checkable
class _HasConcurrency(Protocol):
    concurrency: int | None


@runtime_checkable
class _RunsInProcess(Protocol):
    in_process: bool


@runtime_checkable
class _Batched(Protocol):
    batched: bool


@runtime_checkable
class _VerifiesNegatives(Protocol):
    verifies_negatives: bool


@runtime_checkable
class _MayReconstruct(Protocol):
    reconstructs: bool


@runtime_checkable
class PreparingExplainer(Protocol):
    """An explainer that is told which sources it will explain before the first feature."""

    async def prepare(self, sources: Sequence[str]) -> None:
        """``sources``: the names of all sources of the run."""


@runtime_checkable
class ControlAwareExplainer(Protocol):
    """An explainer that treats the controls of a run differently."""

    def set_controls(self, controls: Collection[str]) -> None:
        """``controls``: the names of the sources that the run made as controls; told before anything else."""


@runtime_checkable
class SelectiveExplainer(Protocol):
    """An explainer that has nothing to say about some sources; it is not asked about their features."""

    def explains(self, source: str) -> bool:
        """Whether it can explain features of the source with this name."""


@runtime_checkable
class PreparingJudge(Protocol):
    """A judge that can process all questions of a run in bulk, for example embed each distinct text once."""

    async def prepare(
        self, items: Sequence[JudgeItem], explanations: Sequence[str] = (), progress: Progress | None = None
    ) -> None:
        """Called once, before the first question."""


@runtime_checkable
class ListingScorer(Protocol):
    """A scorer that can list its questions before it asks them."""

    def items(self, examples: ScoreExamples) -> Sequence[JudgeItem]:
        """The questions that it will ask about a feature."""


@runtime_checkable
class ExplainedSource(Protocol):
    """A source whose files come with explanations of its features."""

    @property
    def name(self) -> str:
        """As of every source."""

    def explanations(self, feature: FeatureId) -> Sequence[Explanation]:
        """Those of one feature, in the order of the files."""


@runtime_checkable
class ClosableClient(Protocol):
    """A client that holds connections or an engine."""

    async def close(self) -> None:
        """Release them. Called once, after the last request."""


@runtime_checkable
class FinishingClient(Protocol):
    """A client that can be told that its run has ended while requests are in flight."""

    def finish(self) -> None:
        """Wait for the requests in flight; send no others and do not retry."""


@runtime_checkable
class BatchClient(Protocol):
    """A client that submits requests in batches, which are answered hours later at a lower price.

    ``window``: the time within which a batch is answered, for example "24h".
    """

    batched: bool
    window: str

    def keep_in(self, path: Path, record: Callable[[Sequence[Any]], object]) -> None:
        """Called before the first request.

        ``path``: where it keeps the batches that it submitted.
        ``record``: takes the answers as they arrive, also those to requests of an earlier command.
        """


def uses_client(part: object) -> bool:
    """Whether an explainer or judge sends requests to the run's client; its records then carry the client's name."""
    return isinstance(part, _UsesClient) and bool(part.uses_client)


def uses_sources(explainer: object) -> bool:
    """Whether an explainer reads the run's dictionaries: it is made with ``sources=``, a function that opens them."""
    return isinstance(explainer, _UsesSources) and bool(explainer.uses_sources)


def uses_subject(judge: object) -> bool:
    """Whether a judge loads the subject model: it is made with ``model``, ``dtype``, ``device`` and ``revision``."""
    return isinstance(judge, _UsesSubject) and bool(judge.uses_subject)


def variant_of(part: object) -> str | None:
    """The model behind an explainer or judge that uses no client, for the name in its records."""
    return part.variant if isinstance(part, _HasVariant) else None


def main_option_of(cls: object, default: str | None = None) -> str | None:
    """The option that takes VALUE of ``NAME:VALUE`` on the command line."""
    return cls.main_option if isinstance(cls, _HasMainOption) else default


def own_judge_of(scorer: object) -> str | None:
    """The only judge that a scorer goes with, written as for ``--judge``; None for every judge of the run."""
    return scorer.own_judge if isinstance(scorer, _HasOwnJudge) else None


def asked_method(scorer: object) -> str:
    """The method that a scorer needs of a judge: "judge", "pick" or "simulate"."""
    return scorer.asks if isinstance(scorer, _AsksMethod) else "judge"


def needs_explanation(scorer: object) -> bool:
    """Whether a scorer tests an explanation; False if it tests the feature alone, once and with an empty explanation."""
    return not isinstance(scorer, _MayNeedExplanation) or bool(scorer.needs_explanation)


def concurrency_of(client: object) -> int | None:
    """How many requests a client accepts at a time; None for any number.

    Further requests wait in the run, where Ctrl-C and the budget can still drop them.
    """
    return client.concurrency if isinstance(client, _HasConcurrency) else None


def runs_in_process(client: object) -> bool:
    """Whether a client needs no process of its own to receive answers that are in flight when the run is killed."""
    return isinstance(client, _RunsInProcess) and bool(client.in_process)


def is_batched(client: object) -> bool:
    """Whether a client is a ``BatchClient``. Also true of its class."""
    return isinstance(client, _Batched) and bool(client.batched)


def verifies_negatives(source: object) -> bool:
    """Whether a source stores every activation of its texts, so that a feature without one is silent there."""
    return isinstance(source, _VerifiesNegatives) and bool(source.verifies_negatives)


def reconstructs(source: object) -> bool:
    """Whether a source reconstructs hidden states, so that its fit can be checked."""
    return not isinstance(source, _MayReconstruct) or bool(source.reconstructs)


async def close_client(client: object) -> None:
    """Close a client that can be closed."""
    if isinstance(client, ClosableClient):
        await client.close()


def finish_client(client: object) -> None:
    """Tell a client, if it can be told, to wait for its requests in flight and to send no others."""
    if isinstance(client, FinishingClient):
        client.finish()


# What ``evalkit plugins`` prints, by kind: an ability's words and how to see it on a class.
_SHOWN: Mapping[str, Iterable[tuple[str, Callable[[object], bool]]]] = {
    "explainers": (
        ("uses the client", uses_client),
        ("reads the dictionaries", uses_sources),
        ("prepares in bulk", lambda cls: isinstance(cls, PreparingExplainer)),
    ),
    "judges": (
        ("uses the client", uses_client),
        ("loads the subject model", uses_subject),
        ("can pick", lambda cls: isinstance(cls, PickingJudge)),
        ("can simulate", lambda cls: isinstance(cls, SimulatingJudge)),
        ("prepares in bulk", lambda cls: isinstance(cls, PreparingJudge)),
    ),
    "scorers": (
        ("needs a judge that picks", lambda cls: asked_method(cls) == "pick"),
        ("needs a judge that simulates", lambda cls: asked_method(cls) == "simulate"),
        ("needs no explanation", lambda cls: not needs_explanation(cls)),
        ("brings its judge", lambda cls: own_judge_of(cls) is not None),
    ),
    "sources": (),
    "clients": (
        ("submits batches", is_batched),
        ("stays in this process", runs_in_process),
    ),
}


def abilities_of(kind: str, cls: object) -> tuple[str, ...]:
    """The optional abilities of a plug-in's class, in words."""
    return tuple(words for words, has in _SHOWN[kind] if has(cls))
