"""A run that is killed, stopped, started twice or out of disk: the same command goes on, and nothing paid for is lost.

The language model is a server in a process of its own. What it was asked stands in the server's log, whatever the program
believes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat_model import sha
from tests.support.dictionaries import write_sae
from tests.support.hardware import quick_dtype
from tests.support.processes import ROOT, STAGES, Command, Server, serving
from tests.support.servers import ChatServer

WORDS = ("whale", "ship", "sea", "deck", "calm", "night", "storm", "sailor", "captain", "island", "wind", "boat")


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """A test that fails leaves no process behind."""
    yield
    while Command.started_ones:
        process = Command.started_ones.pop().process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


# what a run folder holds


def answers(folder: Path, copy: Path) -> dict[str, tuple[Any, ...]]:
    """The recorded requests by what they ask, as the server's log names them. Reads a copy: recovery is not ours to do.

    A sender may still be writing; a copy that it spoiled is made again.
    """
    rows = None
    while rows is None:
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        with contextlib.suppress(FileNotFoundError):
            for path in sorted(folder.glob("calls.sqlite*"), reverse=True):  # what the log loses is in the file by then
                shutil.copy(path, copy)
            rows = read_answers(copy / "calls.sqlite")
    found = {sha(json.loads(row[0])["messages"])[:16]: row for row in rows}
    assert len(found) == len(rows)  # nothing else tells two requests apart
    return found


def read_answers(path: Path) -> list[tuple[Any, ...]] | None:
    """All rows; None where the file is damaged."""
    query = "SELECT request, key, model, response, prompt_tokens, completion_tokens, paid FROM answers"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        try:
            sound = connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            return connection.execute(query).fetchall() if sound else None
        except sqlite3.OperationalError:  # killed before there was a table
            return []
        except sqlite3.DatabaseError:
            return None


def tables(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Every table of the records, without the times that the stages took."""
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {}
    for name in names:
        rows = [dict(row) for row in connection.execute(f"SELECT * FROM {name}")]
        found[name] = sorted(({key: row[key] for key in row if key != "seconds"} for row in rows), key=repr)
    connection.close()
    return found


