"""The embedding judge on the real MiniLM: its definition, bits that no batch changes, caching, and what it is for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import scorers.judges.minilm as minilm_module
from evalkit.errors import BadConfig, BadFile, MissingFile
from evalkit.records import Answer, JudgeItem
from evalkit.registry import create
from scorers.judges.embedding import EmbeddingJudge
from scorers.judges.minilm import Embedder, find_model

TEXTS = [
    "the white whale",
    "whale.",
    "It was the best of times, it was the worst of times",
    "",
    "SELECT * FROM t WHERE x > 3;",
    "naïve café — déjà vu",
    "the captain's old ship sank near the coast of a country nobody had heard of before that winter",
]


def judged(judge: EmbeddingJudge, explanation: str, items: Sequence[JudgeItem]) -> list[Answer]:
    return list(asyncio.run(judge.judge(explanation, items)))


def pieces_of_a_corpus(count: int) -> list[str]:
    random = np.random.default_rng(0)
    words = [
        "whale",
        "ship",
        "sea",
        "the",
        "of",
        "captain's",
        "1851",
        "unbelievable",
        "sqlite3_open()",
        "harpooneers,",
        "in",
        "and;",
        "Nantucket",
    ]
    return list(dict.fromkeys(" ".join(random.choice(words, size=random.integers(1, 6))) for _ in range(count)))


@pytest.mark.slow
def test_embeddings_are_the_sentence_transformers_ones(minilm: Path) -> None:
    """Against another way to compute the definition: padded batch, explicit mask, numpy pooling over real tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm, dtype=torch.float32)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state.numpy()
    expected = []
    for row, mask in zip(states, batch["attention_mask"].numpy(), strict=True):
        mean = row[mask == 1].sum(axis=0) / mask.sum()
        expected.append(mean / np.sqrt((mean**2).sum()))
    embedder = Embedder(str(minilm), "float32")
    np.testing.assert_allclose(embedder.embed(embedder.token_ids(TEXTS)), expected, atol=2e-6)
    rounded = Embedder(str(minilm), "bfloat16")
    cosines = (rounded.embed(rounded.token_ids(TEXTS)) * np.array(expected)).sum(axis=1)
    assert cosines.min() > 0.999


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_no_batch_changes_a_bit(minilm: Path, dtype: str) -> None:
    reference = Embedder(str(minilm), dtype, batch_size=128)
    ids = list(dict.fromkeys(reference.token_ids(pieces_of_a_corpus(150))))
    expected = reference.embed(ids)
    order = np.random.default_rng(1).permutation(len(ids))
    for batch_size in (1, 40, 64):
        embedder = Embedder(str(minilm), dtype, batch_size=batch_size)
        assert np.array_equal(embedder.embed([ids[index] for index in order]), expected[order])
    alone = np.concatenate([reference.embed([one]) for one in ids[:20]])
    assert np.array_equal(alone, expected[:20])


@pytest.mark.slow
def test_confidence_is_the_best_pieces_cosine(minilm: Path) -> None:
    judge = EmbeddingJudge(minilm, dtype="float32")
    text = "they saw the white whale near Nantucket at dawn"
    embedder = Embedder(str(minilm), "float32")

    def cosine(left: str, right: str) -> float:
        a, b = embedder.embed(embedder.token_ids([left])), embedder.embed(embedder.token_ids([right]))
        return float((a * b).sum())

    words = text.split()
    every = [cosine("words about whales", " ".join(words[i : i + 3])) for i in range(len(words) - 2)]
    start = text.index("dawn")
    answers = judged(judge, "words about whales", [JudgeItem(text), JudgeItem(text, ((start, start + 4),))])
    assert answers[0].confidence == pytest.approx(max(every), abs=1e-3)
    assert answers[1].confidence == pytest.approx(every[-1], abs=1e-3)
    assert all(answer.match is None and answer.reason is None for answer in answers)


@pytest.mark.slow
def test_odd_items(minilm: Path) -> None:
    judge = create("judges", "embedding", model=str(minilm))
    items = [JudgeItem(""), JudgeItem(" \n"), JudgeItem("whale"), JudgeItem("a whale", ()), JudgeItem("whale " * 500)]
    answers = judged(judge, "whales", items)
    assert [answer.reason for answer in answers] == ["the text is empty", None, None, "nothing is marked", None]
    assert [answer.confidence is None for answer in answers] == [True, False, False, True, False]
    assert judged(judge, "whales", []) == []
    empty = judged(judge, "  ", items)
    assert len(empty) == 5 and {answer.reason for answer in empty} == {"the explanation is empty"}


