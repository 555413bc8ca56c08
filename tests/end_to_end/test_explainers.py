"""The explainers that ask a language model in whole runs: against a server, from its recording, and in the estimate."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from pathlib import Path

import pytest

from evalkit.config.run_config import RunConfig
from evalkit.pipeline.estimate import CountingClient, count_explaining, made_up
from evalkit.pipeline.plan import estimate_asking
from evalkit.pipeline.resolved import ResolvedRun
from evalkit.pipeline.stages import run
from evalkit.registry import create
from evalkit.store.run_store import RunStore
from tests.sources.data.make_neuronpedia import MODEL, WORDS, write_dump
from tests.support.servers import ChatServer

N_FEATURES, N_SHOWN = 6, 20
NAMES = ("default", "contrastive", "cot", "ensemble", "ensemble:contrastive,n=2")
# requests of a feature: candidates of an ensemble, and as many validations of two questions on 5 + 5 windows
CALLS = {"default": 1, "contrastive": 1, "cot": 1, "ensemble": 4 + 4 * 1, "ensemble:contrastive,n=2": 2 + 2 * 1}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Of a run of an export, whose features are words: collected in a second, with inactive windows to show."""
    root = tmp_path_factory.mktemp("dump")
    write_dump(root, n_features=N_FEATURES, n_texts=100, length=64)
    return {
        "model": MODEL, "dictionaries": (str(root),), "n_features": N_FEATURES, "n_explain": N_SHOWN, "n_positives": 10,
        "n_negatives": 10, "controls": ("shuffled",), "explainers": NAMES, "client": "openai:stand-in",
    }  # fmt: skip


def explanations(folder: Path) -> dict[str, dict[str, str]]:
    with RunStore.open(folder) as store:
        (source,) = store.source_names()
        return {name: {f: e.text for f, e in store.explanations(source, name).items()} for name in store.explainers()}


@pytest.mark.slow
def test_a_run_against_a_server_is_what_was_estimated_and_repeats_from_its_recording(
    options: dict[str, object], tmp_path: Path
) -> None:
    with ChatServer() as server:
        config = RunConfig.create(**options, client_options={"base_url": server.base_url})
        run(config, tmp_path / "run", stages=("collect",))
        estimated = estimate_asking(ResolvedRun(config.model_copy(update={"judges": ()})), tmp_path / "run")
        run(config, tmp_path / "run", stages=("explain",))
        asked = server.counts()["finished"]
    assert estimated is not None and "the run's own examples" in estimated.basis
    calls = {name.removeprefix("explain ").partition("@")[0]: load.calls for name, load in estimated.parts.items()}
    assert calls == {name: N_FEATURES * CALLS[name] for name in NAMES}
    # candidates that say the same are validated once, even those of two ensembles: fewer calls, never more
    assert N_FEATURES * (1 + 1 + 1 + 4 + 2 + 1) <= asked <= estimated.load.calls
    found = explanations(tmp_path / "run")
    assert {name.partition("@")[0] for name in found} == set(NAMES)
    for by_feature in found.values():
        assert {f: WORDS[int(f)] in text for f, text in by_feature.items()} == {str(i): True for i in range(N_FEATURES)}
        assert all(re.fullmatch(r"words such as [a-z, ]+", text) for text in by_feature.values())  # no note, no JSON
    replayed = {**options, "client": f"replay:{tmp_path / 'run' / 'calls.sqlite'}"}
    run(RunConfig.create(**replayed), tmp_path / "again", stages=("collect", "explain"))
    assert explanations(tmp_path / "again") == found


def test_the_ensemble_s_note_tells_scores(options: dict[str, object], tmp_path: Path) -> None:
    with ChatServer() as server:
        config = RunConfig.create(
            **{**options, "explainers": ("ensemble",)}, client_options={"base_url": server.base_url}
        )
        run(config, tmp_path, stages=("collect", "explain"))
    with RunStore.open(tmp_path) as store:
        found = store.explanations(store.source_names()[0], "ensemble@stand-in").values()
    pattern = r"candidate \d of 4; balanced accuracy on 5 active and 5 inactive held-out windows: (.*)"
    scores = [[float(x) for x in re.fullmatch(pattern, one.note)[1].split(", ")] for one in found]  # type: ignore[index]
    assert len(scores) == N_FEATURES and all(max(each) >= 0.9 for each in scores)  # features are words


@pytest.mark.parametrize("name", NAMES)
def test_an_estimate_before_there_are_examples_counts_alike(name: str) -> None:
    """On made-up windows, 40 of each kind: with them, 10 + 10 are held back and asked about in two questions."""
    config = RunConfig.create(model="none", dictionaries=("none",))
    part, _, further = name.partition(":")
    explainer = create("explainers", part, **({"of": "contrastive", "n": 2} if further else {}))
    client = CountingClient("m")
    one = made_up(config)
    examples = [replace(one, explain=replace(one.explain, feature=str(index))) for index in range(3)]
    loads = asyncio.run(count_explaining({name: explainer}, examples, client))
    expected = {"ensemble": 4 + 4 * 2, "ensemble:contrastive,n=2": 2 + 2 * 2}.get(name, 1)
    assert loads[f"explain {name}"].calls == 3 * expected
    assert loads[f"explain {name}"].prompt_characters > 3 * expected * 1000
    assert 0 < loads[f"explain {name}"].completion_tokens < 3 * expected * 250
