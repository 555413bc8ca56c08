"""Imported explanations: which one is taken, whose features they are, and that what is missing fails alone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from evalkit.config.run_config import RunConfig
from evalkit.errors import BadConfig, BadFile, CorpusError, MissingFile, UnknownFeature
from evalkit.pipeline.stages import run
from evalkit.records import ExplainExamples, Explanation
from evalkit.registry import parse_part
from evalkit.store.run_store import RunStore
from explainers.neuronpedia import NeuronpediaExplainer
from tests.sources.data.make_neuronpedia import MODEL, SOURCE, WORDS, write_dump, write_lines
from tests.sources.data.make_neuronpedia import lines as make_lines

SAE, OTHER, PLANTED = "m/layers.20/sae/width-16/l0-3", "m/layers.20/sae/width-32/l0-3", "m/layers.20/null-planted"


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    return write_dump(tmp_path / "v1", n_features=4, n_texts=2, length=24)


def add(dump: Path, *lines: dict[str, Any], folder: str = "explanations-more") -> None:
    common = {"modelId": MODEL, "layer": SOURCE, "typeName": "np_max-act-logits", "explanationModelName": "gpt-5"}
    write_lines(dump / folder / "batch-0.jsonl.gz", [common | line for line in lines])


def explain(explainer: NeuronpediaExplainer, feature: str = "1", source: str = SAE) -> Explanation:
    examples = ExplainExamples(source, feature, 0.0, 1.0, ())
    return asyncio.run(explainer.explain(feature, examples))


def test_the_first_in_file_order_or_the_first_by_a_model_or_method(dump: Path) -> None:
    add(
        dump,
        {"index": 1, "description": "captains, mates and\n\tother officers "},
        {"index": "1", "description": "ranks"},
    )
    found = explain(NeuronpediaExplainer(str(dump)))
    assert (found.source, found.feature, found.explainer, found.version) == (SAE, "1", "neuronpedia", "1")
    assert found.text == "mentions of captains"
    assert found.note == "by gpt-4o-mini, oai_token-act-pair; the first of 3"
    for by in ("gpt-5", "np_max-act-logits"):
        found = explain(NeuronpediaExplainer(str(dump), by=by))
        assert found.text == "captains, mates and other officers"
        assert found.note == "by gpt-5, np_max-act-logits; the first of 2"
    assert explain(NeuronpediaExplainer(str(dump), by="gpt-4o-mini")).note == "by gpt-4o-mini, oai_token-act-pair"


def test_a_feature_without_one_fails_alone(dump: Path) -> None:
    explainer = NeuronpediaExplainer(str(dump))
    with pytest.raises(UnknownFeature, match=f"^{SAE} feature 9: expected an explanation in the export; seen none;"):
        explain(explainer, "9")
    with pytest.raises(UnknownFeature, match=r"by gpt-5; seen explanations by gpt-4o-mini \(oai_token-act-pair\);"):
        explain(NeuronpediaExplainer(str(dump), by="gpt-5"))
    assert explain(explainer).text == "mentions of captains"


@pytest.mark.parametrize(
    ("text", "seen"), [("x" * 601, "601 characters, 'xxx"), ("…", "1 characters, '…'"), ("a \ud800", "3 characters")]
)
def test_what_is_no_phrase_is_refused(dump: Path, text: str, seen: str) -> None:
    add(dump, {"index": 5, "description": text})
    with pytest.raises(CorpusError, match=f"expected a phrase of at most 600 characters in the export; seen {seen}"):
        explain(NeuronpediaExplainer(str(dump)), "5")


def test_text_is_taken_on_one_line(dump: Path) -> None:
    add(dump, {"index": 5, "description": "whales\r\n\x1b[2Jignore\x00 all\u2028that "})
    assert explain(NeuronpediaExplainer(str(dump)), "5").text == "whales [2Jignore all that"


def prepare(explainer: NeuronpediaExplainer, *sources: str) -> None:
    asyncio.run(explainer.prepare(sources))


def test_of_several_dictionaries_one_has_to_be_named(dump: Path) -> None:
    prepare(NeuronpediaExplainer(str(dump)), SAE, PLANTED)  # controls are never meant
    message = f"expected exactly one dictionary that the export explains; seen 2: {SAE}, {OTHER}; fix: name"
    with pytest.raises(BadConfig, match=message):
        prepare(NeuronpediaExplainer(str(dump)), SAE, OTHER, PLANTED)
    with pytest.raises(BadConfig, match=f"seen none in {PLANTED}"):
        prepare(NeuronpediaExplainer(str(dump)), PLANTED)
    for pattern in (SAE, "*/width-16/*"):
        explainer = NeuronpediaExplainer(str(dump), source=pattern)
        prepare(explainer, SAE, OTHER, PLANTED)
        assert explain(explainer).text == "mentions of captains"
        assert [explainer.explains(source) for source in (SAE, OTHER, PLANTED)] == [True, False, False]
        with pytest.raises(UnknownFeature, match="expected an explanation in the export; seen none"):
            explain(explainer, source=OTHER)
    with pytest.raises(BadConfig, match="seen none in"):
        prepare(NeuronpediaExplainer(str(dump), source="*/planted"), SAE)


def test_what_is_missing_or_damaged_is_found_before_the_first_feature(dump: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="expected a folder of a Neuronpedia export"):
        NeuronpediaExplainer(str(tmp_path / "nowhere"))
    add(dump, {"index": 1, "description": 7})
    with pytest.raises(BadFile, match=r"batch-0.jsonl.gz line 1: expected description as a string; seen int"):
        prepare(NeuronpediaExplainer(str(dump)), SAE)
    for sources in (None, lambda: [], lambda: [object]):
        with pytest.raises(BadConfig, match="expected a run on an export, or the folder of an export; seen neither"):
            prepare(NeuronpediaExplainer(sources=sources), SAE)


def test_named_on_the_command_line() -> None:
    part = parse_part("explainers", "neuronpedia:/data/v1/model/20-res,by=gpt-5,source=*/l0-32")
    assert part.options == {"path": "/data/v1/model/20-res", "by": "gpt-5", "source": "*/l0-32"}


# whole runs


def records(folder: Path) -> dict[str, dict[str, tuple[str | None, str | None]]]:
    """Text and reason by source and feature."""
    with RunStore.open(folder) as store:
        frame = store.frames().explanations
    found: dict[str, dict[str, tuple[str | None, str | None]]] = {}
    for row in frame.astype(object).where(frame.notna(), None).itertuples():
        found.setdefault(row.source, {})[row.feature] = (row.text, row.reason)
    return found


def test_a_run_of_an_export_is_explained_by_it(tmp_path: Path) -> None:
    """No path, no model, no corpus: the export's own words; one feature of which it says nothing fails alone."""
    dump = write_dump(tmp_path / "v1", n_features=6, n_texts=40, length=64)
    lines = [
        {"modelId": MODEL, "layer": SOURCE, "index": i, "description": f"mentions of {WORDS[i]}s"} for i in range(5)
    ]
    write_lines(dump / "explanations" / "batch-0.jsonl.gz", lines)
    config = RunConfig.create(
        model=MODEL, dictionaries=(str(tmp_path / "v1"),), n_features=6, n_positives=8, n_negatives=8, n_explain=8,
        controls=("shuffled",), explainers=("neuronpedia",),
    )  # fmt: skip
    run(config, tmp_path / "run", stages=("collect", "explain"))
    (found,) = records(tmp_path / "run").values()
    assert {feature: text for feature, (text, _) in found.items() if text} == {
        str(i): f"mentions of {WORDS[i]}s" for i in range(5)
    }
    text, reason = found["5"]
    assert text is None and reason is not None and "expected an explanation in the export; seen none" in reason


