"""The frozen records that every stage shares.

Knows only the shapes of things: no disk, no model, no network. Plain Python and numpy, so that
tables and plots can be read on a machine without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from evalkit.thoughts import answer_after_thought, ends_in_thought

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "BASELINE",
    "CONTROL_MARK",
    "NO_EXPLAINER",
    "REAL",
    "SHUFFLED",
    "Activations",
    "Answer",
    "Example",
    "ExplainExamples",
    "Explanation",
    "FeatureExamples",
    "FeatureId",
    "JudgeItem",
    "Judgement",
    "Message",
    "Pick",
    "Pool",
    "Response",
    "Score",
    "ScoreExamples",
    "Simulation",
    "Site",
    "SourceInfo",
    "Span",
    "SubjectInfo",
    "TestExamples",
    "TokenBatch",
]

REAL, SHUFFLED = "", "shuffled"  # the control of a test: with the feature's own explanation, or with another feature's
BASELINE = ("words", "lexical")  # explainer and judge of the control "lexical", which needs no model at all
CONTROL_MARK = "/null-"  # in the name of a dictionary that is a control
NO_EXPLAINER = "none"  # the explainer of tests that need no explanation

FeatureId: TypeAlias = str  # the decimal index of an SAE latent; "<token id>@<context>.<position>" for an RQAE centre
Span: TypeAlias = tuple[int, int]  # half-open character range of a text
Pool: TypeAlias = Literal["explain", "score"]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a dictionary reads: a module path of a subject model, such as ``layers.15`` (the residual after it)."""

    model: str
    path: str
    reconstructs: str | None = None  # another module path, for transcoders

    @property
    def out(self) -> str:
        """The module path that a reconstruction is compared with."""
        return self.reconstructs or self.path

    def __str__(self) -> str:
        return f"{self.model}/{self.path}"


@dataclass(frozen=True, slots=True, eq=False)
class SubjectInfo:
    """What a feature source may need of the subject model.

    ``norm_gain`` (d_model,) is the factor the final norm multiplies by: the weight for Llama-type norms, 1 + weight for
    Gemma-type ones. ``norm_eps`` is added to the mean square. ``sites`` are the module paths that can be hooked.
    """

    model: str
    d_model: int
    n_layers: int
    norm_gain: NDArray[np.float32]
    norm_eps: float
    sites: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """The columns a table prints about a feature source. ``name`` is the key everywhere."""

    name: str
    kind: str  # "rqae", "sae", "null-planted", …
    site: str
    width: int | None = None
    l0: float | None = None
    depth: int | None = None
    declared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """The tokens of some contexts of the corpus. ``token_ids`` and ``valid``: (batch, pos); ``contexts``: (batch,).

    ``valid`` is False on BOS, EOS, padding and the skipped first positions. ``contexts`` are corpus-wide row numbers, so
    what is computed from them does not depend on how the corpus is cut into batches.
    """

    token_ids: NDArray[np.int64]
    valid: NDArray[np.bool_]
    contexts: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """Every active (token, feature) of one source; arrays are (entry,), in corpus order.

    ``tokens``: context x context length + position; ``features``: index into the chosen features; ``n_tokens`` counts
    the unmasked tokens they were found among.
    """

    tokens: NDArray[np.int64]
    features: NDArray[np.int64]
    values: NDArray[np.float32]
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Example:
    """A window of the corpus with one feature's activation on each of its tokens.

    Activations in examples are the excess over the feature's threshold θ, and 0 where it is not active.

    ``tokens`` are text pieces whose concatenation is the window's text. ``window`` is its id on the corpus-wide grid.
    ``decile`` (0–9) is its rank by peak among the feature's active windows, None for a negative.
    """

    window: int
    document: int
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    decile: int | None = None

    @property
    def text(self) -> str:
        return "".join(self.tokens)

    @property
    def peak(self) -> float:
        return max(self.activations)


