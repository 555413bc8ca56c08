"""Runs in which one file is damaged, and what a command makes of each: the proof that damage does not go unnoticed.

A run over the tiny model of ``tests/end_to_end/data/older_run`` is recorded once, with a stand-in for the language model.
Every case copies the state of it that the command starts from, damages one file at random places, and calls the command
in this process.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from evalkit.cli import main
from evalkit.store.run_store import RunStore
from evalkit.util.sealed_files import sidecar
from tests.support.paths import ROOT
from tests.support.servers import ChatServer

MATERIAL = ROOT / "tests" / "end_to_end" / "data" / "older_run"
OPTIONS = [
    *(
        "--model",
        MATERIAL / "model",
        "-d",
        MATERIAL / "sae",
        "-d",
        MATERIAL / "rqae",
        "--corpus",
        MATERIAL / "text.jsonl",
    ),
    *[
        "--depths",
        "2,8",
        "--density",
        "0.05",
        "--features",
        "3",
        "--examples",
        "6",
        "--positives",
        "4",
        "--negatives",
        "4",
    ],
    *["--dtype", "float32", "--force", "--controls", "shuffled,planted,permuted"],
]
OFFLINE = ["--explainer", "words", "--judge", "lexical", "--scorer", "detection"]
ASKING = ["--explainer", "default", "--judge", "llm", "--scorer", "detection"]


@dataclass(frozen=True)
class Pair:
    """A file, and the command that reads it.

    state: of the run before the command: "finished", "collecting" (its examples are to be drawn again), "collected"
        (nothing is explained yet)
    command: "run" (with the options of the run), "score", "table" or "replay" (run from the recorded answers)
    """

    file: str
    state: str
    command: str

    def __str__(self) -> str:
        return f"{self.file}, {self.command} of a {self.state} run"


PAIRS = (
    Pair("run.json", "finished", "score"),
    *(
        Pair(f"corpus/{name}", "collecting", "run")
        for name in ("corpus.json", "tokens.npy", "documents.npy", "lengths.npy")
    ),
    Pair("fit.json", "collecting", "run"),
    Pair("calibration.safetensors", "collecting", "run"),
    Pair("collected/manifest.json", "collecting", "run"),
    Pair("collected/shard-000000.npz", "collecting", "run"),
    Pair("examples/source-000.parquet", "collected", "run"),
    Pair("examples/windows.parquet", "collected", "run"),
    Pair("records.sqlite", "finished", "table"),
    Pair("records.sqlite", "finished", "run"),
    Pair("calls.sqlite", "collected", "replay"),
)


def flip_bit(data: bytearray, random: np.random.Generator) -> None:
    data[random.integers(len(data))] ^= 1 << int(random.integers(8))


def flip_bits(data: bytearray, random: np.random.Generator) -> None:
    for _ in range(16):
        flip_bit(data, random)


def overwrite(data: bytearray, random: np.random.Generator) -> None:
    """With zeros, as a lost sector is."""
    start = int(random.integers(len(data)))
    length = min(len(data) - start, int(random.integers(1, 4097)))
    data[start : start + length] = bytes(length)


def cut_off(data: bytearray, random: np.random.Generator) -> None:
    del data[int(random.integers(len(data))) :]


def leave_out(data: bytearray, random: np.random.Generator) -> None:
    start = int(random.integers(len(data)))
    del data[start : start + int(random.integers(1, 257))]


def exchange(data: bytearray, random: np.random.Generator) -> None:
    """Two pieces of the file for each other."""
    length = max(1, min(512, len(data) // 4))
    one, other = sorted(int(place) for place in random.integers(0, len(data) - length + 1, 2))
    if other >= one + length:
        data[one : one + length], data[other : other + length] = (
            data[other : other + length],
            data[one : one + length],
        )


KINDS: tuple[Callable[[bytearray, np.random.Generator], None], ...] = (
    *(flip_bit, flip_bit, flip_bit, flip_bits, overwrite, cut_off, leave_out, exchange),
)


@dataclass(frozen=True)
class Outcome:
    """verdict: "unharmed" (the same table), "noticed" (one line that names the file and says what to do), or a fault:
    "differs", "traceback" or "unclear"; said: what the command said last
    """

    pair: Pair
    kind: str
    verdict: str
    said: str

    @property
    def is_fault(self) -> bool:
        return self.verdict not in ("unharmed", "noticed")


class DamagedRuns:
    """Cases in copies under ``folder`` of runs that are made there first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tables: dict[Pair, str] = {}

    def outcomes(self, pair: Pair, count: int, seed: int) -> Iterator[Outcome]:
        """``count`` cases of a pair; each file that is damaged differs from the sound one."""
        wanted = self._sound_table(pair)
        for number in range(count):
            random = np.random.default_rng([seed, PAIRS.index(pair), number])
            folder = self._copy(pair)
            path = folder / pair.file
            sound = path.read_bytes()
            data = bytearray(sound)
            while bytes(data) == sound:
                kind = KINDS[int(random.integers(len(KINDS)))]
                kind(data, random)
            path.write_bytes(bytes(data))
            yield Outcome(pair, kind.__name__, *self._judge(pair, folder, wanted))
            shutil.rmtree(folder)

    def _judge(self, pair: Pair, folder: Path, wanted: str) -> tuple[str, str]:
        code, out, err = self._call(pair, folder)
        if code == 0 and pair.command != "table":
            code, out, more = call("table", folder, "--format", "csv")
            err += more
        if code == 0:
            return ("unharmed" if out == wanted else "differs"), err
        said = err.strip().splitlines()[-1] if err.strip() else ""
        if code != 2 or "Traceback" in err:
            return "traceback", err
        file = folder / pair.file
        names = (
            str(file) in said or str(sidecar(file)) in said or (pair.file.startswith("corpus") and "/corpus" in said)
        )
        return ("noticed" if said.startswith("error: ") and names and "; fix: " in said else "unclear"), said

    def _sound_table(self, pair: Pair) -> str:
        if pair not in self._tables:
            folder = self._copy(pair)
            code, out, err = self._call(pair, folder)
            if pair.command != "table":
                assert code == 0, err
                code, out, err = call("table", folder, "--format", "csv")
            assert code == 0, err
            self._tables[pair] = out
            shutil.rmtree(folder)
        return self._tables[pair]

    def _copy(self, pair: Pair) -> Path:
        source = {"finished": self._finished, "collecting": self._collecting, "collected": self._collected}[pair.state]
        return Path(shutil.copytree(source, self._folder / "case"))

    def _call(self, pair: Pair, folder: Path) -> tuple[int, str, str]:
        if pair.command == "table":
            return call("table", folder, "--format", "csv")
        if pair.command == "score":
            return call("score", folder, "--judge", "lexical", "--scorer", "fuzzing")
        if pair.command == "replay":
            return call("run", *OPTIONS, *ASKING, "--client", f"replay:{folder / 'calls.sqlite'}", "--out", folder)
        return call("run", *OPTIONS, *OFFLINE, "--out", folder)

    @cached_property
    def _collected(self) -> Path:
        """A run whose examples are collected, with the answers that another one recorded beside it."""
        folder = self._folder / "collected"
        check(call("collect", *OPTIONS, "--out", folder))
        asked = self._folder / "asked"
        shutil.copytree(folder, asked)
        with ChatServer() as server:
            at = ("--client", f"openai:{server.model}", "--base-url", server.base_url)
            check(call("run", *OPTIONS, *ASKING, *at, "--out", asked))
        shutil.copy(asked / "calls.sqlite", folder)
        return folder

    @cached_property
    def _collecting(self) -> Path:
        folder = self._folder / "collecting"
        shutil.copytree(self._collected, folder)
        shutil.rmtree(folder / "examples")
        with RunStore.open(folder) as store:
            identity = store.identity()
        with RunStore.create(folder, identity) as store, store._writing() as connection:
            connection.execute("DELETE FROM stages")
        return folder

    @cached_property
    def _finished(self) -> Path:
        folder = self._folder / "finished"
        shutil.copytree(self._collected, folder)
        check(call("run", *OPTIONS, *OFFLINE, "--out", folder))
        return folder


def check(called: tuple[int, str, str]) -> None:
    assert called[0] == 0, called[2]


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``evalkit ARGUMENTS`` in this process; code 1 with the text of an escaped error."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before, handlers = sys.argv, logging.getLogger().handlers[:]
    sys.argv = ["evalkit", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as stopped:
                code = int(stopped.code or 0)
            except BaseException:
                traceback.print_exc()
                code = 1
    finally:
        sys.argv = before
        logging.getLogger().handlers[:] = handlers
    said, told = (stream.buffer.getvalue().decode() for stream in (out, err))
    return code, said, told
