"""Options are checked where they enter."""

from __future__ import annotations

import pytest

from evalkit.errors import BadConfig
from evalkit.inspection.parts.settings import PARTS, Settings, parse_depths, parse_parts


def test_depths_are_the_usual_ones_up_to_the_quantizers() -> None:
    assert Settings("x").depths_of(256) == (1, 2, 3, 4, 8, 16, 64, 256)
    assert Settings("x").depths_of(1024) == (1, 2, 3, 4, 8, 16, 64, 256, 1024)
    assert Settings("x").depths_of(20) == (1, 2, 3, 4, 8, 16, 20)
    assert Settings("x", depths=(64, 2, 64)).depths_of(64) == (2, 64)
    with pytest.raises(
        BadConfig, match="depths: expected depths from 1 to 20, the number of quantizers of the RQAE; seen 16, 64"
    ):
        Settings("x", depths=(16, 64)).depths_of(20)


def test_depths_as_text() -> None:
    assert parse_depths(None) is None
    assert parse_depths("16, 64,256,") == (16, 64, 256)
    with pytest.raises(BadConfig, match="depths: expected whole numbers separated by commas; seen '16;64'"):
        parse_depths("16;64")


def test_parts_by_name() -> None:
    assert parse_parts((), has_sae=False) == PARTS[:-1]
    assert parse_parts((), has_sae=True) == PARTS
    assert parse_parts(("ranks,layers", "prefixes"), has_sae=False) == ("prefixes", "layers", "ranks")
    with pytest.raises(
        BadConfig, match="--only: expected some of prefixes, cosines, layers, fit, ranks, sae; seen 'loss'"
    ):
        parse_parts(("loss",), has_sae=True)
    with pytest.raises(BadConfig, match="--only sae: expected an SAE to compare with; seen none"):
        parse_parts(("sae",), has_sae=False)


@pytest.mark.parametrize("name", ["max_tokens", "fit_tokens", "features", "pairs", "top", "examples"])
def test_counts_are_positive(name: str) -> None:
    with pytest.raises(BadConfig, match=f"{name}: expected at least 1; seen 0"):
        Settings("x", **{name: 0})  # type: ignore[arg-type]


def test_dtypes_are_two() -> None:
    with pytest.raises(BadConfig, match="dtype: expected bfloat16 or float32; seen 'int8'"):
        Settings("x", dtype="int8")
