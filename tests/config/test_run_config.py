from __future__ import annotations

from pathlib import Path

import pytest

from evalkit.config.run_config import RunConfig, read_toml
from evalkit.errors import BadConfig, MissingFile


def make(**options: object) -> RunConfig:
    return RunConfig.create(**{"model": "m", "dictionaries": ("d",), **options})


def test_bad_options_are_one_line() -> None:
    with pytest.raises(BadConfig) as caught:
        make(n_positives=1)
    assert str(caught.value) == (
        "n_positives: expected Input should be greater than or equal to 2; seen 1; fix: see `evalkit run --help`"
    )
    with pytest.raises(BadConfig, match="Extra inputs are not permitted"):
        make(typo=1)
    with pytest.raises(BadConfig, match="exceeds context_length 16"):
        make(context_length=16)
    with pytest.raises(BadConfig, match="repeat"):
        make(depths=(16, 16))
    with pytest.raises(BadConfig, match="controls"):
        make(controls=("nothing",))


def test_identity_ignores_what_changes_no_record() -> None:
    base = make().identity()
    assert make(batch_size=3, device="cuda", judges=("llm",), explainers=("default",)).identity() == base
    for change in ({"seed": 1}, {"n_positives": 20}, {"dictionaries": ("e",)}, {"max_tokens": 5}, {"controls": ()}):
        assert make(**change).identity() != base


def test_read_toml(tmp_path: Path) -> None:
    good = tmp_path / "run.toml"
    good.write_text('model = "m"\n')
    assert read_toml(good) == {"model": "m"}
    with pytest.raises(MissingFile, match=r"nothing\.toml: expected a TOML file; seen nothing there"):
        read_toml(tmp_path / "nothing.toml")
    good.write_text("model = \n")
    with pytest.raises(BadConfig, match="line 1"):
        read_toml(good)
