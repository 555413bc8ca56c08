"""How well a server is held to be."""

from __future__ import annotations

import pytest

from evalkit.clients import servers
from evalkit.clients.servers import Health

SERVER = "http://here/v1"


def test_a_silent_server_rests_longer_every_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(servers.time, "monotonic", lambda: now)
    health, rests = Health(), []
    for _ in range(6):
        for _ in range(5):  # requests that meet the same silence
            health.was_silent(SERVER, "no connection")
        rests.append(health.resting_until - now)
        now = health.resting_until + 1
    assert rests == [5, 10, 20, 40, 60, 60]
    health.answered(SERVER)
    health.answered(SERVER)
    health.was_silent(SERVER, "no reply")
    assert health.resting_until - now == 5
    for _ in range(9):  # a server that comes and goes is told of once a minute
        health.answered(SERVER)
        now += 4
        health.was_silent(SERVER, "came and went")
    assert [record.getMessage() for record in caplog.records] == [
        f"{SERVER}: no connection; trying again",
        f"{SERVER} answers again",
        f"{SERVER}: no reply; trying again",
        f"{SERVER} answers again",
    ]
