"""The contracts at the plug-in points. Structural: a plug-in implements the methods, it need not inherit anything.

Imports records and errors only, and torch only for annotations, so a plug-in costs nothing to import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from evalkit.records import (
    Answer,
    ExplainExamples,
    Explanation,
    FeatureId,
    JudgeItem,
    Message,
    Pick,
    Response,
    Score,
    ScoreExamples,
    Simulation,
    Site,
    SourceInfo,
    SubjectInfo,
    TokenBatch,
)

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "CalibratedSource",
    "CentredSource",
    "Client",
    "DirectedSource",
    "ExampleSource",
    "Explainer",
    "FeatureSource",
    "Judge",
    "PickingJudge",
    "Progress",
    "ReadyExamples",
    "ReadyText",
    "Scorer",
    "SimulatingJudge",
    "SourceReader",
    "TokenSource",
]


@runtime_checkable
class FeatureSource(Protocol):
    """Answers "how active is feature f on these tokens". ``hidden`` is always the raw hidden state of the site."""

    @property
    def name(self) -> str:
        """Unique: model/site/kind/width/L0 or depth; the key everywhere."""

    @property
    def site(self) -> Site:
        """Where it reads, and what it reconstructs."""

    @property
    def info(self) -> SourceInfo:
        """What a table prints about this source."""

    def bind(self, subject: SubjectInfo) -> Self:
        """Take what it needs of the subject (norm gain and eps, d_model). Raises SiteMismatch."""

    def features(self) -> Sequence[FeatureId]:
        """Every feature id, in a fixed order."""

    def activations(
        self, hidden: Float[Tensor, "batch pos d_model"], features: Sequence[FeatureId]
    ) -> Float[Tensor, "batch pos feature"]:
        """Activation of the chosen features at every position, in the source's own units. Raises UnknownFeature."""

    def threshold(self, feature: FeatureId) -> float:
        """θ: active means above it. 0 for SAEs, a corpus quantile for RQAE."""

    def reconstruct(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_out"]:
        """The dictionary's reconstruction, in the units of the hidden state at ``site.out``."""


@runtime_checkable
class CentredSource(Protocol):
    """A source whose features are made from token occurrences (an RQAE's code prefixes)."""

    def with_centres(self, hidden: Float[Tensor, "centre d_model"], features: Sequence[FeatureId]) -> Self:
        """A copy whose features are the given occurrences. ``hidden`` is raw, one row a feature."""


@runtime_checkable
class CalibratedSource(Protocol):
    """A source whose thresholds are corpus quantiles: the top ``density`` share of tokens is active."""

    density: float

    def with_thresholds(self, thresholds: Mapping[FeatureId, float]) -> Self:
        """A copy with these thresholds."""


@runtime_checkable
class TokenSource(Protocol):
    """A source that fires on tokens or positions rather than on hidden states (the planted and permuted controls)."""

    def token_activations(self, batch: TokenBatch, features: Sequence[FeatureId]) -> Float[Tensor, "batch pos feature"]:
        """Activation of the chosen features at every position."""


@runtime_checkable
class DirectedSource(Protocol):
    """A source whose features are directions, so that it can be said which tokens each of them promotes."""

    def directions(self, features: Sequence[FeatureId]) -> Float[Tensor, "feature d_out"] | None:
        """What a feature adds to the state at ``site.out``, up to a positive factor; None where nothing can be said.

        Raises UnknownFeature.
        """


@dataclass(frozen=True, slots=True, eq=False)
class ReadyText:
    """A text in which another tool saw features fire, whole and once however many features it is recorded of.

    ``text`` is a 63-bit hash of its tokens. ``tokens`` are text pieces that join to the text; ``valid`` (pos,) is False on
    BOS, EOS and padding. ``activations`` (pos,), by feature: what is recorded of the asked features, those that are
    active in it only. ``complete``: all of these are there, so that it may serve the other asked features as a negative.
    """

    text: int
    tokens: tuple[str, ...]
    valid: NDArray[np.bool_]
    activations: Mapping[FeatureId, NDArray[np.float32]]
    complete: bool


@dataclass(frozen=True, slots=True, eq=False)
class ReadyExamples:
    """Texts of the asked features and of others, each text once. ``densities``: share of tokens active, where known."""

    texts: Sequence[ReadyText]
    densities: Mapping[FeatureId, float]


@runtime_checkable
class ExampleSource(Protocol):
    """Has examples ready (a dump of another tool) instead of activations: no model reads a text for it.

    One that has explanations too gives those of a feature with ``explanations(feature)``.
    """

    @property
    def name(self) -> str:
        """Unique, as a FeatureSource's."""

    @property
    def site(self) -> Site:
        """Where the features were read; a label here."""

    @property
    def info(self) -> SourceInfo:
        """What a table prints about this source; ``declared`` says what is not verified about its examples."""

    def features(self) -> Sequence[FeatureId]:
        """Every feature with an activating text, in a fixed order. May read the whole dump."""

    def examples(self, features: Sequence[FeatureId]) -> ReadyExamples:
        """The texts of these features, and a sample of all texts to draw negatives from. Raises UnknownFeature."""


class SourceReader(Protocol):
    """Opens dictionaries of one on-disk format. One small module per format."""

    format: str
    options: frozenset[str]  # the names that ``read`` takes

    def matches(self, path: Path) -> bool:
        """Whether ``path`` (a file or folder) looks like this format; cheap, never raises."""

    def read(self, path: Path, **options: Any) -> Sequence[FeatureSource]:
        """The feature sources of the dictionary at ``path`` (an RQAE gives one per asked depth).

        A format of ready examples gives ExampleSources instead.
        """


class Explainer(Protocol):
    """Writes an explanation from examples of the explain pool.

    Optional abilities (``evalkit.abilities``): ``uses_client``, ``uses_sources``, ``variant``, ``prepare``, ``explains``.
    """

    name: str
    version: str

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None) -> Explanation:
        """Describe the feature. ``client`` is None unless the run names one."""


