"""A client that runs another one in its own process, so that a command that is killed loses no answer it paid for.

That process (``sender.child``) records every answer before passing it on. Once the command is gone it sends nothing more,
waits for the requests in flight, records their answers and ends. It holds a lock until then.
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
    """Wait until no other process holds the lock on a file, then lock it and return its descriptor.

    Logs a warning if it has to wait. Raises StorageError.
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
                        "waiting for answers to requests of an earlier command; `kill %s` gives them up", holder or "…"
                    )
                await asyncio.sleep(_LOOK_EVERY_S)
            else:
                return lock
    except BaseException:
        os.close(lock)
        raise


class Sender:
    """Sends the requests of ``client`` from another process, which starts with the first request.

    ``part``: the client's name and options, from which that process creates it again.
    ``client``: the same client in this process; only its name and concurrency limit are used.
    ``recordings``: the files in which that process records answers.
    ``lock``: the descriptor of a locked file; that process keeps the lock until it ends.
    """

    def __init__(self, part: Part, client: Client, recordings: Sequence[Path], lock: int) -> None:
        self.name = client.name
        self.concurrency = concurrency_of(client)
        self._part, self._recordings, self._lock = part, recordings, lock
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: dict[int, asyncio.Future[Response]] = {}  # unanswered, also if the caller was cancelled
        self._asked = 0
        self._gone: Exception | None = None

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        """The client's reply. Raises the client's errors, StorageError, and ClientDown if the process ended."""
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
        """Let the client send nothing more and retry nothing; requests in flight are awaited."""
        self._say({"finish": True})

    async def close(self) -> None:
        """Send no more requests and wait for the process to end, or leave it running if requests are still in flight."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            self._input(process).close()
        if self._waiting and self._gone is None:
            _LOG.warning("process %d waits for requests in flight, records the answers and then ends", process.pid)
            return
        await asyncio.to_thread(process.wait)

    def _start(self) -> None:
        said = tempfile.TemporaryFile()  # noqa: SIM115 (the thread that listens closes it)
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-m", "evalkit.llm.clients.sender.child"],  # -P: not from the working folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(part or str(Path.cwd()) for part in sys.path)},
            pass_fds=[self._lock],
            start_new_session=True,  # it must survive Ctrl-C and the end of the terminal
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
        """Send a line to the process. If it is gone, the error is ignored here and reported by ``_listen``."""
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
        """Read the process's lines until it ends. Runs in a thread of its own."""
        assert process.stdout is not None
        with contextlib.suppress(RuntimeError), process.stdout, said:  # RuntimeError: the event loop is closed
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
            if answer.done():  # the caller was cancelled
                return
            if "error" in content:
                answer.set_exception(unpacked_error(content["error"]))
            else:
                answer.set_result(unpacked_response(content["response"]))

    def _end(self, last_words: str) -> None:
        """The process has ended: fail all requests without an answer."""
        self._gone = self._gone or ClientDown(
            f"the process of client {self._part.name!r}",
            expected="it to run until all requests are answered",
            seen=last_words,
            fix="see the reason, then run the same command again; it resumes, and every answer is kept",
        )
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._gone)


def _log_levels() -> dict[str, int]:
    """The level of every logger that has its own, so that the other process logs what this one would log."""
    named = {
        name: logger for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)
    }
    return {name: logger.level for name, logger in {"": logging.root, **named}.items() if logger.level}
