from __future__ import annotations

from pathlib import Path

import pytest

from evalkit.config.feature_selection import Choice, parse_features
from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig, MissingFile


def test_every_form(tmp_path: Path) -> None:
    assert parse_features("50") == parse_features(50) == Choice(50)
    assert parse_features("ids:3,7-9,3") == Choice(4, ("3", "7", "8", "9"))
    path = tmp_path / "ids.txt"
    path.write_text("12\n 4, 5\n\n6-7\n")
    assert parse_features(f"file:{path}") == Choice(5, ("12", "4", "5", "6", "7"))
    assert parse_features("density:1e-4..1e-2:20") == Choice(20, None, (1e-4, 1e-2))
    assert parse_features("density:0..0.5") == Choice(50, None, (0.0, 0.5))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-3",
        "many",
        "ids:",
        "ids:a",
        "ids:9-3",
        "ids:0-99999999",
        "density:0.5..0.1",
        "density:x..1",
        "density:1e-..2",
    ],
)
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(BadConfig, match="--features: expected "):
        parse_features(text)


def test_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="expected a file of feature ids"):
        parse_features(f"file:{tmp_path / 'none'}")


def test_ids_are_part_of_a_run() -> None:
    base = RunConfig.create(model="m", dictionaries=("d",), n_features=2)
    named = RunConfig.create(model="m", dictionaries=("d",), **parse_features("ids:4,5").fields())
    assert base.identity() != named.identity() and named.identity()["feature_ids"] == ["4", "5"]
    with pytest.raises(BadConfig, match=r"expected as many ids as n_features \(2\); seen 1 ids"):
        RunConfig.create(model="m", dictionaries=("d",), feature_ids=("1",), n_features=2)
