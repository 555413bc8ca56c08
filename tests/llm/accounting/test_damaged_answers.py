"""A recorded answer comes back as it was recorded, or not at all."""

from __future__ import annotations

import math
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from evalkit.errors import BadFile, DamagedFile, StorageError
from evalkit.llm.accounting.answer_store import KeyedRequest, Recorded, Recording
from evalkit.llm.clients.replay import ReplayClient
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.records import Message, Response
from tests.support.damage import damaged_copies

COUNT = 40


def request(number: int, model: str = "m") -> KeyedRequest:
    return KeyedRequest.of(model, GenerateRequest([Message("user", f"question {number}?")], max_tokens=5))


def recorded(number: int) -> Recorded:
    logprobs = ({"yes": -0.25 * number, "no": -math.inf},)
    return Recorded(Response(f"answer {number}", logprobs=logprobs, prompt_tokens=number, completion_tokens=2), 0.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    recording = Recording(tmp_path / "calls.sqlite", write=True)
    for number in range(COUNT):
        recording.add(request(number), recorded(number), paid=True)
    recording.close()
    return tmp_path / "calls.sqlite"


def change(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute(statement).rowcount


def answers(path: Path) -> Iterator[Recorded | None]:
    with closing(Recording(path, write=False)) as recording:
        for number in range(COUNT):
            yield recording.find(request(number).key)


def test_sound_answers_come_back(path: Path) -> None:
    assert list(answers(path)) == [recorded(number) for number in range(COUNT)]


@pytest.mark.parametrize(
    "setting",
    [
        "response = replace(response, 'answer 7', 'answer 8')",
        "response = replace(response, '-1.75', '-1.5')",
        "request = replace(request, '7', '8')",
        "model = 'n'",
        "prompt_tokens = 8",
        "completion_tokens = 3",
        "seconds = 0.75",
        "paid = 0",
        "response = response || ' '",
        "response = ''",
    ],
)
def test_a_changed_answer_is_noticed(path: Path, setting: str) -> None:
    key = request(7).key
    change(path, f"UPDATE answers SET {setting} WHERE key = '{key}'")
    for write in (False, True):
        with closing(Recording(path, write=write)) as recording:
            assert recording.find(request(6).key) == recorded(6)  # others are sound
            with pytest.raises(DamagedFile) as caught:
                recording.find(key)
            assert str(caught.value) == (
                f"{path}: expected the answer that was recorded under {key}; seen another one; fix: delete that answer "
                f"(DELETE FROM answers WHERE key = '{key}') and run again, which asks for it once more"
            )
            if "model" not in setting:
                with pytest.raises(DamagedFile):
                    recording.spent("m")


def test_a_model_that_only_a_damaged_row_names_is_no_model(path: Path) -> None:
    change(path, f"UPDATE answers SET model = 'n' WHERE key = '{request(7).key}'")
    with pytest.raises(DamagedFile):
        ReplayClient(path)


def test_a_lost_answer_is_an_error_of_a_replay_and_is_requested_again_by_a_recorder(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = request(7).key
    change(path, f"DELETE FROM answers WHERE key = '{key}'")
    with (
        closing(Recording(path, write=False)) as recording,
        pytest.raises(DamagedFile, match="seen none, though it was"),
    ):
        recording.find(key)
    with closing(Recording(path, write=True)) as recording:
        assert recording.find(key) is None and "is missing and is requested again" in caplog.text
        recording.add(request(7), recorded(7), paid=True)
        assert recording.find(key) == recorded(7)
        assert recording.spent("m").calls == COUNT
    assert list(answers(path))[7] == recorded(7)


def test_no_damaged_byte_gives_another_answer(path: Path) -> None:
    """Three hundred files with one flipped bit, a hundred with a lost piece."""
    noticed = 0
    for place, damaged in damaged_copies(path.read_bytes(), 5, lost=256):
        path.write_bytes(damaged)
        try:
            found = list(answers(path))
        except (BadFile, StorageError) as error:
            noticed += 1
            assert str(path) in str(error) and "; fix: " in str(error)
        else:
            assert found == [recorded(number) for number in range(COUNT)], place
    assert noticed > 100


def older(path: Path) -> Path:
    """The recording as earlier versions wrote it."""
    change(path, "DELETE FROM checksums")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DROP TABLE checksums")
        database.execute("PRAGMA user_version = 0")
    return path


def test_a_recording_of_an_earlier_version_is_read_and_gets_checksums_when_it_is_written(path: Path) -> None:
    before = older(path).read_bytes()
    assert list(answers(path)) == [recorded(number) for number in range(COUNT)]
    assert path.read_bytes() == before
    Recording(path, write=True).close()
    assert list(answers(path)) == [recorded(number) for number in range(COUNT)]
    change(path, f"UPDATE answers SET response = replace(response, '7', '8') WHERE key = '{request(7).key}'")
    with pytest.raises(DamagedFile):
        list(answers(path))


def test_answers_are_verified_when_another_file_takes_them_over(path: Path, tmp_path: Path) -> None:
    with closing(Recording(tmp_path / "cache.sqlite", write=True)) as cache:
        with closing(Recording(path, write=False)) as recording:
            cache.add_all(recording, "m")
        assert [cache.find(request(number).key) for number in range(COUNT)] == list(answers(path))
        assert cache.spent("m").calls == 0
        damaged = Path(shutil.copy(path, tmp_path / "damaged.sqlite"))
        change(damaged, "UPDATE answers SET response = replace(response, 'answer', 'answar')")
        with closing(Recording(damaged, write=False)) as recording, pytest.raises(DamagedFile):
            cache.add_all(recording, "m")


def test_a_recording_of_a_later_version_is_refused(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("PRAGMA user_version = 9")
    for write in (False, True):
        with pytest.raises(BadFile, match="expected a recording in layout 3; seen layout 9"):
            Recording(path, write=write)
