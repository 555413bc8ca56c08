"""A server and a command as processes of their own, for tests that kill, stop and starve them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tests.support.paths import ROOT

STAGES = ("start", "calibrate", "collect activations", "sample windows", "explain", "score")


@dataclass(frozen=True)
class Server:
    """A stand-in in a process of its own."""

    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def events(self, name: str) -> dict[str, list[float]]:
        """When an event happened, by what the request asked."""
        found = defaultdict(list)
        for line in self.log.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry["event"] == name:
                found[entry["key"]].append(entry["time"])
        return found


@contextlib.contextmanager
def serving(log: Path, delay_s: float, port: int = 0) -> Iterator[Server]:
    arguments = ["--log", str(log), "--delay", str(delay_s), "--port", str(port)]
    command = [sys.executable, "-m", "tests.support.servers", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            yield Server(int(process.stdout.readline()), log)
        finally:
            process.kill()


class Command:
    """``evalkit …`` in a process group of its own; what it says on stderr is read as it comes."""

    started_ones: ClassVar[list[Command]] = []

    def __init__(self, *arguments: object, largest_file: int = resource.RLIM_INFINITY) -> None:
        self.lines: list[tuple[float, str]] = []
        self._ended = False
        self._news = threading.Condition()
        self.started = time.time()

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's & makes children ignore it
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))

        self.process = subprocess.Popen(
            [sys.executable, "-m", "evalkit", *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=prepare,
            env={"OMP_NUM_THREADS": "2", **os.environ, "COLUMNS": "200"},
        )
        Command.started_ones.append(self)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                with self._news:
                    self.lines.append((time.time(), line.strip()))
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    @property
    def said(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def begun(self) -> dict[str, float]:
        """When each stage began, of those that did."""
        found = {"start": self.started}
        for seen, line in list(self.lines):
            name, _, rest = line.partition(": ")
            if name in STAGES and re.fullmatch(r"\d+ [a-z]+", rest):
                found.setdefault(name, seen)
        return found

    def wait_for(self, text: str) -> None:
        """Until a line begins with the text, or the process has ended."""
        with self._news:
            self._news.wait_for(lambda: self._ended or any(line.startswith(text) for _, line in self.lines), 120)

    def wait_for_stage(self, stage: str) -> str:
        """The stage as soon as it has begun, or a later one where it had nothing to do."""
        later = STAGES[STAGES.index(stage) :]
        with self._news:
            self._news.wait_for(lambda: self._ended or any(one in later for one in self.begun()), 120)
        reached = list(self.begun())[-1]
        assert not self._ended and reached in later, self.said
        return reached

    def kill(self) -> float:
        """kill -9 to the whole group; when."""
        killed = time.time()
        os.killpg(self.process.pid, signal.SIGKILL)
        assert self.process.wait(10) == -signal.SIGKILL, self.said
        self._reader.join()
        return killed

    def finish(self, timeout_s: float = 120) -> int:
        """The exit code; by kill -9 where it takes too long."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self._reader.join()
        return code
