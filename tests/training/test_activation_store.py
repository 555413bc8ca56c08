"""The activation store: exact rows, resumable builds, batches that depend on the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from evalkit.errors import BadConfig, BadFile, BadShape, CorpusError, MissingFile
from evalkit.records import Site, TokenBatch
from evalkit.training.activation_store import ActivationStore

SITE = Site("toy", "layers.1")
D, POS = 6, 8


def token_batch(first: int, rows: int = 4) -> TokenBatch:
    contexts = np.arange(first, first + rows)
    valid = np.ones((rows, POS), bool)
    valid[:, 0] = False
    valid[contexts % 5 == 0, 5:] = False
    ids = contexts[:, None] * 100 + np.arange(POS)
    return TokenBatch(ids.astype(np.int64), valid, contexts)


def hidden(batch: TokenBatch) -> torch.Tensor:
    """Any function of the token id alone, in steps that bfloat16 holds exactly."""
    ids = torch.from_numpy(batch.token_ids)
    return torch.stack([((ids * (k + 3)) % 31 - 15).float() / 8 + 4 for k in range(D)], dim=-1)


def corpus(n: int = 30, stop_after: int | None = None) -> Iterator[TokenBatch]:
    for number in range(n):
        if stop_after is not None and number >= stop_after:
            raise KeyboardInterrupt
        yield token_batch(4 * number)


def build(folder: Path, batches: Iterator[TokenBatch] | None = None, **changes: object) -> ActivationStore:
    options: dict[str, object] = {"corpus_name": "toy", "d_model": D, "max_tokens": 10_000, **changes}
    read = options.pop("hidden", hidden)
    return ActivationStore.build(batches or corpus(), read, SITE, folder, **options)  # type: ignore[arg-type]


def expected_rows() -> torch.Tensor:
    return torch.cat([hidden(batch)[torch.from_numpy(batch.valid)] for batch in corpus()])


def test_rows_are_the_valid_tokens_in_order(tmp_path: Path) -> None:
    store = build(tmp_path)
    torch.testing.assert_close(torch.cat(list(store.chunks(7))), expected_rows(), rtol=0, atol=0)
    assert (store.site, len(ActivationStore(tmp_path))) == (SITE, len(expected_rows()))
    assert store.rows(torch.tensor([3, 0])).dtype == torch.float32


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "a", corpus(120, stop_after=77))
    with (tmp_path / "a" / "hidden.bf16").open("ab") as stream:
        stream.write(b"torn")
    with pytest.raises(BadFile, match="an interrupted build with"):
        ActivationStore(tmp_path / "a")
    seen = []
    build(tmp_path / "a", corpus(120), hidden=lambda batch: seen.append(batch) or hidden(batch))
    build(tmp_path / "b", corpus(120))
    assert len(seen) == 70  # fifty batches were on record
    for name in ("hidden.bf16", "store.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_what_is_there_is_not_built_again_and_another_store_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    build(tmp_path, hidden=lambda batch: pytest.fail("read again"))
    with pytest.raises(BadConfig, match=r"a store of toy/layers\.1 over toy, 99 tokens"):
        build(tmp_path, max_tokens=99)


def test_max_tokens_is_exact(tmp_path: Path) -> None:
    store = build(tmp_path, max_tokens=100)
    torch.testing.assert_close(torch.cat(list(store.chunks())), expected_rows()[:100], rtol=0, atol=0)


def test_attention_sinks_stay_out_and_are_counted(tmp_path: Path) -> None:
    def with_sinks(batch: TokenBatch) -> torch.Tensor:
        found = hidden(batch)
        found[batch.contexts % 7 == 3, 2] *= 100
        return found

    store = build(tmp_path, hidden=with_sinks)
    sinks = sum(int((batch.contexts % 7 == 3).sum()) for batch in corpus())
    assert (store.record.sinks, len(store)) == (sinks, len(expected_rows()) - sinks)
    assert max(float(chunk.norm(dim=1).max()) for chunk in store.chunks()) < 20


def test_batches_are_seeded_epochs_and_skip_goes_on(tmp_path: Path) -> None:
    store = build(tmp_path)

    def first(count: int, **options: int) -> list[torch.Tensor]:
        return [batch for batch, _ in zip(store.batches(50, **options), range(count), strict=False)]  # type: ignore[arg-type]

    per_epoch = len(store) // 50
    run = first(2 * per_epoch, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(run, first(2 * per_epoch, seed=1), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(run[per_epoch + 3 :], first(2, seed=1, skip=per_epoch + 3), strict=False)
    )
    assert not torch.equal(run[0], first(1, seed=2)[0])
    assert not torch.equal(run[0], run[per_epoch])
    known = {tuple(row.tolist()) for row in expected_rows()}
    assert all(tuple(row.tolist()) in known for batch in run for row in batch)
    with pytest.raises(CorpusError, match="at least one batch of 5000 rows"):
        next(store.batches(5000, seed=0))


def test_a_sample_is_without_replacement(tmp_path: Path) -> None:
    store = build(tmp_path)
    every = store.sample(10**6, seed=3)
    assert sorted(map(tuple, every.tolist())) == sorted(map(tuple, expected_rows().tolist()))
    assert len(store.sample(17, seed=3)) == 17


def test_broken_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"store\.json: expected an activation store; seen no such file"):
        ActivationStore(tmp_path)
    build(tmp_path)
    size = (tmp_path / "hidden.bf16").stat().st_size
    with (tmp_path / "hidden.bf16").open("r+b") as stream:
        stream.truncate(size - 2)
    with pytest.raises(BadFile, match=f"{size} bytes; seen {size - 2} bytes"):
        ActivationStore(tmp_path)
    (tmp_path / "store.json").write_text("{}")
    with pytest.raises(BadFile, match="the record of an activation store"):
        ActivationStore(tmp_path)


def test_wrong_widths_and_empty_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadShape) as caught:
        build(tmp_path / "a", d_model=7)
    assert str(caught.value) == (
        "hidden states at toy/layers.1: expected shape (4, 8, 7); seen shape (4, 8, 6); "
        "fix: check the site and the width of the subject model"
    )
    with pytest.raises(CorpusError, match="at least one valid token"):
        build(tmp_path / "b", iter(()))
