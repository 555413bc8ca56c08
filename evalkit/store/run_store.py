"""The records of a run: ``records.sqlite`` (in WAL mode), beside the folders that other modules write.

Every record has a key. A feature's records are written in one transaction, so a killed process leaves each feature
complete or absent. Knows nothing of how records are made; needs neither torch nor a model.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.errors import BadFile, MissingFile, StorageError
from evalkit.records import Explanation, FeatureId, Score, SourceInfo
from evalkit.store.llm_usage import Asked
from evalkit.store.run_folder import acquire, bind_identity, sweep
from evalkit.store.tables import FEATURES_QUERY, LAYOUT, SCORE_KEY, TABLES, FeatureRow, ScoreKey
from evalkit.util.atomic_files import storage_errors
from evalkit.util.sqlite import open_to_read, open_to_write

if TYPE_CHECKING:
    from evalkit.store.frames import RunFrames

__all__ = ["RunStore", "read_run"]

_FORGET_JUDGEMENTS = f"DELETE FROM judgements WHERE ({SCORE_KEY}) = (?, ?, ?, ?, ?, ?, ?)"


def _forget_scores(connection: sqlite3.Connection, source: str, feature: FeatureId, explainer: str) -> None:
    """Delete the scores that used an explanation: the feature's own, and shuffled ones, which may have used it."""
    for table in ("scores", "judgements"):
        connection.execute(
            f"DELETE FROM {table} WHERE source = ? AND explainer = ? AND (feature = ? OR control = 'shuffled')",
            (source, explainer, feature),
        )


def _moments(values: Sequence[float] | None) -> str | None:
    return None if values is None else json.dumps(list(values))