@dataclass(frozen=True, slots=True)
class ExplainExamples:
    """What an explainer sees: windows of the explain pool only, strongest first.

    ``threshold`` is where activity begins in the units of the examples (0 for examples of a run, which hold the excess over
    θ); ``peak`` is the feature's largest activation in the explain pool. ``promoted`` are the tokens whose logits the
    feature raises most if its direction goes straight to the output, strongest first; empty where there is no direction.
    """

    source: str
    feature: FeatureId
    threshold: float
    peak: float
    positives: tuple[Example, ...]
    negatives: tuple[Example, ...] = ()
    promoted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TestExamples:
    """The windows one test is built from: three disjoint sets of one pool.

    ``positives`` and ``decoys`` are windows where the feature is active (decoys are what fuzzing marks wrongly);
    ``negatives`` are verified inactive.
    """

    __test__ = False  # not a pytest class

    positives: tuple[Example, ...]
    decoys: tuple[Example, ...]
    negatives: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class ScoreExamples:
    """What a scorer builds its test from.

    ``test`` comes from the score pool. ``calibration`` comes from the explain pool, disjoint from what the explainer saw
    where there is enough: judges whose confidence is no probability get their match cut-off fitted on it. ``repeat``
    counts how often the same test was held before: questions are the same each time, their order and batches are not.
    """

    source: str
    feature: FeatureId
    threshold: float
    seed: int
    test: TestExamples
    calibration: TestExamples
    repeat: int = 0


@dataclass(frozen=True, slots=True)
class FeatureExamples:
    """All examples of one feature: what an explainer sees, and what its test is built from."""

    explain: ExplainExamples
    score: ScoreExamples


@dataclass(frozen=True, slots=True)
class Explanation:
    """A description of one feature.

    ``version`` is that of the explainer's prompt or rule; ``note`` says what a reader should know of how it came about.
    """

    source: str
    feature: FeatureId
    explainer: str
    version: str
    text: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class JudgeItem:
    """One question for a judge: does the explanation match this text (and, if given, exactly the marked spans)?"""

    text: str
    marks: tuple[Span, ...] | None = None

    def __post_init__(self) -> None:
        if self.marks is not None:
            object.__setattr__(self, "marks", tuple((int(a), int(b)) for a, b in self.marks))


@dataclass(frozen=True, slots=True)
class Answer:
    """A judge's answer. ``match`` is None with a ``reason`` when it could not be given.

    ``confidence`` orders items (higher: matches more); ``probability`` is P(match) where the judge has one. A judge whose
    confidence is no probability leaves ``match`` None and ``reason`` None: the scorer fits its cut-off.
    """

    match: bool | None
    confidence: float | None = None
    probability: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Pick:
    """Which text of a group does not belong with the others: its place, or None with a ``reason``."""

    index: int | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Simulation:
    """The predicted activation of every token of a window, in any unit, or None with a ``reason``."""

    values: tuple[float, ...] | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """An answer held against its item's label. ``correct`` is None when unscored, and ``reason`` says why.

    Where activations are predicted there is nothing to match: ``moments`` are then (n, Σx, Σy, Σx², Σy², Σxy) of the
    predictions x and the activations y of a window's n tokens.
    """

    item: int
    window: int
    label: bool
    match: bool | None
    confidence: float | None
    probability: float | None
    decile: int | None = None
    reason: str | None = None
    moments: tuple[float, ...] | None = None

    @property
    def scored(self) -> bool:
        """Whether there is something to score."""
        return self.match is not None or self.moments is not None

    @property
    def correct(self) -> bool | None:
        return None if self.match is None else self.match == self.label


@dataclass(frozen=True, slots=True)
class Score:
    """All judgements of one (feature, scorer, explanation, judge). ``cutoff`` is the fitted match cut-off, if one was."""

    source: str
    feature: FeatureId
    scorer: str
    version: str
    judgements: tuple[Judgement, ...]
    cutoff: float | None = None

    @property
    def n_unscored(self) -> int:
        return sum(not judgement.scored for judgement in self.judgements)


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Response:
    """A client's reply. ``logprobs``: per generated token, {candidate token: natural log of its probability}."""

    text: str
    logprobs: Sequence[dict[str, float]] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    model: str = ""

    @property
    def answer(self) -> str:
        """The text without what a reasoning model thought aloud before it."""
        return answer_after_thought(self.text)

    @property
    def in_thought(self) -> bool:
        """Whether the reply ends before its thought does, so that what stands in it is no answer yet."""
        return ends_in_thought(self.text)
