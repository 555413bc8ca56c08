"""The process that ``Sender`` starts: sends requests with a client, records every answer, then passes it to the parent.

Reads one request per line from standard input until its end, and writes results to standard output while the parent reads
them. Keeps running after its parent is gone, until everything in flight is answered and recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evalkit import registry
from evalkit.abilities import close_client, finish_client
from evalkit.llm.accounting.answer_store import KeyedRequest, Recorded, Recording
from evalkit.llm.clients.sender.wire import from_line, packed_error, packed_response, to_line, unpacked_request
from evalkit.protocols import Client

Say = Callable[[dict[str, Any]], None]


class _Telling(logging.Handler):
    """Passes log records to the parent, as formatted messages."""

    def __init__(self, say: Say) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say({"log": [record.name, record.levelno, record.getMessage()]})


def main() -> None:
    """Run until standard input ends and all requests in flight are answered."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output that plug-ins print must not mix with our lines

    def say(content: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):  # the parent is gone
            output.write(to_line(content))
            output.flush()

    line = sys.stdin.buffer.readline()
    if not line:
        return
    start = from_line(line)
    logging.basicConfig(handlers=[_Telling(say)], force=True)
    for name, level in start["levels"].items():
        logging.getLogger(name).setLevel(level)
    try:
        client: Client = registry.create("clients", start["client"], **start["options"])
        recordings = [Recording(Path(path), write=True) for path in start["recordings"]]
    except Exception as error:  # of any class: the parent must get it
        say({"failed": packed_error(error)})
        return
    asyncio.run(_serve(client, recordings, start["parent"], say))


async def _serve(client: Client, recordings: list[Recording], parent: int, say: Say) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    tasks: set[asyncio.Task[None]] = set()

    def take(line: bytes) -> None:
        if os.getppid() != parent:  # the parent was killed before we read this request: drop it
            return
        content = from_line(line)
        if "finish" in content:
            finish_client(client)
            return
        task = asyncio.create_task(_answer(client, recordings, content, say))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def listen() -> None:
        for line in sys.stdin.buffer:
            loop.call_soon_threadsafe(take, line)
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=listen, name="input", daemon=True).start()
    await ended.wait()
    if tasks:
        finish_client(client)
    await asyncio.gather(*tasks, return_exceptions=True)
    await close_client(client)
    for recording in recordings:
        recording.close(whole=False)


async def _answer(client: Client, recordings: list[Recording], content: dict[str, Any], say: Say) -> None:
    request = unpacked_request(content)
    started = time.monotonic()
    try:
        response = await client.generate(request.messages, **request.options())
        recorded = Recorded(response, time.monotonic() - started)
        for recording in recordings:
            recording.add(KeyedRequest.of(client.name, request), recorded, paid=True)
    except Exception as error:  # clients are plug-ins, which may raise anything; the parent handles it
        say({"number": content["number"], "error": packed_error(error)})
    else:
        say({"number": content["number"], "response": packed_response(response)})


if __name__ == "__main__":
    main()