class RunStore:
    """The records of one run. Open it with ``RunStore.create`` (to write; one process at a time) or ``RunStore.open``."""

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self.folder = folder
        self._connection = connection
        self._lock: int | None = None

    @classmethod
    def create(cls, folder: Path, identity: dict[str, Any]) -> RunStore:
        """Create the folder, or resume the run in it. Raises RunMismatch, RunLocked, StorageError."""
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = acquire(folder / "run.lock")
        try:
            sweep(folder)
            bind_identity(folder, identity)
            store = cls(folder, open_to_write(folder / "records.sqlite"))
            with store._writing():
                store._connection.executescript(TABLES)
                store._connection.execute(f"PRAGMA user_version = {LAYOUT}")
        except BaseException:
            os.close(lock)
            raise
        store._lock = lock
        return store

    @classmethod
    def open(cls, folder: Path) -> RunStore:
        """Open a finished or unfinished run read-only. Raises MissingFile, BadFile."""
        path = folder / "records.sqlite"
        if not path.is_file():
            inside = ", ".join(sorted(found.name for found in folder.glob("*"))[:4])
            raise MissingFile(
                str(folder),
                expected="a run folder with records.sqlite",
                seen=f"a folder with {inside or 'nothing'}" if folder.is_dir() else "no such folder",
                fix="pass the folder that `evalkit run` wrote",
            )
        try:
            connection = open_to_read(path, "judgements")
            (layout,) = connection.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as error:
            raise BadFile(str(path), expected="the records of a run", seen=str(error), fix="run again") from error
        if layout != LAYOUT:
            connection.close()
            raise BadFile(
                str(path),
                expected=f"records in layout {LAYOUT}, the one of this version of evalkit",
                seen=f"layout {layout}",
                fix="read it with the version that wrote it, or run again with another --out",
            )
        return cls(folder, connection)

    def close(self) -> None:
        """Close the records and release the lock."""
        self._connection.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction. Raises StorageError when the disk is full or read-only."""
        try:
            with self._connection:
                yield self._connection
        except sqlite3.OperationalError as error:
            raise StorageError(
                str(self.folder / "records.sqlite"),
                expected="a file that can be written",
                seen=str(error),
                fix="free space on the disk, then run the same command again; it resumes, and finished work is kept",
            ) from error

    def write_sources(self, sources: Sequence[SourceInfo], measured: Sequence[dict[str, Any]]) -> None:
        """Replace the list of sources; ``measured`` holds the measurements of each (FVU, L0 on the calibration tokens)."""
        rows = [
            (i, s.name, s.kind, s.site, s.width, s.l0, s.depth, json.dumps({**s.declared, **m}, sort_keys=True))
            for i, (s, m) in enumerate(zip(sources, measured, strict=True))
        ]
        with self._writing() as connection:
            connection.execute("DELETE FROM sources")
            connection.executemany("INSERT INTO sources VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def write_features(self, source: str, rows: Iterable[FeatureRow]) -> None:
        """Replace a source's rows in the table of features."""
        with self._writing() as connection:
            connection.execute("DELETE FROM features WHERE source = ?", (source,))
            kept = [(*row[:-1], json.dumps(row.promoted, ensure_ascii=False)) for row in rows]
            connection.executemany("INSERT INTO features VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", kept)

    def features(self, source: str) -> list[FeatureRow]:
        """The rows of a source, in the order of selection."""
        query = "SELECT * FROM features WHERE source = ? ORDER BY position"
        rows = (FeatureRow(*row) for row in self._connection.execute(query, (source,)))
        return [row._replace(promoted=tuple(json.loads(str(row.promoted)))) for row in rows]

    def source_names(self) -> list[str]:
        """Every source, in the order of the run."""
        return [name for (name,) in self._connection.execute("SELECT name FROM sources ORDER BY position")]

    def write_explanation(self, explanation: Explanation) -> None:
        """Store an explanation. If it replaces another one, delete the scores that used that one."""
        e = explanation
        key = (e.source, e.feature, e.explainer)
        with self._writing() as connection:
            query = "SELECT version, text FROM explanations WHERE source = ? AND feature = ? AND explainer = ?"
            old = connection.execute(query, key).fetchone()
            if old is not None and old[1] is not None and old != (e.version, e.text):
                _forget_scores(connection, *key)
            connection.execute(
                "INSERT OR REPLACE INTO explanations VALUES (?, ?, ?, ?, ?, NULL, ?)",
                (e.source, e.feature, e.explainer, e.version, e.text, e.note),
            )

    def write_failed_explanation(self, source: str, feature: FeatureId, explainer: str, reason: str) -> None:
        """Store why a feature has no explanation; a resumed run retries it. Deletes the scores of an older explanation."""
        with self._writing() as connection:
            query = "SELECT 1 FROM explanations WHERE source = ? AND feature = ? AND explainer = ? AND text IS NOT NULL"
            if connection.execute(query, (source, feature, explainer)).fetchone():
                _forget_scores(connection, source, feature, explainer)
            connection.execute(
                "INSERT OR REPLACE INTO explanations VALUES (?, ?, ?, '', NULL, ?, '')",
                (source, feature, explainer, reason),
            )

    def explanations(self, source: str, explainer: str) -> dict[FeatureId, Explanation]:
        """Finished explanations by feature."""
        query = (
            "SELECT feature, version, text, note FROM explanations "
            "WHERE source = ? AND explainer = ? AND text IS NOT NULL"
        )
        return {
            feature: Explanation(source, feature, explainer, version, text, note)
            for feature, version, text, note in self._connection.execute(query, (source, explainer))
        }

    def write_score(self, key: ScoreKey, score: Score, *, judge_version: str) -> None:
        """Store a score and all its judgements under ``key``, in one transaction."""
        rows = [
            (
                *key,
                j.item,
                j.window,
                j.label,
                j.match,
                j.confidence,
                j.probability,
                j.decile,
                j.reason,
                _moments(j.moments),
            )
            for j in score.judgements
        ]
        with self._writing() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (*key, score.version, judge_version, score.cutoff),
            )
            connection.execute(_FORGET_JUDGEMENTS, key)
            connection.executemany("INSERT INTO judgements VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", rows)

    def explainers(self) -> list[str]:
        """Names of the explainers with at least one explanation."""
        query = "SELECT DISTINCT explainer FROM explanations WHERE text IS NOT NULL ORDER BY explainer"
        return [name for (name,) in self._connection.execute(query)]

    def write_failed_score(self, key: ScoreKey, reason: str) -> None:
        """Store why a score is missing; a resumed run retries it. Deletes the judgements of an older score."""
        with self._writing() as connection:
            connection.execute(_FORGET_JUDGEMENTS, key)
            connection.execute(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, '', '', NULL, ?)", (*key, reason)
            )

    def finished_scores(self) -> dict[ScoreKey, tuple[str, str]]:
        """Keys of the finished scores, each with the versions of its scorer and judge."""
        query = f"SELECT {SCORE_KEY}, version, judge_version FROM scores WHERE reason IS NULL"
        return {row[:7]: (row[7], row[8]) for row in self._connection.execute(query)}

    def write_stage(self, name: str, seconds: float, detail: dict[str, Any]) -> None:
        """Add to the total time of a stage over all commands; replace its detail."""
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO stages VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
                "seconds = seconds + excluded.seconds, detail = excluded.detail",
                (name, seconds, json.dumps(detail, sort_keys=True)),
            )

    def stage_done(self, name: str) -> bool:
        """Whether a stage has finished once."""
        return bool(self._connection.execute("SELECT 1 FROM stages WHERE name = ?", (name,)).fetchone())

    def write_estimate(self, model: str, estimate: dict[str, Any]) -> None:
        """Store the expected calls and tokens of a model; the first estimate of a run is kept."""
        with self._writing() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO asked VALUES (?, 0, 0, 0, NULL, ?)",
                (model, json.dumps(estimate, sort_keys=True)),
            )

    def write_asked(
        self, model: str, *, calls: int, prompt_tokens: int, completion_tokens: int, cost: float | None
    ) -> None:
        """Store the calls, tokens and cost of a model so far."""
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO asked VALUES (?, ?, ?, ?, ?, '{}') ON CONFLICT (model) DO UPDATE SET calls = excluded.calls, "
                "prompt_tokens = excluded.prompt_tokens, completion_tokens = excluded.completion_tokens, "
                "cost = coalesce(excluded.cost, cost)",
                (model, calls, prompt_tokens, completion_tokens, cost),
            )

    def asked(self) -> list[Asked]:
        """Calls, tokens and cost of each language model."""
        rows = self._connection.execute(
            "SELECT model, calls, prompt_tokens, completion_tokens, cost, estimate FROM asked ORDER BY model"
        )
        return [
            Asked(model, calls, prompt_tokens, completion_tokens, cost, json.loads(estimate))
            for model, calls, prompt_tokens, completion_tokens, cost, estimate in rows
        ]

    def identity(self) -> dict[str, Any]:
        """The configuration of the run."""
        found: dict[str, Any] = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        return found

    def _cost(self) -> str:
        """Time and language model usage of the run, as a sentence."""
        stages = list(self._connection.execute("SELECT name, seconds FROM stages ORDER BY rowid"))
        told = [", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages)] if stages else []
        return "; ".join([*told, *(asked.sentence() for asked in self.asked())]) or "not recorded"

    def frames(self) -> RunFrames:
        """All records as data frames."""
        import pandas as pd

        from evalkit.store.frames import RunFrames

        def frame(query: str) -> pd.DataFrame:
            return pd.read_sql_query(query, self._connection)

        judgements = frame(
            f"SELECT j.*, s.version AS scorer_version, s.judge_version FROM judgements j JOIN scores s USING ({SCORE_KEY})"
        )
        judgements["label"] = judgements["label"].astype(bool)
        judgements["match"] = judgements["match"].astype("boolean")
        for column in ("confidence", "probability"):
            judgements[column] = judgements[column].astype("float64")
        judgements["decile"] = judgements["decile"].astype("Int64")
        sources = frame("SELECT name, kind, site, width, l0, depth, measured FROM sources ORDER BY position")
        for column in ("width", "depth"):
            sources[column] = sources[column].astype("Int64")
        sources["l0"] = sources["l0"].astype("float64")
        return RunFrames(
            sources=sources,
            features=frame(FEATURES_QUERY),
            explanations=frame("SELECT * FROM explanations ORDER BY source, feature"),
            judgements=judgements,
            meta={**self.identity(), "cost": self._cost()},
        )


def read_run(folder: str | Path) -> RunFrames:
    """The records of a run as data frames. Raises MissingFile, BadFile."""
    with RunStore.open(Path(folder)) as store:
        return store.frames()
