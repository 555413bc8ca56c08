"""A run on a dump with ready examples, from end to end: no corpus, no subject model, the same files as any run."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evalkit.collect.stage import read_examples
from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig, CorpusError, RunMismatch, UnknownFeature
from evalkit.evaluate.score_stage import score_features
from evalkit.pipeline.plan import plan
from evalkit.pipeline.stages import run
from evalkit.records import Answer, Example, FeatureExamples, JudgeItem
from evalkit.registry import create
from evalkit.store.run_store import RunStore, read_run
from tests.sources.data.make_neuronpedia import MODEL, SOURCE, WORDS, record, write_dump, write_lines
from tests.support.dictionaries import write_sae
from tests.support.run_folders import each_with_each

NAME = f"{MODEL}/layers.20/neuronpedia/{SOURCE}"
LENGTH = 16


def config(*dumps: Path, **changes: Any) -> RunConfig:
    options = {
        "model": "no-such/model",
        "dictionaries": tuple(map(str, dumps)),
        "n_features": 8,
        "n_explain": 8,
        "n_positives": 6,
        "n_negatives": 6,
        "window_length": LENGTH,
        "controls": ("shuffled",),
    }
    return RunConfig.create(**{**options, **changes})


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dump(tmp_path_factory.mktemp("dump"))


@pytest.fixture(scope="module")
def collected(dump: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    run(config(dump), folder, stages=("collect", "explain"))
    return folder


def examples_of(folder: Path, source: str = NAME) -> dict[str, FeatureExamples]:
    with RunStore.open(folder) as store:
        return read_examples(store, 0)[source]


def parts(one: FeatureExamples) -> dict[str, Sequence[Example]]:
    """By pool and kind of example."""
    calibration, test = one.score.calibration, one.score.test
    return {
        "explain+": (*one.explain.positives, *calibration.positives, *calibration.decoys),
        "explain-": (*one.explain.negatives, *calibration.negatives),
        "score+": (*test.positives, *test.decoys),
        "score-": test.negatives,
    }


Texts = dict[tuple[str, ...], dict[str, list[float]]]


def texts_of(folder: Path) -> Texts:
    """The dump read without us: every text, and what is recorded of it (the larger of two records of one feature)."""
    found: Texts = {}
    for file in sorted((folder / "activations").iterdir()):
        for line in gzip.decompress(file.read_bytes()).splitlines():
            one = json.loads(line)
            of_text = found.setdefault(tuple(token.replace("▁", " ") for token in one["tokens"]), {})
            if max(one["values"]) > max(of_text.get(one["index"], [0.0])):
                of_text[one["index"]] = one["values"]
    return found


def places(texts: Texts, example: Example) -> list[tuple[tuple[str, ...], int]]:
    """The texts that hold the window, and where."""
    window = example.tokens
    return [
        (text, start)
        for text in texts
        for start in range(len(text) - len(window) + 1)
        if text[start : start + len(window)] == window
    ]


def example_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "examples").iterdir())}


def test_windows_are_cut_from_the_texts_and_pools_share_no_text(collected: Path, dump: Path) -> None:
    texts = texts_of(dump)
    in_pool: dict[str, set[tuple[str, ...]]] = {"explain": set(), "score": set()}
    documents: dict[str, set[int]] = {"explain": set(), "score": set()}
    offsets = []
    found = examples_of(collected)
    assert len(found) == 8
    for feature, one in found.items():
        for part, windows in parts(one).items():
            for example in windows:
                assert len(example.tokens) == len(example.activations) == LENGTH and "<bos>" not in example.tokens
                ((text, start),) = places(texts, example)
                in_pool[part[:-1]].add(text)
                documents[part[:-1]].add(example.document)
                values = texts[text].get(feature)
                if part.endswith("+"):
                    assert values is not None and start > 0
                    np.testing.assert_array_equal(
                        np.float32(example.activations), np.float32(values[start : start + LENGTH])
                    )
                    usable = [v for i, v in enumerate(values) if _fits(text, i)]
                    assert example.peak == np.float32(max(usable)) and example.decile is not None
                    offsets.append(int(np.argmax(example.activations)))
                else:
                    assert values is None and example.peak == 0 and example.decile is None
    assert in_pool["explain"] and not in_pool["explain"] & in_pool["score"]
    assert not documents["explain"] & documents["score"]
    counts = np.bincount(offsets, minlength=LENGTH)
    assert (counts > 0).all() and counts.max() < 3 * counts.mean()  # the peak lies anywhere in its window


def test_negatives_are_cut_at_one_hashed_place_of_a_text(collected: Path, dump: Path) -> None:
    """Not where another feature has its peak: that would tell them from positives, or put a second feature into all."""
    texts = texts_of(dump)
    cuts: dict[tuple[str, ...], set[int]] = {}
    with_peak = []
    for one in examples_of(collected).values():
        for example in (*parts(one)["explain-"], *parts(one)["score-"]):
            ((text, start),) = places(texts, example)
            cuts.setdefault(text, set()).add(start)
            peaks = [int(np.argmax(values)) for values in texts[text].values()]
            with_peak.append(any(start <= peak < start + LENGTH for peak in peaks))
    assert all(len(starts) == 1 for starts in cuts.values())
    assert 0.1 < np.mean(with_peak) < 0.6


def test_the_first_positions_are_left_out(dump: Path, tmp_path: Path) -> None:
    run(config(dump, skip_first=9), tmp_path / "run", stages=("collect",))
    texts = texts_of(dump)
    starts = [
        start
        for one in examples_of(tmp_path / "run").values()
        for windows in parts(one).values()
        for example in windows
        for _, start in places(texts, example)
    ]
    assert min(starts) == 9


def _fits(text: tuple[str, ...], place: int) -> bool:
    """Whether some window without a BOS and without the first token holds this place."""
    return any(
        start >= 1 and "<bos>" not in text[start : start + LENGTH]
        for start in range(max(0, place - LENGTH + 1), min(place, len(text) - LENGTH) + 1)
    )


def test_counts_and_disjoint_roles(collected: Path) -> None:
    for one in examples_of(collected).values():
        test = one.score.test
        assert len(test.positives) in (5, 6) and len(test.negatives) == len(test.positives)
        assert len(test.positives) - len(test.decoys) in (0, 1)
        assert 6 <= len(one.explain.positives) <= 8 and len(one.explain.negatives) == 8
        assert one.explain.peak >= max(example.peak for example in one.explain.positives)
        assert {example.decile for example in (*test.positives, *test.decoys)} >= {0, 4, 9}
        windows = [example.window for part in parts(one).values() for example in part]
        assert len(windows) == len(set(windows))


def test_the_tables_say_what_was_not_verified(collected: Path, dump: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = read_run(collected)
    (row,) = frames.sources.to_dict("records")
    assert (row["name"], row["kind"], row["site"]) == (NAME, "neuronpedia", "layers.20")
    assert json.loads(row["measured"])["negatives"] == "texts of other features, not verified"
    assert (frames.features["status"] == "ok").all() and len(frames.features) == 8
    for feature, density in zip(frames.features["feature"], frames.features["density"], strict=True):
        assert density == pytest.approx(0.001 * (int(feature) + 1))
    with caplog.at_level(logging.WARNING):
        run(config(dump, controls=("shuffled", "planted")), collected.parent / "logged", stages=("collect",))
    assert f"{NAME}: negatives are texts of other features, not verified to be silent" in caplog.messages
    assert "no planted control: it needs activations on a corpus, which dumps do not contain" in caplog.messages


def test_texts_count_once(collected: Path, dump: Path) -> None:
    """Every first text is recorded twice, and one of them of two features."""
    texts = texts_of(dump)
    with RunStore.open(collected) as store:
        rows = {row.feature: row for row in store.features(NAME)}
    for feature, row in rows.items():
        usable = [
            text
            for text, recorded in texts.items()
            if feature in recorded and any(v > 0 and _fits(text, i) for i, v in enumerate(recorded[feature]))
        ]
        assert row.peak == np.float32(max(max(texts[text][feature]) for text in usable))
        used = sum(len(windows) for part, windows in parts(examples_of(collected)[feature]).items() if part[-1] == "+")
        assert used <= len(usable) <= 41


def test_explanations_name_the_words(collected: Path) -> None:
    found = read_run(collected).explanations.set_index("feature")["text"]
    assert {feature: f"the word {WORDS[int(feature)]}" for feature in found.index} == found.to_dict()


class WordJudge:
    """Says yes to texts with a word of the explanation."""

    name, version, probabilistic = "word", "1", True

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        word = explanation.split()[-1]
        answers = []
        for item in items:
            marked = item.text if item.marks is None else "".join(item.text[a:b] for a, b in item.marks)
            answers.append(Answer(word in marked, float(word in marked), float(word in marked)))
        return answers


def test_scores_of_a_judge_that_reads_words(collected: Path) -> None:
    """Every scorer works on ready examples as on others: right with the explanation, at chance with another's."""
    with RunStore.create(collected, json.loads((collected / "run.json").read_text())) as store:
        scorers = [create("scorers", name) for name in ("detection", "fuzzing")]
        examples = read_examples(store, 0)
        tests = each_with_each({"word": WordJudge()}, scorers)
        work = score_features(store, examples, ["words"], tests, shuffled=True, seed=0)
        asyncio.run(work)
    judged = read_run(collected).judgements
    judged["right"] = judged["match"] == judged["label"]
    right = judged.groupby(["scorer", "control"])["right"].mean()
    assert right["detection", ""] == 1.0 and right["fuzzing", ""] > 0.9
    assert 0.4 < right["detection", "shuffled"] < 0.6 and 0.4 < right["fuzzing", "shuffled"] < 0.6
    assert judged.groupby(["scorer", "control"]).size().min() >= 8 * 9


