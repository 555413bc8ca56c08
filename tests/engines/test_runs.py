"""Whole runs with a real language model as explainer and judge: in this process, and behind a real server.

The model has 135M parameters and judges at chance: these tests are about plumbing, and every table says so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from evalkit.llm.accounting.answer_store import Recording
from evalkit.store.frames import RunFrames
from evalkit.store.run_store import read_run
from tests.support.command_line import EVALKIT, SMALL, run_command
from tests.support.hardware import quick_dtype

pytestmark = pytest.mark.slow
KEY = "sk-planted-0123456789abcdef"
ASKED = ["--explainer", "default", "--judge", "llm", "--judge", "llm:single"]
KEYS = ["source", "feature", "scorer", "judge", "control", "item"]


@pytest.fixture(scope="module")
def collected(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three features of a shipped dictionary, with their examples."""
    folder = tmp_path_factory.mktemp("engines") / "collected"
    run_command("collect", "--model", smollm2, *SMALL, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def in_process(collected: Path, smollm2: Path) -> Path:
    folder = Path(shutil.copytree(collected, collected.with_name("in-process")))
    done = run_command("run", "--model", smollm2, *SMALL, "--out", folder, *ASKED, "--client", f"vllm:{smollm2}")
    assert "Loading safetensors" not in done.stderr and done.stdout == ""
    return folder


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """vLLM's own server with the same model: its base URL and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    options = {
        "--model": smollm2, "--served-model-name": "smollm2-135m", "--port": port, "--host": "127.0.0.1",
        "--dtype": quick_dtype(), "--max-model-len": 4096, "--api-key": KEY,
        "--structured-outputs-config": '{"backend": "xgrammar", "disable_any_whitespace": true}',
    }  # fmt: skip
    listed = [str(part) for pair in options.items() for part in pair]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *listed],
            stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1", log
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no server within 180 s: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def served(collected: Path, server: tuple[str, Path]) -> Path:
    folder = Path(shutil.copytree(collected, collected.with_name("served")))
    client = ["--client", "openai:smollm2-135m", "--base-url", server[0], "--cache", folder.with_name("cache.sqlite")]
    run_command("explain", folder, *ASKED[:2], *client, OPENAI_API_KEY=KEY)
    run_command("score", folder, *ASKED[2:], *client, OPENAI_API_KEY=KEY)
    return folder


def check_run(folder: Path) -> RunFrames:
    """Every test of every feature was held, under both forms, and says what kind of model stands behind it."""
    frames = read_run(folder)
    explained = frames.explanations[frames.explanations["text"].notna()]
    assert set(explained["explainer"]) == {"default@smollm2-135m"} and len(explained) == 3
    judged = frames.judgements
    assert set(judged["judge"]) == {"llm@smollm2-135m", "llm:single@smollm2-135m"}
    sizes = judged.groupby(["source", "feature", "scorer", "judge", "control"]).size()
    assert (sizes == 12).all()  # 6 + 6 windows: as many judgements as items
    assert len(sizes) == 3 * 2 * 2 * 2  # features, scorers, forms, own and shuffled explanation
    unscored = judged[judged["match"].isna()]
    assert unscored["reason"].notna().all() and len(unscored) < 0.1 * len(judged)
    single = judged[judged["judge"].str.startswith("llm:single")]
    assert single["probability"].notna().mean() > 0.9 and single["probability"].nunique() > 10
    return frames


@pytest.mark.parametrize("kind", ["in_process", "served"])
def test_three_features_are_explained_and_judged_in_both_forms(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    check_run(folder)
    for arguments in (("table", folder), ("table", folder, "--short")):
        assert "smollm2-135m: plumbing only" in run_command(*arguments).stdout
    assert "calls" in run_command("table", folder).stdout


def test_the_recording_alone_gives_the_same_run(in_process: Path, collected: Path) -> None:
    folder = Path(shutil.copytree(collected, collected.with_name("replayed")))
    recording = f"replay:{in_process / 'calls.sqlite'}"
    run_command("explain", folder, *ASKED[:2], "--client", recording)
    run_command("score", folder, *ASKED[2:], "--client", recording)
    live, again = (read_run(one).judgements.sort_values(KEYS).reset_index(drop=True) for one in (in_process, folder))
    pd.testing.assert_frame_equal(live, again)


def test_the_server_was_asked_everything_once(served: Path, server: tuple[str, Path]) -> None:
    """As many healthy replies in the server's log as answers recorded; a second run from the cache adds none."""

    def replies() -> int:
        return len(re.findall(r'"POST /v1/chat/completions HTTP/1\.1" 200', server[1].read_text()))

    recording = Recording(served / "calls.sqlite", write=False)
    spent = recording.spent("smollm2-135m")
    recording.close()
    assert replies() == spent.calls > 40 and spent.prompt_tokens > 10_000
    again = Path(shutil.copytree(served.with_name("collected"), served.with_name("again")))
    client = ["--client", "openai:smollm2-135m", "--base-url", server[0], "--cache", served.with_name("cache.sqlite")]
    run_command("explain", again, *ASKED[:2], *client, OPENAI_API_KEY=KEY)
    run_command("score", again, *ASKED[2:], *client, OPENAI_API_KEY=KEY)
    assert replies() == spent.calls
    first, second = (read_run(one).judgements.sort_values(KEYS).reset_index(drop=True) for one in (served, again))
    pd.testing.assert_frame_equal(first, second)


def test_the_estimate_was_right(served: Path, collected: Path, server: tuple[str, Path], tmp_path: Path) -> None:
    """What --dry-run says before anything is asked, against what the server then counted: calls, tokens, cost."""
    prices = tmp_path / "prices.toml"
    prices.write_text("[smollm2-135m]\nprompt = 1.0\ncompletion = 4.0\n")
    options = ["--client", "openai:smollm2-135m", "--base-url", server[0], "--prices", prices]
    plans = [
        json.loads(run_command(*command, *options, "--dry-run", "--json", OPENAI_API_KEY=KEY).stdout)["language_model"]
        for command in (("explain", collected, *ASKED[:2]), ("score", collected, "--explainer", "default", *ASKED[2:]))
    ]
    recording = Recording(served / "calls.sqlite", write=False)
    spent = recording.spent("smollm2-135m")
    recording.close()
    assert sum(plan["calls"] for plan in plans) == pytest.approx(spent.calls, rel=0.15)
    assert sum(plan["prompt_tokens"] for plan in plans) == pytest.approx(spent.prompt_tokens, rel=0.25)
    assert all(plan["cost_usd"] > 0 for plan in plans)


def test_the_doctor_asks_the_server(server: tuple[str, Path]) -> None:
    asked = ["--client", "openai:smollm2-135m", "--base-url", server[0]]
    rows = json.loads(run_command("doctor", *asked, "--json", OPENAI_API_KEY=KEY).stdout)
    assert any(row["group"] == "client" and row["state"] == "ok" for row in rows)
    refused = subprocess.run(
        [*EVALKIT, "doctor", *asked], env={**os.environ, "OPENAI_API_KEY": "sk-wrong"}, capture_output=True, text=True
    )
    assert refused.returncode == 1 and "401" in refused.stdout and "sk-wrong" not in refused.stdout + refused.stderr


def test_the_key_is_in_no_file_of_the_run(served: Path) -> None:
    files = [path for path in served.parent.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
