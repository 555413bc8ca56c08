"""Log-probabilities after a prefix: against plain forwards of transformers, and bits that no batch changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from evalkit.errors import BadConfig, BadFile, MissingFile
from scorers.judges.causal import CausalModel
from tests.support.plain_forward import log_probabilities_by_hand

PREFIX = 'Description: "ships and whales"\nText:'
TEXTS = [
    " the whale",
    " A number such as 1851",
    "x",
    "The whale swam under the ship. Nobody on deck saw it, and the sea was calm.",
    " naïve café — déjà vu",
    "\n\n",
    *(f" whale number {n}, seen at sea on day {n * n * n}" for n in range(23)),
]


def read(model: CausalModel, texts: list[str], prefix: str = PREFIX) -> list[np.ndarray]:
    return list(model.log_probabilities(model.prefix_ids(prefix), model.ids(texts)))


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gemma", "tiny_gpt2"])
def test_log_probabilities_are_those_of_a_plain_forward(fixture: str, request: pytest.FixtureRequest) -> None:
    """Gemma's sliding windows of 16 tokens are shorter than the prefix; GPT-2 counts positions."""
    folder: Path = request.getfixturevalue(fixture)
    found = read(CausalModel(str(folder), "float32", "cpu"), TEXTS[:8])
    for text, row in zip(TEXTS[:8], found, strict=True):
        np.testing.assert_allclose(row, log_probabilities_by_hand(folder, PREFIX, text), atol=2e-5)
        assert (row < 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_batch_changes_a_bit(tiny_llama: Path, dtype: str) -> None:
    expected = read(CausalModel(str(tiny_llama), dtype, "cpu", batch_size=16), TEXTS)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    for batch_size in (1, 8, 20, 64):
        model = CausalModel(str(tiny_llama), dtype, "cpu", batch_size=batch_size)
        shuffled = read(model, [TEXTS[index] for index in order])
        assert all(np.array_equal(row, expected[index]) for index, row in zip(order, shuffled, strict=True))
    alone = [read(model, [text])[0] for text in TEXTS[:8]]
    assert all(np.array_equal(row, whole) for row, whole in zip(alone, expected, strict=False))


def test_a_model_whose_state_cannot_be_shared_reads_the_prefix_with_every_text(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CausalModel(str(tiny_llama), "float32", "cpu")
    shared = read(model, TEXTS)
    monkeypatch.setattr(CausalModel, "_cache", lambda self, ids: None)
    for one, other in zip(read(model, TEXTS), shared, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_text_may_fill_the_context_to_its_last_position(tiny_gpt2: Path) -> None:
    """128 positions: rounding the text's length up would go over."""
    model = CausalModel(str(tiny_gpt2), "float32", "cpu")
    prefix = model.prefix_ids("a b c d e f g h i j k l m n o p q r s t u v w x y z")
    text = (40,) * (128 - len(prefix))
    assert model.longest == 128 and len(text) % 8
    (row,) = model.log_probabilities(prefix, [text])
    assert len(row) == len(text) and np.isfinite(row).all()


def test_a_prefix_of_one_token_and_no_texts(tiny_llama: Path) -> None:
    model = CausalModel(str(tiny_llama), "float32", "cpu")
    one = model.ids(["x"])[0]
    (row,) = model.log_probabilities(one, [one])
    assert len(row) == 1 and row[0] < 0
    assert model.log_probabilities(one, []) == [] and model.ids([]) == []


def test_a_prefix_begins_as_the_tokenizer_begins_texts_and_never_ends_them(tmp_path: Path, tiny_llama: Path) -> None:
    import shutil

    from tests.conftest import sentencepiece_tokenizer

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    sentencepiece_tokenizer().save_pretrained(folder)
    model = CausalModel(str(folder), "float32", "cpu")
    assert model.prefix_ids("the")[0] == 1 and 1 not in model.ids(["the"])[0]
    tokenizer = sentencepiece_tokenizer()
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(folder)
    ending = CausalModel(str(folder), "float32", "cpu")
    assert ending.prefix_ids("the") == model.prefix_ids("the")


def test_what_is_no_model_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BadFile, match="expected a causal language model in a local folder"):
        CausalModel(str(tmp_path))
    with pytest.raises(BadConfig, match="expected bfloat16 or float32; seen 'int8'"):
        CausalModel(str(tmp_path), dtype="int8")
    with pytest.raises(BadConfig, match="at least 1 row"):
        CausalModel(str(tmp_path), batch_size=0)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFile, match="or on a hub that can be reached"):
        CausalModel("nobody/no-such-model")