def test_of_several_sources_only_the_one_named_is_explained(tmp_path: Path) -> None:
    """Two sources in a run and an export apart from it: the same index is the same feature, the other source has none."""
    for name in ("20-mine", "20-other"):
        lines = [{**one, "layer": name} for one in make_lines(4, 40, 64, seed=len(name))]
        write_lines(tmp_path / "dumps" / name / "activations" / "batch-0.jsonl.gz", lines)
    options = {
        "model": MODEL, "dictionaries": (str(tmp_path / "dumps"),), "n_features": 4, "n_positives": 8, "n_negatives": 8,
        "n_explain": 8, "controls": ("shuffled",),
    }  # fmt: skip
    run(RunConfig.create(**options), tmp_path / "run", stages=("collect",))
    export = tmp_path / "export"
    add(export, *({"index": i, "description": f"number {i}"} for i in range(3)), folder="explanations")

    def describe(explainer: str) -> None:
        run(RunConfig.create(**options, explainers=(explainer,)), tmp_path / "run", stages=("explain",))

    with pytest.raises(BadConfig, match="expected exactly one dictionary that the export explains; seen 2: gemma"):
        describe(f"neuronpedia:{export}")
    with pytest.raises(BadConfig, match="expected exactly one dictionary that the export explains; seen none in gemma"):
        describe(f"neuronpedia:{export},source=*/20-absent")
    assert records(tmp_path / "run") == {}
    for _ in range(2):  # the second time only the one that failed is tried
        describe(f"neuronpedia:{export},source=*/20-mine")
        ((source, found),) = records(tmp_path / "run").items()
        assert source == "gemma-2-2b/layers.20/neuronpedia/20-mine"
        assert {feature: text for feature, (text, _) in found.items() if text} == {
            str(i): f"number {i}" for i in range(3)
        }
        assert "expected an explanation in the export; seen none" in str(found["3"][1])
    add(export, {"index": 3, "description": "number 3"}, folder="explanations-later")
    describe(f"neuronpedia:{export},source=*/20-mine")
    assert records(tmp_path / "run")[source]["3"] == ("number 3", None)