def test_order_of_lines_changes_no_byte(collected: Path, dump: Path, tmp_path: Path) -> None:
    other = tmp_path / "dump" / MODEL / SOURCE
    lines = [
        json.loads(line)
        for file in (dump / "activations").iterdir()
        for line in gzip.decompress(file.read_bytes()).splitlines()
    ]
    random.Random(3).shuffle(lines)
    for batch in range(3):
        write_lines(other / "activations" / f"batch-{batch}.jsonl", lines[batch::3])
    run(config(other), tmp_path / "run", stages=("collect",))
    assert example_files(tmp_path / "run") == example_files(collected)
    run(config(other, seed=1), tmp_path / "seed", stages=("collect",))
    assert example_files(tmp_path / "seed") != example_files(collected)


@pytest.mark.parametrize("lost", ["source-000.parquet", "windows.parquet"])
def test_what_is_lost_is_made_again(collected: Path, dump: Path, tmp_path: Path, lost: str) -> None:
    folder = tmp_path / "run"
    run(config(dump), folder, stages=("collect", "explain"))
    before = example_files(folder)
    (folder / "examples" / lost).unlink()
    run(config(dump), folder, stages=("collect", "explain"))
    assert example_files(folder) == before == example_files(collected)


def test_what_is_there_is_not_read_again(tmp_path: Path) -> None:
    """The dump is gone and the run goes on; a changed dump is refused where it would be needed."""
    dump = write_dump(tmp_path / "dump")
    folder = tmp_path / "run"
    run(config(dump), folder, stages=("collect",))
    batch = dump / "activations" / "batch-1.jsonl.gz"
    data = batch.read_bytes()
    batch.unlink()
    run(config(dump), folder, stages=("collect", "explain"))
    (folder / "examples" / "windows.parquet").unlink()
    with pytest.raises(RunMismatch, match=f"seen other values of {NAME}"):
        run(config(dump), folder, stages=("collect",))
    batch.write_bytes(data)
    run(config(dump), folder, stages=("collect",))
    assert (folder / "examples" / "windows.parquet").exists()


