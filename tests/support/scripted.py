"""A server whose every answer a test writes itself, and the asking of it through the client ``openai``."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from evalkit.llm.clients.openai import OpenAIClient
from evalkit.records import Message, Response

ASK = [Message("system", "Answer."), Message("user", "How many?")]
Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]  # status, body (bytes as they are, else as JSON), headers


@dataclass
class Scripted:
    """``asked`` holds the bodies of the chat requests, ``headers`` those of all requests, their names in small letters."""

    base_url: str
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # of connections that come at the same moment


@contextmanager
def scripted(
    answer: Callable[[dict[str, Any]], Reply], *, owned_by: str = "vllm", models: Callable[[], Reply] | None = None
) -> Iterator[Scripted]:
    """Serve ``answer`` of every chat request's body; the list of models says ``owned_by``, or what ``models`` gives."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            found.headers.append({name.lower(): value for name, value in self.headers.items()})
            self._reply(
                *(models() if models else (200, {"object": "list", "data": [{"id": "m", "owned_by": owned_by}]}))
            )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.headers.append({name.lower(): value for name, value in self.headers.items()})
            found.asked.append(body)
            self._reply(*answer(body))

        def _reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        found = Scripted(f"http://127.0.0.1:{server.server_port}/v1")
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield found
        server.shutdown()


def saying(text: str | None, **more: Any) -> dict[str, Any]:
    """A healthy completion; ``more`` goes into the choice, or into the message where it is ``refusal``."""
    message = {"role": "assistant", "content": text, **({"refusal": more.pop("refusal")} if "refusal" in more else {})}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", **more}
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def error(message: str, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None, **more}}


def ask(client: OpenAIClient, *messages: Message, **options: Any) -> Response:
    """One reply, in an event loop of its own."""

    async def one() -> Response:
        try:
            return await client.generate(messages or ASK, **({"max_tokens": 5} | options))
        finally:
            await client.close()

    return asyncio.run(one())


async def ask_many(client: OpenAIClient, count: int, **options: Any) -> list[Response | BaseException]:
    """Different questions at the same time; errors among the replies."""
    questions = [[Message("user", f"Question {number}?")] for number in range(count)]
    asked = (client.generate(question, **({"max_tokens": 5} | options)) for question in questions)
    try:
        return await asyncio.gather(*asked, return_exceptions=True)
    finally:
        await client.close()
