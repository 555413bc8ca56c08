from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from evalkit.corpus.contexts import Corpus
from evalkit.corpus.tokenisation import tokenize_corpus
from evalkit.errors import BadConfig, BadFile, BadShape, CorpusError, MissingFile, RunMismatch
from tests.conftest import byte_level_tokenizer, sentencepiece_tokenizer

TOKENIZER = byte_level_tokenizer()
WORDS = ["the", "whale", "swam", "under", "ship", "and", "nobody", "saw", "it", "although", "sea", "was", "calm"]


def prose(n_words: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n_words))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def cut(source: str | Path, tmp_path: Path, **options: Any) -> Corpus:
    return tokenize_corpus(source, options.pop("tokenizer", TOKENIZER), tmp_path / "corpus", **options)


def text_of(corpus: Corpus, document: int) -> str:
    rows = np.flatnonzero(corpus.documents == document)
    ids = [int(token) for row in rows for token in corpus.tokens[row, : corpus.lengths[row]]]
    return TOKENIZER.decode(ids, clean_up_tokenization_spaces=False)


def test_contexts_never_cross_documents(tmp_path: Path) -> None:
    texts = [prose(400, 1), prose(30, 2), prose(2, 3), prose(250, 4)]
    corpus = cut(write_jsonl(tmp_path / "a.jsonl", texts), tmp_path)
    lengths = [len(TOKENIZER(text)["input_ids"]) for text in texts]
    expected = [
        (document, min(128, length - start))
        for document, length in enumerate(lengths)
        for start in range(0, length, 128)
        if length - start >= 32
    ]
    assert list(zip(corpus.documents.tolist(), corpus.lengths.tolist(), strict=True)) == expected
    assert 2 not in corpus.documents  # two words are too short
    assert corpus.context_length == 128
    assert corpus.n_documents == len({document for document, _ in expected})
    assert corpus.n_tokens == sum(length for _, length in expected)
    for document in (0, 1, 3):
        kept = text_of(corpus, document)
        assert texts[document].startswith(kept) and kept
    assert corpus.tokens.dtype == np.uint32
    assert isinstance(corpus.tokens, np.memmap)


def test_batches_mask_padding_and_first_positions(tmp_path: Path) -> None:
    corpus = cut(write_jsonl(tmp_path / "a.jsonl", [prose(150, 1)]), tmp_path, skip_first=3)
    batch = corpus.batch([corpus.n_contexts - 1, 0])
    assert batch.contexts.tolist() == [corpus.n_contexts - 1, 0]
    assert batch.token_ids.dtype == np.int64
    assert not batch.valid[:, :3].any()
    assert batch.valid[1, 3:].all()
    last = corpus.lengths[-1]
    assert batch.valid[0, 3:last].all() and not batch.valid[0, last:].any()
    sizes = [len(part.contexts) for part in corpus.batches(2)]
    assert sum(sizes) == corpus.n_contexts
    with pytest.raises(CorpusError, match="rows from 0 to"):
        corpus.batch([corpus.n_contexts])


def test_special_tokens_are_masked_anywhere(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).integers(2, 300, size=(4, 64))
    matrix[:, 0] = 0
    matrix[1, 20] = 0  # a BOS in mid-context
    matrix[2, 63] = 1
    np.save(tmp_path / "m.npy", matrix)
    corpus = cut(tmp_path / "m.npy", tmp_path)
    valid = corpus.batch(np.arange(4)).valid
    assert np.array_equal(valid, ~np.isin(matrix, (0, 1)))


def test_bos_starts_every_context(tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer()  # adds BOS by itself
    source = write_jsonl(tmp_path / "a.jsonl", [prose(400)])
    corpus = tokenize_corpus(source, tokenizer, tmp_path / "with")
    assert (corpus.tokens[:, 0] == 1).all() and (corpus.tokens[:, 1:] != 1).all()
    assert not corpus.batch([0]).valid[0, 0]
    without = tokenize_corpus(source, tokenizer, tmp_path / "without", add_bos=False)
    plain = tokenizer(prose(400), add_special_tokens=False)["input_ids"]
    assert without.tokens[0].tolist() == plain[:128]
    assert corpus.tokens[:2, 1:].reshape(-1).tolist() == plain[:254]
    assert (cut(source, tmp_path).tokens[:, 0] != 0).all()  # the byte-level one adds none


def test_sources_of_text_agree(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset, DatasetDict

    texts = [prose(200, seed) for seed in range(3)]
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as stream:
        stream.write(plain.read_bytes())
    pq.write_table(pa.table({"id": [1, 2, 3], "body": texts}), tmp_path / "c.parquet")
    (tmp_path / "d").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "d" / f"{index}.txt").write_text(text)
    Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "e")
    DatasetDict({"test": Dataset.from_dict({"text": texts})}).save_to_disk(tmp_path / "f")
    first = tokenize_corpus(plain, TOKENIZER, tmp_path / "out")
    for index, (source, options) in enumerate(
        [
            (tmp_path / "b.jsonl.gz", {}),
            (tmp_path / "c.parquet", {"text_field": "body"}),
            (tmp_path / "d", {}),
            (str(tmp_path / "d" / "*.txt"), {}),
            (tmp_path / "e", {}),
            (tmp_path / "f", {"split": "test"}),
        ]
    ):
        found = tokenize_corpus(source, TOKENIZER, tmp_path / f"out{index}", **options)  # type: ignore[arg-type]
        assert np.array_equal(found.tokens, first.tokens), source
        assert np.array_equal(found.documents, first.documents)
    with pytest.raises(CorpusError, match="a split 'train'; seen the splits test"):
        tokenize_corpus(tmp_path / "f", TOKENIZER, tmp_path / "g")


