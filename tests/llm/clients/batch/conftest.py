"""No key or server of the environment, and short pauses, for every test of the batch client."""

from __future__ import annotations

import pytest

from evalkit.llm.clients.batch import api as batches
from evalkit.llm.clients.batch import sizing as batch_room


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(batches, "_FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(batch_room, "_FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(batch_room, "_LONGEST_PAUSE_S", 0.1)