def files(folder: Path, pattern: str) -> dict[str, str]:
    """Hashes of the files' bytes, hidden ones too."""
    found = [path for path in folder.glob(pattern) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


# kill -9

KILLS = {"start": 2, "calibrate": 3, "collect activations": 5, "sample windows": 2, "explain": 3, "score": 5}
DELAY_S = 0.3  # of an answer
GOING_ON = ("collect activations", "explain", "score")  # a killed one keeps what it has done
ASKING = ("explain", "score")  # begin with the start of a sender
# the undisturbed run says how long a stage lasts, but not where the machine was busier then: later than this comes no kill
LONGEST_S = dict(zip(STAGES, (5.0, 6.0, 1.0, 0.08, 3.0, 6.0), strict=True))
REAL = {
    "-d": "bundled:sae/layer_15/width_2k/average_l0_32",
    "--dtype": quick_dtype(),
    "--context-length": 64,
    "--max-tokens": 28000,  # two fifths of it is not in the calibration sample
    "--features": 4,
    "--positives": 4,
    "--negatives": 4,
    "--examples": 10,
    "--controls": "shuffled,planted",
    "--explainer": "default",
    "--client": "openai:stand-in",
    "--client-option": "concurrency=2",
}
JUDGING = ("--judge", "llm", "--judge", "llm:single", "--scorer", "detection", "--scorer", "fuzzing")


@dataclass(frozen=True)
class Kill:
    """One kill -9: what the process had said until then, and what was on disk after it."""

    stage: str
    time: float
    lines: tuple[str, ...]
    shards: dict[str, tuple[int, str]]
    calibrated: bool
    recorded: frozenset[str]


def flat(options: dict[str, object]) -> list[str]:
    return [str(part) for pair in options.items() for part in pair]


def shards(folder: Path) -> dict[str, tuple[int, str]]:
    hashes = files(folder, "collected/shard-*.npz")
    return {Path(name).name: ((folder / name).stat().st_mtime_ns, digest) for name, digest in hashes.items()}


def kill_in(stage: str, command: list[str], folder: Path, wait_s: dict[str, float], chance: random.Random) -> Kill:
    """Start the command and kill it at a random moment of the stage, or of the next one that has something to do."""
    process = Command(*command)
    try:
        reached = process.wait_for_stage(stage)
        time.sleep(chance.uniform(0, 0.9) * wait_s[reached])
    finally:
        killed = process.kill()
    lines = tuple(line for _, line in process.lines)
    recorded = frozenset(answers(folder, folder.with_name("copy")))
    calibrated = (folder / "calibration.safetensors").exists()
    return Kill(list(process.begun())[-1], killed, lines, shards(folder), calibrated, recorded)


def computed(lines: tuple[str, ...]) -> set[str]:
    """The shards that a process began to compute, by its own word."""
    return {f"shard-{found}.npz" for found in re.findall(r"shard (\d+): starting forward passes", "\n".join(lines))}


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_repeat_nothing(smollm2: Path, tmp_path: Path) -> None:
    chance = random.Random(20)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    common = ["--debug", "run", "--model", str(smollm2), *flat(REAL), *JUDGING]
    with serving(tmp_path / "whole.jsonl", DELAY_S) as server:
        process = Command(*common, "--base-url", server.url, "--out", whole)
        assert process.finish(400) == 0, process.said
    begun = [*process.begun().items(), ("end", time.time())]
    assert [stage for stage, _ in begun[:-1]] == list(STAGES)
    lasts = {stage: after - begin for (stage, begin), (_, after) in itertools.pairwise(begun)}
    shares = {stage: count + 1 if stage in GOING_ON else 1 for stage, count in KILLS.items()}
    first_asked = min(times[0] for times in server.events("received").values())
    starts = {stage: first_asked - dict(begun)["explain"] if stage in ASKING else 0.0 for stage in STAGES}
    wait_s = {stage: min(LONGEST_S[stage], starts[stage] + lasts[stage] / shares[stage]) for stage in STAGES}
    assert {len(times) for times in server.events("finished").values()} == {1}

    with serving(tmp_path / "killed.jsonl", DELAY_S) as server:
        command = [*common, "--base-url", server.url, "--out", str(killed)]
        plan = [stage for stage, count in KILLS.items() for _ in range(count)]
        kills = [kill_in(stage, command, killed, wait_s, chance) for stage in plan]
        last = Command(*command)
        assert last.finish(400) == 0, last.said
    hit = Counter(kill.stage for kill in kills)
    print(f"\nstages, in seconds: {lasts}\nkills: {dict(hit)}")
    assert hit.total() == 20 and set(hit) == set(STAGES)  # each of them a process that was at work: see Command.kill

    check_equal(whole, killed, tmp_path / "copy")
    check_forward_passes(killed, kills, tuple(line for _, line in last.lines))
    check_requests(server, kills, answers(killed, tmp_path / "copy"))


def check_equal(whole: Path, killed: Path, copy: Path) -> None:
    """Record for record, file for file; nothing half written is left lying about."""
    left, right = (files(folder, "**/*") for folder in (killed, whole))
    for name in left.keys() | right.keys():
        if "sqlite" not in name and not name.endswith(".lock"):
            assert left.get(name) == right.get(name), name
    records = tables(killed / "records.sqlite")
    assert records == tables(whole / "records.sqlite")
    assert all(records[name] for name in ("sources", "features", "explanations", "scores", "judgements", "stages"))
    assert answers(killed, copy) == answers(whole, copy)


def check_forward_passes(folder: Path, kills: list[Kill], last: tuple[str, ...]) -> None:
    """What was on disk after a kill is that very file at the end, and no later process began to compute it."""
    finally_there = shards(folder)
    processes = [kill.lines for kill in kills] + [last]
    assert set().union(*map(computed, processes)) == set(finally_there)
    for number, kill in enumerate(kills, 1):
        later = processes[number:]
        assert kill.shards.items() <= finally_there.items()
        assert not set().union(*map(computed, later)) & set(kill.shards)
        assert not kill.calibrated or not any(line.startswith("calibrate:") for lines in later for line in lines)


def check_requests(server: Server, kills: list[Kill], recorded: dict[str, Any]) -> None:
    """By the server's log: nothing is answered twice, and what was recorded is not even asked again."""
    received, finished = server.events("received"), server.events("finished")
    assert set(finished) == set(recorded)
    assert {len(times) for times in finished.values()} == {1}
    for kill in kills:
        assert not [key for key in kill.recorded if max(received[key]) > kill.time]
    under_way = {key for key, (time,) in finished.items() for kill in kills if received[key][0] < kill.time < time}
    print(f"answered after the command that asked was killed: {len(under_way)} of {len(finished)}")
    assert under_way  # else nothing was shown


# the other ways to end, on a tiny model


TINY = {
    "--dtype": "float32",
    "--features": 6,
    "--positives": 5,
    "--negatives": 5,
    "--examples": 6,
    "--controls": "shuffled",
    "--explainer": "default",
    "--judge": "llm:single",
    "--scorer": "detection",
    "--client": "openai:stand-in",
    "--client-option": "concurrency=4",
}


@dataclass(frozen=True)
class Scoring:
    """A run whose features are explained already, so that the command begins to score at once."""

    folder: Path
    options: tuple[str, ...]

    def command(self, server: Server) -> list[str]:
        return ["run", *self.options, "--base-url", server.url, "--out", str(self.folder)]

    def moved(self, folder: Path) -> Scoring:
        return Scoring(Path(shutil.copytree(self.folder, folder)), self.options)

    def recorded(self, tmp_path: Path) -> dict[str, Any]:
        return answers(self.folder, tmp_path / "copy")


@pytest.fixture(scope="module", autouse=True)
def forced() -> Iterator[None]:
    """The tiny model's random dictionaries fit nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVALKIT_RUN_FORCE", "1")
        patch.setenv("EVALKIT_COLLECT_FORCE", "1")
        yield


@pytest.fixture(scope="module")
def explained(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Scoring:
    folder = tmp_path_factory.mktemp("explained")
    chance = random.Random(0)
    lines = [json.dumps({"text": " ".join(chance.choices(WORDS, k=160)) + "."}) for _ in range(80)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    dictionary = write_sae(folder / "sae", 32, 64, 10).parent
    own = {"--model": tiny_llama, "-d": dictionary, "--corpus": folder / "text.jsonl"}
    scoring = Scoring(folder / "run", tuple(flat({**own, **TINY})))
    with serving(folder / "log.jsonl", 0) as server:
        first = Command(*scoring.command(server), "--max-calls", 6)  # as many as there are features to explain
        assert first.finish() == 2 and "--max-calls" in first.said, first.said
    return scoring


@pytest.fixture
def scoring(explained: Scoring, tmp_path: Path) -> Scoring:
    return explained.moved(tmp_path / "run")


def wait_for_log(server: Server, event: str, count: int) -> None:
    end = time.time() + 60
    while len(server.events(event)) < count and time.time() < end:
        time.sleep(0.02)


def test_a_kill_in_the_first_moment_of_a_recording(scoring: Scoring, tmp_path: Path) -> None:
    """It leaves a file without a table in it; too short a moment to be hit by chance."""
    (scoring.folder / "calls.sqlite").unlink()
    connection = sqlite3.connect(scoring.folder / "calls.sqlite")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    check_goes_on(scoring, {}, tmp_path)


def test_a_second_process_is_refused_and_the_first_goes_on(scoring: Scoring, tmp_path: Path) -> None:
    with serving(tmp_path / "log.jsonl", 0.5) as server:
        first = Command(*scoring.command(server))
        first.wait_for("score:")
        second = Command(*scoring.command(server))
        assert second.finish() == 2
        assert second.said.count("error:") == 1 and f"process {first.process.pid} writing it" in second.said
        assert first.process.poll() is None
        assert first.finish() == 0, first.said
        assert {len(times) for times in server.events("received").values()} == {1}


def test_ctrl_c_waits_for_what_was_sent_and_sends_no_more(scoring: Scoring, tmp_path: Path) -> None:
    with serving(tmp_path / "log.jsonl", 0.8) as server:
        process = Command(*scoring.command(server))
        wait_for_log(server, "finished", 4)
        process.process.send_signal(signal.SIGINT)
        stopped = time.time()
        assert process.finish(10) == 130
        assert time.time() - stopped < 6
        log = server.events("received"), server.events("finished"), server.events("gone")
    received, finished, gone = log
    assert all(times[-1] < stopped + 1 for times in received.values())
    assert not gone and set(received) == set(finished)
    recorded = scoring.recorded(tmp_path)
    assert set(finished) <= set(recorded)
    assert "Traceback" not in process.said and re.search("waiting for [1-4] requests in flight", process.said)
    typed = process.said.partition("run the same command to resume:\n")[2].splitlines()[0]

    with serving(tmp_path / "more.jsonl", 0, server.port) as server:
        subprocess.run(typed, shell=True, check=True, cwd=ROOT, capture_output=True)
        assert not set(server.events("received")) & set(recorded)
    assert len(scoring.recorded(tmp_path)) > len(recorded)


def test_what_was_sent_is_recorded_after_the_kill_and_the_next_command_waits_for_it(
    scoring: Scoring, tmp_path: Path
) -> None:
    with serving(tmp_path / "log.jsonl", 6) as server:  # longer than a command takes to start
        process = Command(*scoring.command(server))
        wait_for_log(server, "received", 4)
        killed = process.kill()
        last = Command(*scoring.command(server))
        assert last.finish(200) == 0, last.said
        received, finished = server.events("received"), server.events("finished")
    under_way = [key for key, times in finished.items() if received[key][0] < killed < times[0]]
    assert len(under_way) == 4 and set(under_way) <= set(scoring.recorded(tmp_path))
    assert {len(times) for times in received.values()} == {1}
    assert "waiting for answers to requests of an earlier command; `kill " in last.said


def test_a_kill_stops_what_would_be_tried_again(scoring: Scoring, tmp_path: Path) -> None:
    """A sender without a command asks nobody anew: not what failed, and not what stood in a queue."""
    with ChatServer(faults=1, kinds=("500",), delay_s=0.3) as server:
        process = Command(*scoring.command(Server(server.port, tmp_path / "none")))
        while len(server.log) < 9:
            time.sleep(0.01)
        killed = process.kill()
        time.sleep(3)
        assert max(float(str(entry["time"])) for entry in server.log if entry["event"] == "received") < killed + 0.1


def test_a_sender_that_dies_ends_the_run_with_one_line(scoring: Scoring, tmp_path: Path) -> None:
    with serving(tmp_path / "log.jsonl", 0.5) as server:
        process = Command(*scoring.command(server))
        wait_for_log(server, "finished", 5)
        os.kill(int((scoring.folder / "calls.lock").read_text()), signal.SIGKILL)
        assert process.finish(30) == 2
    assert process.said.count("error:") == 1 and "the process of client 'openai'" in process.said
    assert "exit code -9" in process.said and "Traceback" not in process.said
    check_goes_on(scoring, scoring.recorded(tmp_path), tmp_path)


def test_a_second_ctrl_c_ends_at_once(scoring: Scoring, tmp_path: Path) -> None:
    with serving(tmp_path / "log.jsonl", 60) as server:
        process = Command(*scoring.command(server))
        process.wait_for("score:")
        wait_for_log(server, "received", 1)
        process.process.send_signal(signal.SIGINT)
        process.wait_for("WARNING  waiting for")
        time.sleep(1)
        assert process.process.poll() is None  # it waits
        process.process.send_signal(signal.SIGINT)
        assert process.finish(10) == 130
        assert "Traceback" not in process.said and process.said.count("run the same command to resume") == 1
        assert re.search(r"process \d+ waits for requests in flight, records the answers", process.said)


@contextlib.contextmanager
def small_disk(at: Path) -> Iterator[Path]:
    """A file system with room for 16 MB."""
    at.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", at], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", at], check=True)


def check_full(process: Command, scoring: Scoring, server: Server, tmp_path: Path) -> dict[str, Any]:
    """It ends with one line; all is kept but the answers that came when there was no room. What is kept."""
    assert process.finish(60) == 2, process.said
    assert process.said.count("error:") == 1 and "Traceback" not in process.said
    recorded = scoring.recorded(tmp_path)
    lost = set(server.events("finished")) - set(recorded)
    assert len(recorded) > 4 and len(lost) <= 8  # those in flight and those that had just been sent in their place
    return recorded


def check_goes_on(scoring: Scoring, recorded: dict[str, Any], tmp_path: Path) -> None:
    with serving(tmp_path / "more.jsonl", 0) as server:
        process = Command(*scoring.command(server))
        assert process.finish() == 0, process.said
        assert server.events("received") and not set(server.events("received")) & set(recorded)


def test_a_full_disk_keeps_what_was_answered_before(explained: Scoring, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk, serving(tmp_path / "log.jsonl", 0.2) as server:
        scoring = explained.moved(disk / "run")
        process = Command(*scoring.command(server))
        wait_for_log(server, "finished", 12)
        with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(4096))
        recorded = check_full(process, scoring, server, tmp_path)
        (disk / "ballast").unlink()
        check_goes_on(scoring, recorded, tmp_path)


def test_a_limit_on_files_keeps_what_was_answered_before(scoring: Scoring, tmp_path: Path) -> None:
    """As above where nothing can be mounted: no file may grow past a size."""
    with serving(tmp_path / "log.jsonl", 0.2) as server:
        process = Command(*scoring.command(server), largest_file=300_000)
        recorded = check_full(process, scoring, server, tmp_path)
    check_goes_on(scoring, recorded, tmp_path)
