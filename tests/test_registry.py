"""Names with options, as the command line writes them."""

from __future__ import annotations

import pytest

from evalkit.abilities import abilities_of
from evalkit.errors import BadConfig, PluginError
from evalkit.registry import Part, list_plugins, parse_option, parse_part


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("explainers", "words", Part("words", "words", {})),
        ("judges", " llm:single ", Part("llm", "llm:single", {"mode": "single"})),
        ("judges", "llm:single,seed=3", Part("llm", "llm:single,seed=3", {"mode": "single", "seed": 3})),
        ("judges", "llm:seed=3,batch_size=10", Part("llm", "llm:batch_size=10,seed=3", {"batch_size": 10, "seed": 3})),
        ("clients", "openai:org/model-1.5", Part("openai", "openai:org/model-1.5", {"model": "org/model-1.5"})),
        ("clients", "vllm:a,b/model,dtype=float32",
         Part("vllm", "vllm:a,b/model,dtype=float32", {"model": "a,b/model", "dtype": "float32"})),
        ("clients", "replay:runs/calls.sqlite", Part("replay", "replay:runs/calls.sqlite", {"path": "runs/calls.sqlite"})),
        ("clients", "openai:m,base_url=http://h:1/v1", Part("openai", "openai:m,base_url=http://h:1/v1",
         {"model": "m", "base_url": "http://h:1/v1"})),
    ],
)  # fmt: skip
def test_parts(kind: str, text: str, expected: Part) -> None:
    assert parse_part(kind, text) == expected  # type: ignore[arg-type]


def test_one_spelling_for_the_same_options() -> None:
    assert parse_part("judges", "llm:seed=1,mode=list").label == parse_part("judges", "llm:mode=list,seed=1").label


def test_what_is_no_part() -> None:
    with pytest.raises(PluginError, match="explainer 'words': expected options as words:key=value; seen 'eight'"):
        parse_part("explainers", "words:eight")
    with pytest.raises(PluginError, match=r"expected one of embedding, .*llm.*; seen no such name; fix: use 'llm'"):
        parse_part("judges", "lllm:single")


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=1", 1), ("a=0.5", 0.5), ("a=true", True), ("a=x y", "x y"), ("a=[1,2]", [1, 2]), ("a=", ""), ("a=b=c", "b=c")],
)
def test_options_are_json_where_they_can_be(text: str, value: object) -> None:
    assert parse_option(text) == ("a", value)


@pytest.mark.parametrize("text", ["a", "=1", "a b=1", "1a=2"])
def test_what_is_no_option(text: str) -> None:
    with pytest.raises(BadConfig, match="expected KEY=VALUE"):
        parse_option(text)


def test_abilities_are_read_from_class_attributes_that_a_plugin_merely_sets() -> None:
    asks = type("Asks", (), {"uses_client": True, "uses_subject": True, "pick": lambda self, groups: []})
    assert abilities_of("judges", asks) == ("uses the client", "loads the subject model", "can pick")
    assert abilities_of("judges", type("Refuses", (), {"uses_client": False})) == ()
    assert abilities_of("scorers", object) == ()
    listed = {(plugin.kind, plugin.name): plugin.abilities for plugin in list_plugins()}
    assert listed["judges", "llm"] == ("uses the client", "can pick", "can simulate")
    assert listed["judges", "subject"] == ("loads the subject model", "prepares in bulk")
    assert listed["judges", "lexical"] == ("can pick", "can simulate")
    assert listed["scorers", "intruder"] == ("needs a judge that picks", "needs no explanation")
    assert {name for (kind, name), able in listed.items() if kind == "scorers" and "brings its judge" in able} == {
        "embedding",
        "surprisal",
        "delphi-detection",
        "delphi-fuzz",
    }
    assert listed["clients", "openai-batch"] == ("submits batches", "stays in this process")
