"""What a run is: the options that decide its results, checked where they enter.

Knows names and numbers only; opens no file but the TOML it is asked to read. What changes speed but never results
(batch size, device, progress) is not part of a run's identity.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evalkit.config.presets import find_preset
from evalkit.errors import BadConfig, MissingFile

__all__ = ["CONTROLS", "NULL_SOURCES", "PROTOCOL_VERSION", "DictionarySpec", "RunConfig", "read_toml"]

PROTOCOL_VERSION = "2"  # raised whenever the same configuration would give other numbers
Control: TypeAlias = Literal["shuffled", "random-directions", "random-codes", "planted", "permuted", "lexical"]
CONTROLS: tuple[Control, ...] = ("shuffled", "random-directions", "random-codes", "planted", "permuted", "lexical")
NULL_SOURCES: tuple[Control, ...] = (
    "random-directions",
    "random-codes",
    "planted",
    "permuted",
)  # dictionaries of their own

_FREE = {
    *("explainers", "judges", "scorers", "repeats", "client", "client_options", "batch_size", "device"),
    *("cache", "prices", "max_calls", "max_cost", "force"),
}

Count = Annotated[int, Field(ge=1)]
Way: TypeAlias = Literal["deciles", "top", "random", "importance", "mixed"]  # see ``sampling.order_by``


class DictionarySpec(BaseModel):
    """A dictionary with options of its own, which win over the run's. Each format takes of them what it knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    site: str | None = None
    format: str | None = None
    transform: str | None = None
    name: str | None = None
    depths: tuple[Count, ...] | None = None
    density: Annotated[float, Field(gt=0, lt=1)] | None = None
    revision: str | None = None
    l0: float | None = None
    model: str | None = None
    out: str | None = None  # what a transcoder reconstructs
    norm: Annotated[float, Field(gt=0)] | None = None  # mean norm that a SAELens dictionary was trained with
    centre: bool | None = None
    folder: str | None = None  # of a SAELens release
    tensor: str | None = None  # of a file of directions
    bias: str | None = None
    signed: bool | None = None


class RunConfig(BaseModel):
    """One run. Counts are per feature and per pool unless said; lengths are in tokens.

    ``model`` is the subject model, which dumps with ready examples do without.
    ``dictionaries`` are paths, hub ids or ``bundled:NAME`` patterns, with options of their own where they need some
    (``DictionarySpec``); ``judges``, ``explainers``, ``scorers`` and
    ``client`` are registered names, with options where they take some (``llm:single``, ``openai:MODEL``). ``repeats``: how
    often judges that ask a model are asked. What records are keyed by (explainers, judges, scorers, repeats), what is spent
    (cache, prices, max_calls, max_cost in US dollars) and what changes speed only (batch_size, device) is not part of a
    run's identity: it may differ from one command to the next.
    ``feature_ids`` and ``density_band`` choose the features (see ``feature_choice``); ``transform`` replaces the input
    transform that dictionaries declare; ``force`` goes on where the fit check refuses one. ``preset`` sets what is not
    given as another harness does, and how tables count (``presets``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    dictionaries: tuple[str | DictionarySpec, ...] = Field(min_length=1)
    corpus: str = "bundled:demo"
    revision: str | None = None
    text_field: str = "text"
    split: str = "train"
    site: str | None = None
    format: str | None = None
    transform: str | None = None
    depths: tuple[Count, ...] = (16, 64, 256)
    density: Annotated[float, Field(gt=0, lt=1)] = 0.01

    max_tokens: Count | None = None
    context_length: Annotated[int, Field(ge=8)] = 128
    window_length: Annotated[int, Field(ge=4)] = 32
    skip_first: Annotated[int, Field(ge=0)] = 1
    calibration_contexts: Annotated[int, Field(ge=8)] = 256
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    n_features: Count = 50
    feature_ids: tuple[str, ...] | None = None
    density_band: tuple[float, float] | None = None
    n_explain: Count = 40
    explain_by: Way = "deciles"
    n_positives: Annotated[int, Field(ge=2)] = 50
    positives_by: Way = "deciles"
    n_negatives: Annotated[int, Field(ge=2)] = 50
    explainers: tuple[str, ...] = ("words",)
    judges: tuple[str, ...] = ("embedding",)
    scorers: tuple[str, ...] = ("detection", "fuzzing")
    repeats: Count = 1
    client: str | None = None
    client_options: dict[str, Any] = Field(default_factory=dict)
    cache: Path | None = None
    prices: Path | None = None
    max_calls: Annotated[int, Field(ge=0)] | None = None
    max_cost: Annotated[float, Field(ge=0)] | None = None
    controls: tuple[Control, ...] = CONTROLS
    embedding_model: str | None = None
    seed: int = 0
    preset: str | None = None

    batch_size: Count = 16
    device: str = "auto"
    force: bool = False

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """What a preset sets, where it is not given."""
        if isinstance(given, dict) and (preset := find_preset(given.get("preset"))) is not None:
            return {**preset.options, **given}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.window_length + self.skip_first > self.context_length:
            raise ValueError(
                f"window_length {self.window_length} + skip_first {self.skip_first} exceeds "
                f"context_length {self.context_length}"
            )
        if self.feature_ids is not None and len(self.feature_ids) != self.n_features:
            raise ValueError(f"{len(self.feature_ids)} feature_ids and n_features {self.n_features}")
        if len(set(self.depths)) != len(self.depths):
            raise ValueError(f"depths {self.depths} repeat")
        return self

    @classmethod
    def create(cls, **options: Any) -> RunConfig:
        """A checked configuration. Raises BadConfig with the option, what was expected and what was seen."""
        try:
            return cls(**options)
        except ValidationError as error:
            first = error.errors()[0]
            option = ".".join(str(part) for part in first["loc"] if part not in ("str", "DictionarySpec")) or "options"
            raise BadConfig(
                option,
                expected=first["msg"].removeprefix("Value error, "),
                seen=repr(first.get("input"))[:80] if first["loc"] else "this combination",
                fix="see `evalkit run --help`",
            ) from error

    def subject(self) -> str:
        """The subject model, where one is needed. Raises BadConfig."""
        if not self.model:
            raise BadConfig(
                "model",
                expected="the language model that the dictionaries were trained on",
                seen="none",
                fix="name it: --model with a hub id, a folder or a .gguf file",
            )
        return self.model

    def specs(self) -> tuple[DictionarySpec, ...]:
        """Every dictionary with its options, the run's where it has none of its own."""
        common = ("site", "format", "transform", "depths", "density", "revision")
        found = []
        for one in self.dictionaries:
            own = {"path": one} if isinstance(one, str) else one.model_dump(exclude_none=True)
            run = {name: value for name in common if (value := getattr(self, name)) is not None}
            found.append(DictionarySpec(**{**run, **own}))
        return tuple(found)

    def counts(self) -> dict[str, Any]:
        """How many windows a feature gets, and which: the fields of ``sampling.Counts``."""
        return {
            "explain": self.n_explain,
            "positives": self.n_positives,
            "negatives": self.n_negatives,
            "explain_by": self.explain_by,
            "positives_by": self.positives_by,
        }

    def identity(self) -> dict[str, Any]:
        """The part that decides results, as JSON types."""
        return {
            "protocol": PROTOCOL_VERSION,
            **self.model_dump(mode="json", exclude=_FREE),
        }


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file. Raises MissingFile, or BadConfig with the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFile(str(path), expected="a TOML file", seen="nothing there", fix="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(str(path), expected="valid TOML", seen=str(error), fix="correct that line") from error
