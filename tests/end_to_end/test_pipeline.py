"""The stages together, on a tiny random model; the real models are in test_real_models."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from evalkit import registry
from evalkit.collect.stage import read_examples
from evalkit.config.run_config import RunConfig
from evalkit.errors import CorpusError, MissingFile, RunMismatch
from evalkit.evaluate.explain_stage import explain_features
from evalkit.evaluate.score_stage import score_features
from evalkit.llm.clients.recorder import Recorder
from evalkit.pipeline.plan import plan
from evalkit.pipeline.stages import load_config, run
from evalkit.records import Message, Response
from evalkit.store.run_store import RunStore, read_run
from tests.support.dictionaries import write_sae
from tests.support.run_folders import WORDS, each_with_each, tiny_options


@pytest.fixture(scope="module")
def options(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return tiny_options(tmp_path_factory.mktemp("inputs"), tiny_llama)


def config(options: dict[str, object], **changes: object) -> RunConfig:
    return RunConfig.create(**{**options, **changes})


@pytest.fixture(scope="module")
def collected(options: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    run(config(options), folder, stages=("collect", "explain"))
    return folder


def example_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "examples").iterdir())}


def test_every_dictionary_and_control_has_features(collected: Path) -> None:
    frames = read_run(collected)
    assert frames.sources["kind"].tolist() == [
        "sae", "rqae", "rqae", "null-random-directions", "null-permuted", "null-random-codes",
    ]  # fmt: skip
    tried = frames.features.groupby("source").size()
    assert (tried == 6).all()
    assert (frames.features["status"] == "ok").sum() > 15
    rqae = frames.features[frames.features["source"].str.contains("rqae/depth-8")]
    assert rqae["density"].between(0.02, 0.1).all()
    real = frames.features[~frames.features["source"].str.contains("null-")]
    pairs = [set(real[real["source"].str.endswith(f"depth-{d}")]["feature"]) for d in (2, 8)]
    assert pairs[0] == pairs[1]  # the same token occurrence at every depth


def test_examples_keep_the_protocol(collected: Path, options: dict[str, object]) -> None:
    with RunStore.open(collected) as store:
        examples = read_examples(store, 0)
    for by_feature in examples.values():
        for one in by_feature.values():
            explain, score = one.explain, one.score
            shown = {example.window for example in explain.positives}
            parts = [score.test.positives, score.test.decoys, score.test.negatives]
            windows = [example.window for part in parts for example in part]
            assert len(set(windows)) == len(windows)
            assert not shown & set(windows)
            documents = {
                e.document for e in (*explain.positives, *score.calibration.positives, *score.calibration.negatives)
            }
            assert not documents & {e.document for part in parts for e in part}
            assert all(e.peak > 0 == score.threshold for part in parts[:2] for e in part)
            assert all(e.peak == 0 for e in score.test.negatives)
            assert len(score.test.positives) in (3, 4, 5) and len(score.test.negatives) == len(score.test.positives)
            assert all(len(e.tokens) == len(e.activations) == 32 for part in parts for e in part)
            assert explain.peak >= max(e.peak for e in explain.positives) - 1e-6


def test_batch_size_changes_no_byte(collected: Path, options: dict[str, object], tmp_path: Path) -> None:
    run(config(options, batch_size=3), tmp_path / "other", stages=("collect",))
    assert example_files(tmp_path / "other") == example_files(collected)


def test_another_seed_draws_other_examples(collected: Path, options: dict[str, object], tmp_path: Path) -> None:
    run(config(options, seed=1), tmp_path / "other", stages=("collect",))
    assert example_files(tmp_path / "other") != example_files(collected)


def test_an_interrupted_collection_goes_on(collected: Path, options: dict[str, object], tmp_path: Path) -> None:
    """Without a shard, the sampled files and the mark of the stage, the same command makes the same bytes again."""
    folder = tmp_path / "run"
    run(config(options), folder, stages=("collect",))
    before = example_files(folder)
    assert before == example_files(collected)
    (folder / "collected" / "shard-000000.npz").unlink()
    for path in (folder / "examples").iterdir():
        path.unlink()
    with RunStore.create(folder, config(options).identity()) as store, store._writing() as connection:
        connection.execute("DELETE FROM stages")
    run(config(options), folder, stages=("collect",))
    assert example_files(folder) == before


def test_explanations_are_words_of_the_corpus(collected: Path) -> None:
    texts = read_run(collected).explanations["text"]
    assert len(texts) > 15 and texts.str.contains("|".join(WORDS)).mean() > 0.8


def test_another_configuration_is_refused(collected: Path, options: dict[str, object]) -> None:
    with pytest.raises(RunMismatch, match="expected a run with n_features = 7; seen n_features = 6"):
        run(config(options, n_features=7), collected)
    assert load_config(collected, explainers=("default",)).explainers == ("default",)
    assert load_config(collected).identity() == config(options).identity()


def test_a_corpus_too_short_says_what_is_missing(options: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("The whale swam under the ship. " * 60)
    with pytest.raises(CorpusError, match="expected at least 10 windows in each pool; seen"):
        run(config(options, corpus=str(path)), tmp_path / "run")


def test_stages_in_the_wrong_order(options: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="expected a run whose examples are collected"):
        run(
            config(options),
            tmp_path / "run",
            stages=("score",),
        )
    with pytest.raises(MissingFile, match="fix: start with `evalkit collect` or `evalkit run`"):
        load_config(tmp_path / "nothing")


def test_the_plan_counts_what_a_run_does(options: dict[str, object], tmp_path: Path) -> None:
    planned = plan(config(options), tmp_path)
    assert planned["features"] == 7 * 6  # and the planted control, which this corpus has no words for
    assert planned["judgements"] == 7 * 6 * 2 * 2 * 2 * 10  # two scorers, own and shuffled, the judge and the baseline


def test_every_built_in_can_be_loaded() -> None:
    broken = [plugin for plugin in registry.list_plugins() if plugin.origin == "built in" and plugin.error]
    assert broken == []


class RuleClient:
    """A language model made of two rules: every feature is "whales", and a text matches if its length is even."""

    name = "rules"

    def __init__(self) -> None:
        self.asked = 0

    async def generate(self, messages: Sequence[Message], *, schema: Any = None, **options: Any) -> Response:
        self.asked += 1
        if schema is not None and "explanation" in schema.get("properties", {}):
            return Response('{"explanation": "whales"}', prompt_tokens=10, completion_tokens=3)
        count = schema["minItems"]
        return Response(json.dumps([len(messages[-1].content) % 2] * count), prompt_tokens=20, completion_tokens=count)


def test_llm_explainer_and_judge_replay_a_recorded_run(
    collected: Path, options: dict[str, object], tmp_path: Path
) -> None:
    """Recorded once, the same explanations and judgements come from the recording alone, through the named client."""
    recording = tmp_path / "calls.sqlite"
    live = RuleClient()
    client = Recorder(recording, live)
    frames = []
    for name in ("live", "replayed"):
        folder = tmp_path / name
        shutil.copytree(collected, folder)
        if name == "live":
            with RunStore.create(folder, config(options).identity()) as store:
                examples = read_examples(store, 0)
                explainers = {"default@rules": registry.create("explainers", "default")}
                asyncio.run(explain_features(store, examples, explainers, client))
                judges = {"llm@rules": registry.create("judges", "llm", client=client)}
                scorers = [registry.create("scorers", name) for name in ("detection", "fuzzing")]
                tests = each_with_each(judges, scorers)
                asyncio.run(score_features(store, examples, list(explainers), tests, shuffled=True, seed=0))
            asked = live.asked
        else:
            asyncio.run(client.close())
            replayed = load_config(
                folder,
                explainers=("default",),
                judges=("llm",),
                client="replay",
                client_options={"path": str(recording)},
            )
            run(replayed, folder, stages=("explain", "score"))
        frames.append(read_run(folder))
    assert asked > 50 and live.asked == asked
    asked_of_model = (one.judgements.query("judge != 'lexical'") for one in frames)
    left, right = (one.sort_values(["source", "feature", "scorer", "control", "item"]) for one in asked_of_model)
    assert len(left) > 100 and left["match"].notna().mean() > 0.9
    pd.testing.assert_frame_equal(left.reset_index(drop=True), right.reset_index(drop=True))
    default = frames[1].explanations[frames[1].explanations["explainer"] == "default@rules"]
    assert set(default["text"]) == {"whales"}


def test_a_dictionary_replaced_in_mid_collection_is_noticed(options: dict[str, object], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sae = write_sae(tmp_path / "sae", 32, 64, 10)
    chosen = config(options, dictionaries=(str(sae),))
    run(chosen, folder, stages=("collect",))
    with RunStore.create(folder, chosen.identity()) as store, store._writing() as connection:
        connection.execute("DELETE FROM stages")
    write_sae(tmp_path / "sae", 32, 64, 10, seed=9)
    with pytest.raises(RunMismatch, match="expected the dictionaries, model and device that its collection began with"):
        run(chosen, folder, stages=("collect",))


def test_deleted_examples_are_made_again(options: dict[str, object], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(config(options), folder, stages=("collect",))
    before = example_files(folder)
    (folder / "examples" / "source-000.parquet").unlink()
    run(config(options), folder, stages=("collect",))
    assert example_files(folder) == before


def test_activations_in_examples_are_positive_whatever_the_sign_of_the_threshold(
    options: dict[str, object], tmp_path: Path
) -> None:
    """At density 0.9 nearly every RQAE threshold is negative; active tokens still stand out from silent ones."""
    folder = tmp_path / "run"
    chosen = config(options, dictionaries=(options["dictionaries"][1],), density=0.6)  # type: ignore[index]
    run(chosen, folder, stages=("collect",))
    frames = read_run(folder)
    assert (frames.features["threshold"] < 0).any()
    with RunStore.open(folder) as store:
        examples = read_examples(store, 0)
    for by_feature in examples.values():
        for one in by_feature.values():
            assert all(e.peak > 0 for e in (*one.explain.positives, *one.score.test.positives, *one.score.test.decoys))
            assert all(not any(e.activations) for e in one.score.test.negatives)


def test_records_carry_the_model_behind_a_part() -> None:
    from evalkit.evaluate.components import recorded_as

    named = type("Named", (), {"variant": "bge-small"})()
    asks = type("Asks", (), {"uses_client": True})()
    part = registry.parse_part("judges", "llm:batch_size=10,mode=single")
    assert recorded_as(part, named, RuleClient())[0] == "llm:batch_size=10,mode=single@bge-small"
    assert recorded_as(part, asks, RuleClient())[0] == "llm:batch_size=10,mode=single@rules"
    assert recorded_as(part, asks, None)[0] == part.label
    assert recorded_as(part, object(), RuleClient())[0] == part.label


@pytest.mark.slow
def test_the_default_embedding_model_has_no_suffix(minilm: Path, tmp_path: Path) -> None:
    assert registry.create("judges", "embedding", model=str(minilm)).variant is None
    other = tmp_path / "bge-small"
    shutil.copytree(minilm, other)
    assert registry.create("judges", "embedding", model=str(other)).variant == "bge-small"
