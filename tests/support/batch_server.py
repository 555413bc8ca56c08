"""A stand-in for servers with the Batch API: files, batches, and answers that are those of the chat server it stands on.

Faults are set by its fields. Its log says of every request in a batch when it was answered, under the name that
``tests.support.servers`` gives the same question asked alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.chat_model import completion, reply_text, sha, spoil
from tests.support.servers import ChatServer, _Peer, _Request


@dataclass
class BatchServer(ChatServer):
    """``work_s``: from the making of a batch to its end. ``hold``: seconds by moment: "uploaded" and "made" hold back the
    response when all is done, "making" waits before anything is, and does nothing when the peer leaves.

    ``first``: statuses with which the first requests are answered, by method and path. ``broken``: share of lines that end
    with status 500, ``garbled``: that are no JSON, ``spoiled``: whose text is no JSON; the seed, the question and how often
    it came decide. ``ends``: how the first batches end, "completed" after these; of an expired or cancelled one half is
    done. ``room``: requests that may be in batches at the same time. ``largest``: bytes of a file. ``listed_after_s``: from
    its making, until a batch is in the list. ``lost``: statuses with which the first makings of a batch are answered that
    are done all the same. ``shown``: what is said of a batch, made of the batch and how often it was looked at. ``read``:
    the bytes of a file that goes down, made of what it holds.
    """

    owned_by: str = "hosted"
    work_s: float = 0.0
    hold: Mapping[str, float] = field(default_factory=dict)
    first: dict[str, list[int]] = field(default_factory=dict)
    broken: float = 0.0
    garbled: float = 0.0
    spoiled: float = 0.0
    ends: Sequence[str] = ()
    errors: Sequence[dict[str, Any]] = ()  # of a batch that ends as failed
    room: int | None = None
    largest: int | None = None
    listed_after_s: float = 0.0
    lost: Sequence[int] = ()
    shown: Callable[[dict[str, Any], int], dict[str, Any]] = lambda batch, _: batch
    read: Callable[[bytes], bytes] = lambda content: content
    files: dict[str, bytes] = field(default_factory=dict, init=False)
    names: dict[str, str] = field(default_factory=dict, init=False)
    batches: dict[str, dict[str, Any]] = field(default_factory=dict, init=False)
    keys: set[str] = field(default_factory=set, init=False)  # custom ids of all lines that came
    _times: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int), init=False)
    _looks: Counter[str] = field(default_factory=Counter, init=False)
    _made: int = field(default=0, init=False)
    _working: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    @property
    def answered(self) -> list[str]:
        """The questions that were answered, in batches or alone, as often as they were."""
        return [str(entry["key"]) for entry in self.log if entry["event"] == "finished"]

    async def _look(self, peer: _Peer, request: _Request) -> bool:
        place = urlsplit(request.path)
        parts = place.path.strip("/").split("/")[1:]
        if parts[0] not in ("files", "batches"):
            return await super()._look(peer, request)
        name = f"{request.method} /v1/{'/'.join(parts[:1] + ['ID'] * (len(parts) > 1) + parts[2:])}"
        self._note({"body": None, "key": None}, name)
        if not self._may(request):
            return await self._say(peer, 401, self._error(request, 401, "wrong key", code="invalid_api_key"), request)
        if left := self.first.get(name):
            status = left.pop(0)
            headers = {"Retry-After": str(self.retry_after_s)} if status == 429 else {}
            await peer.send(
                status, json.dumps(self._error(request, status, "busy", code=None)).encode(), headers=headers
            )
            return True
        handle = {
            "POST /v1/files": self._upload,
            "GET /v1/files/ID/content": self._content,
            "DELETE /v1/files/ID": self._delete,
            "POST /v1/batches": self._make,
            "GET /v1/batches": self._list,
            "GET /v1/batches/ID": self._show,
        }[name]
        return await handle(peer, request, parts[1] if len(parts) > 1 else place.query)

    async def _say(self, peer: _Peer, status: int, content: Any, request: _Request) -> bool:
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            await peer.send(status, text, headers=self._headers(request))
        except ConnectionError:
            return False
        return True

    async def _upload(self, peer: _Peer, request: _Request, _: str) -> bool:
        boundary = re.search(r"boundary=(\S+)", request.headers["content-type"])[1].strip('"').encode()  # type: ignore[index]
        parts = [part.partition(b"\r\n\r\n") for part in request.content.split(b"--" + boundary)[1:-1]]
        fields = {re.search(rb'name="(\w+)"', head)[1]: (head, body[:-2]) for head, _, body in parts}  # type: ignore[index]
        assert fields[b"purpose"][1] == b"batch"
        head, content = fields[b"file"]
        if self.largest is not None and len(content) > self.largest:
            return await self._say(peer, 400, self._error(request, 400, "File is too large.", code=None), request)
        id = f"file-{len(self.names)}"
        self.files[id], self.names[id] = content, re.search(rb'filename="([^"]+)"', head)[1].decode()  # type: ignore[index]
        self._note({"body": None, "key": id}, "uploaded")
        await peer.wait(self.hold.get("uploaded", 0))
        card = {"id": id, "object": "file", "bytes": len(content), "created_at": int(time.time()), "purpose": "batch"}
        return await self._say(peer, 200, {**card, "filename": self.names[id], "status": "processed"}, request)

    async def _content(self, peer: _Peer, request: _Request, id: str) -> bool:
        if id not in self.files:
            return await self._say(peer, 404, self._error(request, 404, "no such file", code=None), request)
        return await self._say(peer, 200, self.read(self.files[id]), request)

    async def _delete(self, peer: _Peer, request: _Request, id: str) -> bool:
        found = self.files.pop(id, None) is not None
        return await self._say(peer, 200 if found else 404, {"id": id, "object": "file", "deleted": found}, request)

    async def _make(self, peer: _Peer, request: _Request, _: str) -> bool:
        asked = json.loads(request.content)
        if not await peer.wait(self.hold.get("making", 0)):
            return False
        if asked["input_file_id"] not in self.files:
            return await self._say(peer, 400, self._error(request, 400, "no such file", code=None), request)
        number, self._made = self._made, self._made + 1
        batch = {
            "id": f"batch_{number}",
            "object": "batch",
            "endpoint": asked["endpoint"],
            "completion_window": asked["completion_window"],
            "input_file_id": asked["input_file_id"],
            "metadata": asked.get("metadata"),
            "created_at": int(time.time()),
            "status": "validating",
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
        self.batches[str(batch["id"])] = batch
        self._note({"body": None, "key": batch["id"]}, "made")
        task = asyncio.ensure_future(self._work_off(batch, number))
        self._working.add(task)
        await peer.wait(self.hold.get("made", 0))
        if number < len(self.lost):
            status = self.lost[number]
            return await self._say(peer, status, self._error(request, status, "lost", code=None), request)
        return await self._say(peer, 200, batch, request)

    async def _list(self, peer: _Peer, request: _Request, query: str) -> bool:
        asked = parse_qs(query)
        listed = [one for one in self.batches.values() if time.time() - one["created_at"] >= self.listed_after_s][::-1]
        ids = [one["id"] for one in listed]
        start = ids.index(asked["after"][0]) + 1 if "after" in asked else 0
        end = start + int(asked["limit"][0])
        data = [self.shown(one, 0) for one in listed[start:end]]
        page = {"object": "list", "data": data, "has_more": end < len(listed)}
        return await self._say(peer, 200, page, request)

    async def _show(self, peer: _Peer, request: _Request, id: str) -> bool:
        if id not in self.batches:
            return await self._say(peer, 404, self._error(request, 404, f"No batch {id}", code=None), request)
        self._looks[id] += 1
        return await self._say(peer, 200, self.shown(self.batches[id], self._looks[id]), request)

    # the work

    async def _work_off(self, batch: dict[str, Any], number: int) -> None:
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].splitlines()]
        how = self.ends[number] if number < len(self.ends) else "completed"
        others = sum(one["request_counts"]["total"] for one in self.batches.values() if one["status"] == "in_progress")
        if self.room is not None and others + len(lines) > self.room:
            self._fail(
                batch, [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached", "line": None}]
            )
            return
        if how == "failed":
            self._fail(batch, list(self.errors))
            return
        assert len({line["custom_id"] for line in lines}) == len(lines)
        assert all(line["method"] == "POST" and line["url"] == batch["endpoint"] for line in lines)
        self.keys |= {line["custom_id"] for line in lines}
        batch |= {"status": "in_progress", "request_counts": {"total": len(lines), "completed": 0, "failed": 0}}
        await asyncio.sleep(self.work_s)
        done = lines if how == "completed" else lines[: len(lines) // 2]
        well, ill = self._answers(done)
        code = {"expired": "batch_expired", "cancelled": "batch_cancelled"}.get(how)
        ill += [
            json.dumps({"custom_id": line["custom_id"], "response": None, "error": {"code": code, "message": "over"}})
            for line in lines[len(done) :]
        ]
        for name, texts in (("output_file_id", well), ("error_file_id", ill)):
            if texts:
                batch[name] = f"{name.split('_')[0]}-{number}"
                self.files[batch[name]] = "\n".join(texts).encode() + b"\n"
        counts = {"total": len(lines), "completed": len(well), "failed": len(lines) - len(well)}
        batch |= {"status": how, "request_counts": counts}

    def _fail(self, batch: dict[str, Any], errors: list[dict[str, Any]]) -> None:
        batch |= {"status": "failed", "errors": {"object": "list", "data": errors}}

    def _answers(self, lines: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
        """Lines of the output file, in another order than they came, and of the error file."""
        well, ill = [], []
        for line in lines:
            body = line["body"]
            key = sha(body["messages"])[:16]
            self._times[key] += 1
            call = {"body": sha(body), "key": key, "attempt": self._times[key], "custom_id": line["custom_id"]}
            allowed = {"authorization": f"Bearer {self.require_key}"}  # whoever made the batch had the key
            request = _Request("POST", line["url"], allowed, b"")
            chance = random.Random(f"{self.seed}/{key}/{self._times[key]}")
            draw = chance.random()
            refusal = self._refusal(request, body)
            if refusal is None and draw < self.broken:
                refusal = 500, self._error(request, 500, "broken", code=None)
            if refusal is not None:
                self._note(call, f"refused:{refusal[0]}")
                ill.append(_line(line["custom_id"], *refusal))
                continue
            kind = "wrong_json" if draw < self.spoiled else None
            reply = completion(body, spoil(reply_text(body), kind, chance), self.model)
            self._note(call, f"fault:{kind}" if kind else "finished")
            text = _line(line["custom_id"], 200, reply)
            well.append(text[: len(text) // 2] if chance.random() < self.garbled else text)
        random.Random(self.seed).shuffle(well)
        return well, ill


def _line(key: str, status: int, body: Any) -> str:
    response = {"status_code": status, "request_id": "r", "body": body}
    return json.dumps({"id": f"batch_req_{key[:8]}", "custom_id": key, "response": response, "error": None})
