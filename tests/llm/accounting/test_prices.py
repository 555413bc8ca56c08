"""The price file, and what is said where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig, MissingFile
from evalkit.llm.accounting.prices import Price, read_prices
from evalkit.llm.session import price_of


def written(folder: Path, text: str) -> Path:
    path = folder / "prices.toml"
    path.write_text(text, encoding="utf-8")
    return path


def config(**options: object) -> RunConfig:
    return RunConfig.create(model="none", dictionaries=("none",), **options)


def test_prices_are_dollars_per_million_tokens(tmp_path: Path) -> None:
    prices = read_prices(
        written(tmp_path, '["org/model-7b"]\nprompt = 0.5\ncompletion = 2\n\n[free]\nprompt=0\ncompletion=0')
    )
    assert prices == {"org/model-7b": Price(0.5, 2.0), "free": Price(0.0, 0.0)}
    assert prices["org/model-7b"].cost(1_000_000, 500_000) == 1.5
    assert prices["free"].cost(10**9, 10**9) == 0


@pytest.mark.parametrize(
    "table",
    [
        "prompt = 1",
        "prompt = 1\ncompletion = -2",
        'prompt = "1"\ncompletion = 2',
        "prompt = true\ncompletion = 2",
        "prompt = nan\ncompletion = 2",
        "prompt = 1\ncompletion = 2\ncached = 0.1",
    ],
)
def test_what_is_no_price(table: str, tmp_path: Path) -> None:
    with pytest.raises(
        BadConfig, match=r"prices\.toml \[m\]: expected prompt and completion in US dollars per million"
    ):
        read_prices(written(tmp_path, f"[m]\n{table}"))


def test_what_is_no_price_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="no such file"):
        read_prices(tmp_path / "none.toml")
    with pytest.raises(BadConfig, match=r"expected valid TOML; seen .*line 1"):
        read_prices(written(tmp_path, "[m\nprompt = 1"))
    with pytest.raises(BadConfig, match=r"\[prompt\]"):
        read_prices(written(tmp_path, "prompt = 1\ncompletion = 2"))


def test_a_limit_on_cost_needs_the_model_s_price(tmp_path: Path) -> None:
    path = written(tmp_path, "[known]\nprompt = 1\ncompletion = 2")
    assert price_of(config(prices=path, max_cost=1.0), "known") == Price(1, 2)
    assert price_of(config(prices=path, max_cost=1.0), "known;temperature=0.5") == Price(1, 2)
    assert price_of(config(prices=path), "unknown") is None
    with pytest.raises(BadConfig, match=r"a price of 'unknown' in the file .*seen prices of known; .*\[\"unknown\"\]"):
        price_of(config(prices=path, max_cost=1.0), "unknown")
    with pytest.raises(BadConfig, match="seen no price file"):
        price_of(config(max_cost=1.0), "known")
