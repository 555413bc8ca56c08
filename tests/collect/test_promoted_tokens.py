"""Promoted tokens against transformers' own norm and head, through every kind of source, and in a run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from evalkit.collect import promoted_tokens as promoted
from evalkit.collect.activations import SelectedFeatures
from evalkit.collect.promoted_tokens import promoted_by_source, promoted_tokens, token_texts
from evalkit.collect.stage import read_examples
from evalkit.config.run_config import RunConfig
from evalkit.errors import UnknownFeature
from evalkit.pipeline.stages import run
from evalkit.protocols import DirectedSource
from evalkit.records import Site
from evalkit.sources import open_dictionaries
from evalkit.sources.controls import PlantedSource, RandomDirectionsSource
from evalkit.sources.formats.directions import DirectionsSource
from evalkit.sources.sae.source import SaeSource
from evalkit.sources.sae.transforms import Centre, RmsNorm, Scale, UnitNorm
from evalkit.sources.sae.weights import SaeWeights
from evalkit.store.run_store import RunStore
from evalkit.subject.final_norm import normalise
from evalkit.subject.model import Subject
from evalkit.subject.unembedding import OutputHead, read_output_head
from evalkit.util.tensor_files import Stored, open_safetensors
from tests.conftest import byte_level_tokenizer, sentencepiece_tokenizer
from tests.support.dictionaries import write_rqae
from tests.support.run_folders import tiny_options

VOCAB, D_MODEL, SITE = 300, 32, Site("tiny-llama", "layers.3")


def load(folder: Path) -> tuple[Subject, OutputHead]:
    subject = Subject.load(folder, sites=["layers.3"], dtype="float32")
    head = read_output_head(str(folder), subject.info, vocab_size=subject.vocab_size)
    assert head is not None
    return subject, head


def by_transformers(folder: Path, directions: torch.Tensor, k: int) -> list[list[str]]:
    """The directions through the model's own norm and head, one at a time, and what its tokenizer makes of the best."""
    whole: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    norm = whole.get_decoder().norm if hasattr(whole.get_decoder(), "norm") else whole.get_decoder().ln_f
    tokenizer = byte_level_tokenizer()
    found = []
    for direction in directions.float():
        with torch.no_grad():
            logits = whole.lm_head(norm(direction[None]))[0] - whole.lm_head(norm(torch.zeros(1, len(direction))))[0]
        ids = [index for index in logits.argsort(descending=True).tolist() if index > 1]  # 0 and 1 are <s> and </s>
        texts = [tokenizer.decode([index]) for index in ids]
        found.append([text for text in texts if text and "\ufffd" not in text][:k])
    return found


