"""Estimates of calls, tokens and cost, held against what a run then really sends to a server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from evalkit.config.run_config import RunConfig
from evalkit.llm.accounting.answer_store import Recording
from evalkit.pipeline.estimate import CountingClient, count_explaining, made_up
from evalkit.pipeline.plan import estimate_asking, plan
from evalkit.pipeline.resolved import ResolvedRun
from evalkit.pipeline.stages import run
from evalkit.registry import create
from evalkit.store.run_store import RunStore
from tests.support.run_folders import tiny_options
from tests.support.servers import ChatServer

ASKING = {
    "explainers": ("default", "words"),
    "judges": ("llm", "llm:single"),
    "scorers": ("detection", "fuzzing"),
    "controls": ("shuffled",),
    "client": "openai:stand-in",
}


@pytest.fixture(scope="module")
def options(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return tiny_options(tmp_path_factory.mktemp("inputs"), tiny_llama) | ASKING


def prices(folder: Path) -> Path:
    path = folder / "prices.toml"
    path.write_text("[stand-in]\nprompt = 2.0\ncompletion = 10.0\n")
    return path


def test_an_estimate_on_the_runs_own_examples_is_what_is_then_sent(options: dict[str, object], tmp_path: Path) -> None:
    """Of calls; afterwards nothing is left to pay, and estimate and bill stand in the records."""
    with ChatServer(owned_by="vllm") as server:
        config = RunConfig.create(**options, client_options={"base_url": server.base_url}, prices=prices(tmp_path))
        folder = tmp_path / "run"
        run(config, folder, stages=("collect",))
        before = estimate_asking(ResolvedRun(config), folder)
        assert before is not None and before.load.recorded == 0 and before.cost is not None
        assert "the run's own examples" in before.basis and server.counts().get("received", 0) == 0
        run(config, folder)
        after = estimate_asking(ResolvedRun(config), folder)
    with RunStore.open(folder) as store:
        (asked,) = store.asked()
    # a reply that names the same words for two features makes their questions one: fewer calls, never more
    assert 0.8 * before.load.calls <= asked.calls <= before.load.calls
    assert asked.calls == server.counts()["finished"]
    assert asked.cost == pytest.approx((2.0 * asked.prompt_tokens + 10.0 * asked.completion_tokens) / 1e6)
    assert asked.estimate["calls"] == round(before.load.calls)
    assert after is not None and after.load.calls == after.load.recorded and after.load.prompt_tokens == 0
    assert f"{asked.calls:,} calls" in asked.sentence() and "estimated" in asked.sentence()


def test_an_estimate_before_anything_is_collected_counts_the_most_that_can_be_asked(
    options: dict[str, object], tmp_path: Path
) -> None:
    planned = plan(RunConfig.create(**options, client_options={"base_url": "http://127.0.0.1:9/v1"}), tmp_path / "no")
    asking = planned["language_model"]
    n_features, n_explainers = 3 * 6, 2
    tests = n_features * n_explainers * 2 * 2  # own and shuffled explanation, two scorers
    assert asking["calls"] == n_features * 1 + tests * (10 // 5) + tests * 10  # one explainer asks; lists of 5; singles
    assert asking["recorded_calls"] == 0 and asking["cost_usd"] is None
    assert asking["seconds"] == round(asking["calls"] * 2.0 / 64)  # two seconds a call, 64 at a time
    assert "made-up examples" in asking["basis"] and not (tmp_path / "no").exists()


def test_only_explanations_that_will_be_scored_are_counted(options: dict[str, object], tmp_path: Path) -> None:
    """A run has explanations by ``default`` and by ``default`` with an option: scoring one is not charged for both."""
    with ChatServer(owned_by="vllm") as server:
        served = {**options, "judges": ("llm",), "client_options": {"base_url": server.base_url}}
        both = RunConfig.create(**{**served, "explainers": ("default", "default:n_examples=2")})
        run(both, tmp_path, stages=("collect",))
        run(both, tmp_path, stages=("explain",))
        for explainers in (("default:n_examples=2",), ()):  # none named: all that are recorded
            config = RunConfig.create(**{**served, "explainers": explainers})
            before = estimate_asking(ResolvedRun(config), tmp_path)
            judgements = plan(config, tmp_path)["judgements"]
            n_received = server.counts().get("received", 0)
            run(config, tmp_path, stages=("score",))
            assert before is not None
            to_send = before.load.calls - before.load.recorded
            n_sent = server.counts()["received"] - n_received
            assert 0.8 * to_send <= n_sent <= to_send
            # the most there can be: own and shuffled explanation, two scorers, ten windows
            assert judgements == 3 * 6 * (len(explainers) or 2) * 2 * 2 * 10


def test_without_a_language_model_there_is_nothing_to_estimate(options: dict[str, object], tmp_path: Path) -> None:
    silent = RunConfig.create(**{**options, "client": None, "explainers": ("words",), "judges": ("embedding",)})
    assert plan(silent, tmp_path)["language_model"] is None


def test_the_time_of_a_call_is_learned_from_earlier_ones(options: dict[str, object], tmp_path: Path) -> None:
    with ChatServer(owned_by="vllm", delay_s=0.02) as server:
        first = {**options, "judges": ("llm",), "client_options": {"base_url": server.base_url, "concurrency": 4}}
        run(RunConfig.create(**first), tmp_path)
        more = estimate_asking(ResolvedRun(RunConfig.create(**{**first, "judges": ("llm", "llm:single")})), tmp_path)
    recording = Recording(tmp_path / "calls.sqlite", write=False)
    spent = recording.spent("stand-in")
    recording.close()
    assert more is not None and more.seconds > 0 and more.load.calls > more.load.recorded > 0
    to_make = more.load.calls - more.load.recorded
    assert more.seconds == pytest.approx(to_make * spent.seconds / spent.calls / 4)
    assert more.load.prompt_tokens / more.load.prompt_characters == pytest.approx(
        spent.prompt_tokens / spent.prompt_characters
    )


def test_reading_the_corpus_is_counted_and_timed(options: dict[str, object], tmp_path: Path) -> None:
    """80 documents of 160 words; a token of that text has three to five characters."""
    options = {**options, "client": None, "explainers": ("words",), "judges": ("embedding",)}
    planned = plan(RunConfig.create(**options), tmp_path)["reading"]
    characters = sum(len(json.loads(line)["text"]) for line in Path(str(options["corpus"])).read_text().splitlines())
    assert characters / 5 < planned["tokens"] < characters / 3 and planned["seconds"] >= 0
    assert plan(RunConfig.create(**options, max_tokens=500), tmp_path)["reading"]["tokens"] == 500
    nowhere = plan(RunConfig.create(**{**options, "model": "nobody/nothing"}), tmp_path)["reading"]
    assert nowhere["seconds"] is None


def test_a_run_and_its_estimate_work_inside_a_running_loop(options: dict[str, object], tmp_path: Path) -> None:
    """As in a notebook, where a loop is always running."""
    with ChatServer(owned_by="vllm") as server:
        small = {**options, "judges": ("llm",), "client_options": {"base_url": server.base_url}}

        async def cell() -> None:
            run(RunConfig.create(**small), tmp_path)

        asyncio.run(cell())
    with RunStore.open(tmp_path) as store:
        (asked,) = store.asked()
    assert asked.calls > 0 and asked.estimate["calls"] >= asked.calls


def test_a_feature_that_cannot_be_explained_asks_nothing(options: dict[str, object]) -> None:
    config = RunConfig.create(**options)
    one = made_up(config)
    silent = replace(one, explain=replace(one.explain, promoted=()))
    explainers = {"token-logits": create("explainers", "token-logits")}
    client = CountingClient("m")
    loads = asyncio.run(count_explaining(explainers, [one, silent, silent], client))
    assert loads["explain token-logits"].calls == 1


def test_batches_take_their_window_not_a_time_learned_from_calls(options: dict[str, object], tmp_path: Path) -> None:
    """Explanations are one wave of batches, judgements rest on their answers; nothing is said of seconds."""
    batched = {**options, "client": "openai-batch:stand-in", "client_options": {"base_url": "http://127.0.0.1:9/v1"}}
    both = RunConfig.create(**batched)
    planned = plan(both, tmp_path)["language_model"]
    assert planned["batches"] == {"waves": 2, "window": "24h"} and planned["seconds"] is None
    judged = RunConfig.create(**{**batched, "explainers": ("words",)})
    assert plan(judged, tmp_path)["language_model"]["batches"]["waves"] == 1
