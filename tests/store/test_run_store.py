from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from evalkit.errors import BadFile, MissingFile, RunLocked, RunMismatch
from evalkit.records import Explanation
from evalkit.store.run_store import RunStore, read_run
from tests.support.small_records import IDENTITY, SOURCE, fill, key, score


def test_records_come_back(tmp_path: Path) -> None:
    with RunStore.create(tmp_path / "run", IDENTITY) as store:
        fill(store)
        assert [row.feature for row in store.features(SOURCE.name)] == ["3", "5"]
        assert store.explanations(SOURCE.name, "words")["3"].text == "cats"
        assert store.finished_scores() == {key("3"): ("1", "2")}
        assert store.source_names() == [SOURCE.name]
    frames = read_run(tmp_path / "run")
    assert frames.judgements["match"].isna().sum() == 1
    assert frames.judgements.loc[3, "reason"] == "odd"
    assert frames.judgements["label"].tolist() == [True, False, True, False]
    assert frames.features["status"].tolist() == ["ok", "ineligible"]
    assert frames.sources.loc[0, "l0"] == 2.5
    assert frames.meta["model"] == "m"


def test_writing_twice_replaces(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, IDENTITY) as store:
        fill(store)
        fill(store)
    assert len(read_run(tmp_path).judgements) == 4


def test_a_new_explanation_takes_its_old_scores_along(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, IDENTITY) as store:
        fill(store)
        for feature, control in (("3", "shuffled"), ("5", ""), ("5", "shuffled")):
            store.write_score(key(feature, "words", control), score(feature), judge_version="2")
        store.write_score(key("3", "other", ""), score("3"), judge_version="2")
        store.write_explanation(Explanation(SOURCE.name, "3", "words", "1", "cats"))
        assert len(store.finished_scores()) == 5  # the same text again changes nothing
        store.write_explanation(Explanation(SOURCE.name, "3", "words", "2", "cats and dogs"))
        kept = {(feature, explainer, control) for _, feature, _, explainer, _, control, _ in store.finished_scores()}
        assert kept == {("5", "words", ""), ("3", "other", "")}
    assert len(read_run(tmp_path).judgements) == 2 * 4


def test_a_shorter_test_leaves_no_old_judgement(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, IDENTITY) as store:
        store.write_score(key("3", "words", ""), score("3", 9), judge_version="2")
        store.write_score(key("3", "words", ""), score("3", 4), judge_version="2")
    assert len(read_run(tmp_path).judgements) == 4


def test_a_failed_second_explanation_takes_the_scores_of_the_first_along(tmp_path: Path) -> None:
    """Else what is written at the third attempt would inherit them."""
    with RunStore.create(tmp_path, IDENTITY) as store:
        fill(store)
        store.write_failed_explanation(SOURCE.name, "3", "words", "server down")
        store.write_explanation(Explanation(SOURCE.name, "3", "words", "2", "dogs"))
        assert store.finished_scores() == {}
    assert len(read_run(tmp_path).judgements) == 0


def test_what_cannot_be_explained_at_all_takes_no_scores_along(tmp_path: Path) -> None:
    """It fails again at every resume: the shuffled scores of the others would be made again each time."""
    with RunStore.create(tmp_path, IDENTITY) as store:
        fill(store)
        store.write_score(key("3", "words", "shuffled"), score("3"), judge_version="2")
        for _ in range(2):
            store.write_failed_explanation(SOURCE.name, "5", "words", "no words")
        assert len(store.finished_scores()) == 2


def test_a_failed_second_score_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, IDENTITY) as store:
        fill(store)
        store.write_failed_score(key("3"), "judge down")
    frames = read_run(tmp_path)
    assert len(frames.judgements) == 0 and frames.features["status"].tolist()[0] == "failed"


def test_the_lexical_baseline_does_not_hide_that_everything_else_failed(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, IDENTITY) as store:
        fill(store)
        store.write_failed_score(key("3"), "judge down")
        baseline = (SOURCE.name, "3", "detection", "words", "lexical", "", 0)
        store.write_score(baseline, score("3"), judge_version="1")
        assert store.frames().features["status"].tolist()[0] == "failed"
        other = (SOURCE.name, "3", "detection", "default", "llm", "", 0)
        store.write_score(other, score("3"), judge_version="1")
        assert store.frames().features["status"].tolist()[0] == "ok"


def test_failures_are_kept_and_tried_again(tmp_path: Path) -> None:
    with RunStore.create(tmp_path, IDENTITY) as store:
        fill(store)
        store.write_failed_explanation(SOURCE.name, "5", "words", "no words")
        store.write_failed_score(key("5"), "judge down")
        assert "5" not in store.explanations(SOURCE.name, "words")
        assert key not in store.finished_scores()


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    RunStore.create(tmp_path, {**IDENTITY, "seed": 7}).close()
    RunStore.create(tmp_path, IDENTITY).close()  # nothing was computed yet, so the folder is not bound
    (tmp_path / "collected").mkdir()
    RunStore.create(tmp_path, IDENTITY).close()
    with pytest.raises(RunMismatch) as caught:
        RunStore.create(tmp_path, {**IDENTITY, "seed": 1})
    assert str(caught.value) == (
        f"{tmp_path}: expected a run with seed = 1; seen seed = 0; "
        "fix: use another --out, or delete the folder to start over"
    )
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 0


def test_a_second_process_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from evalkit.store.run_store import RunStore
store = RunStore.create(Path({str(tmp_path)!r}), {{"model": "m"}})
print("held", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(RunLocked, match=f"seen process {holder.pid} writing it"):
        RunStore.create(tmp_path, {"model": "m"})
    holder.kill()
    holder.communicate()
    RunStore.create(tmp_path, {"model": "m"}).close()


def test_killed_writers_leave_whole_features(tmp_path: Path) -> None:
    """A process killed while it writes scores leaves each score with all its judgements or with none."""
    code = f"""
from pathlib import Path
from evalkit.store.run_store import RunStore
from tests.support.small_records import IDENTITY, fill, key, score
store = RunStore.create(Path({str(tmp_path)!r}), IDENTITY)
fill(store)
print("go", flush=True)
for feature in range(100000):
    store.write_score(key(str(feature), "words", ""), score(str(feature), 40), judge_version="2")
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert writer.stdout is not None and writer.stdout.readline() == "go\n"
    with pytest.raises(subprocess.TimeoutExpired):
        writer.wait(0.5)
    writer.kill()
    writer.communicate()
    frames = read_run(tmp_path)
    sizes = frames.judgements.groupby("feature").size().drop("3", errors="ignore")
    assert len(sizes) > 3 and set(sizes) == {40}


def test_reading_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"expected a run folder with records\.sqlite; seen no such folder"):
        read_run(tmp_path / "nothing")
    with pytest.raises(MissingFile, match="seen a folder with nothing"):
        read_run(tmp_path)
    (tmp_path / "records.sqlite").write_bytes(b"not a database, but long enough to look like one" * 30)
    with pytest.raises(BadFile, match="expected the records of a run; seen file is not a database"):
        read_run(tmp_path)


def test_records_are_in_write_ahead_mode(tmp_path: Path) -> None:
    RunStore.create(tmp_path, IDENTITY).close()
    connection = sqlite3.connect(tmp_path / "records.sqlite")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