def test_two_dumps_agree_about_pools(dump: Path, tmp_path: Path) -> None:
    """The same texts under another source's name: a text is in one pool whatever dump it comes from."""
    other = tmp_path / MODEL / "21-other"
    lines = [
        {**json.loads(line), "layer": "21-other", "values": json.loads(line)["values"]}
        for file in (dump / "activations").iterdir()
        for line in gzip.decompress(file.read_bytes()).splitlines()
    ]
    write_lines(other / "activations" / "batch-0.jsonl.gz", lines)
    run(config(dump, other), tmp_path / "run", stages=("collect",))
    pools: dict[str, set[int]] = {"explain": set(), "score": set()}
    for name in (NAME, f"{MODEL}/layers.21/neuronpedia/21-other"):
        for one in examples_of(tmp_path / "run", name).values():
            for part, windows in parts(one).items():
                pools[part[:-1]] |= {example.document for example in windows}
    assert pools["explain"] and not pools["explain"] & pools["score"]
    with pytest.raises(BadConfig):
        run(config(dump, dump), tmp_path / "twice", stages=("collect",))


def test_a_mixture_is_refused_before_anything_is_done(dump: Path, tmp_path: Path) -> None:
    write_sae(tmp_path / "sae", 32, 64, 10)
    for order in ((dump, tmp_path / "sae"), (tmp_path / "sae", dump)):
        mixed = config(*order)
        for call in (lambda c=mixed: plan(c, tmp_path / "run"), lambda c=mixed: run(c, tmp_path / "run")):
            with pytest.raises(BadConfig) as caught:
                call()
            assert str(caught.value) == (
                "dictionaries: expected either dictionaries, which need a corpus, or dumps, which contain their examples; "
                f"seen both: the dictionary model/layers.3/sae/width-64/l0-10 and the dump {NAME}; "
                "fix: make two runs with two --out folders"
            )
        assert not (tmp_path / "run" / "examples").exists()


