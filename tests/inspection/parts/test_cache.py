"""What is kept comes back for the same arguments and only for these."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from evalkit.errors import BadFile, RunMismatch
from evalkit.inspection.parts.cache import Part, bind, digest, load_part, save_part

ARGUMENTS = {"of": {"model": "toy", "tokens": 100}, "depths": (1, 2)}


def test_a_part_comes_back_for_its_arguments_only(tmp_path: Path) -> None:
    part = Part("ranks", ARGUMENTS, [{"depth": 1, "mean": math.nan}], {"values": [[0.5, math.inf]]}, ["a note"], 1.5)
    written = save_part(tmp_path, part)
    again = load_part(tmp_path, "ranks", ARGUMENTS)
    assert again is not None
    for one in (written, again):
        assert one.rows == [{"depth": 1, "mean": None}] and one.further == {"values": [[0.5, None]]}
        assert (one.notes, one.seconds) == (["a note"], 1.5)
    assert load_part(tmp_path, "ranks", {**ARGUMENTS, "depths": (1, 3)}) is None
    assert load_part(tmp_path, "fit", ARGUMENTS) is None


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"name": "ranks"}', '{"name": 1, "more": 2}', "\x00"])
def test_a_damaged_part_is_not_there(damage: str, tmp_path: Path) -> None:
    (tmp_path / "ranks.json").write_text(damage)
    assert load_part(tmp_path, "ranks", ARGUMENTS) is None


def test_a_folder_holds_the_codes_of_one_text(tmp_path: Path) -> None:
    bind(tmp_path, {"model": "a", "max_tokens": 100})
    (tmp_path / "corpus").mkdir()
    (tmp_path / "norm_limit.json").write_text("3")
    bind(tmp_path, {"model": "b", "max_tokens": 100})  # nothing was encoded yet
    assert not (tmp_path / "corpus").exists() and not (tmp_path / "norm_limit.json").exists()
    (tmp_path / "codes").mkdir()
    bind(tmp_path, {"model": "b", "max_tokens": 100})
    with pytest.raises(RunMismatch) as caught:
        bind(tmp_path, {"model": "b", "max_tokens": 200})
    assert str(caught.value) == (
        f"{tmp_path}: expected an inspection with max_tokens = 200; seen max_tokens = 100; "
        "fix: use another --out, or delete the folder to start over"
    )
    assert json.loads((tmp_path / "inspect.json").read_text()) == {"model": "b", "max_tokens": 100}
    (tmp_path / "inspect.json").write_text("nothing")
    with pytest.raises(BadFile, match=r"inspect\.json: expected a JSON object that identifies an inspection"):
        bind(tmp_path, {"model": "b", "max_tokens": 100})


def test_weights_are_named_by_their_values() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    name = digest([weight, None])
    assert name == digest([weight.T.contiguous().T, None]) == digest([weight.clone()])
    assert len({name, digest([weight.T]), digest([weight + 1e-6]), digest([weight.reshape(4, 3)])}) == 4
    assert digest([weight.bfloat16()]) == digest([weight.bfloat16().float()])
