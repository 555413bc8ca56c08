from __future__ import annotations

import re
from pathlib import Path

import pytest

from evalkit.config.run_config import RunConfig, read_toml
from evalkit.errors import BadConfig, MissingFile


def make(**options: object) -> RunConfig:
    return RunConfig.create(**{"model": "m", "dictionaries": ("d",), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_positives": 1}, "n_positives: expected a number of at least 2; seen 1; fix: see `evalkit run --help`"),
        ({"density": 0}, "density: expected a number above 0; seen 0; fix: see `evalkit run --help`"),
        ({"density": 1.5}, "density: expected a number below 1; seen 1.5; fix: see `evalkit run --help`"),
        ({"density": "much"}, "density: expected a number; seen 'much'; fix: see `evalkit run --help`"),
        ({"max_cost": [1]}, "max_cost: expected a number; seen [1]; fix: see `evalkit run --help`"),
        ({"seed": "x"}, "seed: expected a whole number; seen 'x'; fix: see `evalkit run --help`"),
        ({"seed": 1.5}, "seed: expected a whole number; seen 1.5; fix: see `evalkit run --help`"),
        ({"seed": None}, "seed: expected a whole number; seen None; fix: see `evalkit run --help`"),
        ({"force": "maybe"}, "force: expected true or false; seen 'maybe'; fix: see `evalkit run --help`"),
        ({"force": None}, "force: expected true or false; seen None; fix: see `evalkit run --help`"),
        ({"corpus": 5}, "corpus: expected text; seen 5; fix: see `evalkit run --help`"),
        ({"cache": 5}, "cache: expected a path; seen 5; fix: see `evalkit run --help`"),
        ({"scorers": "fuzzing"}, "scorers: expected a list; seen 'fuzzing'; fix: see `evalkit run --help`"),
        ({"scorers": (5,)}, "scorers.0: expected text; seen 5; fix: see `evalkit run --help`"),
        ({"client_options": 5}, "client_options: expected a table of options; seen 5; fix: see `evalkit run --help`"),
        (
            {"dictionaries": ()},
            "dictionaries: expected a list of 1 or more entries; seen (); fix: see `evalkit run --help`",
        ),
        (
            {"dictionaries": (5,)},
            "dictionaries.0: expected a path, or a table with path and options; seen 5; fix: see `evalkit run --help`",
        ),
        (
            {"dictionaries": ({"path": "d", "depths": (0,)},)},
            "dictionaries.0.depths.0: expected a number of at least 1; seen 0; fix: see `evalkit run --help`",
        ),
        (
            {"dictionaries": ({"site": "layers.1"},)},
            "dictionaries.0.path: expected a value; seen none; fix: see `evalkit run --help`",
        ),
        (
            {"dictionaries": ({"path": "d", "sight": "layers.1"},)},
            "dictionaries.0.sight: expected the name of an existing option; seen 'sight'; fix: did you mean 'site'?",
        ),
        (
            {"dtype": "int8"},
            "dtype: expected one of float32, bfloat16; seen 'int8'; fix: see `evalkit run --help`",
        ),
        (
            {"controls": ("nothing",)},
            "controls.0: expected one of shuffled, random-directions, random-codes, planted, permuted, lexical; "
            "seen 'nothing'; fix: see `evalkit run --help`",
        ),
        (
            {"n_positive": 9},
            "n_positive: expected the name of an existing option; seen 'n_positive'; fix: did you mean 'n_positives'?",
        ),
        ({"qqq": 1}, "qqq: expected the name of an existing option; seen 'qqq'; fix: remove it"),
        (
            {"density_band": (0.1,)},
            "density_band.1: expected a value; seen none; fix: see `evalkit run --help`",
        ),
        (
            {"density_band": (0.1, 0.2, 0.3)},
            "density_band: expected a list of at most 2 entries; seen (0.1, 0.2, 0.3); fix: see `evalkit run --help`",
        ),
        (
            {"context_length": 16},
            "window_length: expected windows that fit into a context of 16 tokens; seen window_length 32 + skip_first 1; "
            "fix: use shorter windows or a longer --context-length",
        ),
        (
            {"feature_ids": ("1",)},
            "feature_ids: expected as many ids as n_features (50); seen 1 ids; fix: set n_features to the number of ids",
        ),
        ({"depths": (16, 16)}, "depths: expected each depth once; seen (16, 16); fix: remove the repeated depths"),
    ],
)
def test_bad_options_are_one_line_in_our_words(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadConfig) as caught:
        make(**options)
    assert str(caught.value) == message


def test_no_kind_of_field_shows_the_words_of_a_library() -> None:
    """Whatever is given for whichever option, the message is one of ours."""
    hostile = (None, 5, -1, 1.5, "x", "", (), (None,), {}, {"a": 1}, [[]], float("nan"), object(), True, b"x", 10**400)
    for option in RunConfig.model_fields:
        for value in hostile:
            try:
                make(**{option: value})
            except BadConfig as error:
                assert not re.search(r"[Ii]nput|valid value|permitted|pydantic|Value error", error.expected), error


def test_identity_ignores_what_changes_no_record() -> None:
    base = make().identity()
    assert make(batch_size=3, device="cuda", judges=("llm",), explainers=("default",)).identity() == base
    for change in (
        {"seed": 1},
        {"n_positives": 20},
        {"dictionaries": ("e",)},
        {"max_tokens": 5},
        {"prepend_bos": True},
    ):
        assert make(**change).identity() != base


def test_read_toml(tmp_path: Path) -> None:
    good = tmp_path / "run.toml"
    good.write_text('model = "m"\n')
    assert read_toml(good) == {"model": "m"}
    with pytest.raises(MissingFile, match=r"nothing\.toml: expected a TOML file; seen no such file"):
        read_toml(tmp_path / "nothing.toml")
    good.write_text("model = \n")
    with pytest.raises(BadConfig, match="line 1"):
        read_toml(good)