def test_the_plan_opens_a_dump(dump: Path, tmp_path: Path) -> None:
    planned = plan(config(dump), tmp_path / "run")
    assert (planned["dictionaries"], planned["features"]) == ([NAME], 8)


def test_named_features(dump: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(config(dump, feature_ids=("3", "77", "5"), n_features=3), tmp_path / "run", stages=("collect",))
    with RunStore.open(tmp_path / "run") as store:
        rows = [(row.feature, row.status, row.reason) for row in store.features(NAME)]
    assert rows == [
        ("3", "ok", None),
        ("77", "ineligible", "active in 0 windows of the explain pool, 6 needed"),
        ("5", "ok", None),
    ]
    with pytest.raises(UnknownFeature, match="expected one of its 10 features with activating texts, such as 0, 1, 2"):
        run(config(dump, feature_ids=("77",), n_features=1), tmp_path / "none", stages=("collect",))
    with pytest.raises(BadConfig, match="expected features of a dump by number or by id"):
        run(config(dump, density_band=(0.001, 0.01)), tmp_path / "band", stages=("collect",))


def test_too_few_texts_say_how_many_would_do(dump: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        run(config(dump, n_positives=50, n_negatives=50), tmp_path / "run", stages=("collect",))
    assert "expected a feature with 50 activating texts and 50 others in each pool; seen at most" in str(caught.value)
    fix = str(caught.value).split("--positives ")[1]
    half = int(fix.split()[0])
    assert fix == f"{half} --negatives {half}, which half of the features have"
    run(config(dump, n_positives=half, n_negatives=half), tmp_path / "half", stages=("collect",))
    assert (read_run(tmp_path / "half").features["status"] == "ok").sum() >= 4
    with pytest.raises(CorpusError, match=r"expected texts with 100 successive tokens without a BOS; seen none"):
        run(config(dump, window_length=100), tmp_path / "long", stages=("collect",))


def test_texts_that_are_too_short_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dump = write_dump(tmp_path / "dump")
    short = record(0, ["▁tiny", "▁whale"], [0.0, 1.0])
    write_lines(dump / "activations" / "batch-9.jsonl", [short])
    with caplog.at_level(logging.WARNING):
        run(config(dump), tmp_path / "run", stages=("collect",))
    assert f"{NAME}: 1 of 401 texts are too short for a window" in caplog.messages


@pytest.mark.slow
def test_with_the_embedding_judge(dump: Path, tmp_path: Path, minilm: Path) -> None:
    small = config(dump, embedding_model=str(minilm), n_features=4)
    run(small, tmp_path / "run")
    judged = read_run(tmp_path / "run").judgements
    right = (judged["match"] == judged["label"]).groupby([judged["scorer"], judged["control"]]).mean()
    assert right["detection", ""] > 0.9 and right["fuzzing", ""] > 0.75
    assert right["detection", "shuffled"] < 0.7
