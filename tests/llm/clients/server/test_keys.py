"""The key of an API: in no file, no log and no error, however a server throws it back."""

from __future__ import annotations

import base64
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalkit.errors import BadConfig, EvalkitError
from evalkit.llm.clients import openai
from evalkit.llm.clients.openai import OpenAIClient
from evalkit.llm.clients.recorder import Recorder
from evalkit.llm.clients.server.keys import Redactor, checked_fields, checked_url, read_key
from evalkit.pipeline.stages import run
from evalkit.store.run_store import RunStore
from tests.support.chat_model import reply_text
from tests.support.paths import ROOT
from tests.support.scripted import Reply, ask, error, saying, scripted
from tests.support.servers import ChatServer
from tests.support.word_features import collected

KEY = "sk-proj-Zq3vT8kWm1LxY6bNcR0dHuJe5PsGa7F"
_LONGEST = 8  # of a key's characters in a row that may be met anywhere: "sk-proj-" says nothing


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def pieces(text: str) -> list[str]:
    """Parts of the key in a text, longer than nothing to worry about."""
    return [KEY[at : at + _LONGEST + 1] for at in range(len(KEY) - _LONGEST) if KEY[at : at + _LONGEST + 1] in text]


def echoing(shape: str) -> Any:
    """Answers that hold the key in one way or another."""
    message = f"Incorrect API key provided: {KEY}"
    headers = {"X-Seen": f"Bearer {KEY}", "Set-Cookie": KEY}
    shapes: dict[str, Reply] = {
        "wrong key": (401, error(message), headers),
        "plain text": (400, message.encode(), headers),
        "html": (503, f"<html>{message}</html>".encode(), headers),
        "reply in html": (200, f"<html>{message}</html>".encode(), {**headers, "Content-Type": "text/html"}),
        "cut": (400, error(f"Incorrect API key provided: {KEY[:20]}"), headers),
        "cut at its head": (400, error(f"…{KEY[9:]} is no key"), headers),
        "long before it": (400, error("x" * 180 + KEY), headers),
        "of a parameter": (400, error(message, param="seed"), headers),
        "as a parameter": (400, error("no", param=KEY, code=KEY, type=KEY), headers),
        "pause": (429, error(message), {**headers, "Retry-After": KEY}),
        "no choices": (200, {"error": {"message": message}}, headers),
        "broken": (200, f'{{"choices": "{KEY}'.encode(), headers),
        "redirect": (307, b"", {**headers, "Location": f"http://127.0.0.1:1/{KEY}"}),
        "unknown status": (418, {"detail": [{"loc": [KEY], "msg": message}]}, headers),
    }
    return lambda body: shapes[shape] if shape != "of a parameter" or "seed" in body else (200, saying("fine"))