@pytest.mark.slow
def test_answers_depend_on_the_item_alone(minilm: Path) -> None:
    texts = [" ".join(pieces_of_a_corpus(60)[first : first + 5]) for first in range(0, 50, 5)]
    items = [JudgeItem(text, ((0, 4),) if index % 2 else None) for index, text in enumerate(texts)]
    together = judged(EmbeddingJudge(minilm), "whales", items)
    judge = EmbeddingJudge(minilm, batch_size=16)
    assert [judged(judge, "whales", [item])[0] for item in items[::-1]][::-1] == together


class Recorder:
    """A progress reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.total, self.done, self.tasks = 0, 0, 0

    def start(self, description: str, total: int | None, unit: str) -> int:
        self.total += total or 0
        self.tasks += 1
        return 3

    def advance(self, task: int, amount: int = 1) -> None:
        assert task == 3
        self.done += amount

    def finish(self, task: int) -> None:
        assert task == 3


@pytest.mark.slow
def test_prepare_embeds_each_distinct_piece_once(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    forward = Embedder._forward
    monkeypatch.setattr(Embedder, "_forward", lambda self, batch: rows.append(len(batch)) or forward(self, batch))
    items = [JudgeItem("the white whale swam"), JudgeItem("The White  whale swam", ((4, 9),)), JudgeItem("")]
    judge, progress = EmbeddingJudge(minilm), Recorder()
    asyncio.run(judge.prepare(items, explanations=["whales", "whales", " "], progress=progress))
    assert sum(rows) == progress.total == progress.done == 3  # the model reads no capitals: two pieces, one explanation
    answers = judged(judge, "whales", items)
    assert sum(rows) == 3
    assert answers == judged(EmbeddingJudge(minilm), "whales", items)


@pytest.mark.slow
def test_right_explanations_beat_wrong_ones(minilm: Path) -> None:
    topics = {
        "ships and the sea": ["the schooner left harbour", "waves broke over the deck", "he sailed to the island"],
        "numbers": ["seventeen of them", "about 4,000 and 12", "the second and third"],
        "cooking and food": ["boil the potatoes", "bread with butter", "a bowl of soup"],
        "law courts": ["the judge ruled that", "a guilty verdict", "the attorney objected"],
    }
    judge = EmbeddingJudge(minilm)
    items = [JudgeItem(text) for texts in topics.values() for text in texts]
    for place, topic in enumerate(topics):
        confidences = [answer.confidence or 0.0 for answer in judged(judge, topic, items)]
        mine = confidences[3 * place : 3 * place + 3]
        others = confidences[: 3 * place] + confidences[3 * place + 3 :]
        assert np.mean([a > b for a in mine for b in others]) > 0.8, topic


def test_where_the_model_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EVALKIT_EMBEDDING_MODEL", raising=False)
    monkeypatch.setattr(minilm_module, "_PACKAGE", "no_such_package")
    monkeypatch.chdir(tmp_path)
    assert find_model() == minilm_module.HUB_ID
    assert find_model("sentence-transformers/another") == "sentence-transformers/another"
    package = tmp_path / "site" / "weights_in_here"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('never import me')")
    (package / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(minilm_module, "_PACKAGE", "weights_in_here")
    assert find_model() == str(package / "model")
    for name in ("models/minilm", "elsewhere", "option"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    assert find_model() == "models/minilm"
    monkeypatch.setenv("EVALKIT_EMBEDDING_MODEL", str(tmp_path / "elsewhere"))
    assert find_model() == str(tmp_path / "elsewhere")
    assert find_model(tmp_path / "option") == str(tmp_path / "option")


def test_a_missing_model_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFile, match="seen no such folder; fix: give the right folder, or run: evalkit models pull"
    ):
        EmbeddingJudge(tmp_path / "nowhere")
    with pytest.raises(MissingFile, match=r"seen a folder without config\.json"):
        EmbeddingJudge(tmp_path)


def test_a_broken_model_folder_and_bad_options(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadFile, match="run: evalkit models pull minilm"):
        Embedder(str(tmp_path))
    with pytest.raises(BadConfig, match="expected bfloat16 or float32; seen 'int8'"):
        Embedder(str(tmp_path), dtype="int8")
    with pytest.raises(BadConfig, match="at least 1 row"):
        Embedder(str(tmp_path), batch_size=0)