@pytest.mark.parametrize("model", ["tiny_llama", "tied_llama", "tiny_gemma", "tiny_gpt2"])
def test_as_transformers_has_it(model: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(model)
    subject, head = load(folder)
    directions = torch.randn(12, D_MODEL, generator=torch.Generator().manual_seed(3))
    found = promoted_tokens(directions, head, token_texts(subject.tokenizer, VOCAB), k=9)
    assert [list(tokens) for tokens in found] == by_transformers(folder, directions, 9)


def test_the_gain_matters(tiny_gemma: Path) -> None:
    """With the weight instead of 1 + weight, or no gain, the tokens are others: the test above can fail."""
    _, head = load(tiny_gemma)
    directions = torch.randn(12, D_MODEL, generator=torch.Generator().manual_seed(3))
    texts = token_texts(byte_level_tokenizer(), VOCAB)
    right = promoted_tokens(directions, head, texts, 9)
    assert right != promoted_tokens(directions, replace(head, gain=head.gain - 1), texts, 9)
    assert right != promoted_tokens(directions, replace(head, gain=torch.ones(D_MODEL)), texts, 9)


def stored(folder: Path, matrix: torch.Tensor) -> Stored:
    from safetensors.torch import save_file

    save_file({"lm_head.weight": matrix.contiguous()}, folder / "head.safetensors")
    return open_safetensors(folder / "head.safetensors")["lm_head.weight"]


def head_of(folder: Path, matrix: torch.Tensor) -> OutputHead:
    return OutputHead(stored(folder, matrix), torch.ones(matrix.shape[1]))


@pytest.mark.parametrize("room", [1 << 22, 4096])
def test_other_features_their_order_and_tiles_change_nothing(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(5000, D_MODEL, generator=generator)
    matrix[4000:4010] = matrix[17]  # equal logits: the lower id is first, and is cut last
    head, texts = head_of(tmp_path, matrix), [str(index) for index in range(5000)]
    directions = torch.randn(40, D_MODEL, generator=generator)
    directions[5] = matrix[17]
    expected = [
        tuple(sorted(texts, key=lambda text: (-(matrix[int(text)].double() @ row.double()).float().item(), int(text))))
        for row in directions[[5, 30]]
    ]
    monkeypatch.setattr(promoted, "_ROOM", room)
    found = promoted_tokens(directions, head, texts, k=8)
    assert found[5] == expected[0][:8] == ("17", *(str(index) for index in range(4000, 4007)))
    assert found[30] == expected[1][:8]
    assert promoted_tokens(directions.flip(0), head, texts, k=8) == found[::-1]
    assert [promoted_tokens(row[None], head, texts, k=8)[0] for row in directions] == found


def test_memory_is_bounded_by_tiles_and_every_row_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(5000, D_MODEL, generator=torch.Generator().manual_seed(0))
    head, texts = head_of(tmp_path, matrix), [str(index) for index in range(5000)]
    taken: list[slice] = []
    take = Stored.take

    def recorded(self: Stored, index: Any, axis: int) -> torch.Tensor:
        taken.append(index)
        return take(self, index, axis)

    monkeypatch.setattr(Stored, "take", recorded)
    monkeypatch.setattr(promoted, "_ROOM", 1 << 13)
    for n_features in (3, 100):
        taken.clear()
        promoted_tokens(torch.randn(n_features, D_MODEL), head, texts, k=8)
        rows = [part.stop - part.start for part in taken]
        assert max(rows) * max(n_features, D_MODEL) <= 1 << 13 and len(taken) > 10
        assert [part.start for part in taken] == np.cumsum([0, *rows[:-1]]).tolist() and sum(rows) == 5000


def test_what_shifts_all_logits_alike_changes_nothing(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(12, D_MODEL, generator=generator)
    directions, shift = torch.randn(20, D_MODEL, generator=generator), 30 * torch.randn(D_MODEL, generator=generator)
    texts = [str(index) for index in range(12)]
    plain = promoted_tokens(directions, head_of(tmp_path, matrix), texts, k=12)
    assert promoted_tokens(directions, head_of(tmp_path, matrix + shift), texts, k=12) == plain
    for row, tokens in zip(directions, plain, strict=True):
        logits = (matrix - matrix.mean(dim=0)) @ row
        assert {int(token) for token in tokens} == set((logits > 0).nonzero().flatten().tolist())


def test_directions_that_raise_nothing_have_no_tokens(tmp_path: Path) -> None:
    head = head_of(tmp_path, torch.randn(50, D_MODEL))
    directions = torch.randn(4, D_MODEL)
    directions[1], directions[2, 3] = 0, torch.nan
    texts = [str(index) for index in range(50)]
    found = promoted_tokens(directions, head, texts, k=5)
    assert [len(tokens) for tokens in found] == [5, 0, 0, 5]
    assert found[3] == promoted_tokens(directions[3:], head, texts, k=5)[0]
    assert promoted_tokens(directions[:0], head, texts) == []
    flat = head_of(tmp_path, torch.ones(50, D_MODEL))
    assert promoted_tokens(directions[:1], flat, texts) == [()]


def test_ids_of_one_text_count_once(tmp_path: Path) -> None:
    matrix = torch.eye(D_MODEL)[:8] * torch.arange(8, 0, -1)[:, None]
    texts = ["a", None, "b", "a", "b", None, "c", "d"]
    found = promoted_tokens(torch.ones(1, D_MODEL), head_of(tmp_path, matrix), texts, k=3)
    assert found == [("a", "b")]  # "c" and "d" lie below the mean logit of 4.5


def test_texts_of_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<unused7>", "<table>", "<|reserved_special_token_3|>"])
    texts = token_texts(tokenizer, len(tokenizer) + 5)
    assert texts[0] is texts[1] is None  # <s>, </s>
    assert texts[-5:] == [None] * 5  # rows of the embedding without a token
    assert texts[-8:-5] == [None, "<table>", None]
    whole = [text for text in texts if text is not None]
    assert " whale" not in texts and " the" in whole and "\n" in whole
    for index, text in enumerate(texts[:VOCAB]):
        if index > 1:
            assert text == (None if "\ufffd" in tokenizer.decode([index]) else tokenizer.decode([index]))
    pieces = token_texts(sentencepiece_tokenizer(), 400)
    assert pieces[:3] == [None] * 3 and pieces[3 + 0x41] == "A" and pieces[3 + 0xFF] is None and "the" in pieces


def sae(w_dec: torch.Tensor, site: Site = SITE, **options: Any) -> SaeSource:
    width = len(w_dec)
    return SaeSource(SaeWeights(w_dec.T.contiguous(), torch.zeros(width), w_dec, torch.ones(D_MODEL)), site, **options)


@pytest.mark.parametrize(
    "steps",
    [(), (Scale(0.25),), (Centre(), UnitNorm()), (RmsNorm(gain=torch.linspace(-1, 2, D_MODEL)),)],
    ids=["none", "scale", "unit", "gain"],
)
def test_directions_of_an_sae_are_what_a_latent_adds_to_its_reconstruction(steps: tuple[Any, ...]) -> None:
    source = sae(torch.randn(6, D_MODEL), steps=steps)
    hidden = torch.randn(1, 1, D_MODEL)
    without = replace(source.weights, b_enc=torch.full((6,), -1e6))
    for feature in range(6):
        alone = replace(without, b_enc=torch.full((6,), -1e6).index_fill(0, torch.tensor(feature), 50.0))
        added = (
            replace(source, weights=alone).reconstruct(hidden) - replace(source, weights=without).reconstruct(hidden)
        )[0, 0]
        direction = source.directions([str(feature)])[0]
        assert torch.cosine_similarity(added, direction, dim=0) > 0.9999
    assert torch.equal(source.directions(["4", "1"]), source.directions([str(i) for i in range(6)])[[4, 1]])
    with pytest.raises(UnknownFeature, match="feature '6'"):
        source.directions(["6"])


def test_a_transcoder_gives_its_rows_as_they_are() -> None:
    w_dec = torch.randn(6, D_MODEL)
    source = sae(w_dec, Site("m", "layers.3.pre_mlp_norm:in", "layers.3.mlp"), steps=(Scale(4.0), RmsNorm()))
    assert torch.equal(source.directions(["2", "0"]), w_dec[[2, 0]])


def test_directions_of_an_rqae_rebuild_the_state_they_were_made_from(tiny_llama: Path, tmp_path: Path) -> None:
    subject, _ = load(tiny_llama)
    hidden = torch.randn(3, D_MODEL)
    path = write_rqae(tmp_path / "rqae", D_MODEL, 8, model="tiny-llama", site="layers.3")
    for source in open_dictionaries([(str(path), {"depths": [2, 8]})]):
        made = source.bind(subject.info).with_centres(hidden, ["a", "b", "c"])  # type: ignore[attr-defined]
        scale = normalise(hidden, subject.info) / (hidden * torch.from_numpy(subject.info.norm_gain))
        bias = made.encoder.model.b_out[: made.depth].sum(dim=0) / torch.from_numpy(subject.info.norm_gain)
        rebuilt = (made.directions(["c", "a"]) + bias) / scale[[2, 0]]
        torch.testing.assert_close(rebuilt, made.reconstruct(hidden)[[2, 0]], rtol=1e-4, atol=1e-4)


def test_signed_directions_promote_opposite_tokens(tiny_llama: Path) -> None:
    subject, head = load(tiny_llama)
    source = DirectionsSource(torch.randn(3, D_MODEL), None, SITE, signed=True)  # type: ignore[arg-type]
    source = replace(source, vectors=_Matrix(source.vectors))  # type: ignore[arg-type]
    up, down = promoted_tokens(source.directions(["1+", "1-"]), head, token_texts(subject.tokenizer, VOCAB), k=9)
    assert len(up) == len(down) == 9 and not {*up} & {*down}


class _Matrix:
    """A matrix in memory that is asked for rows as one on disk is."""

    def __init__(self, rows: Any) -> None:
        self.rows, self.shape = rows, rows.shape

    def take(self, index: Any, axis: int) -> torch.Tensor:
        return self.rows[torch.from_numpy(index)]


def test_all_sources_share_one_pass_and_those_without_directions_get_nothing(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, head = load(tiny_llama)
    texts = token_texts(subject.tokenizer, VOCAB)
    first, second = sae(torch.randn(6, D_MODEL)), RandomDirectionsSource(SITE, D_MODEL, 4, 0.1, 0)
    inside = sae(torch.randn(6, D_MODEL), Site("m", "layers.3.mlp:in"))
    planted = PlantedSource(SITE, {"a": (3,)})
    assert not isinstance(planted, DirectedSource)
    calls = []
    strongest = promoted._strongest
    monkeypatch.setattr(promoted, "_strongest", lambda *args: calls.append(args) or strongest(*args))
    chosen = [
        SelectedFeatures(inside, ("1",)),
        SelectedFeatures(first, ("5", "2")),
        SelectedFeatures(planted, ("a",)),
        SelectedFeatures(second, ("0", "3", "1")),
        SelectedFeatures(first, ()),
    ]
    found = promoted_by_source(chosen, subject, str(tiny_llama), k=7)
    assert len(calls) == 1
    assert [list(tokens) for tokens in found] == [[], ["5", "2"], [], ["0", "3", "1"], []]
    assert found[1]["2"] == promoted_tokens(first.weights.w_dec[2:3], head, texts, k=7)[0]
    assert found[3]["3"] == promoted_tokens(second.directions(["3"]), head, texts, k=7)[0]


def test_a_model_without_an_unembedding_gives_one_warning_and_no_tokens(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subject, _ = load(tiny_llama)
    chosen = [SelectedFeatures(sae(torch.randn(6, D_MODEL)), ("1",))] * 3
    with caplog.at_level(logging.WARNING):
        assert promoted_by_source(chosen, subject, str(tmp_path)) == [{}, {}, {}]
        (tmp_path / "model.safetensors").write_bytes(b"torn")
        assert promoted_by_source(chosen, subject, str(tmp_path)) == [{}, {}, {}]
    said = [record.message for record in caplog.records]
    assert len(said) == 2
    assert said[0] == f"no promoted tokens: no unembedding of {tmp_path} in a safetensors or torch checkpoint"
    assert said[1].startswith(f"no promoted tokens: {tmp_path / 'model.safetensors'}: expected plain tensors")


def test_a_run_keeps_them_beside_its_examples(tiny_llama: Path, tmp_path: Path) -> None:
    options = tiny_options(tmp_path, tiny_llama)
    run(RunConfig.create(**options, controls=("planted", "random-directions")), tmp_path / "run", stages=("collect",))
    with RunStore.open(tmp_path / "run") as store:
        examples, names = read_examples(store, 0), store.source_names()
        rows = {row.feature: row for row in store.features(names[0])}
    weights = np.load(tmp_path / "sae/layer_3/width_64/average_l0_10/params.npz")["W_dec"]
    features = list(examples[names[0]])
    expected = by_transformers(tiny_llama, torch.from_numpy(weights[[int(feature) for feature in features]]), 20)
    assert [list(one.explain.promoted) for one in examples[names[0]].values()] == expected
    assert all(rows[feature].promoted == examples[names[0]][feature].explain.promoted for feature in features)
    kinds = {name: {len(one.explain.promoted) for one in found.values()} for name, found in examples.items()}
    assert all(lengths == ({0} if "planted" in name else {20}) for name, lengths in kinds.items() if lengths)
