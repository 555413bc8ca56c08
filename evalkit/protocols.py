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

    One that asks the client says so with ``uses_client = True``: its records then carry the client's name. One that reads
    what the run's dictionaries themselves know says ``uses_sources = True``: it is made with ``sources=``, a function that
    opens these. Two more are optional: ``async prepare(sources)`` is called before the first feature, with the names of all
    sources; ``explains(source)`` says whether it has anything to say about the features of one, and if not is not asked.
    """

    name: str
    version: str

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None) -> Explanation:
        """Describe the feature. ``client`` is None unless the run names one."""


class Judge(Protocol):
    """Says whether an explanation matches a window, never knowing the label.

    ``probabilistic``: whether its answers carry their own match decision; if False, scorers fit the cut-off on
    confidences. A judge that asks a client says so with ``uses_client = True``, as explainers do. One that can prepare in
    bulk has ``async prepare(items, explanations=(), progress=None)``; a scorer that can list its questions beforehand has
    ``items(examples)``.
    """

    name: str
    version: str
    probabilistic: bool

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        """As many answers as items, always, in their order."""


class PickingJudge(Protocol):
    """A judge that can say which of some texts does not belong with the others; no explanation is shown."""

    async def pick(self, groups: Sequence[Sequence[JudgeItem]]) -> Sequence[Pick]:
        """As many picks as groups, always, in their order."""


class SimulatingJudge(Protocol):
    """A judge that can predict from an explanation how active the feature is on every token of a window."""

    async def simulate(self, explanation: str, windows: Sequence[Sequence[str]]) -> Sequence[Simulation]:
        """As many simulations as windows, always, in their order. A window is its tokens as text."""


class Scorer(Protocol):
    """Builds the test (windows, marks, labels), asks a judge, holds the answers against the labels.

    ``asks`` names the method that it needs of a judge: "judge" where it says nothing, "pick" or "simulate" (see
    ``PickingJudge``, ``SimulatingJudge``); judges of a run without it are not asked. A scorer that goes with one judge only
    names that with ``own_judge``, as ``--judge`` would. One that tests features without any explanation says
    ``needs_explanation = False``: it is then run once a feature, with an empty one.
    """

    name: str
    version: str

    async def score(self, explanation: Explanation, examples: ScoreExamples, judge: Judge) -> Score:
        """The judgements of one feature under one explanation."""


class Client(Protocol):
    """A language model that answers chat messages.

    ``name`` is the model's, with every option that changes its answers: recordings and records are keyed by it. Where
    ``--client NAME:VALUE`` puts VALUE, a class says with ``main_option`` (default "model"). Making one must be cheap and
    reach nobody: an engine starts with the first request. One that holds connections or an engine has ``async close()``.
    Retries and limits on requests in flight are the client's own affair; recording and budgets are not.

    A run makes it in a process of its own, which lives on for the answers that are under way when the run is killed. An
    optional ``finish()`` tells it then to wait for these, and to send nothing more or again. One whose model would only
    hold that up, as it dies with the run, says ``in_process = True``.

    Two more are optional. ``concurrency``: how many requests it takes at a time; the others wait in the run, where Ctrl-C
    and a budget can still drop them. ``batched = True`` says that it hands requests in many at a time and is answered hours
    later, at the price of batches; it has ``window``, the time within which a batch is answered, and ``keep_in(path,
    record)``, called before the first request: it keeps at ``path`` what it handed in, and hands every answer to
    ``record``, also those that came for a command which is gone. Ctrl-C leaves it without waiting, the next command
    fetches the answers.
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
