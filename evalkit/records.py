"""The immutable records that all stages share. Data only: no files, no models, no network.

Uses plain Python and numpy, so tables and plots can be made on a machine without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from evalkit.thoughts import answer_after_thought, ends_in_thought

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "BASELINE",
    "CONTROL_KIND",
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

REAL, SHUFFLED = "", "shuffled"  # value of "control": the feature's own explanation, or that of another feature
BASELINE = ("words", "lexical")  # explainer and judge of the control "lexical", which needs no model
CONTROL_KIND = "null-"  # begins the kind of every source that the run itself made as a control, and of no other
NO_EXPLAINER = "none"  # recorded as the explainer of tests that need no explanation

FeatureId: TypeAlias = str  # the decimal index of an SAE latent; "<token id>@<context>.<position>" for an RQAE centre
Span: TypeAlias = tuple[int, int]  # half-open character range of a text
Pool: TypeAlias = Literal["explain", "score"]


@dataclass(frozen=True, slots=True)
class Site:
    """What a dictionary reads: the output of a module of a subject model, such as ``layers.15`` (the residual after it)."""

    model: str
    path: str
    reconstructs: str | None = None  # for transcoders: the path of another module

    @property
    def out(self) -> str:
        """The path of the module whose output a reconstruction is compared with."""
        return self.reconstructs or self.path

    def __str__(self) -> str:
        return f"{self.model}/{self.path}"


@dataclass(frozen=True, slots=True, eq=False)
class SubjectInfo:
    """The properties of the subject model that a feature source may need.

    ``d_model``, ``widths``: the width of the states between blocks, and of those at the sites that were loaded.
    ``norm_gain``: (d_model,), the factor of the final norm: the weight in Llama-type norms, 1 + weight in Gemma-type norms.
    ``norm_eps``: the constant that the final norm adds to the mean square. ``sites``: module paths that can be hooked.
    """

    model: str
    d_model: int
    n_layers: int
    norm_gain: NDArray[np.float32]
    norm_eps: float
    sites: tuple[str, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """The columns that tables print about a feature source. All records use ``name`` as its key."""

    name: str
    kind: str  # "rqae", "sae", …; "null-planted", … of controls
    site: str
    width: int | None = None
    l0: float | None = None
    depth: int | None = None
    declared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class TokenBatch:
    """The tokens of some contexts of the corpus. ``token_ids`` and ``valid``: (batch, pos); ``contexts``: (batch,).

    ``valid``: False on BOS, EOS, padding and the skipped first positions.
    ``contexts``: row numbers in the whole corpus, so that results do not depend on how it is split into batches.
    """

    token_ids: NDArray[np.int64]
    valid: NDArray[np.bool_]
    contexts: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """Every active (token, feature) pair of one source; arrays are (entry,), in corpus order.

    ``tokens``: context x context length + position.
    ``features``: index into the chosen features.
    ``n_tokens``: the number of valid tokens that were searched.
    """

    tokens: NDArray[np.int64]
    features: NDArray[np.int64]
    values: NDArray[np.float32]
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Example:
    """A window of the corpus with one feature's activation on each of its tokens.

    ``window``: its id on the corpus-wide grid.
    ``tokens``: text pieces whose concatenation is the window's text.
    ``activations``: per token, the excess over the feature's threshold θ; 0 where the feature is not active.
    ``decile``: 0–9, its rank by peak among the feature's active windows; None for a negative.
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
    """The input of an explainer: windows of the explain pool only, strongest first.

    ``threshold``: a token is active above it; 0 in a run, because activations in examples are the excess over θ.
    ``peak``: the feature's largest activation in the explain pool.
    ``promoted``: the tokens whose logits the feature's direction raises most, if it is read out directly by the
    unembedding; strongest first, empty if the feature has no direction.
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
    """The windows from which one test is built: three disjoint sets from one pool.

    ``positives`` and ``decoys``: windows where the feature is active; fuzzing puts false marks on decoys.
    ``negatives``: windows verified inactive.
    """

    __test__ = False  # not a pytest class

    positives: tuple[Example, ...]
    decoys: tuple[Example, ...]
    negatives: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class ScoreExamples:
    """The input of a scorer.

    ``test``: windows of the score pool.
    ``calibration``: windows of the explain pool on which the match cut-off is fitted, for judges whose confidence is not a
    probability; disjoint from the windows that the explainer saw, if there are enough.
    ``repeat``: how often the same test was run before; a repeat has the same questions in another order and other batches.
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
    """All examples of one feature: the input of explainers and the input of scorers."""

    explain: ExplainExamples
    score: ScoreExamples


@dataclass(frozen=True, slots=True)
class Explanation:
    """A description of one feature. ``version``: that of the explainer's prompt or rule.

    ``note``: remarks for readers on how the text was made.
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
    """A judge's answer about one item.

    ``match``: the decision; None with a ``reason`` if the judge could not answer. A judge whose confidence is not a
    probability leaves both None: the scorer then decides with a fitted cut-off.
    ``confidence``: orders items; a higher value is a better match.
    ``probability``: P(match), if the judge has one.
    """

    match: bool | None
    confidence: float | None = None
    probability: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Pick:
    """Which text of a group does not belong with the others: its index from 0, or None with a ``reason``."""

    index: int | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Simulation:
    """The predicted activation of every token of a window, in any unit, or None with a ``reason``."""

    values: tuple[float, ...] | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """An answer compared with its item's label; ``reason`` says why it is unscored, if it is.

    ``moments``: only if activations are predicted, in which case ``match`` is None: (n, Σx, Σy, Σx², Σy², Σxy) of the
    predictions x and the activations y of the window's n tokens.
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
        """Whether there is a match decision, or predicted activations."""
        return self.match is not None or self.moments is not None

    @property
    def correct(self) -> bool | None:
        return None if self.match is None else self.match == self.label


@dataclass(frozen=True, slots=True)
class Score:
    """All judgements of one (feature, scorer, explanation, judge). ``cutoff``: the match cut-off, if one was fitted."""

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
    """A client's reply. ``logprobs``: per generated token, {candidate token: natural-log probability}."""

    text: str
    logprobs: Sequence[dict[str, float]] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    model: str = ""

    @property
    def answer(self) -> str:
        """The text after the reasoning of a reasoning model."""
        return answer_after_thought(self.text)

    @property
    def in_thought(self) -> bool:
        """Whether the reply was cut off during the model's reasoning, so that it contains no answer."""
        return ends_in_thought(self.text)
