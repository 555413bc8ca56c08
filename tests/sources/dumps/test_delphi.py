"""Latent caches of eai-delphi: what is read against the library's own files and numbers, a run on one, hostile files."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evalkit.collect.stage import read_examples
from evalkit.config.run_config import DictionarySpec, RunConfig
from evalkit.errors import BadConfig, BadFile, CorpusError, EvalkitError, MissingFile, UnknownFeature
from evalkit.pipeline.stages import run
from evalkit.protocols import ExampleSource, ReadyExamples
from evalkit.records import Site
from evalkit.registry import create
from evalkit.sources import open_dictionary
from evalkit.sources.dumps import delphi, delphi_cache
from evalkit.sources.dumps.delphi import DelphiReader, DelphiSource
from evalkit.store.run_store import RunStore, read_run
from tests.support.hostile import Bomb, cut
from tests.support.paths import DELPHI_LATENTS, DELPHI_TOKENIZER, SOURCES_DATA

DATA = SOURCES_DATA / "delphi"
LATENTS, TOKENIZER = DELPHI_LATENTS, DELPHI_TOKENIZER
HOOKS = ("layers.0", "layers.1.mlp")
EXPECTED = np.load(DATA / "expected.npz")
WIDTH, LENGTH = 48, 16
LIVE = int((EXPECTED["layers.0"] > 0).any(axis=(0, 1)).sum())


def source(folder: Path = LATENTS / "layers.0", **options: Any) -> DelphiSource:
    (found,) = DelphiReader().read(folder, **{"tokenizer": str(TOKENIZER), **options})
    return found


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def dense(examples: ReadyExamples, tokens: np.ndarray) -> dict[int, dict[str, np.ndarray]]:
    """What is recorded, by the number of the sequence; sequences are told by their text."""
    texts = {tokenizer().decode(row): number for number, row in enumerate(tokens)}
    assert len(texts) == len(tokens)
    return {texts["".join(text.tokens)]: dict(text.activations) for text in examples.texts}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A cache of one hook point that says where its tokenizer is."""
    folder = shutil.copytree(LATENTS / "layers.0", tmp_path / "latents" / "layers.0")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_name": str(TOKENIZER)}))
    return folder


