"""A store of codes: what is written is read, what is interrupted goes on, what is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from rqae import RQAE, RqaeConfig, RqaeError
from rqae.searching import code_store
from rqae.searching.code_store import CodeStore
from tests.support.random_rqae import random_rqae

SIZES = (5, 1, 12, 7, 3)
TEXT = torch.randn(sum(SIZES), 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> RQAE:
    return random_rqae(RqaeConfig(16, num_quantizers=9))


class Corpus:
    """Counts what it is asked for; may break."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.asked: list[int] = []
        self._breaks_at = breaks_at

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(SIZES)))

    def hidden(self, batch: int) -> tuple[torch.Tensor, NDArray[np.int64]]:
        if batch == self._breaks_at:
            raise KeyboardInterrupt
        self.asked.append(batch)
        start = sum(SIZES[:batch])
        count = SIZES[batch]
        return TEXT[start : start + count], np.stack([np.full(count, batch), np.arange(count)], axis=1)


def build(folder: Path, model: RQAE, corpus: Corpus, **options: object) -> CodeStore:
    return CodeStore.build(folder, model, corpus, corpus.hidden, **{"identity": "text by model", **options})  # type: ignore[arg-type]


def test_codes_and_places_come_back(model: RQAE, tmp_path: Path) -> None:
    store = build(tmp_path / "codes", model, Corpus())
    assert len(store) == sum(SIZES) and store.codes.dtype == np.uint16
    np.testing.assert_array_equal(store.codes, model.encode(TEXT).numpy())
    np.testing.assert_array_equal(store.contexts, np.repeat(range(5), SIZES))
    assert store.places[5:8].tolist() == [[1, 0], [2, 0], [2, 1]]
    again = Corpus()
    np.testing.assert_array_equal(build(tmp_path / "codes", model, again).codes, store.codes)
    assert not again.asked


@pytest.mark.parametrize("flush", [1, 6, 50])
def test_an_interrupted_build_goes_on(model: RQAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush: int) -> None:
    monkeypatch.setattr(code_store, "_FLUSH_TOKENS", flush)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, model, Corpus(breaks_at=3))
    if flush < 50:
        with pytest.raises(RqaeError, match="expected a complete store of codes; seen an interrupted build"):
            CodeStore(tmp_path)
    rest = Corpus()
    store = build(tmp_path, model, rest)
    assert rest.asked == list(range({1: 3, 6: 3, 50: 0}[flush], 5))
    np.testing.assert_array_equal(store.codes, model.encode(TEXT).numpy())
    np.testing.assert_array_equal(store.contexts, np.repeat(range(5), SIZES))


def test_a_build_whose_rows_are_gone_does_not_go_on(
    model: RQAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_store, "_FLUSH_TOKENS", 1)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, model, Corpus(breaks_at=3))
    (tmp_path / "codes.u16").unlink()
    with pytest.raises(RqaeError, match=r"codes.u16: expected 324 bytes of 18 stored tokens; seen 0 bytes"):
        build(tmp_path, model, Corpus())


def test_a_shallower_store_is_a_prefix(model: RQAE, tmp_path: Path) -> None:
    store = build(tmp_path, model, Corpus(), depth=4)
    np.testing.assert_array_equal(store.codes, model.encode(TEXT)[:, :4].numpy())
    with pytest.raises(
        RqaeError, match="expected a store of text by model, depth 9; seen a store of text by model, depth 4"
    ):
        build(tmp_path, model, Corpus())


def test_damage_is_refused(model: RQAE, tmp_path: Path) -> None:
    with pytest.raises(RqaeError, match="expected a store of codes"):
        CodeStore(tmp_path)
    build(tmp_path, model, Corpus())
    record = json.loads((tmp_path / "codes.json").read_text())
    whole = (tmp_path / "codes.u16").read_bytes()
    (tmp_path / "codes.u16").write_bytes(whole[:-2])
    with pytest.raises(
        RqaeError, match=f"expected 28 rows of 9 numbers, {len(whole)} bytes; seen {len(whole) - 2} bytes"
    ):
        CodeStore(tmp_path)
    (tmp_path / "codes.u16").unlink()
    with pytest.raises(RqaeError, match="no such file"):
        CodeStore(tmp_path)
    for bad in ({**record, "rows": -1}, {**record, "rows": "28"}, {**record, "further": 1}, [], {"identity": 3}):
        (tmp_path / "codes.json").write_text(json.dumps(bad))
        with pytest.raises(RqaeError, match="expected the record of a store of codes"):
            CodeStore(tmp_path)