SHAPES = [
    *("wrong key", "plain text", "html", "reply in html", "cut", "cut at its head", "long before it", "of a parameter"),
    *("as a parameter", "pause", "no choices", "broken", "redirect", "unknown status"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_no_error_and_no_log_holds_the_key(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with scripted(echoing(shape), models=lambda: (200, {"data": []}, {"X-Seen": KEY})) as server:
        try:
            told = repr(ask(OpenAIClient("m", base_url=server.base_url, max_attempts=2), seed=1))
        except EvalkitError as failure:
            told = str(failure)
    assert any(KEY in name for one in server.headers for name in one.values())  # it was sent
    assert len(caplog.records) > 10 and any("httpcore" in record.name for record in caplog.records)
    assert pieces(told) == [] and pieces(caplog.text) == []
    if shape not in ("of a parameter", "redirect", "as a parameter", "broken"):
        assert "[key]" in told


@pytest.mark.parametrize(
    "reply",
    [
        saying(f"the key is {KEY}, I think"),
        saying(f"part of it: {KEY[3:]}"),
        saying("fine", finish_reason=KEY),
        saying(None, refusal=f"I will not say {KEY}"),
        {**saying("fine"), "model": KEY, "id": KEY, "system_fingerprint": KEY},
        saying(
            "x", logprobs={"content": [{"token": "x", "logprob": -1, "top_logprobs": [{"token": KEY, "logprob": -1}]}]}
        ),
        saying(
            "x",
            logprobs={
                "content": [
                    {"token": part, "logprob": -1, "top_logprobs": [{"token": part, "logprob": -1}]}
                    for part in re.findall("....", KEY)
                ]
            },
        ),
    ],
    ids=["text", "part", "finish_reason", "refusal", "model", "candidate", "spelled"],
)
def test_a_reply_is_kept_without_it(reply: dict[str, Any], tmp_path: Path) -> None:
    with scripted(lambda body: (200, reply)) as server:
        client = OpenAIClient("m", base_url=server.base_url)
        response = ask(Recorder(tmp_path / "a.sqlite", client, cache=tmp_path / "b.sqlite"), logprobs=1)  # type: ignore[arg-type]
    assert pieces(repr(response)) == []
    assert pieces("".join("".join(one) for one in response.logprobs)) == []
    for file in tmp_path.iterdir():
        assert pieces(file.read_bytes().decode("latin-1")) == []
    assert (response.prompt_tokens, response.completion_tokens) == (7, 2)


def test_no_file_of_a_run_holds_the_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that echoes it in headers and errors, in a tenth of the replies, and in the explanations themselves."""
    monkeypatch.setattr(openai, "_FIRST_PAUSE_S", 0.01)
    caplog.set_level(logging.DEBUG)
    count = 0

    def answer(body: dict[str, Any]) -> Reply:
        nonlocal count
        count += 1
        if count % 5 == 0:
            return 500, error(f"broken for Bearer {KEY}"), {"X-Seen": KEY}
        if count % 11 == 0:
            return 400, error(f"refused to {KEY}"), {"X-Seen": KEY}
        text = reply_text(body)
        return 200, {**saying(text.replace("words", f"{KEY} words") + (KEY if count % 10 == 0 else "")), "model": KEY}

    with scripted(answer, owned_by="another") as server:
        store, config = collected(
            tmp_path / "run",
            3,
            explainers=("default",),
            judges=("llm",),
            client="openai:m",
            client_options={"base_url": server.base_url},
            cache=tmp_path / "cache.sqlite",
        )

        store.close()
        run(config, tmp_path / "run", stages=("explain", "score"))
    with RunStore.open(tmp_path / "run") as store:
        frames = store.frames()
    assert count > 30 and len(frames.judgements) > 0
    assert frames.explanations["text"].dropna().str.contains(r"\[key\]").any()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"records.sqlite", "calls.sqlite", "cache.sqlite"} <= {file.name for file in files}
    for file in files:
        content = file.read_bytes()
        assert pieces(content.decode("latin-1")) == [], file
        assert base64.b64encode(KEY.encode())[:40] not in content, file
    assert pieces(caplog.text) == []


@pytest.mark.slow
@pytest.mark.parametrize("client", ["openai:stand-in", "openai:wrong-name"])
def test_no_word_of_a_process_holds_the_key(client: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    collected(folder, 3)[0].close()
    environment = {**os.environ, "OPENAI_API_KEY": KEY, "OPENAI_LOG": "debug", "PYTHONPATH": str(ROOT)}
    with ChatServer(faults=0.3, kinds=("500", "503", "not_json"), echo_key=True, owned_by="another") as server:
        options = ["explain", str(folder), "--explainer", "default", "--client", client, "--base-url", server.base_url]
        done = subprocess.run(
            [sys.executable, "-m", "evalkit", "--debug", *options],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert (done.returncode == 0) == (client == "openai:stand-in"), done.stderr
    assert server.counts()["received"] > 0 and all(entry["authorization"] for entry in server.log)
    if client == "openai:wrong-name":
        assert "Traceback" in done.stderr and "does not exist" in done.stderr
    assert pieces(done.stdout) == pieces(done.stderr) == []
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or pieces(file.read_bytes().decode("latin-1")) == [], file


# what comes in


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@localhost:8000/v1",
        f"http://{KEY}@localhost:8000/v1",
        f"http://localhost:8000/v1?api-key={KEY}",
        f"http://localhost:8000/{KEY}/v1",
        f"http://localhost:8000/v1#{KEY}",
        "http://user:another-secret@localhost:8000/v1",
        "http://another-secret@localhost:8000/v1",
        "http://localhost:8000/v1?api-key=another-secret",
        "http://localhost:8000/v1#another-secret",
        "another-secret",
        f"http://{KEY}.example.org/v1",
        KEY,
        f"{KEY}:x@localhost/v1",
        f"user:{KEY}@localhost/v1",
        f"ftp://{KEY}/v1",
        f"http://localhost:{KEY}/v1",
        f"http://[{KEY}/v1",
        f"http://local host/{KEY}",
    ],
)
def test_a_url_with_a_key_is_refused_without_repeating_it(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(BadConfig) as caught:
        OpenAIClient("m", base_url=["http://localhost:1/v1", url])
    told = str(caught.value) + caplog.text
    assert pieces(told) == [] and KEY[9:].lower() not in told
    assert "user:" not in told and "another-secret" not in told


@pytest.mark.parametrize(
    "url", ["", "localhost:8000/v1", "http://", "http:///v1", "https://host:99999/v1", None, 5, ["x"]]
)
def test_urls_that_cannot_be(url: Any) -> None:
    with pytest.raises(BadConfig, match="base URL: expected http://HOST:PORT/v1 or https://…"):
        checked_url(url, Redactor(None))


def test_urls_that_can() -> None:
    for url in ("http://localhost:8000/v1", "https://api.example.org/v1/", "http://[::1]:8000/v1", "http://10.0.0.1"):
        assert checked_url(url, Redactor(KEY)) == url.rstrip("/")


def test_further_fields_may_not_hold_one_either() -> None:
    redact = Redactor(KEY, piece=8)
    for fields in (
        {"user": KEY},
        {"a": {"b": [KEY[5:20]]}},
        {"api_key": "x"},
        {"x": {"Authorization": "y"}},
        {"key": 1},
    ):
        with pytest.raises(BadConfig, match="keys come from the environment") as caught:
            checked_fields(fields, redact)
        assert pieces(str(caught.value)) == []
    sound = {"top_p": 0.9, "stop_token_ids": [1], "max_tokens": 5, "monkey": 1}
    assert checked_fields(sound, redact) == sound
    assert checked_fields(None, redact) == {}


@pytest.mark.parametrize("planted", [f"{KEY}\n{KEY}", f"{KEY} ", f"{KEY} x", f"“{KEY}”", f"{KEY}\x7f"])
def test_a_key_that_cannot_be_sent(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", planted)
    if planted.strip() == KEY:
        assert read_key("OPENAI_API_KEY") == KEY
        return
    with pytest.raises(BadConfig, match="environment variable OPENAI_API_KEY: expected an API key") as caught:
        OpenAIClient("m", base_url="http://localhost:1/v1")
    assert pieces(str(caught.value)) == []


# cutting


@given(st.text(max_size=30), st.integers(0, len(KEY)), st.integers(0, len(KEY)), st.text(max_size=30))
def test_no_piece_stays(before: str, start: int, end: int, after: str) -> None:
    text = before + KEY[start:end] + after
    cut = Redactor(KEY, piece=8)(text)
    assert not any(KEY[at : at + 8] in cut for at in range(len(KEY) - 7))
    if end - start < 8 and not any(KEY[at : at + 8] in text for at in range(len(KEY) - 7)):
        assert cut == text


def test_cutting_leaves_the_rest() -> None:
    redact = Redactor("sk-12345678", piece=4)
    assert redact("a sk-12345678 b sk-1234 c 345678 d 123") == "a [key] b [key] c [key] d 123"
    assert Redactor("sk-12345678")("sk-12345678, sk-1234") == "[key], sk-1234"
    assert Redactor(None)("none") == "none"
    assert Redactor("EMPTY", least=8)("EMPTY") == "EMPTY"


@pytest.mark.parametrize("placeholder", ["EMPTY", "none", "test", "x", "words"])
def test_a_placeholder_for_a_key_spoils_no_reply(placeholder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", placeholder)
    text = f"{placeholder} such as {placeholder}s"
    with scripted(lambda body: (200, saying(text))) as server:
        assert ask(OpenAIClient("m", base_url=server.base_url)).text == text
        assert server.headers[-1]["authorization"] == f"Bearer {placeholder}"


def test_without_a_key_a_server_of_one_s_own_is_still_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with scripted(lambda body: (200, saying("fine"))) as server:
        assert ask(OpenAIClient("m", base_url=server.base_url)).text == "fine"
    assert pieces(str(server.headers)) == []


def test_the_key_goes_to_no_other_server() -> None:
    with scripted(lambda body: (200, saying("caught"))) as thief:
        elsewhere = (307, b"", {"Location": thief.base_url.replace("127.0.0.1", "localhost") + "/chat/completions"})
        with scripted(lambda body: elsewhere) as server:
            ask(OpenAIClient("m", base_url=server.base_url))
    assert thief.asked and pieces(str(thief.headers)) == []
