"""The client that answers from a recording only. Makes no API calls and writes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit.errors import BadConfig, MissingFile, NotRecorded
from evalkit.llm.accounting.answer_store import KeyedRequest, Recording
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Message, Response

__all__ = ["ReplayClient"]


class ReplayClient:
    """Answers recorded requests. Its ``name`` is the model's, so that replayed scores equal the live ones.

    ``path``: the recording.
    ``model``: the model whose answers to replay; required if the recording holds answers of several models.

    Raises MissingFile, BadFile, BadConfig (``model`` is not in the recording, or is missing although it holds several).
    """

    main_option = "path"

    def __init__(self, path: str | Path, model: str | None = None) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise MissingFile(
                str(self.path),
                expected="a file of recorded answers",
                seen="no such file",
                fix="give the path of a recording, or record one first",
            )
        self._recording = Recording(self.path, write=False)
        self.name = self._choose_model(model)

    def _choose_model(self, model: str | None) -> str:
        recorded = self._recording.models()
        if model is None and len(recorded) == 1:
            return recorded[0]
        if model is None or model not in recorded:
            raise BadConfig(
                str(self.path),
                expected=f"one of the recorded models: {', '.join(recorded) or '(the recording is empty)'}",
                seen="no model given" if model is None else repr(model),
                fix="pass model=…, naming one of the recorded models",
            )
        return model

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        """The recorded reply; ``options`` as in ``evalkit.protocols.Client.generate``. Raises NotRecorded, BadFile."""
        request = KeyedRequest.of(self.name, GenerateRequest(messages, **options))
        if (recorded := self._recording.find(request.key)) is not None:
            return recorded.response
        raise NotRecorded(
            f"request {request.key[:12]}",
            expected=f"an answer of {self.name} recorded in {self.path}",
            seen=f"none for: {messages[-1].content[:60]!r}" if messages else "none for an empty request",
            fix="record again with a live client, or undo the change to the prompt, seed or model",
        )

    async def close(self) -> None:
        """Close the recording."""
        self._recording.close()
