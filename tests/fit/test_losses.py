"""What replacements cost, against a plain hook and loops over predictions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from evalkit.corpus.contexts import Corpus
from evalkit.corpus.tokenisation import tokenize_corpus
from evalkit.errors import CorpusError
from evalkit.fit.losses import Losses, measure_losses
from evalkit.subject.language_model import LanguageModel

SITE = "layers.3"
SHIFT = torch.linspace(-1, 1, 32)
HUGE = 1e9


@pytest.fixture(scope="module")
def language(tiny_llama: Path) -> LanguageModel:
    return LanguageModel.load(tiny_llama, sites=[SITE], dtype="float32")


@pytest.fixture(scope="module")
def corpus(language: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Documents of several lengths, contexts of 48 with BOS, some of them padded."""
    folder = tmp_path_factory.mktemp("losses")
    generator = np.random.default_rng(0)
    words = ["whale", "ship", "sea", "deck", "calm"]
    lines = [json.dumps({"text": " ".join(generator.choice(words, size))}) for size in (40, 90, 33, 60, 25)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    return tokenize_corpus(
        folder / "text.jsonl", language.subject.tokenizer, folder / "corpus", context_length=48, add_bos=True
    )


def by_hand(folder: Path, corpus: Corpus, limit: float, shift: torch.Tensor | None) -> tuple[list[float], list[int]]:
    """Loss and document of every prediction that counts, one context at a time, without padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def hook(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        if shift is None:
            return None
        changed = output.clone()
        for position in range(1, output.shape[1]):  # position 0 is BOS
            if output[0, position].norm() <= limit:
                changed[0, position] = output[0, position] + shift
        return changed

    model.model.layers[3].register_forward_hook(hook)
    losses, documents = [], []
    for row in range(corpus.n_contexts):
        ids = torch.from_numpy(corpus.tokens[row, : corpus.lengths[row]].astype(np.int64))
        with torch.no_grad():
            chances = model(ids[None]).logits[0].log_softmax(-1)
        for position in range(1, len(ids) - 1):
            losses.append(-float(chances[position, ids[position + 1]]))
            documents.append(int(corpus.documents[row]))
    return losses, documents


def measured(language: LanguageModel, corpus: Corpus, limit: float) -> Losses:
    everything = np.arange(corpus.n_contexts)
    changes = {"same": lambda hidden: hidden, "shifted": lambda hidden: hidden + SHIFT}
    return measure_losses(language, corpus, everything, SITE, limit, changes)


@pytest.mark.parametrize("sinks", [False, True])
def test_losses_with_and_without_are_those_of_a_plain_hook(
    sinks: bool, language: LanguageModel, corpus: Corpus, tiny_llama: Path
) -> None:
    assert (corpus.lengths < 48).any() and (corpus.tokens[:, 0] == 0).all()
    states = language.subject.hidden(corpus.batch(np.arange(corpus.n_contexts)).token_ids)[SITE]
    limit = float(states.norm(dim=-1).quantile(0.7)) if sinks else HUGE
    found = measured(language, corpus, limit)
    clean, documents = by_hand(tiny_llama, corpus, limit, None)
    np.testing.assert_allclose(found.clean, clean, rtol=1e-4, atol=1e-5)
    assert found.documents.tolist() == documents
    shifted, _ = by_hand(tiny_llama, corpus, limit, SHIFT)
    np.testing.assert_allclose(found.replaced["shifted"], shifted, rtol=1e-4, atol=1e-4)
    assert found.change("shifted").mean == pytest.approx(np.mean(shifted) - np.mean(clean), abs=1e-4)
    assert found.change("same").mean == 0 and found.change("same").se == 0


def test_how_many_contexts_a_forward_takes_changes_nothing(
    language: LanguageModel, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(language, corpus, HUGE)
    monkeypatch.setattr(LanguageModel, "contexts_per_forward", lambda self, length: 2)
    parts = measured(language, corpus, HUGE)
    np.testing.assert_allclose(parts.replaced["shifted"], whole.replaced["shifted"], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(parts.documents, whole.documents)


def test_loss_recovered_is_1_for_the_identity_and_0_for_the_ablation(language: LanguageModel, corpus: Corpus) -> None:
    found = measured(language, corpus, HUGE)
    assert found.recovered("same", "shifted") == 1
    assert found.recovered("shifted", "shifted") == 0
    assert np.isnan(found.recovered("shifted", "same"))


def test_the_error_is_that_of_the_differences() -> None:
    clean = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    found = Losses(clean, {"other": clean + np.array([1, 3, 2, 2], np.float32)}, np.array([0, 0, 1, 1]))
    assert found.change("other").mean == 2
    assert found.change("other").se == 0  # the documents' means are equal
    found = Losses(clean, {"other": clean + np.array([1, 3, 2, 6], np.float32)}, np.array([0, 1, 2, 3]))
    assert found.change("other").se == pytest.approx(np.std([1, 3, 2, 6], ddof=1) / 2)


def test_nothing_to_predict_is_refused(language: LanguageModel, corpus: Corpus) -> None:
    with pytest.raises(CorpusError, match="two valid tokens in a row"):
        measure_losses(language, corpus, np.arange(0), SITE, HUGE, {})
