"""The options of a run and their validation.

Their defaults are in ``defaults``. Knows names and numbers only. Reads the file given to ``read_toml``; writes nothing.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evalkit.config import defaults
from evalkit.config.option_errors import bad_option
from evalkit.config.presets import find_preset
from evalkit.errors import BadConfig, MissingFile

__all__ = ["CONTROLS", "NULL_SOURCES", "PROTOCOL_VERSION", "DictionarySpec", "RunConfig", "read_toml"]

PROTOCOL_VERSION = "2"  # increase it whenever a change makes the same configuration give different numbers
Control: TypeAlias = Literal["shuffled", "random-directions", "random-codes", "planted", "permuted", "lexical"]
CONTROLS: tuple[Control, ...] = defaults.CONTROLS
# The controls that are added to the run as separate dictionaries.
NULL_SOURCES: tuple[Control, ...] = ("random-directions", "random-codes", "planted", "permuted")

# Options that are not part of a run's identity: records are already keyed by some of them, the others only limit spending
# or change the speed.
_OUTSIDE_IDENTITY = {
    *("explainers", "judges", "scorers", "repeats", "client", "client_options", "batch_size", "device"),
    *("cache", "prices", "max_calls", "max_cost", "force"),
}

Count = Annotated[int, Field(ge=1)]
Way: TypeAlias = Literal["deciles", "top", "random", "importance", "mixed"]  # defined in ``sampling.order_by``


class DictionarySpec(BaseModel):
    """A dictionary with its own options, which override the run's. Each format uses the options it supports."""

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
    out: str | None = None  # site that a transcoder reconstructs
    # the mean norm of the states that a SAELens dictionary was trained on
    norm: Annotated[float, Field(gt=0)] | None = None
    centre: bool | None = None
    folder: str | None = None  # folder of the dictionary within a SAELens release
    tensor: str | None = None  # tensor to read from a file of directions
    bias: str | None = None
    signed: bool | None = None