class Judge(Protocol):
    """Says whether an explanation matches a window, without knowing the label.

    ``probabilistic``: whether its answers carry their own match decision; if False, scorers fit the cut-off on
    confidences.

    Optional abilities (``evalkit.abilities``): ``uses_client``, ``uses_subject``, ``variant``, ``prepare``; see also
    ``PickingJudge`` and ``SimulatingJudge``.
    """

    name: str
    version: str
    probabilistic: bool

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        """As many answers as items, always, in their order."""


@runtime_checkable
class PickingJudge(Protocol):
    """A judge that can pick the text that does not belong with the others; it sees no explanation."""

    async def pick(self, groups: Sequence[Sequence[JudgeItem]]) -> Sequence[Pick]:
        """As many picks as groups, always, in their order."""


@runtime_checkable
class SimulatingJudge(Protocol):
    """A judge that can predict from an explanation how active the feature is on every token of a window."""

    async def simulate(self, explanation: str, windows: Sequence[Sequence[str]]) -> Sequence[Simulation]:
        """As many simulations as windows, always, in their order. A window is its tokens as text."""


class Scorer(Protocol):
    """Builds the test (windows, marks, labels), asks a judge, and compares the answers with the labels.

    Optional abilities (``evalkit.abilities``): ``asks``, ``own_judge``, ``needs_explanation``, ``items``.
    """

    name: str
    version: str

    async def score(self, explanation: Explanation, examples: ScoreExamples, judge: Judge) -> Score:
        """The judgements of one feature under one explanation."""


class Client(Protocol):
    """A language model that answers chat messages.

    ``name`` is the model's, with every option that changes its answers: recordings and records are keyed by it. Creating
    a client must be cheap and must contact nothing: an engine starts with the first request. Retries and limits on
    requests in flight are the client's task; recording and budgets are not.

    A run creates the client in a separate process, which outlives a killed run until the requests in flight are answered.
    A client with ``in_process = True`` stays in the run's process, for example because its model would end with the run.

    Optional abilities (``evalkit.abilities``): ``main_option`` (default "model"), ``concurrency``, ``in_process``,
    ``close``, ``finish``, and those of a ``BatchClient``. On Ctrl-C a run does not wait for a batch client; the next
    command fetches its answers.
    """

    name: str

    async def generate(
        self,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None = None,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
        logprobs: int = 0,
        seed: int | None = None,
        max_tokens: int,
    ) -> Response:
        """One reply. At most one of ``schema`` (JSON schema), ``choices``, ``regex`` constrains it where the engine can.

        ``logprobs``: so many candidates of every token are returned with their log-probabilities. Raises
        ContextOverflow, RequestRefused, NoAnswer, ClientDown.
        """


class Progress(Protocol):
    """How a library tells its caller about long work; the command line draws it."""

    def start(self, description: str, total: int | None, unit: str) -> int:
        """Open a task; returns its id."""

    def advance(self, task: int, amount: int = 1) -> None:
        """``amount`` more units are done."""

    def finish(self, task: int) -> None:
        """The task is done."""
