"""The command line as a person meets it: one line on a mistake, exit code 2, data on stdout."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import evalkit
from evalkit.cli import app, main
from tests.support.command_line import call
from tests.support.dictionaries import write_rqae, write_sae
from tests.support.paths import ROOT


@pytest.fixture
def good(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Options of a run that would work; a random dictionary fits nothing."""
    monkeypatch.setenv("EVALKIT_RUN_FORCE", "1")
    monkeypatch.setenv("EVALKIT_COLLECT_FORCE", "1")
    generator = np.random.default_rng(0)
    corpus = tmp_path / "text.jsonl"
    words = ["whale", "ship", "sea", "deck"]
    corpus.write_text("\n".join(json.dumps({"text": " ".join(generator.choice(words, 300))}) for _ in range(60)))
    return {
        "--model": tiny_llama,
        "-d": write_sae(tmp_path / "sae", 32, 64, 10).parent,
        "--corpus": corpus,
        "--features": 4,
        "--positives": 5,
        "--negatives": 5,
        "--examples": 6,
        "--dtype": "float32",
        "--out": tmp_path / "run",
    }


def truncated(tmp_path: Path) -> Path:
    folder = write_sae(tmp_path / "cut", 32, 64, 10)
    data = (folder / "params.npz").read_bytes()
    (folder / "params.npz").write_bytes(data[: len(data) // 2])
    return folder


def other_width(tmp_path: Path) -> Path:
    return write_sae(tmp_path / "wide", 48, 64, 10)


def wrong_rqae(tmp_path: Path) -> Path:
    return write_rqae(tmp_path / "rqae", 48, 256, model="tiny-llama", site="layers.3")


def empty_file(tmp_path: Path) -> Path:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    return path


def short_file(tmp_path: Path) -> Path:
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(json.dumps({"text": "the whale and the ship " * 30}) for _ in range(3)))
    return path


def no_text(tmp_path: Path) -> Path:
    path = tmp_path / "field.jsonl"
    path.write_text(json.dumps({"body": "the whale"}))
    return path


def floats(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.npy"
    np.save(path, np.zeros((20, 128)))
    return path


MISTAKES = {
    "missing model": ("--model", "nowhere/model", "nowhere/model"),
    "missing dictionary": ("-d", "nowhere/sae", "nowhere/sae: expected a dictionary"),
    "truncated dictionary": ("-d", truncated, "params.npz"),
    "dictionary of another width": ("-d", other_width, "32"),
    "RQAE of another width": ("-d", wrong_rqae, "32"),
    "missing site": ("--site", "layers.99", "layers.99"),
    "missing corpus": ("--corpus", "nowhere.jsonl", "nowhere.jsonl"),
    "empty corpus": ("--corpus", empty_file, "empty.jsonl"),
    "short corpus": ("--corpus", short_file, "at least 10 windows in each pool"),
    "no such field": ("--corpus", no_text, "body"),
    "floats for tokens": ("--corpus", floats, "tokens.npy"),
    "unknown explainer": ("--explainer", "word", "fix: use 'words'"),
    "unknown control": ("--controls", "nothing", "controls"),
    "zero features": ("--features", 0, "--features"),
    "bad dtype": ("--dtype", "int8", "dtype"),
    "judge without client": ("--judge", "llm", "client"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    mistake: str,
    good: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    option, value, fragment = MISTAKES[mistake]
    changed = {**good, option: value(tmp_path) if callable(value) else value}
    code, out, err = call(capsys, monkeypatch, "-q", "run", *(part for pair in changed.items() for part in pair))
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and out == "", err
    assert len(lines) == 1, err
    assert fragment in lines[0]
    assert all(word in lines[0] for word in (": expected ", "; seen ", "; fix: "))
    assert "Traceback" not in err
    left = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert not any(name.endswith(".part") for name in left)


def test_a_run_of_another_configuration(
    good: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [part for pair in good.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["evalkit", "-q", "collect", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    code, _, err = call(capsys, monkeypatch, "-q", "collect", *options, "--seed", 5)
    assert code == 2
    assert "expected a run with seed = 5; seen seed = 0; fix: use another --out" in err


@pytest.mark.parametrize("command", ["table", "plot"])
def test_no_run_there(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = call(capsys, monkeypatch, command, tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert err == (
        f"error: {tmp_path / 'nothing'}: expected a run folder with records.sqlite; seen no such folder; "
        "fix: pass the folder that `evalkit run` wrote\n"
    )


def test_dry_run_loads_no_model_and_writes_nothing(
    good: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [part for pair in {**good, "--model": "nowhere/model"}.items() for part in pair]
    code, out, _ = call(capsys, monkeypatch, "run", *options, "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["features"] == 4 * 4 and json.loads(out)["language_model"] is None
    code, out, _ = call(capsys, monkeypatch, "run", *options, "--dry-run")
    assert code == 0 and "16 at most" in out and "No language model is used." in out
    assert not (tmp_path / "run").exists()


def test_plugins_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = call(capsys, monkeypatch, "plugins", "--json")
    found = {(row["kind"], row["name"]): row for row in json.loads(out)}
    assert code == 0
    assert found["explainers", "words"] == {
        "kind": "explainers",
        "name": "words",
        "origin": "built in",
        "target": "explainers.words:WordsExplainer",
        "error": None,
        "abilities": [],
    }


@pytest.mark.parametrize(
    "command", [[], ["run"], ["collect"], ["explain"], ["score"], ["table"], ["plot"], ["inspect"], ["plugins"],
                ["models", "pull"], ["train", "sae"], ["train", "rqae"]],
    ids=lambda command: " ".join(command) or "evalkit",
)  # fmt: skip
def test_every_command_has_help_and_an_example(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    if command:
        assert f"evalkit {' '.join(command)}" in " ".join(result.output.split())
        assert "Example:" in result.output


def test_a_client_is_an_option_of_run(
    good: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording that is not there is found before anything is collected twice, and named."""
    options = [part for pair in good.items() for part in pair]
    code, _, err = call(
        capsys,
        monkeypatch,
        "-q",
        "run",
        *options,
        "--explainer",
        "default",
        "--client",
        f"replay:{tmp_path / 'no.sqlite'}",
    )
    assert code == 2
    assert "no.sqlite: expected a file of recorded answers; seen no such file" in err


def test_a_stage_in_which_everything_fails_is_an_error(
    good: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty recording answers nothing: every feature fails, is recorded as failed, and the command says so."""
    import asyncio

    from evalkit.llm.clients.recorder import Recorder
    from evalkit.records import Message, Response
    from evalkit.store.run_store import read_run

    class Once:
        name = "once"

        async def generate(self, messages: object, **options: object) -> Response:
            return Response("nothing")

    recording = tmp_path / "calls.sqlite"
    client = Recorder(recording, Once())
    asyncio.run(client.generate([Message("user", "hello")], max_tokens=1))
    asyncio.run(client.close())
    options = [part for pair in good.items() for part in pair]
    arguments = [*options, "--explainer", "default", "--client", f"replay:{recording}"]
    code, _, err = call(capsys, monkeypatch, "-q", "run", *arguments)
    assert code == 2
    assert re.search(r"explain: explainer default@\S+: expected at least one of", err) and "all failed" in err
    frames = read_run(tmp_path / "run")
    assert "failed" in set(frames.features["status"])


def test_scoring_before_explaining(
    good: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["evalkit", "-q", "collect", *(str(p) for pair in good.items() for p in pair)])
    with pytest.raises(SystemExit):
        main()
    code, _, err = call(capsys, monkeypatch, "-q", "score", tmp_path / "run")
    assert code == 2
    assert "expected explanations by some explainer; seen no explanation; fix: run `evalkit explain" in err


@pytest.mark.parametrize("mistake", [("--explainer", "word"), ("--judge", "llm"), ("--scorer", "fuzz")])
def test_names_are_checked_before_anything_is_computed(
    mistake: tuple[str, str],
    good: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [part for pair in good.items() for part in pair]
    code, _, _ = call(capsys, monkeypatch, "-q", "run", *options, *mistake)
    assert code == 2
    assert not (tmp_path / "run").exists()


def test_a_first_try_with_a_mistake_does_not_bind_the_folder(
    good: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [part for pair in {**good, "--corpus": tmp_path / "nowhere.jsonl"}.items() for part in pair]
    code, _, _ = call(capsys, monkeypatch, "-q", "collect", *wrong)
    assert code == 2
    monkeypatch.setattr(sys, "argv", ["evalkit", "-q", "collect", *(str(p) for pair in good.items() for p in pair)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code


def test_a_device_that_is_not_there(
    good: dict[str, object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [part for pair in good.items() for part in pair]
    code, _, err = call(capsys, monkeypatch, "-q", "collect", *options, "--device", "cuda:99")
    assert code == 2
    assert "device 'cuda:99': expected a device that this torch can use" in err


def test_ctrl_c_says_how_to_go_on(good: dict[str, object], tmp_path: Path) -> None:
    """A real SIGINT once the run folder is there; then the same command finishes."""
    options = [str(part) for pair in good.items() for part in pair]
    command = [sys.executable, "-m", "evalkit", "collect", *options, "--batch-size", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    while not (tmp_path / "run" / "corpus").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("stopped; finished work is kept; run the same command to resume") == 1
    assert "Traceback" not in err
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.output == f"evalkit {evalkit.__version__}\n"
