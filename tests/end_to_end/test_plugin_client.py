"""The example client for another provider: small, keeps the contract, and found and run once it is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from evalkit.errors import NoAnswer
from evalkit.records import Message
from evalkit.store.run_store import read_run
from tests.support.chat_model import answer
from tests.support.paths import ROOT
from tests.support.run_folders import tiny_options

MODULE = ROOT / "tests/plugin_client/evalkit_example_provider.py"
KEY = "key-of-the-example"
CODE = """
import asyncio, json, sys
import evalkit
from evalkit import Example, ExplainExamples, JudgeItem

async def main():
    client = evalkit.load_client("example", model="toy-1", url=sys.argv[1])
    windows = tuple(Example(n, n, (" the", " whale", " sank"), (0.1, 4.0, 0.0), decile=9) for n in range(3))
    examples = ExplainExamples("source", "7", 0.0, 4.0, windows)
    explanation = await evalkit.load_explainer("default").explain("7", examples, client)
    items = [JudgeItem("a whale swam by"), JudgeItem("the bakery was shut"), JudgeItem("the whale", ((0, 3),))]
    answers = [
        await evalkit.load_judge("llm", client=client, mode=mode).judge(explanation.text, items)
        for mode in ("list", "single")
    ]
    print(json.dumps([client.name, explanation.text, [[one.match for one in found] for found in answers]]))

asyncio.run(main())
"""


@dataclass
class Provider:
    """The stand-in: POST /complete takes a prompt and a limit, and gives an output and two counts of tokens."""

    url: str
    asked: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def provider() -> Iterator[Provider]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.path == "/complete" and self.headers["Authorization"] == f"Bearer {KEY}"
            if known:
                found.asked.append(asked)
            output = answer(asked["prompt"])
            self.send_response(200 if known else 401)
            self.end_headers()
            used = [len(asked["prompt"].split()), len(output.split())]
            self.wfile.write(json.dumps({"output": output, "used": used} if known else {}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Provider(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield found
        server.shutdown()


def client_of(url: str) -> Any:
    spec = importlib.util.spec_from_file_location(MODULE.stem, MODULE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ExampleClient("toy-1", url=url)


def test_it_stays_small_and_imports_evalkit_alone() -> None:
    lines = MODULE.read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 20
    imported = {found[1] for line in lines if (found := re.match(r"(?:from|import) (\w+)", line))}
    assert imported - sys.stdlib_module_names == {"evalkit"}


def test_it_turns_messages_into_a_prompt_and_a_reply_into_a_response(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXAMPLE_API_KEY", KEY)
    messages = [Message("system", "Judge."), Message("user", 'Description: "whales"\nText: "whales swim"')]
    response = asyncio.run(client_of(provider.url).generate(messages, choices=("yes", "no"), seed=1, max_tokens=1))
    assert (response.text, response.prompt_tokens, response.completion_tokens) == ("yes", 8, 1)
    prompt = 'system:\nJudge.\n\nuser:\nDescription: "whales"\nText: "whales swim"'
    assert provider.asked == [{"model": "toy-1", "prompt": prompt, "limit": 1}]


def test_a_failure_is_the_error_of_the_contract(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_API_KEY", "key-that-is-wrong")
    for url, reason in ((provider.url, "HTTP Error 401"), ("http://127.0.0.1:1", "Connection refused")):
        with pytest.raises(NoAnswer, match=reason) as caught:
            asyncio.run(client_of(url).generate([Message("user", "?")], max_tokens=1))
        assert "key-that-is-wrong" not in str(caught.value)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the package, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    # the build writes beside the sources, so it gets a copy
    package = shutil.copytree(MODULE.parent, folder / "package")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(folder / "site"), str(package)], check=True)
    path = os.pathsep.join([str(folder / "site"), str(ROOT)])
    return {**os.environ, "PYTHONPATH": path, "EXAMPLE_API_KEY": KEY}


def python(environment: dict[str, str], folder: Path, *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_installed_it_is_found_and_asked(installed: dict[str, str], tmp_path: Path, provider: Provider) -> None:
    found = json.loads(python(installed, tmp_path, "-m", "evalkit", "plugins", "--json"))
    listed = next(one for one in found if one["name"] == "example")
    assert (listed["kind"], listed["origin"], listed["error"]) == ("clients", "evalkit-example-provider", None)
    matches = [True, False, False]
    replies = json.loads(python(installed, tmp_path, "-c", CODE, provider.url))
    assert replies == ["toy-1", "words such as whale", [matches, matches]]
    assert len(provider.asked) == 1 + 2 + 3  # an explanation; plain and marked texts as a list each; one by one


@pytest.mark.slow
def test_a_whole_run_goes_through_it(
    installed: dict[str, str], tmp_path: Path, provider: Provider, tiny_llama: Path
) -> None:
    """`evalkit run --client example:MODEL`: records carry the model, answers are recorded, a second run asks nothing."""
    inputs = tiny_options(tmp_path, tiny_llama)
    options = {
        "--model": tiny_llama, "-d": tmp_path / "sae", "--corpus": inputs["corpus"], "--dtype": "float32",
        "--features": 4, "--examples": 6, "--positives": 4, "--negatives": 4, "--controls": "shuffled",
        "--explainer": "default", "--judge": "llm", "--client": "example:toy-1",
        "--client-option": f"url={provider.url}", "--max-calls": 1000,
    }  # fmt: skip
    listed = [str(part) for pair in options.items() for part in pair]
    for name in ("run", "again"):
        place = ["--out", str(tmp_path / name), "--cache", str(tmp_path / "cache.sqlite")]
        python(installed, tmp_path, "-m", "evalkit", "-q", "run", "--force", *listed, *place)
        if name == "run":
            asked = len(provider.asked)
    assert len(provider.asked) == asked > 10
    frames = read_run(tmp_path / "run")
    assert set(frames.judgements["judge"]) == {"llm@toy-1"}
    assert set(frames.explanations["explainer"]) == {"default@toy-1"}
    assert f"toy-1: {asked} calls" in str(frames.meta["cost"])
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert KEY.encode() not in written
