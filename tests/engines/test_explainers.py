"""Explainers that ask a language model, on the real engine and a real model of 135M parameters: plumbing, no science."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from evalkit.llm.accounting.answer_store import Recording
from evalkit.store.run_store import RunStore
from tests.support.command_line import SMALL, run_command

pytestmark = pytest.mark.slow
NAMES = ("contrastive", "cot", "ensemble")


@pytest.fixture(scope="module")
def explained(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Three features with their explanations, and the calls that were estimated for each explainer."""
    folder = tmp_path_factory.mktemp("explainers") / "run"
    asked = [part for name in NAMES for part in ("--explainer", name)]
    client = ["--client", f"vllm:{smollm2}"]
    run_command("collect", "--model", smollm2, *SMALL, "--out", folder)
    plan = json.loads(run_command("explain", folder, *asked, *client, "--dry-run", "--json").stdout)["language_model"]
    run_command("explain", folder, *asked, *client)
    return folder, {name.partition(" ")[2].partition("@")[0]: part["calls"] for name, part in plan["parts"].items()}


def test_every_feature_is_described_in_one_phrase(explained: tuple[Path, dict[str, int]]) -> None:
    with RunStore.open(explained[0]) as store:
        (source,) = store.source_names()
        assert store.explainers() == [f"{name}@smollm2-135m" for name in NAMES]
        found = {name: store.explanations(source, f"{name}@smollm2-135m") for name in NAMES}
    for name, by_feature in found.items():
        assert len(by_feature) == 3, name
        for one in by_feature.values():
            assert 0 < len(one.text) <= 600 and one.text.isprintable()
            assert not re.search(r'"observations"|"explanation"|^\{', one.text)
    scores = r"((\d\.\d\d|no candidate)(, |$)){4}"  # a model this small may run on to the end of its room
    pattern = (
        rf"candidate [1-4] of 4; balanced accuracy on (?P<n>[23]) active and (?P=n) inactive held-out windows: {scores}"
    )
    assert all(re.fullmatch(pattern, one.note) for one in found["ensemble"].values())


def test_it_took_about_what_was_estimated(explained: tuple[Path, dict[str, int]]) -> None:
    folder, estimated = explained
    assert estimated == {"contrastive": 3, "cot": 3, "ensemble": 3 * (4 + 4)}
    recording = Recording(folder / "calls.sqlite", write=False)
    spent = recording.spent("smollm2-135m")
    recording.close()
    assert 3 * (1 + 1 + 4 + 1) <= spent.calls <= 1.2 * sum(estimated.values())  # a few are asked again