class RunConfig(BaseModel):
    """The options of one run. Counts are per feature and per pool unless noted; lengths are in tokens.

    ``model``: the subject model; not needed for dumps with ready examples.
    ``dictionaries``: paths, hub ids, ``bundled:NAME`` patterns, or a ``DictionarySpec`` for one with its own options.
    ``transform``: replaces the input transform that the dictionaries declare.
    ``prepend_bos``: whether contexts begin with BOS; None: as the dictionaries declare, else as the tokenizer does.
    ``n_features``, ``feature_ids``, ``density_band``: which features are scored (see ``feature_selection``).
    ``explainers``, ``judges``, ``scorers``, ``client``: registered names, with their options if any (``llm:single``).
    ``repeats``: how many times a judge that uses a language model judges each test.
    ``max_calls``, ``max_cost``: limits on the number of requests and on their cost in US dollars.
    ``preset``: a published protocol that sets the options not given here and the metrics of the table (see ``presets``).
    ``force``: continue with dictionaries that fail the fit check; their results are marked.

    Commands on the same run folder may differ in the options listed in ``_OUTSIDE_IDENTITY``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    dictionaries: tuple[str | DictionarySpec, ...] = Field(min_length=1)
    corpus: str = defaults.CORPUS
    revision: str | None = None
    text_field: str = defaults.TEXT_FIELD
    split: str = defaults.SPLIT
    site: str | None = None
    format: str | None = None
    transform: str | None = None
    depths: tuple[Count, ...] = defaults.DEPTHS
    density: Annotated[float, Field(gt=0, lt=1)] = defaults.DENSITY

    max_tokens: Count | None = None
    context_length: Annotated[int, Field(ge=8)] = defaults.CONTEXT_LENGTH
    window_length: Annotated[int, Field(ge=4)] = defaults.WINDOW_LENGTH
    prepend_bos: bool | None = None
    skip_first: Annotated[int, Field(ge=0)] = 1
    calibration_contexts: Annotated[int, Field(ge=8)] = 256
    dtype: Literal["float32", "bfloat16"] = defaults.DTYPE

    n_features: Count = defaults.N_FEATURES
    feature_ids: tuple[str, ...] | None = None
    density_band: tuple[float, float] | None = None
    n_explain: Count = defaults.N_EXPLAIN
    explain_by: Way = defaults.EXPLAIN_BY
    n_positives: Annotated[int, Field(ge=2)] = defaults.N_POSITIVES
    positives_by: Way = defaults.POSITIVES_BY
    n_negatives: Annotated[int, Field(ge=2)] = defaults.N_NEGATIVES
    explainers: tuple[str, ...] = ("words",)
    judges: tuple[str, ...] = ("embedding",)
    scorers: tuple[str, ...] = ("detection", "fuzzing")
    repeats: Count = defaults.REPEATS
    client: str | None = None
    client_options: dict[str, Any] = Field(default_factory=dict)
    cache: Path | None = None
    prices: Path | None = None
    max_calls: Annotated[int, Field(ge=0)] | None = None
    max_cost: Annotated[float, Field(ge=0)] | None = None
    controls: tuple[Control, ...] = CONTROLS
    embedding_model: str | None = None
    seed: int = defaults.SEED
    preset: str | None = None

    batch_size: Count = defaults.BATCH_SIZE
    device: str = defaults.DEVICE
    force: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        """The given options, with the preset's values for options that are not given."""
        if isinstance(given, dict) and (preset := find_preset(given.get("preset"))) is not None:
            return {**preset.options, **given}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.window_length + self.skip_first > self.context_length:
            raise BadConfig(
                "window_length",
                expected=f"windows that fit into a context of {self.context_length} tokens",
                seen=f"window_length {self.window_length} + skip_first {self.skip_first}",
                fix="use shorter windows or a longer --context-length",
            )
        if self.feature_ids is not None and len(self.feature_ids) != self.n_features:
            raise BadConfig(
                "feature_ids",
                expected=f"as many ids as n_features ({self.n_features})",
                seen=f"{len(self.feature_ids)} ids",
                fix="set n_features to the number of ids",
            )
        if len(set(self.depths)) != len(self.depths):
            raise BadConfig(
                "depths", expected="each depth once", seen=f"{self.depths}", fix="remove the repeated depths"
            )
        return self

    @classmethod
    def create(cls, **options: Any) -> RunConfig:
        """A validated configuration. Raises BadConfig, naming the option, if a value is invalid."""
        try:
            return cls(**options)
        except ValidationError as error:
            raise bad_option(error, cls.model_fields, DictionarySpec.model_fields) from error

    def subject(self) -> str:
        """The subject model. Raises BadConfig if none is configured."""
        if not self.model:
            raise BadConfig(
                "model",
                expected="the language model that the dictionaries were trained on",
                seen="none",
                fix="add --model with a hub id, a folder or a .gguf file",
            )
        return self.model

    def specs(self) -> tuple[DictionarySpec, ...]:
        """Every dictionary with its options: its own where given, otherwise the run's."""
        shared = ("site", "format", "transform", "depths", "density", "revision")
        inherited = {name: value for name in shared if (value := getattr(self, name)) is not None}
        own_options = [
            {"path": dictionary} if isinstance(dictionary, str) else dictionary.model_dump(exclude_none=True)
            for dictionary in self.dictionaries
        ]
        return tuple(DictionarySpec(**{**inherited, **own}) for own in own_options)

    def counts(self) -> dict[str, Any]:
        """The fields of ``sampling.Counts``: how many windows each feature gets and how they are drawn."""
        return {
            "explain": self.n_explain,
            "positives": self.n_positives,
            "negatives": self.n_negatives,
            "explain_by": self.explain_by,
            "positives_by": self.positives_by,
        }

    def control_dictionaries(self, *, has_rqae: bool) -> list[Control]:
        """The controls of this run that are dictionaries of their own. "random-codes" needs an RQAE among the others."""
        return [name for name in self.controls if name in NULL_SOURCES and (has_rqae or name != "random-codes")]

    def identity(self) -> dict[str, Any]:
        """The options that decide the results, as JSON types. A run folder accepts only runs with the same identity."""
        return {
            "protocol": PROTOCOL_VERSION,
            **self.model_dump(mode="json", exclude=_OUTSIDE_IDENTITY),
        }


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file. Raises MissingFile if it does not exist, and BadConfig, naming the line, if it is invalid."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFile(str(path), expected="a TOML file", seen="no such file", fix="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(str(path), expected="valid TOML", seen=str(error), fix="correct that line") from error
