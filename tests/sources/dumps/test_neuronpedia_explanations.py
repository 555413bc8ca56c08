"""The explanations of an export, without its other parts: where they are found, in which order, what is refused."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import BadConfig, BadFile, MissingFile
from evalkit.sources.dumps import neuronpedia_explanations
from evalkit.sources.dumps.neuronpedia_explanations import ExportedExplanations
from tests.sources.data.make_neuronpedia import MODEL, SOURCE, WORDS, write_dump, write_lines


def line(index: int | str, text: object, /, **changes: Any) -> dict[str, Any]:
    common = {"modelId": MODEL, "layer": SOURCE, "typeName": "np_max-act", "explanationModelName": "some-model"}
    return {**common, "index": index, "description": text, **changes}


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """The folder of a source with nothing but its explanations."""
    folder = write_dump(tmp_path / "v1", n_features=4, n_texts=2, length=24)
    shutil.rmtree(folder / "activations")
    shutil.rmtree(folder / "features")
    return folder


def test_found_at_every_level_and_equal_to_the_file(dump: Path) -> None:
    plain = gzip.decompress((dump / "explanations" / "batch-0.jsonl.gz").read_bytes()).splitlines()
    texts = {str(each["index"]): each["description"] for each in map(json.loads, plain)}
    assert texts == {str(i): f"mentions of {WORDS[i]}s" for i in range(4)}
    for path in (dump / "explanations", dump, dump.parent, dump.parent.parent, str(dump)):
        found = ExportedExplanations.find(path)
        assert {index: [one.text for one in found.of(index)] for index in texts} == {i: [t] for i, t in texts.items()}
        assert found.origin == (MODEL, SOURCE) and found.of("4") == []


def test_several_sources_are_not_guessed_between(dump: Path, tmp_path: Path) -> None:
    other = dump.with_name("20-other")
    write_lines(other / "explanations" / "batch-0.jsonl", [line(0, "x", layer="20-other")])
    for path in (dump.parent, tmp_path):
        with pytest.raises(BadConfig, match="expected the explanations of one source; seen 2 sources, such as "):
            ExportedExplanations.find(path)
    assert [one.text for one in ExportedExplanations.find(other).of("0")] == ["x"]


def test_file_order_is_folder_then_number_then_line(dump: Path) -> None:
    write_lines(dump / "explanations-a" / "batch-10.jsonl.gz", [line(1, "fourth"), line(1, "fifth")])
    write_lines(
        dump / "explanations-a" / "batch-9.jsonl", [line("1", "second"), line(2, "x"), line(1, " "), line(1, "third")]
    )
    assert [one.text for one in ExportedExplanations.find(dump).of("1")] == [
        "mentions of captains", "second", "third", "fourth", "fifth",
    ]  # fmt: skip
    only = ExportedExplanations.find(dump / "explanations-a")
    assert [one.text for one in only.of("1")] == ["second", "third", "fourth", "fifth"]


def test_files_are_read_once(dump: Path) -> None:
    found = ExportedExplanations.find(dump)
    assert found.of("0")
    shutil.rmtree(dump)
    assert [one.text for one in found.of("3")] == ["mentions of islands"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line(0, None), "expected description as a string; seen NoneType"),
        (line(0, ["x"]), "expected description as a string; seen list"),
        (line(-1, "x"), "expected index as a feature number; seen -1"),
        (line(0, "x", layer="8-other"), f"expected modelId {MODEL} and layer {SOURCE}; seen {MODEL} and 8-other"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    write_lines(tmp_path / "explanations" / "batch-0.jsonl.gz", [line(0, "good"), bad])
    with pytest.raises(BadFile, match=f"batch-0.jsonl.gz line 2: {message}"):
        ExportedExplanations.find(tmp_path).of("0")


def test_a_first_line_that_does_not_say_whose_it_is(tmp_path: Path) -> None:
    write_lines(tmp_path / "explanations" / "batch-0.jsonl", [line(0, "x", modelId=None)])
    with pytest.raises(BadFile, match="line 1: expected modelId and layer as non-empty strings; seen None and"):
        ExportedExplanations.find(tmp_path).of("0")


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuronpedia_explanations, "_MOST_CHARACTERS", 100)
    lines = [line(i, "x" * 40, explanationModelName="m" * 10_000) for i in range(2)]
    path = write_lines(tmp_path / "explanations" / "batch-0.jsonl", lines)
    assert len(ExportedExplanations.find(tmp_path).of("1")[0].explainer) == len("neuronpedia:") + 200
    write_lines(path, [*lines, line(2, "x" * 40)])
    with pytest.raises(BadFile, match=r"line 3: expected at most .* explanations, 100 characters in all; seen more"):
        ExportedExplanations.find(tmp_path).of("0")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"none: expected a folder of a Neuronpedia export .* seen no such folder"):
        ExportedExplanations.find(tmp_path / "none")
    (tmp_path / "explanations").mkdir()
    with pytest.raises(
        MissingFile, match="seen no such batch in this folder; fix: download v1/MODEL/SOURCE/explanations/"
    ):
        ExportedExplanations.find(tmp_path)
