"""A client that asks another one in a process of its own, so that a command that is killed loses no answer it paid for.

That process (``sender_process``) records every answer before it hands it over. When the command is gone it sends nothing
more, waits for what was sent, records that and ends. It holds the lock given to it for as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from evalkit.abilities import concurrency_of
from evalkit.errors import ClientDown
from evalkit.llm.clients.sender.wire import from_line, packed_request, to_line, unpacked_error, unpacked_response
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.protocols import Client
from evalkit.records import Message, Response
from evalkit.registry import Part
from evalkit.util.atomic_files import storage_errors

__all__ = ["Sender", "lock_when_free"]

_LOG = logging.getLogger(__name__)
_LOOK_EVERY_S, _TELL_AFTER_S = 0.02, 0.5


async def lock_when_free(path: Path) -> int:
    """Lock a file as soon as no sender holds it, however long that takes; the user is told. Its descriptor.

    Raises StorageError.
    """
    with storage_errors(path):
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        waited = 0.0
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited += _LOOK_EVERY_S
                if waited - _LOOK_EVERY_S < _TELL_AFTER_S <= waited:
                    holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
                    _LOG.warning(
                        "waiting for answers to what an earlier command sent; `kill %s` gives them up", holder or "…"
                    )
                await asyncio.sleep(_LOOK_EVERY_S)
            else:
                return lock
    except BaseException:
        os.close(lock)
        raise


class Sender:
    """Stands for ``client``, which it has made anew from ``part`` in the other process with the first request.

    Answers are recorded there in the files ``recordings``. ``lock``: the descriptor of a locked file, which that process
    shares until it ends.
    """

    def __init__(self, part: Part, client: Client, recordings: Sequence[Path], lock: int) -> None:
        self.name = client.name
        self.concurrency = concurrency_of(client)
        self._part, self._recordings, self._lock = part, recordings, lock
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: dict[int, asyncio.Future[Response]] = {}  # of all that is unanswered, wanted or not
        self._asked = 0
        self._gone: Exception | None = None

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        """The reply of the client behind. Raises what it raises, StorageError, ClientDown (the process ended)."""
        if self._process is None:
            self._start()
        if self._gone is not None:
            raise self._gone
        self._asked += 1
        number = self._asked
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._say({"number": number, **packed_request(GenerateRequest(messages, **options))})
        return await answer

    def finish(self) -> None:
        """Have the client behind send nothing more, nor anything again; what was sent is waited for."""
        self._say({"finish": True})

    async def close(self) -> None:
        """Send no more, and wait for the process to end, unless it waits for answers that nobody here wants any more."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            self._input(process).close()
        if self._waiting and self._gone is None:
            _LOG.warning("process %d waits for what was sent and records it; then it ends", process.pid)
            return
        await asyncio.to_thread(process.wait)

    def _start(self) -> None:
        said = tempfile.TemporaryFile()  # noqa: SIM115 (the thread that listens closes it)
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "evalkit.llm.clients.sender.child"],  # -P: nothing from the working directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(part or str(Path.cwd()) for part in sys.path)},
            pass_fds=[self._lock],
            start_new_session=True,  # neither Ctrl-C nor the terminal's end is meant for it
        )
        with contextlib.suppress(OSError):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(process.pid).encode(), 0)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, args=(process, said, loop), name="sender", daemon=True).start()
        self._say(
            {
                "client": self._part.name,
                "options": self._part.options,
                "recordings": [str(path.absolute()) for path in self._recordings],
                "parent": os.getpid(),
                "levels": _log_levels(),
            }
        )

    def _say(self, content: dict[str, Any]) -> None:
        """Where nobody listens any more, ``_listen`` finds out why."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                stream = self._input(self._process)
                stream.write(to_line(content))
                stream.flush()

    @staticmethod
    def _input(process: subprocess.Popen[bytes]) -> IO[bytes]:
        assert process.stdin is not None
        return process.stdin

    def _listen(self, process: subprocess.Popen[bytes], said: IO[bytes], loop: asyncio.AbstractEventLoop) -> None:
        """The thread that hears the process, until it ends."""
        assert process.stdout is not None
        with contextlib.suppress(RuntimeError), process.stdout, said:  # RuntimeError: the loop is closed, nobody waits
            for line in process.stdout:
                loop.call_soon_threadsafe(self._take, from_line(line))
            code = process.wait()
            said.seek(0)
            last = (said.read().decode(errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]
            loop.call_soon_threadsafe(self._end, last[:300])

    def _take(self, content: dict[str, Any]) -> None:
        if "log" in content:
            name, level, text = content["log"]
            logging.getLogger(name).log(level, "%s", text)
        elif "failed" in content:
            self._gone = unpacked_error(content["failed"])
        else:
            answer = self._waiting.pop(content["number"])
            if answer.done():  # cancelled: nobody waits for it any more
                return
            if "error" in content:
                answer.set_exception(unpacked_error(content["error"]))
            else:
                answer.set_result(unpacked_response(content["response"]))

    def _end(self, last_words: str) -> None:
        """All who wait hear that nobody answers any more."""
        self._gone = self._gone or ClientDown(
            f"the process of client {self._part.name!r}",
            expected="it to run as long as there is something to ask",
            seen=last_words,
            fix="see the reason; what was answered is kept, the same command goes on",
        )
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._gone)


def _log_levels() -> dict[str, int]:
    """Of every logger that has one of its own, so that the other process tells what would be heard here."""
    named = {
        name: logger for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)
    }
    return {name: logger.level for name, logger in {"": logging.root, **named}.items() if logger.level}
