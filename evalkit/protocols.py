"""The contracts of plug-ins: feature sources, readers, explainers, judges, scorers and clients.

They are structural types: a plug-in implements the methods and need not inherit from anything. The module knows only the
shared records, and imports torch for annotations only, so that importing it is cheap. Reads and writes nothing.
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
    """Computes how active each feature is on each token. ``hidden`` is always the raw hidden state of the site."""

    @property
    def name(self) -> str:
        """A unique name, model/site/kind/width/L0 or depth. All records and tables use it as the key of the source."""

    @property
    def site(self) -> Site:
        """The module whose hidden state the source reads, and the module whose state it reconstructs."""

    @property
    def info(self) -> SourceInfo:
        """The columns that tables print about this source."""

    def bind(self, subject: SubjectInfo) -> Self:
        """A source prepared for this subject model: checks d_model and takes the norm gain and eps. Raises SiteMismatch."""

    def features(self) -> Sequence[FeatureId]:
        """Every feature id, in a fixed order."""

    def activations(
        self, hidden: Float[Tensor, "batch pos d_model"], features: Sequence[FeatureId]
    ) -> Float[Tensor, "batch pos feature"]:
        """Activation of the given features at every position, in the source's own units. Raises UnknownFeature."""

    def threshold(self, feature: FeatureId) -> float:
        """The threshold θ: a feature is active where its activation exceeds θ. 0 for SAEs, a corpus quantile for RQAE."""

    def reconstruct(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_out"]:
        """The dictionary's reconstruction, in the units of the hidden state at ``site.out``."""


@runtime_checkable
class CentredSource(Protocol):
    """A source whose features are defined by token occurrences (the code prefixes of an RQAE)."""

    def with_centres(self, hidden: Float[Tensor, "centre d_model"], features: Sequence[FeatureId]) -> Self:
        """A copy whose features are the given occurrences. ``hidden``: raw hidden states, one row per feature."""


@runtime_checkable
class CalibratedSource(Protocol):
    """A source whose thresholds are corpus quantiles.

    ``density``: share of tokens on which each feature is active.
    """

    density: float

    def with_thresholds(self, thresholds: Mapping[FeatureId, float]) -> Self:
        """A copy of the source that uses these thresholds."""


@runtime_checkable
class TokenSource(Protocol):
    """A source whose activations depend on tokens or positions, not on hidden states (planted and permuted controls)."""

    def token_activations(self, batch: TokenBatch, features: Sequence[FeatureId]) -> Float[Tensor, "batch pos feature"]:
        """Activation of the given features at every position."""


@runtime_checkable
class DirectedSource(Protocol):
    """A source whose features are directions, so that the tokens that each feature promotes can be computed."""

    def directions(self, features: Sequence[FeatureId]) -> Float[Tensor, "feature d_out"] | None:
        """The direction that each feature adds to the state at ``site.out``, up to a positive factor.

        Returns None if the source cannot tell. Raises UnknownFeature.
        """


@dataclass(frozen=True, slots=True, eq=False)
class ReadyText:
    """A whole text for which another tool recorded activations; one object per text, however many features are active.

    ``text``: a 63-bit hash of the tokens, which identifies the text.
    ``tokens``: text pieces whose concatenation is the text.
    ``valid``: (pos,), False on BOS, EOS and padding.
    ``activations``: (pos,) per requested feature that is active in the text.
    ``complete``: whether ``activations`` has every requested feature that is active in the text. If so, the text can be a
    negative for the other requested features.
    """

    text: int
    tokens: tuple[str, ...]
    valid: NDArray[np.bool_]
    activations: Mapping[FeatureId, NDArray[np.float32]]
    complete: bool


@dataclass(frozen=True, slots=True, eq=False)
class ReadyExamples:
    """The texts of an ExampleSource.

    ``texts``: texts of the requested features and of others, each text once.
    ``densities``: per feature, the share of tokens on which it is active, if known.
    """

    texts: Sequence[ReadyText]
    densities: Mapping[FeatureId, float]


@runtime_checkable
class ExampleSource(Protocol):
    """Provides ready examples, such as a dump of another tool, instead of activations; it needs no subject model.

    A source that also has explanations returns those of a feature from ``explanations(feature)``.
    """

    @property
    def name(self) -> str:
        """A unique name, like that of a FeatureSource."""

    @property
    def site(self) -> Site:
        """The module whose hidden state the other tool read; used only as a label."""

    @property
    def info(self) -> SourceInfo:
        """The columns that tables print about this source; ``declared`` lists unverified properties of its examples."""

    def features(self) -> Sequence[FeatureId]:
        """Every feature that is active in at least one text, in a fixed order. May read the whole dump."""

    def examples(self, features: Sequence[FeatureId]) -> ReadyExamples:
        """The texts of these features, and a sample of all texts for negatives. Raises UnknownFeature."""


class SourceReader(Protocol):
    """Reads dictionaries of one on-disk format.

    ``options``: the names of the options that ``read`` accepts.
    """

    format: str
    options: frozenset[str]

    def matches(self, path: Path) -> bool:
        """Whether ``path`` (a file or folder) looks like this format. Must be cheap and must not raise."""

    def read(self, path: Path, **options: Any) -> Sequence[FeatureSource]:
        """The feature sources of the dictionary at ``path``; for an RQAE, one per requested depth.

        A format of ready examples returns ExampleSources instead.
        """


class Explainer(Protocol):
    """Writes an explanation of a feature from its examples in the explain pool.

    Optional abilities (``evalkit.abilities``): ``uses_client``, ``uses_sources``, ``variant``, ``prepare``, ``explains``.
    """

    name: str
    version: str

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None) -> Explanation:
        """The explanation of the feature. ``client`` is None unless the run has one."""


