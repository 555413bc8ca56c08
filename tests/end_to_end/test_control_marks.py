"""What a control is, the run says: no name and no kind that a dictionary gives itself makes it one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from evalkit.collect.stage import read_examples
from evalkit.config.run_config import DictionarySpec, RunConfig
from evalkit.evaluate.explain_stage import explain_features
from evalkit.pipeline.stages import run
from evalkit.registry import create
from evalkit.report.rows import sorted_sources
from evalkit.report.tables import summary_table
from evalkit.store.run_store import RunStore, read_run
from tests.sources.data.make_neuronpedia import write_dump
from tests.support.run_folders import tiny_options


def test_a_dictionary_that_is_named_as_a_control_is_scored_as_a_dictionary(tiny_llama: Path, tmp_path: Path) -> None:
    options = tiny_options(tmp_path, tiny_llama)
    name = "tiny-llama/layers.3/null-planted"
    spec = DictionarySpec(path=str(tmp_path / "sae"), name=name)
    config = RunConfig.create(
        **options | {"dictionaries": (spec,), "controls": ("shuffled", "permuted"), "explainers": ("words",)},
        judges=("lexical",),
        scorers=("detection",),
    )
    run(config, tmp_path / "run")
    frames = read_run(tmp_path / "run")
    marks = {source.name: source.is_null for source in sorted_sources(frames)}
    assert marks == {name: False, "tiny-llama/layers.3/null-permuted": True}
    assert set(summary_table(frames).query("dictionary == @name")["kind"]) == {"sae"}
    with RunStore.create(tmp_path / "run", config.identity()) as store:
        assert store.control_names() == {"tiny-llama/layers.3/null-permuted"}
        dump = write_dump(tmp_path / "dump", n_features=4, n_texts=2, length=24)
        explainer = create("explainers", "neuronpedia", path=str(dump))
        asyncio.run(explain_features(store, read_examples(store, 0), {"neuronpedia": explainer}, None))
    explained = read_run(tmp_path / "run").explanations.query(
        "explainer == 'neuronpedia'"
    )  # which failed, as the export is about other features
    assert set(explained["source"]) == {name}
    with RunStore.create(tmp_path / "run", config.identity()) as store:
        assert explainer.explains(name) and not explainer.explains("tiny-llama/layers.3/null-permuted")


@pytest.mark.parametrize("explainer", ["neuronpedia", "delphi"])
def test_explainers_of_files_ask_the_run_which_sources_are_controls(explainer: str, tmp_path: Path) -> None:
    name, control = "m/layers.20/null-planted", "m/layers.20/random"
    if explainer == "neuronpedia":
        made = create(
            "explainers", explainer, path=str(write_dump(tmp_path / "v1", n_features=2, n_texts=2, length=24))
        )
    else:
        (tmp_path / "explanations").mkdir()
        (tmp_path / "explanations" / "layers.20_latent0.txt").write_text('"whales"')
        made = create("explainers", explainer, path=str(tmp_path))
    made.set_controls([control])
    asyncio.run(made.prepare([name, control]))
    assert made.explains(name) and not made.explains(control)
