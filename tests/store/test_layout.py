"""Records are verified when they are read, and the tables of another version are never taken for those of this one."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from evalkit.errors import BadFile, DamagedFile, EvalkitError, RunMismatch
from evalkit.records import BASELINE, Explanation
from evalkit.store.frames import RunFrames, features_frame
from evalkit.store.run_store import RunStore, read_run
from evalkit.store.tables import LAYOUT, NEW_TABLES, TABLES
from evalkit.util.sealed_files import is_sealed
from tests.support.damage import damaged_copies
from tests.support.paths import ROOT
from tests.support.small_records import IDENTITY, SOURCE, fill, key, score

OLDER = ROOT / "tests" / "end_to_end" / "data" / "older_run" / "run"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with RunStore.create(tmp_path / "run", IDENTITY) as store:
        fill(store)
        store.write_failed_explanation(SOURCE.name, "5", "words", "no words")
        for feature in "789":
            store.write_score(key(feature), score(feature, 12), judge_version="2")
        store.write_stage("collect", 2.5, {"tokens": 100})
        store.write_asked("m", calls=3, prompt_tokens=40, completion_tokens=5, cost=0.25)
    return tmp_path / "run"


def change(folder: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(folder / "records.sqlite")) as database, database:
        assert database.execute(statement, values).rowcount != 0


def files(folder: Path) -> dict[Path, bytes]:
    """The content of all files but those that SQLite and the lock leave beside the others."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal", ".lock")))
    return {path: path.read_bytes() for path in found}


def same(left: RunFrames, right: RunFrames) -> bool:
    names = ("sources", "features", "explanations", "judgements")
    return left.meta == right.meta and all(getattr(left, name).equals(getattr(right, name)) for name in names)


@pytest.mark.parametrize(
    ("statement", "seen"),
    [
        ("UPDATE sources SET l0 = 3.5", "another row of sources, m/layers.1/sae"),
        ("UPDATE sources SET kind = 'null-planted'", "another row of sources"),
        ("DELETE FROM sources", "1 rows of sources less than were written"),
        ("UPDATE features SET density = 0.02 WHERE feature = '3'", "another row of features, m/layers.1/sae 3"),
        ("UPDATE features SET status = 'ok', reason = NULL", "another row of features"),
        ("DELETE FROM features WHERE feature = '5'", "1 rows of features less"),
        ("UPDATE explanations SET text = 'bats' WHERE feature = '3'", "another row of explanations"),
        ("UPDATE scores SET cutoff = 0.5 WHERE feature = '7'", "another score of m/layers.1/sae feature 7"),
        ("UPDATE scores SET version = '2' WHERE feature = '8'", "another score of m/layers.1/sae feature 8"),
        (
            "UPDATE judgements SET match = 0 WHERE feature = '9' AND item = 4",
            "other judgements of m/layers.1/sae feature 9",
        ),
        ("UPDATE judgements SET confidence = confidence + 1e-9 WHERE item = 1", "other judgements"),
        ("DELETE FROM judgements WHERE feature = '7' AND item = 11", "11 judgements instead of 12"),
        ("UPDATE asked SET cost = 0.26", "another row of asked, m"),
        ("UPDATE stages SET seconds = 3.5", "another row of the stage collect"),
        ("UPDATE stages SET detail = '{}'", "another row of the stage collect"),
        ("UPDATE checksums SET checksum = x'00' WHERE stage = 'scores'", "another score"),
        ("DELETE FROM checksums WHERE stage = 'features'", "another row of features"),
    ],
)
def test_a_changed_record_is_noticed(run: Path, statement: str, seen: str) -> None:
    change(run, statement)
    with pytest.raises(DamagedFile) as caught:
        read_run(run)
    told = str(caught.value)
    assert told.startswith(f"{run / 'records.sqlite'}: expected the records that were written; seen {seen}"), told
    assert "fix: delete records.sqlite" in told and "not paid again" in told


