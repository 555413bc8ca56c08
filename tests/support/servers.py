"""A stand-in for servers that speak the chat-completions protocol, with faults on demand and a log of what it was asked.

What it says is in ``chat_model``. The HTTP is written by hand, for control over every byte on the wire. Standard library
only.

As a process, printing its port first: ``python -m tests.support.servers --port 0 --log FILE --faults 0.3 --seed 1``
"""

from __future__ import annotations

import argparse
import asyncio
import email.utils
import json
import math
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from tests.support.chat_model import MODEL_KINDS, completion, prompt_tokens, reply_text, sha, spoil

WIRE_KINDS = ("429", "500", "503", "timeout", "reset", "slow_body", "not_json", "no_choices", "truncated")
KINDS = (*WIRE_KINDS, *MODEL_KINDS)

_HTML = b"<html><body><h1>The gateway is busy</h1></body></html>"


@dataclass(slots=True)
class _Request:
    method: str
    path: str
    headers: dict[str, str]
    content: bytes


class _Peer:
    """One connection. Reads ahead all the time, so that it notices when the peer leaves."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer, self._buffer = reader, writer, b""
        writer.transport.set_write_buffer_limits(0)  # drain: until the kernel has it all
        self._read_on()

    def _read_on(self) -> None:
        self._read = asyncio.ensure_future(self._reader.read(65536))
        self._read.add_done_callback(lambda read: read.cancelled() or read.exception())  # seen, if only here

    async def _receive(self, timeout_s: float | None) -> bool | None:
        """True when more came, False when the peer is gone, None when the time is over."""
        done, _ = await asyncio.wait({self._read}, timeout=timeout_s)
        if not done:
            return None
        if self._read.exception() is not None or not self._read.result():
            return False
        self._buffer += self._read.result()
        self._read_on()
        return True

    async def wait(self, seconds: float) -> bool:
        """Let so long pass; False at once when the peer leaves."""
        end = time.monotonic() + seconds
        while (received := await self._receive(max(0.0, end - time.monotonic()))) is True:
            pass
        return received is None

    async def request(self) -> _Request | None:
        """The next request, None when the peer left instead."""
        while b"\r\n\r\n" not in self._buffer:
            if not await self._receive(None):
                return None
        head, _, rest = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self._buffer, length = rest, int(headers.get("content-length", 0))
        while len(self._buffer) < length:
            if not await self._receive(None):
                return None
        content, self._buffer = self._buffer[:length], self._buffer[length:]
        method, path, _ = first.split()
        return _Request(method, path, headers, content)

    async def send(self, status: int, content: bytes, *, headers: dict[str, str], only: int | None = None) -> None:
        """A whole response, or ``only`` so many bytes of its body. Raises ConnectionError when the peer is gone."""
        kind = "text/html" if content.startswith(b"<") else "application/json"
        told = {"Content-Type": kind, "Content-Length": str(len(content)), **headers}
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {told[name]}" for name in told)]
        await self.push("\r\n".join([*lines, "", ""]).encode("latin-1") + content[:only])

    async def push(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        connection = self.writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


# the server


@dataclass
class ChatServer:
    """Serves on a thread of its own while its ``with`` block is open.

    ``faults``: share of chat requests that get one of ``kinds``; seed, messages and the number of the attempt at these
    messages decide. ``delay_s``: mean delay of an answer, which varies by half. ``owned_by``: "vllm", or anything else for
    a hosted API. ``dribble_s``: pause before every byte of a slow body. ``refuse``: parameters answered with 400.
    ``echo_key``: sends the Authorization header back in a header and in errors. ``require_key``: 401 for any other.
    """

    faults: float = 0.0
    kinds: Sequence[str] = KINDS
    delay_s: float = 0.0
    seed: int = 0
    port: int = 0
    model: str = "stand-in"
    owned_by: str = "vllm"
    retry_after_s: float = 0.05
    dribble_s: float = 0.2
    echo_key: bool = False
    require_key: str | None = None
    context_tokens: int | None = None
    refuse: Sequence[str] = ()
    log_path: Path | None = None
    _entries: list[dict[str, Any]] = field(default_factory=list, init=False)
    _attempts: Counter[str] = field(default_factory=Counter, init=False)
    _loop: asyncio.AbstractEventLoop | None = field(default=None, init=False)

    def __enter__(self) -> ChatServer:
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"no fault kinds: {sorted(unknown)}")
        self._socket = socket.create_server(("127.0.0.1", self.port))
        self.port = self._socket.getsockname()[1]
        self._file = open(self.log_path, "a", encoding="utf-8") if self.log_path else None  # noqa: PTH123
        ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._main(ready),), name="stand-in", daemon=True)
        self._thread.start()
        ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop = None
        if self._file:
            self._file.close()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def log(self) -> list[dict[str, Any]]:
        """What happened so far, a whole answer and the note of it together."""
        if self._loop is not None:  # between two steps of the server: never after the flush but before the note
            settled = threading.Event()
            self._loop.call_soon_threadsafe(settled.set)
            settled.wait(10)
        return list(self._entries)

    def counts(self) -> Counter[str]:
        """How often each event stands in the log."""
        return Counter(entry["event"] for entry in self.log)

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, sock=self._socket, backlog=1024)
        ready.set()
        await self._stop.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = _Peer(reader, writer)
        try:
            with suppress(ConnectionError, asyncio.CancelledError):
                while (request := await peer.request()) is not None:
                    handle = self._chat if request.path == "/v1/chat/completions" else self._look
                    if not await handle(peer, request) or request.headers.get("connection", "").lower() == "close":
                        break
        finally:
            writer.close()

    def _note(self, call: dict[str, Any], event: str) -> None:
        entry = {"time": time.time(), **call, "event": event}
        self._entries.append(entry)
        if self._file:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    async def _look(self, peer: _Peer, request: _Request) -> bool:
        """Everything but chat: the list of models, and what vLLM's server has besides."""
        call = {"body": None, "key": None, "attempt": 0, "authorization": "authorization" in request.headers}
        self._note(call, f"{request.method} {request.path}")
        card = {"id": self.model, "object": "model", "created": 0, "owned_by": self.owned_by}
        pages: dict[str, Any] = {"/v1/models": {"object": "list", "data": [card]}}
        if self.owned_by == "vllm":
            pages |= {"/version": {"version": "0.0.0+stand.in"}}
        status, page = (200, pages[request.path]) if request.path in pages else (404, {"detail": "Not Found"})
        if request.path.startswith("/v1") and not self._may(request):
            status, page = 401, self._error(request, 401, "wrong key", code="invalid_api_key")
        await peer.send(status, json.dumps(page).encode(), headers=self._headers(request))
        return True

    async def _chat(self, peer: _Peer, request: _Request) -> bool:
        """Answer one chat request, or misbehave; whether the connection lives on."""
        body = json.loads(request.content)
        key = sha(body["messages"])[:16]
        self._attempts[key] += 1
        attempt, has_key = self._attempts[key], "authorization" in request.headers
        call = {"body": sha(body), "key": key, "attempt": attempt, "authorization": has_key}
        self._note(call, "received")
        chance = random.Random(f"{self.seed}/{key}/{attempt}")
        refusal = self._refusal(request, body)
        kind = chance.choice(self.kinds) if chance.random() < self.faults and refusal is None else None
        if kind == "timeout":
            self._note(call, "fault:timeout")
        if not await peer.wait(math.inf if kind == "timeout" else self.delay_s * (0.5 + chance.random())):
            if kind != "timeout":
                self._note(call, "gone")
            return False
        headers = self._headers(request)
        if refusal is not None:
            self._note(call, f"refused:{refusal[0]}")
            await peer.send(refusal[0], json.dumps(refusal[1]).encode(), headers=headers)
            return True
        text = spoil(reply_text(body), kind if kind in MODEL_KINDS else None, chance)
        reply = completion(body, text, self.model)
        if kind in WIRE_KINDS:
            self._note(call, f"fault:{kind}")
            return await self._break(kind, peer, request, reply, chance)
        try:
            await peer.send(200, json.dumps(reply).encode(), headers=headers)
        except ConnectionError:
            self._note(call, "gone")
            return False
        self._note(call, f"fault:{kind}" if kind else "finished")
        return True

    async def _break(
        self, kind: str, peer: _Peer, request: _Request, reply: dict[str, Any], chance: random.Random
    ) -> bool:
        """A fault on the wire; whether the connection lives on."""
        headers, whole = self._headers(request), json.dumps(reply).encode()
        if kind == "reset":
            peer.reset()
            return False
        if kind == "truncated":
            await peer.send(200, whole, headers=headers, only=len(whole) // 2)
            return False
        if kind == "slow_body":
            await peer.send(200, whole, headers=headers, only=0)
            for byte in whole:
                if not await peer.wait(self.dribble_s):
                    return False
                await peer.push(bytes([byte]))
            return True
        if kind == "429":
            date = email.utils.formatdate(math.ceil(time.time() + self.retry_after_s), usegmt=True)
            headers["Retry-After"] = date if chance.random() < 0.25 else str(self.retry_after_s)
        if kind in ("503", "not_json"):  # what stands before the server answers for it
            content = _HTML + (request.headers.get("authorization", "").encode() if self.echo_key else b"")
        elif kind == "no_choices":
            content = json.dumps({name: value for name, value in reply.items() if name != "choices"}).encode()
        else:
            content = json.dumps(self._error(request, int(kind), "too busy, or broken", code=None)).encode()
        await peer.send(int(kind) if kind.isdigit() else 200, content, headers=headers)
        return True

    def _may(self, request: _Request) -> bool:
        return self.require_key is None or request.headers.get("authorization") == f"Bearer {self.require_key}"

    def _headers(self, request: _Request) -> dict[str, str]:
        return {"X-Seen-Authorization": request.headers.get("authorization", "")} if self.echo_key else {}

    def _error(
        self, request: _Request, status: int, message: str, *, code: str | None, param: str | None = None
    ) -> dict[str, Any]:
        """The body of an error, in the shape of vLLM's server or of a hosted API."""
        told = f"{message} (authorization: {request.headers.get('authorization')})" if self.echo_key else message
        if self.owned_by != "vllm":
            kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
            return {"error": {"message": told, "type": kind, "param": param, "code": code}}
        if status == 401:
            return {"error": told}  # its guard of keys answers without the usual object
        kind = f"{HTTPStatus(status).phrase.title().replace(' ', '')}Error"
        return {"error": {"message": told, "type": kind, "param": param, "code": status}}

    def _refusal(self, request: _Request, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Status and body for a request that no retry can help."""
        if not self._may(request):
            return 401, self._error(request, 401, "wrong key", code="invalid_api_key")
        if body["model"] != self.model:
            told = f"The model `{body['model']}` does not exist."
            return 404, self._error(request, 404, told, code="model_not_found", param="model")
        if refused := [name for name in self.refuse if name in body]:
            told = f"Unsupported parameter: '{refused[0]}' is not supported with this model."
            return 400, self._error(request, 400, told, code="unsupported_parameter", param=refused[0])
        try:
            reply_text(body)
        except ValueError as error:
            return 400, self._error(request, 400, str(error), code=None)
        return self._overflow(request, body)

    def _overflow(self, request: _Request, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """As vLLM has it: prompts are counted no further than one over the limit, replies are cut where they reach it."""
        limit = self.context_tokens
        param: str = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
        value: int = body.get(param) or 0
        if limit is None or max(prompt_tokens(body), value) <= limit:
            return None
        told = f"{param}={value} cannot be greater than max_model_len={limit}."
        if prompt_tokens(body) > limit:
            param, value = "input_tokens", limit + 1
            told = f"This model's maximum context length is {limit} tokens. However, "
            told += f"your prompt contains at least {value} input tokens."
        told += f" (parameter={param}, value={value})"
        return 400, self._error(request, 400, told, code="context_length_exceeded", param=param)


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for a server of chat completions; prints its port first.")
    parser.add_argument("--log", type=Path, dest="log_path")
    parser.add_argument("--delay", type=float, default=0.0, dest="delay_s")
    parser.add_argument("--dribble", type=float, default=0.2, dest="dribble_s")
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--kinds", type=_names, default=KINDS)
    parser.add_argument("--refuse", type=_names, default=())
    parser.add_argument("--echo-key", action="store_true")
    for name, default in (("port", 0), ("seed", 0), ("context-tokens", None)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, text in (("model", "stand-in"), ("owned-by", "vllm"), ("require-key", None)):
        parser.add_argument(f"--{name}", default=text)
    with ChatServer(**vars(parser.parse_args())) as server:
        print(server.port, flush=True)
        threading.Event().wait()


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


if __name__ == "__main__":
    main()