class Judge(Protocol):
    """Decides whether an explanation matches a window. It never sees the label.

    ``probabilistic``: True if every answer has its own match decision; False if scorers fit a cut-off on the confidences.

    Optional abilities (``evalkit.abilities``): ``uses_client``, ``uses_subject``, ``variant``, ``prepare``; see also
    ``PickingJudge`` and ``SimulatingJudge``.
    """

    name: str
    version: str
    probabilistic: bool

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        """Exactly one answer per item, in their order."""


@runtime_checkable
class PickingJudge(Protocol):
    """A judge that can pick the text of a group that does not belong with the others, without any explanation."""

    async def pick(self, groups: Sequence[Sequence[JudgeItem]]) -> Sequence[Pick]:
        """Exactly one pick per group, in their order."""


@runtime_checkable
class SimulatingJudge(Protocol):
    """A judge that can predict, from an explanation, how active the feature is on every token of a window."""

    async def simulate(self, explanation: str, windows: Sequence[Sequence[str]]) -> Sequence[Simulation]:
        """Exactly one simulation per window, in their order. A window is given as the texts of its tokens."""


class Scorer(Protocol):
    """Builds a test (windows, marks, labels), queries a judge, and compares its answers with the labels.

    Optional abilities (``evalkit.abilities``): ``asks``, ``own_judge``, ``needs_explanation``, ``items``.
    """

    name: str
    version: str

    async def score(self, explanation: Explanation, examples: ScoreExamples, judge: Judge) -> Score:
        """The judgements of one explanation of one feature."""


class Client(Protocol):
    """A language model that answers chat messages.

    ``name``: the model with every option that changes its answers; recorded calls and results are stored under it.

    Creating a client must be cheap and must not use the network: an engine starts with the first request. The client
    retries and limits the requests in flight; the caller records calls and enforces budgets.

    A run creates the client in a separate process, which survives a killed run until the requests in flight are answered.
    A client with ``in_process = True`` stays in the run's process, for example because its model ends with the run anyway.

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
        """One reply. Callers set at most one of ``schema``, ``choices`` and ``regex``.

        ``schema``: JSON schema that the reply must follow, if the engine supports constraints.
        ``choices``: texts of which the reply must be one, likewise.
        ``regex``: pattern that the reply must match, likewise.
        ``logprobs``: how many candidates per generated token to return with their log-probabilities.

        Raises ContextOverflow, RequestRefused, NoAnswer, ClientDown.
        """


class Progress(Protocol):
    """Reports the progress of long work to the caller. The command line draws it; library code only calls it."""

    def start(self, description: str, total: int | None, unit: str) -> int:
        """Start a task and return its id. ``total``: number of units, None if unknown."""

    def advance(self, task: int, amount: int = 1) -> None:
        """Report that ``amount`` more units are done."""

    def finish(self, task: int) -> None:
        """Report that the task is done."""
