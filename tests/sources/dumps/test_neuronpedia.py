"""Neuronpedia's export layout: what is read against plain gzip and json, tokens as they are written, hostile files."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evalkit.corpus.token_strings import boundaries, text_pieces
from evalkit.errors import BadConfig, BadFile, MissingFile, UnknownFeature
from evalkit.protocols import ExampleSource, FeatureSource
from evalkit.records import Site
from evalkit.registry import create
from evalkit.sources import open_dictionary
from evalkit.sources.dumps.neuronpedia import NeuronpediaReader, NeuronpediaSource
from evalkit.sources.dumps.text_sample import SampledTexts
from tests.sources.data.make_neuronpedia import MODEL, SOURCE, record, write_dump, write_lines
from tests.support.paths import SOURCES_DATA

FIXTURE = SOURCES_DATA / "neuronpedia"
FOLDER = FIXTURE / MODEL / SOURCE


def plain(folder: Path = FOLDER, part: str = "activations") -> list[dict[str, Any]]:
    """Every line, read without us."""
    files = sorted((folder / part).iterdir())
    return [json.loads(line) for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]


def source(folder: Path = FOLDER, **options: Any) -> NeuronpediaSource:
    (found,) = NeuronpediaReader().read(folder, **options)
    return found


def test_recognised_and_named_at_every_level() -> None:
    reader = create("sources", "neuronpedia")
    assert all(reader.matches(path) for path in (FOLDER, FOLDER.parent, FIXTURE, FIXTURE.parent))
    assert not any(reader.matches(path) for path in (FOLDER / "features", FIXTURE / "none", Path(__file__)))
    for path in (FOLDER, FIXTURE):
        (found,) = open_dictionary(path, subject="gemma-2-2b", density=0.01, depths=(16,))
        assert found.name == "gemma-2-2b/layers.20/neuronpedia/20-gemmascope-res-16k"
        assert found.site == Site("gemma-2-2b", "layers.20")
        assert (found.info.kind, found.info.declared) == (
            "neuronpedia",
            {"negatives": "texts of other features, not verified"},
        )
        assert isinstance(found, ExampleSource) and not isinstance(found, FeatureSource)
    named = source(site="blocks.3.hook_resid_post", model="toy", name="mine")
    assert (named.name, named.site) == ("mine", Site("toy", "layers.3"))


@pytest.mark.parametrize(
    ("layer", "path"),
    [
        ("8-res-jb", "layers.8"),
        ("5-gemmascope-mlp-16k", "layers.5.mlp"),
        ("0-gemmascope-att-65k", "layers.0.self_attn"),
        ("12-gemmascope-transcoder-16k", "layers.12.mlp"),
        ("custom", "custom"),
    ],
)
def test_sites_come_from_the_source_id(tmp_path: Path, layer: str, path: str) -> None:
    write_lines(tmp_path / "activations" / "batch-0.jsonl", [record(0, ["a"], [1.0], layer=layer)])
    assert source(tmp_path).site.path == path


def test_features_and_texts_are_those_of_the_files() -> None:
    read = source()
    assert list(read.features()) == ["0", "1", "2", "3"]
    found = read.examples(["0", "1"])
    expected: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for line in plain():
        tokens = tuple(token.replace("▁", " ") for token in line["tokens"])
        of_text = expected.setdefault(tokens, {})
        if line["index"] in ("0", "1"):
            of_text[line["index"]] = line["values"]
    texts = {text.tokens: text for text in found.texts}
    assert len(found.texts) == len(texts) == len({text.text for text in found.texts}) == 4 * 6
    assert texts.keys() == expected.keys()
    for tokens, values in expected.items():
        assert texts[tokens].complete
        assert texts[tokens].valid.tolist() == [token != "<bos>" for token in tokens]
        assert texts[tokens].activations.keys() == values.keys()
        for feature in values:
            np.testing.assert_array_equal(texts[tokens].activations[feature], np.float32(values[feature]))
    assert sum(len(text.activations) == 2 for text in found.texts) == 1
    assert found.densities == {"0": 0.001, "1": 0.002}


def test_order_of_lines_and_cut_into_batches_change_nothing(tmp_path: Path) -> None:
    records = plain()
    random.Random(1).shuffle(records)
    for batch in range(5):
        write_lines(tmp_path / "activations" / f"batch-{batch * 7}.jsonl", records[batch::5])
    one, other = (each.examples(["2", "3"]) for each in (source(), source(tmp_path)))
    assert [(t.text, t.tokens) for t in one.texts] == [(t.text, t.tokens) for t in other.texts]
    for left, right in zip(one.texts, other.texts, strict=True):
        assert {f: v.tolist() for f, v in left.activations.items()} == {
            f: v.tolist() for f, v in right.activations.items()
        }
    assert other.densities == {}


def test_silent_records_and_numbers_as_indices(tmp_path: Path) -> None:
    """Converters write indices as numbers; a record without activity makes no feature, but its text may be a negative."""
    records = [record(5, ["x", "y"], [0, 2], index=5), record(7, ["u", "v"], [0.0, -1.0])]
    write_lines(tmp_path / "activations" / "batch-0.jsonl.gz", records)
    read = source(tmp_path)
    assert list(read.features()) == ["5"]
    assert {text.tokens: list(text.activations) for text in read.examples(["5"]).texts} == {
        ("x", "y"): ["5"],
        ("u", "v"): [],
    }
    with pytest.raises(
        UnknownFeature, match=r"feature '7' of gemma-2-2b/layers.20/neuronpedia/20-gemmascope-res-16k: "
    ):
        read.examples(["7"])


def test_explanations_stay_reachable(tmp_path: Path) -> None:
    (found,) = source().explanations("2")
    assert (found.text, found.explainer, found.version) == (
        "mentions of storms",
        "neuronpedia:gpt-4o-mini",
        "oai_token-act-pair",
    )
    assert source().explanations("9") == []
    folder = write_dump(tmp_path, 2, 2, 12)
    extra = {"modelId": MODEL, "layer": SOURCE, "index": 1, "description": "captains", "typeName": None}
    write_lines(folder / "explanations-gpt-5" / "batch-0.jsonl.gz", [extra])
    assert [each.text for each in source(folder).explanations("1")] == ["mentions of captains", "captains"]
    write_lines(folder / "explanations-gpt-5" / "batch-0.jsonl.gz", [{**extra, "description": " "}])
    assert [each.text for each in source(folder).explanations("1")] == ["mentions of captains"]
    write_lines(folder / "explanations-gpt-5" / "batch-0.jsonl.gz", [{**extra, "description": None}])
    with pytest.raises(BadFile, match=r"batch-0.jsonl.gz line 1: expected description as a string; seen NoneType"):
        source(folder).explanations("1")


@pytest.mark.parametrize(
    ("tokens", "pieces"),
    [
        (["ĠThe", "Ġcaf", "Ã©", "ĊĊ", "ĉ"], (" The", " caf", "é", "\n\n", "\t")),
        (["<|endoftext|>", "ĠðŁ", "ĺ", "Ģ", "!"], ("<|endoftext|>", " 😀", "", "", "!")),
        (["<bos>", "▁The", "▁▁", "end", "<0x0A>", "<0xC3>", "<0xA9>"], ("<bos>", " The", "  ", "end", "\n", "é", "")),
        ([" don", "âĢĻ", "t", " ðŁ", "ĺ", "Ģ"], (" don", "’", "t", " 😀", "", "")),  # spaces were put right, no more
        ([" Łódź", " naïve", " é", " Ġ", " ▁"], (" Łódź", " naïve", " é", " Ġ", " ▁")),  # real letters stay
        ([" a", "<0x0A>", "<0xFF>"], (" a", "\n", "\ufffd")),
        (["<｜begin▁of▁sentence｜>", "▁Hi"], ("<｜begin of sentence｜>", " Hi")),
    ],
)
def test_tokens_become_text(tokens: list[str], pieces: tuple[str, ...]) -> None:
    assert text_pieces(tokens) == pieces


def test_byte_level_pieces_are_the_tokenizers() -> None:
    """Against a real byte-level tokenizer: names of tokens to what it decodes."""
    from tests.conftest import byte_level_tokenizer

    tokenizer = byte_level_tokenizer()
    text = "The whale — “naïve” café 😀,\n\n日本 swam.\tÅngström"
    names = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert "".join(text_pieces(names)) == text


def test_boundaries() -> None:
    assert all(boundaries(["<bos>", "<s>", "</s>", "<|endoftext|>", "<|begin_of_text|>", "[CLS]", "<pad>"]))
    assert boundaries(["<b>", "bos", " <bos>", "<start_of_turn>", "s"]) == (False,) * 5
    assert boundaries(["a", "<｜end▁of▁sentence｜>", "b"]) == (False, True, False)


def test_a_sample_is_the_smallest_that_fit_in_any_order() -> None:
    rng = np.random.default_rng(0)
    offers = [(i, int(rng.integers(1 << 62)), ("x" * int(rng.integers(1, 400)),), (True,), None) for i in range(300)]
    by_priority = sorted(offers, key=lambda each: each[1])
    for most, room in ((20, 10**9), (10**9, 5000), (30, 8000)):
        expected, size = [], 0
        for text, _, tokens, _, _ in by_priority:
            size += len(tokens[0]) + 64
            if len(expected) == most or size > room:
                break
            expected.append(text)
        assert 0 < len(expected) < 300
        for seed in range(5):
            order = offers * 2
            random.Random(seed).shuffle(order)
            sample = SampledTexts(most, room)
            for each in order:
                sample.offer(*each)
            assert sorted(sample.held) == sorted(expected)


def test_of_two_records_of_a_text_the_larger_stays() -> None:
    for order in ([1.0, 3.0], [3.0, 1.0]):
        sample = SampledTexts(5, 1000)
        for value in order:
            sample.offer(1, 1, ("x",), (True,), ("0", np.float32([value])))
        assert sample.held[1].activations["0"].tolist() == [3.0]


GOOD = json.dumps(record(0, ["a", "b"], [0.0, 1.0]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object; seen invalid JSON; fix"),
        ("[1]", "expected a JSON object; seen a list"),
        ("[" * 100_000, "expected a JSON object; seen invalid JSON; fix"),
        ("\udcff", "expected a JSON object; seen invalid JSON; fix"),
        (json.dumps(record(0, ["a"], [1.0], layer="8-other")), f"expected modelId {MODEL} and layer {SOURCE}; seen"),
        (json.dumps(record(0, ["a"], [1.0], index=-1)), "expected index as a feature number; seen -1"),
        (json.dumps(record(0, ["a"], [1.0], index=True)), "expected index as a feature number; seen True"),
        (json.dumps(record(0, ["a"], [1.0], index="../x")), "expected index as a feature number; seen '../x'"),
        (json.dumps(record(0, ["a"], [1.0], index="01")), "expected index as a feature number; seen '01'"),
        (json.dumps(record(0, ["a"], [1.0], tokens=None)), "expected tokens, a list of strings; seen None"),
        (json.dumps(record(0, ["a"], [1.0], tokens=[1])), r"expected tokens, a list of strings; seen \[1\]"),
        (
            json.dumps(record(0, ["a"], [1.0], tokens=["a" * 2000])),
            "expected tokens of at most 1024 characters; seen 2000",
        ),
        (json.dumps(record(0, ["a"], [1.0], values="1")), "expected values, a list of numbers; seen '1'"),
        (json.dumps(record(0, ["a"], [1.0], values=[True])), r"expected values, a list of numbers; seen \[True\]"),
        (
            json.dumps(record(0, ["a"], [1.0], values=[1.0, 2.0])),
            "expected as many values as tokens; seen 2 values and 1 tokens",
        ),
        (json.dumps(record(0, ["a"], [1.0], values=[float("nan")])), "expected finite values; seen nan"),
        (json.dumps(record(0, ["a"], [1.0], values=[float("-inf")])), "expected finite values; seen -inf"),
        (json.dumps(record(0, ["a"], [1.0], values=[1e300])), "expected finite values; seen 1e"),
        (json.dumps(record(0, ["a"], [1.0], values=[10**400])), "expected finite values; seen a number of more"),
        ("9" * 5000, "expected a JSON object; seen invalid JSON; fix"),
        (" " * (5 << 20) + GOOD, "expected a line of at most 4194304 bytes; seen a longer one"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "activations" / "batch-3.jsonl.gz"
    file.parent.mkdir()
    file.write_bytes(gzip.compress(f"{GOOD}\n\n{line}\n".encode(errors="surrogateescape")))
    read = source(tmp_path)
    for call in (read.features, lambda: read.examples(["0"])):
        with pytest.raises(BadFile, match=f"batch-3.jsonl.gz line 3: {message}"):
            call()


def test_broken_archives_are_named(tmp_path: Path) -> None:
    file = tmp_path / "activations" / "batch-0.jsonl.gz"
    file.parent.mkdir()
    noise = np.random.default_rng(0).uniform(1, 2, 500)
    whole = gzip.compress("".join(json.dumps(record(0, ["a"], [x])) + "\n" for x in noise).encode())
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        BadFile, match=r"batch-0.jsonl.gz line \d+: expected a complete gzip file; seen Compressed file ended"
    ):
        source(tmp_path).features()
    flipped = bytearray(whole)
    flipped[len(whole) // 2 : len(whole) // 2 + 40] = b"\xff" * 40
    file.write_bytes(flipped)
    with pytest.raises(BadFile, match=r"batch-0.jsonl.gz line \d+: expected"):
        source(tmp_path).features()
    file.write_bytes(b"PK not gzip at all")
    with pytest.raises(
        BadFile, match=r"batch-0.jsonl.gz line 1: expected a complete gzip file; seen Not a gzipped file"
    ):
        source(tmp_path)


def test_a_gzip_bomb_costs_no_memory(tmp_path: Path) -> None:
    """A gigabyte of spaces in one line, in a process that may not have half of that."""
    file = tmp_path / "activations" / "batch-0.jsonl.gz"
    file.parent.mkdir()
    block = gzip.compress(b" " * (1 << 24))
    file.write_bytes(gzip.compress(f"{GOOD}\n".encode()) + block * 64)
    code = f"""
