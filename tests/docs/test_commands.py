"""Every command on the pages is parsed by the real program; the cheap ones run, and so does the main path of the README."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from evalkit import registry
from evalkit.cli import app
from evalkit.cli.options import config_of_run
from evalkit.config.presets import PRESETS
from evalkit.stats.metrics import ALL_METRICS
from tests.support.documents import ELLIPSIS, PAGES, Page
from tests.support.paths import ROOT
from tests.support.run_folders import tiny_options, write_run
from tests.support.servers import ChatServer

GROUP: Any = typer.main.get_command(app)
CHEAP = {"table", "plot", "compare", "plugins"}
EXAMPLE_PLUGINS = {"top-token", "NAME"}  # the first is installable, from tests/plugin_example
KINDS = {"explainer": "explainers", "judge": "judges", "scorer": "scorers", "client": "clients"}
SHOWN = [(page, command) for page in PAGES for command in page.commands()]
EVALKIT = [(page, command) for page, command in SHOWN if command[0] == "evalkit"]
INLINE = [
    (page, shlex.split(span))
    for page in PAGES
    for spans in page.code_spans()
    for span in spans
    if re.match(r"evalkit [a-z]", span)
]


def ids(item: object) -> str:
    return item.name if isinstance(item, Page) else " ".join(item)  # type: ignore[arg-type]


def parse(words: list[str], *, whole: bool) -> Any:
    """The context that the program makes of ``evalkit WORDS…``; what is missing is filled in unless it is ``whole``."""
    command, words = GROUP, list(words)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    assert not hasattr(command, "commands"), f"no such command: {words}"
    if whole and ELLIPSIS not in words:
        return command.make_context(command.name, words)
    required = [p for p in command.params if p.required]
    options = [p for p in required if p.param_type_name == "option" and not set(p.opts) & set(words)]
    filled = [word for word in words if word != ELLIPSIS] + [word for p in options for word in (p.opts[0], "0")]
    for _ in required:
        try:
            return command.make_context(command.name, list(filled))
        except Exception as error:
            if type(error).__name__ != "MissingParameter":
                raise
            filled.append("filled-in")
    return command.make_context(command.name, filled)


def check_values(context: Any) -> None:
    """Names of parts, presets, metrics and formats are known ones; the options of a run make a configuration."""
    parameters, command = context.params, context.command.name
    for option, kind in KINDS.items():
        values = parameters.get(option) or ()
        for value in [values] if isinstance(values, str) else values:
            name = value.partition(":")[0]
            assert name in registry.names(kind) or name in EXAMPLE_PLUGINS, f"--{option} {value}"  # type: ignore[arg-type]
    assert parameters.get("preset") in (None, *PRESETS)
    metrics = parameters.get("metric") or ()
    assert {metrics} <= set(ALL_METRICS) if isinstance(metrics, str) else set(metrics) <= set(ALL_METRICS)
    if command in ("table", "compare"):
        assert parameters["format"] in ("markdown", "csv", "json", "latex", "parquet")
    if command in ("run", "collect"):
        config_of_run({**parameters, "context": context})


@pytest.mark.parametrize(("page", "command"), EVALKIT, ids=ids)
def test_commands_parse(page: Page, command: list[str]) -> None:
    """The command exists, so does every option, and nothing that is required is missing."""
    context = parse(command[1:], whole=True)
    check_values(context)


@pytest.mark.parametrize(("page", "command"), INLINE, ids=ids)
def test_commands_within_the_text_parse(page: Page, command: list[str]) -> None:
    words = command[1 : command.index(">")] if ">" in command else command[1:]
    if words[-1].startswith("--") and len(words) > 1:  # the option is named without its value
        assert words.pop() in options_of(GROUP)
    context = parse(words, whole=False)
    check_values(context)


def options_of(command: Any) -> set[str]:
    children = getattr(command, "commands", {}).values()
    own = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    return own.union(*(options_of(child) for child in children))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_options_within_the_text_exist(page: Page) -> None:
    foreign = {
        "--structured-outputs-config",
        "--no-deps",
        "--held-out",
        "--work",
        "--demo",
        "--only",
        "--tokens",
        "--trainer",
    }
    for spans in page.code_spans():
        for span in spans:
            if span.startswith("--"):
                assert span.split()[0] in options_of(GROUP) | foreign, f"{page.name}: {span}"


def test_there_are_commands_of_every_kind() -> None:
    programs = {command[0] for _, command in SHOWN}
    assert {"make", "evalkit", "pip", "git"} <= programs
    first_words = {command[1] for _, command in EVALKIT}
    assert first_words >= {"run", "table", "plot", "models", "sweep", "inspect", "train", "export", "doctor", "explain"}


@pytest.mark.parametrize(("page", "command"), [c for c in EVALKIT if c[1][1] in CHEAP], ids=ids)
def test_cheap_commands_run(page: Page, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "mine")
    result = CliRunner().invoke(app, command[1:])
    assert result.exit_code == 0, result.output
    if "--out" in command:
        assert (tmp_path / command[command.index("--out") + 1]).exists()


TARGETS = {c[1] for _, c in SHOWN if c[0] == "make"} | {
    t for p in PAGES for t in re.findall(r"`make ([a-z-]+)", p.text)
}


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_make_targets_exist(target: str) -> None:
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_extras_that_they_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        name for page in PAGES for group in re.findall(r"'\.\[([\w,-]+)\]'", page.text) for name in group.split(",")
    }
    assert {"model", "embed", "api"} <= named <= set(extras)


def test_local_packages_that_are_installed_exist() -> None:
    for page, command in SHOWN:
        if command[:2] == ["pip", "install"]:
            for word in command[2:]:
                assert not word.startswith("./") or (ROOT / word / "pyproject.toml").exists(), f"{page.name}: {word}"


def test_the_main_path_runs(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections 1 to 3 of the README as written, with a tiny model, dictionaries, text and server for the named ones."""
    monkeypatch.chdir(tmp_path)
    tiny = tiny_options(tmp_path, tiny_llama)
    text = Page("README.md").text
    main_path = [
        c[1:] for _, c in [e for e in EVALKIT if e[0].name == "README.md"] if c[1] not in ("models", "sweep", "doctor")
    ]
    assert [c[0] for c in main_path] == ["run", "table", "plot", "compare", "explain", "score"] and "## 3." in text
    small = [
        "--features",
        "4",
        "--examples",
        "8",
        "--positives",
        "5",
        "--negatives",
        "5",
        "--dtype",
        "float32",
        "--force",
    ]
    with ChatServer(model="my-model") as server:
        replaced = {
            "google/gemma-2-2b": str(tiny["model"]),
            "path/to/layer_12/width_16k/average_l0_82": "sae",
            "my_text.jsonl": "text.jsonl",
            "http://localhost:8000/v1": f"http://127.0.0.1:{server.port}/v1",
        }
        for command in main_path:
            words = [replaced.get(word, word) for word in command]
            if words[0] == "run":
                words += ["-d", "rqae", "--depths", "2,8", *small, "--judge", "lexical"]  # no embedding model here
            result = CliRunner().invoke(app, words, catch_exceptions=False)
            assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "mine" / "plots" / "scores.png").exists()
    assert "llm" in CliRunner().invoke(app, ["table", "runs/mine"]).output
