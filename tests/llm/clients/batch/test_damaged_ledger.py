"""What is known of batches is what was written of them, or an error: a wrong batch would be paid for twice."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from evalkit.errors import DamagedFile
from evalkit.llm.accounting.answer_store import KeyedRequest
from evalkit.llm.clients.batch.ledger import Batch, Ledger, requests_in_batches
from evalkit.llm.clients.server.dialects import Dialect
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Message

SERVER = "http://server"


def request(number: int) -> KeyedRequest:
    return KeyedRequest.of("m", GenerateRequest([Message("user", f"question {number}?")], max_tokens=5))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    ledger = Ledger(tmp_path / "batches.sqlite", "m", SERVER)
    for name in ("one", "two", "done"):
        requests = [request(number) for number in range(3)]
        batch = Batch(name, {one.key: one for one in requests}, Dialect())
        ledger.write(batch)
        ledger.uploaded(batch, f"file-{name}")
        ledger.begins(batch, 1000.0)
        ledger.created(batch, f"batch-{name}")
    ledger.ended(batch, "completed")
    ledger.learn(Dialect(), {"list"})
    ledger.close()
    return tmp_path / "batches.sqlite"


def read(path: Path, server: str = SERVER) -> list[object]:
    with closing(Ledger(path, "m", server)) as ledger:
        batches = [(one.name, one.id, one.file, one.begun, list(one.requests)) for one in ledger.open_batches()]
        return [batches, ledger.elsewhere(), ledger.learned(), requests_in_batches(path, "m")]


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute(statement).rowcount


def test_a_sound_ledger(path: Path) -> None:
    keys = [request(number).key for number in range(3)]
    batches, elsewhere, learned, requests = read(path)
    assert batches == [(name, f"batch-{name}", f"file-{name}", 1000.0, keys) for name in ("one", "two")]
    assert (elsewhere, requests) == ({}, [request(number) for number in sorted(range(3), key=lambda n: request(n).key)])
    assert learned == (Dialect(), {"list"})
    assert read(path, "http://other")[1] == {SERVER: 6}


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE batches SET batch = 'batch-twp' WHERE name = 'two'",
        "UPDATE batches SET server = 'http://servar' WHERE name = 'two'",
        "UPDATE batches SET ended = 'completed' WHERE name = 'two'",
        "UPDATE batches SET ended = NULL WHERE name = 'done'",
        "UPDATE batches SET count = 4 WHERE name = 'two'",
        "UPDATE batches SET model = 'n' WHERE name = 'one'",
        "DELETE FROM batches WHERE name = 'one'",
        "UPDATE requests SET request = replace(request, '2', '3') WHERE number = 1 AND place = 2",
        "UPDATE requests SET key = '0' WHERE number = 2 AND place = 0",
        "DELETE FROM requests WHERE number = 2 AND place = 1",
        "DELETE FROM requests WHERE number = 2",
        "UPDATE learned SET forms = '[]'",
        "DELETE FROM learned",
    ],
)
def test_a_changed_row_is_noticed(path: Path, statement: str) -> None:
    change(path, statement)
    with pytest.raises(
        DamagedFile, match=r"batches\.sqlite: expected .*, as written; seen (something else|nothing); fix:"
    ):
        read(path)


def test_a_ledger_of_an_earlier_version_gets_checksums(path: Path) -> None:
    sound = read(path)
    change(path, "DELETE FROM checksums")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE checksums")
        database.execute("PRAGMA user_version = 0")
    assert requests_in_batches(path, "m") == sound[3]
    assert read(path) == sound
    change(path, "UPDATE batches SET batch = 'other' WHERE name = 'one'")
    with pytest.raises(DamagedFile):
        read(path)


def test_no_ledger_and_one_without_tables_hold_no_requests(tmp_path: Path) -> None:
    assert requests_in_batches(tmp_path / "none.sqlite", "m") == []
    (tmp_path / "empty.sqlite").touch()
    assert requests_in_batches(tmp_path / "empty.sqlite", "m") == []