def rewrite(file: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    held = load_file(file)
    change(held)
    save_file(held, file)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_activation_is_that_of_the_model(hook: str) -> None:
    """Against the model's own hooks, and the densities against the frequencies that the library's loader computes."""
    one = source(LATENTS / hook)
    truth = EXPECTED[hook].astype(np.float32)
    features = one.features()
    assert features == [str(latent) for latent in np.flatnonzero((truth > 0).any(axis=(0, 1)))]
    found = one.examples(features)
    recorded = dense(found, EXPECTED["tokens"])
    assert sorted(recorded) == list(range(len(truth)))
    for number, activations in recorded.items():
        for latent in range(WIDTH):
            values = activations.get(str(latent), np.zeros(truth.shape[1], np.float32))
            np.testing.assert_array_equal(values, truth[number, :, latent])
    frequencies = EXPECTED[f"{hook}.frequency"]
    assert found.densities == pytest.approx({feature: frequencies[int(feature)] for feature in features})
    peaks = {f: max(float(a[f].max()) for a in recorded.values() if f in a) for f in features}
    assert peaks == pytest.approx({f: EXPECTED[f"{hook}.peak"][int(f)] for f in features})


def test_texts_are_the_sequences_and_boundaries_are_masked() -> None:
    found = source().examples(["3"])
    special = tokenizer().bos_token
    assert all(text.complete for text in found.texts)
    for text in found.texts:
        assert len(text.tokens) == 48
        assert [piece == special for piece in text.tokens] == (~text.valid).tolist()
    assert any(not text.valid.all() for text in found.texts)
    assert any("é" in piece for text in found.texts for piece in text.tokens)  # a character of two tokens
    assert len({text.text for text in found.texts}) == len(EXPECTED["tokens"])


def test_recognised_and_named() -> None:
    reader = create("sources", "delphi")
    assert reader.matches(LATENTS / "layers.0") and reader.matches(LATENTS) and reader.matches(DATA)
    assert not any(reader.matches(path) for path in (TOKENIZER, DATA.parent / "saelens", DATA / "none", Path(__file__)))
    opened = open_dictionary(LATENTS)
    assert [one.name for one in opened] == ["tiny-llama/layers.0/delphi", "tiny-llama/layers.1.mlp/delphi"]
    assert all(isinstance(one, ExampleSource) for one in opened)
    (one,) = reader.read(LATENTS / "layers.0", site="model.layers.7", model="other", name="mine")
    assert (one.name, one.site) == ("mine", Site("other", "layers.7"))
    assert (one.info.kind, one.info.width) == ("delphi", WIDTH)
    assert one.info.declared == {"negatives": "verified: every activation is cached"}
    with pytest.raises(BadConfig, match="one hook point, because the option name= is given; seen 2 hook points"):
        reader.read(LATENTS, name="mine")
    with pytest.raises(MissingFile, match="no such folder at or below it"):
        reader.read(TOKENIZER)


def test_a_whole_folder_of_the_library_opens(copy: Path) -> None:
    """``results/NAME``: beside latents/ there are explanations, scores and a pickle of firing counts."""
    top = copy.parent.parent
    (top / "log").mkdir()
    (top / "log" / "hookpoint_firing_counts.pt").write_bytes(pickle.dumps(Bomb(top / "ran")))
    (top / "explanations").mkdir()
    (top / "explanations" / "layers.0_latent3.txt").write_text('"sea"')
    (one,) = open_dictionary(top, format="delphi")
    assert one.name == "tokenizer/layers.0/delphi" and len(one.features()) == LIVE
    assert not (top / "ran").exists()


def test_samples_are_bounded_and_do_not_depend_on_the_order_of_entries(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer sequences than there are: the same for entries in any order, split in any way, read in any ranges."""
    monkeypatch.setattr(delphi, "_SHOWN", 5)
    monkeypatch.setattr(delphi, "_OTHERS", 3)
    features = ["12", "29", "39"]

    def summary() -> list[Any]:
        found = source(copy).examples(features)
        return [
            (text.text, text.tokens, text.complete, {f: v.tolist() for f, v in text.activations.items()})
            for text in found.texts
        ]

    whole = summary()
    truth = EXPECTED["layers.0"] > 0
    complete = [one for one in whole if one[2]]
    assert len(complete) == 3 and 5 < len(whole) <= 3 + 3 * 5
    numbers = dense(source(copy).examples(features), EXPECTED["tokens"])
    in_all = {n for n, text in zip(numbers, source(copy).examples(features).texts, strict=True) if text.complete}
    for feature in features:
        fires = set(np.flatnonzero(truth[:, :, int(feature)].any(axis=1)).tolist())
        recorded = {number for number, activations in numbers.items() if feature in activations}
        assert recorded <= fires and recorded >= fires & in_all and len(recorded) >= min(5, len(fires))
    random = np.random.default_rng(0)
    for file in copy.glob("*.safetensors"):

        def shuffled(held: dict[str, np.ndarray]) -> None:
            order = random.permutation(len(held["activations"]))
            held["locations"], held["activations"] = held["locations"][order], held["activations"][order]

        rewrite(file, shuffled)
    monkeypatch.setattr(delphi_cache, "_ENTRIES", 37)
    monkeypatch.setattr(delphi_cache, "_TOKENS", 100)
    assert summary() == whole


def test_of_files_sorted_by_latent_only_their_ranges_are_read_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def by_latent(held: dict[str, np.ndarray]) -> None:
        order = np.argsort(held["locations"][:, 2], kind="stable")
        held["locations"], held["activations"] = held["locations"][order], held["activations"][order]

    for file in copy.glob("*.safetensors"):
        rewrite(file, by_latent)
    monkeypatch.setattr(delphi_cache, "_ENTRIES", 64)
    one = source(copy)
    n_ranges = len(one.cache._read_once[1])
    ranges = list(one.cache.entries([9]))
    count = int((EXPECTED["layers.0"][:, :, 9] > 0).sum())
    assert sum(len(entries.values) for entries in ranges) == count
    assert len(ranges) <= count // 64 + 2 < n_ranges / 2
    assert {int(latent) for entries in ranges for latent in entries.latents} == {9}


def test_copies_of_a_sequence_count_once(copy: Path) -> None:
    for file in copy.glob("*.safetensors"):

        def doubled(held: dict[str, np.ndarray]) -> None:
            held["tokens"][1] = held["tokens"][0]

        rewrite(file, doubled)
    found = source(copy).examples(["1", "2"])
    assert len(found.texts) == len(EXPECTED["tokens"]) - 1


def test_sizes_that_half_precision_cannot_hold(copy: Path) -> None:
    """float16 stores 70,000 as infinite: taken as its largest number. Negative activations are not active ones."""
    file = copy / "0_15.safetensors"

    def large(held: dict[str, np.ndarray]) -> None:
        held["activations"][0], held["activations"][1] = np.inf, -2.0

    before = load_file(file)["locations"]
    rewrite(file, large)
    one = source(copy)
    recorded = dense(one.examples(one.features()), EXPECTED["tokens"])
    sequence, position, latent = (int(number) for number in before[0])
    assert recorded[sequence][str(latent)][position] == 65504
    sequence, position, latent = (int(number) for number in before[1])
    assert recorded[sequence].get(str(latent), np.zeros(48))[position] == 0


def config(*folders: Path, **changes: Any) -> RunConfig:
    options: dict[str, Any] = {
        "model": "no-such/model",
        "dictionaries": tuple(map(str, folders)),
        "n_features": 8,
        "n_explain": 6,
        "n_positives": 5,
        "n_negatives": 5,
        "window_length": LENGTH,
        "controls": ("shuffled",),
    }
    return RunConfig.create(**{**options, **changes})


def test_a_run_on_a_cache_verifies_its_negatives(copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every window against the dense activations: positives fire, negatives do not, and the two never overlap."""
    with caplog.at_level(logging.WARNING):
        run(config(copy), tmp_path / "run", stages=("collect", "explain"))
    assert "not verified" not in caplog.text
    frames = read_run(tmp_path / "run")
    (row,) = frames.sources.to_dict("records")
    measured = json.loads(row["measured"])
    assert measured["negatives"].startswith("verified") and measured["negatives_unverified"] is False
    texts = {tokenizer().decode(ids): number for number, ids in enumerate(EXPECTED["tokens"])}
    truth = EXPECTED["layers.0"].astype(np.float32)
    with RunStore.open(tmp_path / "run") as store:
        found = read_examples(store, 0)[row["name"]]
        shares = {one.feature: one.window_share for one in store.features(row["name"])}
    assert len(found) >= 6
    elsewhere = 0
    for feature, one in found.items():
        test, calibration = one.score.test, one.score.calibration
        fires = truth[:, :, int(feature)]

        def places(
            tokens: tuple[str, ...], values: tuple[float, ...], fires: np.ndarray = fires
        ) -> list[tuple[int, int]]:
            """Sequences that hold the window with these activations, and where."""
            hits = []
            for text, number in texts.items():
                pieces = pieces_of(number)
                for start in range(len(pieces) - LENGTH + 1):
                    if pieces[start : start + LENGTH] == tokens and text:
                        hits.append((number, start, np.array_equal(fires[number, start : start + LENGTH], values)))
            assert hits and any(same for *_, same in hits)
            return [(number, start) for number, start, same in hits if same]

        for example in (*one.explain.positives, *test.positives, *test.decoys, *calibration.positives):
            assert example.peak > 0 and places(example.tokens, example.activations)
        for example in (*test.negatives, *calibration.negatives, *one.explain.negatives):
            assert example.peak == 0
            elsewhere += any(fires[number].any() for number, _ in places(example.tokens, example.activations))
        assert 0 < shares[feature] < 1
        true_share = np.mean([fires[:, s : s + LENGTH].any(axis=1) for s in range(1, 48 - LENGTH + 1)])
        assert abs(shares[feature] - true_share) < 0.25
    assert elsewhere > 10  # windows of texts in which the feature does fire, elsewhere: as verified as any other


_PIECES: dict[int, tuple[str, ...]] = {}


def pieces_of(number: int) -> tuple[str, ...]:
    if not _PIECES:
        by_text = {"".join(text.tokens): text.tokens for text in source().examples(["3"]).texts}
        _PIECES.update({n: by_text[tokenizer().decode(ids)] for n, ids in enumerate(EXPECTED["tokens"])})
    return _PIECES[number]


def test_a_dense_feature_has_negatives(copy: Path, tmp_path: Path) -> None:
    """One that fires in every text, though not in every window of it."""
    truth = EXPECTED["layers.0"] > 0
    share = truth.any(axis=1).mean(axis=0)
    dense_one = int(np.argmax(np.where(truth.mean(axis=(0, 1)) < 0.2, share, 0)))
    assert share[dense_one] > 0.8
    chosen = config(copy, feature_ids=(str(dense_one),), n_features=1, window_length=6)
    run(chosen, tmp_path / "run", stages=("collect",))
    assert read_run(tmp_path / "run").features["status"].tolist() == ["ok"]


def test_the_tokenizer_is_that_of_the_config_or_the_option(copy: Path, tmp_path: Path) -> None:
    given = source(LATENTS / "layers.0").examples(["3"])
    said = DelphiReader().read(copy)[0].examples(["3"])
    assert [text.text for text in said.texts] == [text.text for text in given.texts]
    with pytest.raises(MissingFile) as caught:
        source(copy, tokenizer=str(tmp_path / "none")).examples(["3"])
    assert str(caught.value).startswith(
        f"tokenizer {tmp_path}/none of {copy}: expected the tokenizer of the cached model"
    )
    assert "fix: set the dictionary's option tokenizer to a folder with it" in str(caught.value)
    rewrite(copy / "0_15.safetensors", lambda held: held["tokens"].__setitem__((4, 2), 300))
    with pytest.raises(BadFile, match=r"below 300; seen 300 in sequence 4"):
        source(copy).examples(["3"])


def test_unknown_features_and_too_many_activations(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for feature in ("48", "8", "-1", "x", "١", "1.0"):
        with pytest.raises(UnknownFeature, match=re.escape(f"feature {feature!r} of tiny-llama/layers.0/delphi")):
            source().examples([feature])
    monkeypatch.setattr(delphi, "_MOST_ENTRIES", 100)
    with pytest.raises(
        CorpusError, match=r"at most 100 activations of the selected features .* fix: select fewer features"
    ):
        source().examples(["0", "1", "2"])


def test_reading_loads_no_torch() -> None:
    code = f"""
import sys
from evalkit.sources.dumps.delphi import DelphiReader
(one,) = DelphiReader().read(__import__("pathlib").Path({str(LATENTS / "layers.0")!r}))
print(len(one.features()), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(LIVE), "False"]


def put(name: str, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda held: held.__setitem__(name, value)


def at(name: str, place: Any, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda held: held[name].__setitem__(place, value)


BAD: list[tuple[Callable[[dict[str, np.ndarray]], Any], str]] = [
    (
        lambda h: h.pop("activations"),
        "0_15.safetensors: activations: expected a tensor with this name; seen only these tensors: locations",
    ),
    (
        lambda h: h.pop("locations"),
        "0_15.safetensors: locations: expected a tensor with this name; seen only these tensors: activations",
    ),
    (lambda h: put("locations", h["locations"][:-1].copy())(h), r"locations: expected shape \(\d+, 3\); seen shape"),
    (lambda h: put("locations", h["locations"][:, :2].copy())(h), r"locations: expected shape \(\d+, 3\); seen shape"),
    (
        lambda h: put("activations", h["activations"][None])(h),
        r"activations: expected shape \(entries\); seen shape \(1, ",
    ),
    (lambda h: put("tokens", h["tokens"][0].copy())(h), r"tokens: expected shape \(sequences, positions\)"),
    (lambda h: put("tokens", h["tokens"][:0].copy())(h), r"tokens: expected shape \(sequences, positions\)"),
    (
        lambda h: put("tokens", h["tokens"][:-1].copy())(h),
        r"the same tokens in every split; seen shape \(72, 48\), and",
    ),
    (lambda h: put("tokens", h["tokens"].astype(np.float32))(h), "tokens: expected dtype I16"),
    (lambda h: put("locations", h["locations"].astype(np.float16))(h), "locations: expected dtype I16"),
    (
        lambda h: put("activations", h["locations"][:, 0].copy())(h),
        "activations: expected dtype F16, F32, F64; seen dtype U16",
    ),
    (at("locations", (5, 0), 72), "locations: expected sequences from 0 to 71; seen 72 in entry 5"),
    (at("locations", (6, 1), 48), "locations: expected positions from 0 to 47; seen 48 in entry 6"),
    (at("locations", (7, 2), 16), "locations: expected latents from 0 to 15; seen 16 in entry 7"),
    (
        lambda h: (put("locations", h["locations"].astype(np.int64))(h), at("locations", (8, 0), -1)(h)),
        "locations: expected sequences from 0 to 71; seen -1 in entry 8",
    ),
    (at("activations", 9, np.nan), "activations: expected finite numbers; seen nan in entry 9"),
    (
        lambda h: (put("activations", h["activations"].astype(np.float32))(h), at("activations", 3, np.inf)(h)),
        "activations: expected finite numbers; seen inf in entry 3",
    ),
    (at("tokens", (4, 2), -5), "tokens: expected token ids of 0 or more; seen -5"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_bad_file_is_one_line(copy: Path, number: int) -> None:
    change, message = BAD[number]
    rewrite(copy / "0_15.safetensors", change)
    with pytest.raises(BadFile, match=message) as caught:
        source(copy).examples(["3"])
    assert "0_15.safetensors" in str(caught.value) and str(copy) in str(caught.value)
    assert "\n" not in str(caught.value) and "cache the latents again" in str(caught.value)


def test_torn_and_foreign_files_are_one_line(copy: Path) -> None:
    file = copy / "0_15.safetensors"
    cut(file)
    refused(copy, BadFile, f"{file}: expected plain tensors in a .safetensors file")
    file.write_bytes(pickle.dumps(Bomb(copy / "ran")))
    refused(copy, BadFile, f"{file}: expected plain tensors in a .safetensors file")
    assert not (copy / "ran").exists()
    file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    refused(copy, BadFile, f"{file}: expected plain tensors in a .safetensors file")
    file.unlink()
    file.mkdir()
    refused(copy, BadFile, f"{file}: expected plain tensors")


def test_configs_and_names_are_checked(copy: Path) -> None:
    shutil.copy(copy / "0_15.safetensors", copy / "8_19.safetensors")
    refused(copy, BadFile, f"{copy}: expected splits that do not overlap; seen 0_15.safetensors and 8_19.safetensors")
    (copy / "8_19.safetensors").rename(copy / "99_4000000000.safetensors")
    refused(
        copy,
        BadFile,
        "and LAST below 4194304; seen 99_4000000000.safetensors",
    )
    (copy / "99_4000000000.safetensors").unlink()
    for text, message in (("{", "a JSON object"), ("{}", "the name of the cached model; seen None")):
        (copy / "config.json").write_text(text)
        refused(copy, BadFile, message)


def test_a_cache_without_tokens_is_refused(copy: Path) -> None:
    for file in copy.glob("*.safetensors"):
        rewrite(file, lambda held: held.pop("tokens"))
    refused(
        copy,
        BadFile,
        "tokens: expected tokens in at least one split; seen none; fix: cache the latents again with",
    )


def refused(folder: Path, kind: type[EvalkitError], message: str) -> None:
    with pytest.raises(kind) as caught:
        source(folder).features()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_two_hook_points_in_one_run(copy: Path, tmp_path: Path) -> None:
    """The same tokens: a text is in one pool for both; options are given as for any dictionary."""
    spec = DictionarySpec(path=str(LATENTS), format="delphi", model=str(TOKENIZER.name))
    assert spec.format == "delphi"
    other = shutil.copytree(LATENTS / "layers.1.mlp", copy.parent / "layers.1.mlp")
    shutil.copy(copy / "config.json", other / "config.json")
    run(config(copy.parent, n_features=4), tmp_path / "run", stages=("collect",))
    pools: dict[str, set[int]] = {"explain": set(), "score": set()}
    with RunStore.open(tmp_path / "run") as store:
        assert len(store.source_names()) == 2
        for features in read_examples(store, 0).values():
            for one in features.values():
                pools["explain"] |= {e.document for e in (*one.explain.positives, *one.explain.negatives)}
                pools["score"] |= {e.document for e in (*one.score.test.positives, *one.score.test.negatives)}
    assert pools["explain"] and not pools["explain"] & pools["score"]