import resource, sys
from pathlib import Path
from evalkit.errors import BadFile
from evalkit.sources.dumps.neuronpedia import NeuronpediaReader
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    NeuronpediaReader().read(Path({str(tmp_path)!r}))[0].features()
except BadFile as error:
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print("line 2" in str(error), grown < 100_000, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False"]


def test_bad_densities_are_named(tmp_path: Path) -> None:
    folder = write_dump(tmp_path, 2, 2, 12)
    for share in (1.5, "0.1", True, float("nan")):
        line = {"modelId": MODEL, "layer": SOURCE, "index": "0", "frac_nonzero": share}
        write_lines(folder / "features" / "batch-0.jsonl.gz", [line])
        with pytest.raises(BadFile, match=r"batch-0.jsonl.gz line 1: expected frac_nonzero from 0 to 1; seen"):
            source(folder).examples(["0"])
    write_lines(folder / "features" / "batch-0.jsonl.gz", [{**line, "frac_nonzero": None}])
    assert source(folder).examples(["0"]).densities == {}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"expected a folder of an export with activations/batch-0.jsonl.gz"):
        NeuronpediaReader().read(tmp_path)
    write_lines(tmp_path / "activations" / "batch-0.jsonl.gz", [])
    with pytest.raises(BadFile, match="activations: expected at least one line in a batch; seen only empty batches"):
        NeuronpediaReader().read(tmp_path)
    write_lines(tmp_path / "activations" / "batch-1.jsonl.gz", [record(0, ["a"], [1.0], modelId=3)])
    with pytest.raises(BadFile, match="line 1: expected modelId and layer as non-empty strings; seen 3 and"):
        NeuronpediaReader().read(tmp_path)
    with pytest.raises(BadConfig, match="the options model, name, site, subject; seen l0"):
        NeuronpediaReader().read(FOLDER, l0=3)
    for part in ("a", "b"):
        write_lines(tmp_path / "two" / part / "activations" / "batch-0.jsonl", [record(0, ["a"], [1.0])])
    with pytest.raises(BadConfig, match="expected one export, because the option name= is given; seen 2 exports"):
        NeuronpediaReader().read(tmp_path / "two", name="x")