def test_a_data_set_in_the_layout_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``datasets`` resolves owner/name to a local folder of that name, so the hub path runs without the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evalkit.corpus.readers.hub_reachable", lambda: True)
    (tmp_path / "owner" / "name" / "data").mkdir(parents=True)
    texts = [prose(200, seed) for seed in range(3)]
    write_jsonl(tmp_path / "owner" / "name" / "data" / "train-00000.jsonl", texts)
    from evalkit.corpus.readers import Located, read_pieces

    found = list(read_pieces(Located("owner/name", "hub"), text_field="text", split="train", revision=None))
    assert found == [(text, True) for text in texts]


def test_a_single_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [prose(100, seed) for seed in range(60)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    corpus = cut(tmp_path / "book.txt", tmp_path)
    assert corpus.n_documents >= 3
    for document in range(1, corpus.n_documents):
        assert text_of(corpus, document).lstrip("\n").split(" ")[0] in WORDS
        assert text_of(corpus, document).lstrip("\n")[:40] in [paragraph[:40] for paragraph in paragraphs]


def test_a_long_document_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalkit.corpus.readers.PIECE", 500)
    lines = [prose(20, seed) + "\n" for seed in range(50)]
    (tmp_path / "d").mkdir()
    for name in "ab":
        (tmp_path / "d" / f"{name}.txt").write_text("".join(lines))
    corpus = cut(tmp_path / "d", tmp_path)
    assert corpus.n_documents == 2
    assert (corpus.lengths[corpus.documents == 0][:-1] == 128).all()
    assert "".join(lines).startswith(text_of(corpus, 0))


def test_max_tokens_keeps_the_first_contexts(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [prose(300, seed) for seed in range(5)])
    whole = tokenize_corpus(source, TOKENIZER, tmp_path / "whole")
    for limit in (128, 600, 1000):
        part = tokenize_corpus(source, TOKENIZER, tmp_path / f"part{limit}", max_tokens=limit)
        assert 0 < part.n_tokens <= limit
        assert limit - part.n_tokens < 128
        assert np.array_equal(part.tokens, whole.tokens[: part.n_contexts])


def test_the_same_settings_are_opened_again(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [prose(300)])
    corpus = cut(source, tmp_path)
    before = (tmp_path / "corpus" / "tokens.npy").stat().st_mtime_ns
    moved = source.rename(tmp_path / "moved.jsonl")
    assert np.array_equal(cut(moved, tmp_path).tokens, corpus.tokens)
    assert (tmp_path / "corpus" / "tokens.npy").stat().st_mtime_ns == before
    with pytest.raises(RunMismatch, match=r"context_length 64; seen .* with context_length 128"):
        cut(moved, tmp_path, context_length=64)
    write_jsonl(moved, [prose(301)])
    with pytest.raises(RunMismatch, match="with digest"):
        cut(moved, tmp_path)
    with pytest.raises(RunMismatch, match="with tokenizer"):
        cut(write_jsonl(moved, [prose(300)]), tmp_path, tokenizer=sentencepiece_tokenizer())


@pytest.mark.parametrize("ending", ["npy", "pt", "safetensors"])
def test_token_matrices_are_used_as_they_are(tmp_path: Path, ending: str) -> None:
    matrix = np.random.default_rng(0).integers(2, 300, size=(10, 48)).astype(np.int32)
    path = tmp_path / f"m.{ending}"
    if ending == "npy":
        np.save(path, matrix)
    elif ending == "pt":
        torch.save(torch.from_numpy(matrix), path)
    else:
        save_file({"tokens": matrix, "other": np.zeros(3)}, path)
    corpus = cut(path, tmp_path)
    assert np.array_equal(corpus.tokens, matrix)
    assert corpus.documents.tolist() == list(range(10))
    assert (corpus.lengths == 48).all()
    short = tokenize_corpus(path, TOKENIZER, tmp_path / "short", max_tokens=200)
    assert short.n_contexts == 4


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (np.zeros((2, 3, 4), dtype=np.int64), BadShape, r"seen shape \(2, 3, 4\), int64"),
        (np.zeros((2, 3)), BadShape, r"seen shape \(2, 3\), float64"),
        (np.zeros((0, 3), dtype=np.int64), BadShape, "not empty"),
        (np.full((2, 40), -1), CorpusError, "token ids from 0 to 299; seen -1"),
        (np.full((2, 40), 300), CorpusError, "token ids from 0 to 299; seen 300"),
        (np.array([["a", None]], dtype=object), BadFile, "without pickled objects"),
    ],
)
def test_bad_matrices(tmp_path: Path, matrix: np.ndarray, error: type[Exception], message: str) -> None:
    np.save(tmp_path / "m.npy", matrix, allow_pickle=True)
    with pytest.raises(error, match=message):
        cut(tmp_path / "m.npy", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.npy"]


def test_a_pickle_in_a_pt_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"tokens": Path("x")}, tmp_path / "m.pt")
    with pytest.raises(BadFile, match="without pickled objects"):
        cut(tmp_path / "m.pt", tmp_path)