@pytest.mark.parametrize("table", ["explanations", "scores"])
def test_missing_records_are_noticed_by_readers_and_recorded_again_by_a_run(
    run: Path, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    sound = read_run(run)
    change(run, f"DELETE FROM {table} WHERE feature = '3'")
    with pytest.raises(
        DamagedFile, match=f"seen 1 {table} less than were written, such as one of m/layers.1/sae; fix: repeat"
    ):
        read_run(run)
    with RunStore.create(run, IDENTITY) as store:
        assert "3" not in (store.explanations(SOURCE.name, "words") if table == "explanations" else {})
        assert key("3") not in store.finished_scores() or table == "explanations"
        assert f"damaged: 1 {table} less than were written" in caplog.text
        fill(store)
    assert same(read_run(run), sound)


def test_a_lost_explanation_takes_its_scores_along_when_it_is_written_again(run: Path) -> None:
    change(run, "DELETE FROM explanations WHERE feature = '3'")
    with RunStore.create(run, IDENTITY) as store:
        assert store.explanations(SOURCE.name, "words") == {}
        store.write_explanation(Explanation(SOURCE.name, "3", "words", "1", "others"))
        assert key("3") not in store.finished_scores() and key("7") in store.finished_scores()


def test_no_damaged_byte_gives_other_frames(run: Path) -> None:
    """Three hundred files with one flipped bit, a hundred with a lost piece: the same frames, or one line."""
    sound, path = read_run(run), run / "records.sqlite"
    noticed = 0
    for place, damaged in damaged_copies(path.read_bytes(), 3, lost=512):
        path.write_bytes(damaged)
        try:
            found = read_run(run)
        except EvalkitError as error:
            noticed += 1
            assert str(run) in str(error) and "; fix: " in str(error)
        else:
            assert same(found, sound), place
    assert noticed > 30  # most of such a little file is empty


def test_every_cut_off_file_is_noticed(run: Path) -> None:
    path = run / "records.sqlite"
    data = path.read_bytes()
    for length in range(0, len(data), 997):
        path.write_bytes(data[:length])
        with pytest.raises(BadFile, match="fix: "):
            read_run(run)
    (run / "collected").mkdir()
    path.write_bytes(b"")
    with pytest.raises(BadFile, match="seen a file without tables; fix: delete records"):
        RunStore.create(run, IDENTITY)


def test_tables_of_another_layout_are_neither_stamped_nor_touched(tmp_path: Path) -> None:
    """A claimed layout counts only if the tables are those of it; without a claim, tables are of an unknown layout."""
    older = TABLES.replace("note TEXT NOT NULL, ", "")
    assert older != TABLES
    for number, (tables, stamp, seen) in enumerate(
        [
            (older, 1, "layout 1"),
            (older, 0, "layout 0"),
            (older, 2, "layout 2 with another table explanations"),
            (TABLES, LAYOUT, f"layout {LAYOUT} with another table checksums"),
            (TABLES + NEW_TABLES, 2, "layout 2 with another table checksums"),
            (TABLES, LAYOUT + 1, f"layout {LAYOUT + 1}"),
            (TABLES.partition("CREATE TABLE IF NOT EXISTS stages")[0], 2, "layout 2 with another table stages"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        with closing(sqlite3.connect(folder / "records.sqlite")) as database, database:
            database.executescript(tables)
            database.execute(f"PRAGMA user_version = {stamp}")
        before = (folder / "records.sqlite").read_bytes()
        for attempt in (lambda at: RunStore.create(at, IDENTITY), read_run):
            with pytest.raises(BadFile) as caught:
                attempt(folder)  # type: ignore[no-untyped-call]
            assert str(caught.value) == (
                f"{folder / 'records.sqlite'}: expected records in layout 3, the one of this version of evalkit; seen "
                f"{seen}; fix: read it with the version that wrote it, or run again with another --out"
            )
        assert (folder / "records.sqlite").read_bytes() == before and not (folder / "run.json").exists()


def test_an_older_run_opens_unverified_and_is_carried_over_when_it_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(OLDER, tmp_path / "run"))
    before = files(folder)
    older = read_run(folder)
    assert older.meta["verified"] is False and "unverified: written by an earlier version" in caplog.text
    assert before == files(folder)  # reading writes nothing
    with RunStore.open(folder) as store:
        identity = store.identity()
    with caplog.at_level(logging.WARNING), RunStore.create(folder, identity):
        assert "they were added now" in caplog.text
    for path, content in before.items():
        assert path.name == "records.sqlite" or (path.read_bytes() == content and is_sealed(path))
    carried = read_run(folder)
    assert carried.meta == {**older.meta, "verified": True} and same(
        RunFrames(**{name: getattr(carried, name) for name in ("sources", "features", "judgements", "explanations")}),
        RunFrames(**{name: getattr(older, name) for name in ("sources", "features", "judgements", "explanations")}),
    )
    change(folder, "UPDATE judgements SET match = 1 - match WHERE item = 0")
    with pytest.raises(DamagedFile):
        read_run(folder)


def test_a_refused_command_leaves_an_older_run_as_it_is(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLDER, tmp_path / "run"))
    before = files(folder)
    with pytest.raises(RunMismatch):
        RunStore.create(folder, IDENTITY)
    assert before == files(folder)


def test_statuses_are_those_of_the_query_that_older_versions_asked() -> None:
    """The frame of features is made from verified rows; a database makes it by another way."""
    random = np.random.default_rng(0)
    setups = [BASELINE, ("words", "llm"), ("default", "llm"), ("default", "lexical")]
    features = [("s", str(n), n, "ok", None, 0.1, 0.0, 1.0, 1.0, 0.5, "[]") for n in range(200)]
    explanations, scores = [], []
    for _, feature, *_ in features:
        for explainer in ("words", "default"):
            failed = random.random() < 0.3
            said = (None, f"because {random.integers(9)}") if failed else ("whales", None)
            if random.random() < 0.6:
                explanations.append(("s", feature, explainer, "1", *said, ""))
        for explainer, judge in setups:
            reason = f"because {random.integers(9)}" if random.random() < 0.5 else None
            if random.random() < 0.4:
                scores.append(("s", feature, "detection", explainer, judge, "", 0, "1", "1", None, reason))
    database = sqlite3.connect(":memory:")
    database.executescript(TABLES)
    for table, rows in (("features", features), ("explanations", explanations), ("scores", scores)):
        database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
    query = f"""
    WITH failures AS (
        SELECT source, feature, reason, explainer = '{BASELINE[0]}' AS baseline FROM explanations WHERE text IS NULL
        UNION ALL SELECT source, feature, reason, (explainer, judge) = {BASELINE} FROM scores WHERE reason IS NOT NULL)
    SELECT feature, CASE WHEN failed IS NULL THEN status ELSE 'failed' END AS status, coalesce(failed, reason) AS reason
    FROM (SELECT f.*, (SELECT min(x.reason) FROM failures x WHERE x.source = f.source AND x.feature = f.feature
            AND NOT EXISTS (SELECT 1 FROM scores s WHERE s.source = f.source AND s.feature = f.feature AND s.reason IS NULL
                AND (x.baseline OR (s.explainer, s.judge) <> {BASELINE}))
        ) AS failed FROM features f) ORDER BY position"""
    wanted = database.execute(query).fetchall()
    found = features_frame(features, explanations, scores)
    assert found["status"].value_counts()["failed"] > 40
    frame = found[["feature", "status", "reason"]].astype(object)
    assert [tuple(row) for row in frame.where(pd.notna(frame), None).to_numpy()] == wanted


def test_a_missing_configuration_comes_back_from_the_same_command_only(run: Path) -> None:
    (run / "collected").mkdir()
    (run / "run.json").unlink()
    with pytest.raises(
        RunMismatch, match=r"expected the options that the run was made with, as its run\.json is missing"
    ):
        RunStore.create(run, {**IDENTITY, "seed": 1})
    RunStore.create(run, IDENTITY).close()
    assert read_run(run).meta["seed"] == 0


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": "m", "depths": [16, 64], "seed": 8}'])
def test_a_damaged_configuration_is_noticed(run: Path, damage: bytes) -> None:
    (run / "run.json").write_bytes(damage)
    for attempt in (read_run, lambda at: RunStore.create(at, IDENTITY)):
        with pytest.raises(DamagedFile, match=r"run\.json: expected .*; fix: delete it and repeat the command"):
            attempt(run)  # type: ignore[no-untyped-call]


def test_a_file_that_lost_its_checksums_is_named(run: Path) -> None:
    (run / "run.json.checksums").unlink()
    for attempt in (read_run, lambda at: RunStore.create(at, IDENTITY)):
        with pytest.raises(
            BadFile, match=r"run\.json: expected its checksums in run\.json\.checksums; seen no such file"
        ):
            attempt(run)  # type: ignore[no-untyped-call]