def test_errors_of_text_sources(tmp_path: Path) -> None:
    good = json.dumps({"text": "x", "id": 1})
    path = tmp_path / "a.jsonl"
    path.write_text(f"{good}\n{{broken\n")
    with pytest.raises(BadFile, match=r"a\.jsonl:2: expected one JSON object per line"):
        cut(path, tmp_path)
    path.write_text(json.dumps({"title": "x", "body": "y"}))
    with pytest.raises(CorpusError) as caught:
        cut(path, tmp_path)
    assert str(caught.value) == (
        f"{path}:1: expected a field 'text'; seen the fields 'title', 'body'; fix: name the field that holds the text"
    )
    path.write_text(json.dumps({"text": 3}))
    with pytest.raises(CorpusError, match="text in the field 'text'; seen int"):
        cut(path, tmp_path)
    path.write_text("[1]")
    with pytest.raises(BadFile, match="a JSON object; seen list"):
        cut(path, tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadFile, match=r"a\.jsonl:1: expected UTF-8 text"):
        cut(path, tmp_path)
    path.write_text("")
    with pytest.raises(CorpusError, match="seen 0 documents"):
        cut(path, tmp_path)
    write_jsonl(path, ["too short", "this is too"])
    with pytest.raises(CorpusError, match="a document of at least 32 tokens; seen 2 documents, the longest of"):
        cut(path, tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(BadFile, match="a parquet file"):
        cut(tmp_path / "bad.parquet", tmp_path)
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(BadFile):
        cut(tmp_path / "bad.jsonl.gz", tmp_path)
    assert not [path for path in tmp_path.iterdir() if "corpus" in path.name]


def test_errors_of_sources(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="no such file or folder"):
        cut(tmp_path / "none.txt", tmp_path)
    with pytest.raises(MissingFile):
        cut(str(tmp_path / "*.txt"), tmp_path)
    with pytest.raises(MissingFile, match="a corpus shipped with the package"):
        cut("bundled:none", tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(BadFile, match=r"seen \.csv"):
        cut(tmp_path / "a.csv", tmp_path)
    (tmp_path / "a.jsonl.zst").write_text("x")
    with pytest.raises(BadFile, match="zstd -d"):
        cut(tmp_path / "a.jsonl.zst", tmp_path)
    source = write_jsonl(tmp_path / "a.jsonl", [prose(300)])
    with pytest.raises(CorpusError, match="at least one context of 128 tokens; seen 100"):
        cut(source, tmp_path, max_tokens=100)
    with pytest.raises(BadConfig, match="context_length"):
        cut(source, tmp_path, context_length=0)


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MissingFile, match="the hub does not answer"):
        cut("owner/name", tmp_path)


def test_a_folder_that_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    with pytest.raises(MissingFile, match=r"no corpus\.json"):
        Corpus.open(tmp_path / "corpus")
    source = write_jsonl(tmp_path / "a.jsonl", [prose(300)])
    tokenize_corpus(source, TOKENIZER, tmp_path / "c")
    (tmp_path / "c" / "lengths.npy").write_bytes(b"")
    with pytest.raises(BadFile):
        Corpus.open(tmp_path / "c")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """A real limit on file size, in a process of its own."""
    write_jsonl(tmp_path / "a.jsonl", [prose(300, seed) for seed in range(200)])
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    program = f"""
import resource, signal
from pathlib import Path
from transformers import AutoTokenizer
from evalkit.corpus.tokenisation import tokenize_corpus
from evalkit.errors import StorageError
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "tokenizer")!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    tokenize_corpus({str(tmp_path / "a.jsonl")!r}, tokenizer, Path({str(tmp_path / "corpus")!r}))
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "expected space to write the tokenised corpus; seen File too large" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "tokenizer"]
