"""The records of a run: ``records.sqlite`` (in WAL mode), beside the folders that other modules write.

Every record has a key. A feature's records are written in one transaction with their checksums, so a killed process
leaves each feature complete or absent, and every read verifies what it reads (``evalkit.store.verified``). Knows nothing
of how records are made; needs neither torch nor a model.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.errors import BadFile, MissingFile
from evalkit.records import CONTROL_KIND, Explanation, FeatureId, Score, SourceInfo
from evalkit.store.layout import REDO, block_of, hold_score, open_records_to_read, open_records_to_write, records_errors
from evalkit.store.llm_usage import Asked
from evalkit.store.run_folder import acquire, read_identity, sweep
from evalkit.store.tables import SCORE_KEY, FeatureRow, ScoreKey
from evalkit.store.verified import VerifiedRecords
from evalkit.util.atomic_files import storage_errors
from evalkit.util.sealed_rows import forget, hold, holds

if TYPE_CHECKING:
    from evalkit.store.frames import RunFrames

__all__ = ["RunStore", "read_run"]

_FORGET_JUDGEMENTS = f"DELETE FROM judgements WHERE ({SCORE_KEY}) = (?, ?, ?, ?, ?, ?, ?)"


def _forget_scores(connection: sqlite3.Connection, source: str, feature: FeatureId, explainer: str) -> None:
    """Delete the scores that used an explanation: the feature's own, and shuffled ones, which may have used it."""
    which = "WHERE source = ? AND explainer = ? AND (feature = ? OR control = 'shuffled')"
    values = (source, explainer, feature)
    scores = connection.execute(f"SELECT {SCORE_KEY} FROM scores {which}", values).fetchall()
    forget(connection, "scores", source, [block_of(*key[1:]) for key in scores])
    for table in ("scores", "judgements"):
        connection.execute(f"DELETE FROM {table} {which}", values)


def _moments(values: Sequence[float] | None) -> str | None:
    return None if values is None else json.dumps(list(values))


class RunStore:
    """The records of one run. Open it with ``RunStore.create`` (to write; one process at a time) or ``RunStore.open``."""

    def __init__(
        self, folder: Path, connection: sqlite3.Connection, *, lock: int | None = None, verified: bool = True
    ) -> None:
        self.folder = folder
        self.verified = verified  # False for a run of the layout before, which has no checksums
        self._connection = connection
        self._lock = lock
        self._records = VerifiedRecords(folder / "records.sqlite", connection, repairs=lock is not None)

    @classmethod
    def create(cls, folder: Path, identity: dict[str, Any]) -> RunStore:
        """Create the folder, or resume the run in it. Raises RunMismatch, RunLocked, BadFile, StorageError."""
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = acquire(folder / "run.lock")
        try:
            sweep(folder)
            return cls(folder, open_records_to_write(folder, identity), lock=lock)
        except BaseException:
            os.close(lock)
            raise

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
        connection, verified = open_records_to_read(folder)
        return cls(folder, connection, verified=verified)

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
        """One transaction. Raises StorageError when the disk is full or read-only, BadFile."""
        with records_errors(self.folder / "records.sqlite"), self._connection:
            yield self._connection

    def write_sources(self, sources: Sequence[SourceInfo], measured: Sequence[dict[str, Any]]) -> None:
        """Replace the list of sources; ``measured`` holds the measurements of each (FVU, L0 on the calibration tokens)."""
        rows = [
            (i, s.name, s.kind, s.site, s.width, s.l0, s.depth, json.dumps({**s.declared, **m}, sort_keys=True))
            for i, (s, m) in enumerate(zip(sources, measured, strict=True))
        ]
        with self._writing() as connection:
            connection.execute("DELETE FROM sources")
            forget(connection, "sources", "")
            connection.executemany("INSERT INTO sources VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
            for row in rows:
                hold(connection, "sources", "", row[1], [row])

    def write_features(self, source: str, rows: Iterable[FeatureRow]) -> None:
        """Replace a source's rows in the table of features."""
        with self._writing() as connection:
            connection.execute("DELETE FROM features WHERE source = ?", (source,))
            forget(connection, "features", source)
            kept = [(*row[:-1], json.dumps(row.promoted, ensure_ascii=False)) for row in rows]
            connection.executemany("INSERT INTO features VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", kept)
            for row in kept:
                hold(connection, "features", source, row[1], [row])

    def features(self, source: str) -> list[FeatureRow]:
        """The rows of a source, in the order of selection. Raises BadFile."""
        rows = (FeatureRow(*row) for row in self._records.features(source))
        return [row._replace(promoted=tuple(json.loads(str(row.promoted)))) for row in rows]

    def source_names(self) -> list[str]:
        """Every source, in the order of the run. Raises BadFile."""
        return [row[1] for row in self._records.sources()]

    def control_names(self) -> frozenset[str]:
        """The sources that are controls of this run. Raises BadFile."""
        return frozenset(row[1] for row in self._records.sources() if row[2].startswith(CONTROL_KIND))

    def write_explanation(self, explanation: Explanation) -> None:
        """Store an explanation. If it replaces another one, delete the scores that used that one."""
        e = explanation
        key = (e.source, e.feature, e.explainer)
        with self._writing() as connection:
            query = "SELECT version, text FROM explanations WHERE source = ? AND feature = ? AND explainer = ?"
            old = connection.execute(query, key).fetchone()
            lost = old is None and holds(connection, "explanations", e.source, block_of(e.feature, e.explainer))
            if lost or (old is not None and old[1] is not None and old != (e.version, e.text)):
                _forget_scores(connection, *key)
            self._put_explanation(connection, (*key, e.version, e.text, None, e.note))

    def _put_explanation(self, connection: sqlite3.Connection, row: tuple[Any, ...]) -> None:
        connection.execute("INSERT OR REPLACE INTO explanations VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        hold(connection, "explanations", row[0], block_of(row[1], row[2]), [row])

    def write_failed_explanation(self, source: str, feature: FeatureId, explainer: str, reason: str) -> None:
        """Store why a feature has no explanation; a resumed run retries it. Deletes the scores of an older explanation."""
        with self._writing() as connection:
            query = "SELECT 1 FROM explanations WHERE source = ? AND feature = ? AND explainer = ? AND text IS NOT NULL"
            if connection.execute(query, (source, feature, explainer)).fetchone():
                _forget_scores(connection, source, feature, explainer)
            self._put_explanation(connection, (source, feature, explainer, "", None, reason, ""))

    def explanations(self, source: str, explainer: str) -> dict[FeatureId, Explanation]:
        """Finished explanations by feature. Raises BadFile."""
        return {
            feature: Explanation(source, feature, explainer, version, text, note)
            for _, feature, name, version, text, _, note in self._records.explanations(source)
            if name == explainer and text is not None
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
            self._put_score(connection, (*key, score.version, judge_version, score.cutoff, None), rows)

    def _put_score(
        self, connection: sqlite3.Connection, score: tuple[Any, ...], judgements: Sequence[tuple[Any, ...]]
    ) -> None:
        connection.execute("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", score)
        connection.execute(_FORGET_JUDGEMENTS, score[:7])
        connection.executemany("INSERT INTO judgements VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", judgements)
        hold_score(connection, score, [row[7:] for row in judgements])

    def explainers(self) -> list[str]:
        """Names of the explainers with at least one explanation. Raises BadFile."""
        return sorted({row[2] for row in self._records.explanations() if row[4] is not None})

    def write_failed_score(self, key: ScoreKey, reason: str) -> None:
        """Store why a score is missing; a resumed run retries it. Deletes the judgements of an older score."""
        with self._writing() as connection:
            self._put_score(connection, (*key, "", "", None, reason), [])

    def finished_scores(self) -> dict[ScoreKey, tuple[str, str]]:
        """Keys of the finished scores, each with the versions of its scorer and judge. Raises BadFile."""
        return {row[:7]: (row[7], row[8]) for row in self._records.scores() if row[10] is None}

    def write_stage(self, name: str, seconds: float, detail: dict[str, Any]) -> None:
        """Add to the total time of a stage over all commands; replace its detail."""
        told = json.dumps(detail, sort_keys=True)
        with self._writing() as connection:
            connection.execute(
                "INSERT INTO stages VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
                "seconds = seconds + excluded.seconds, detail = excluded.detail",
                (name, seconds, told),
            )
            connection.execute(
                "INSERT OR REPLACE INTO stage_seconds SELECT name, seconds FROM stages WHERE name = ?", (name,)
            )
            hold(connection, "stages", "", name, [(name, told)])

    def stage_done(self, name: str) -> bool:
        """Whether a stage has finished once."""
        return bool(self._connection.execute("SELECT 1 FROM stages WHERE name = ?", (name,)).fetchone())

    def write_estimate(self, model: str, estimate: dict[str, Any]) -> None:
        """Store the expected calls and tokens of a model; the first estimate of a run is kept."""
        if all(asked.model != model for asked in self.asked()):
            self._put_asked((model, 0, 0, 0, None, json.dumps(estimate, sort_keys=True)))

    def write_asked(
        self, model: str, *, calls: int, prompt_tokens: int, completion_tokens: int, cost: float | None
    ) -> None:
        """Store the calls, tokens and cost of a model so far."""
        before = next((asked for asked in self.asked() if asked.model == model), None)
        if cost is None and before is not None:
            cost = before.cost
        estimate = json.dumps({} if before is None else before.estimate, sort_keys=True)
        self._put_asked((model, calls, prompt_tokens, completion_tokens, cost, estimate))

    def _put_asked(self, row: tuple[Any, ...]) -> None:
        with self._writing() as connection:
            connection.execute("INSERT OR REPLACE INTO asked VALUES (?, ?, ?, ?, ?, ?)", row)
            hold(connection, "asked", "", row[0], [row])

    def asked(self) -> list[Asked]:
        """Calls, tokens and cost of each language model. Raises BadFile."""
        return [
            Asked(model, calls, prompt_tokens, completion_tokens, cost, json.loads(estimate))
            for model, calls, prompt_tokens, completion_tokens, cost, estimate in self._records.asked()
        ]

    def identity(self) -> dict[str, Any]:
        """The configuration of the run. Raises MissingFile, BadFile."""
        return read_identity(self.folder)

    def _cost(self) -> str:
        """Time and language model usage of the run, as a sentence."""
        stages = [(name, seconds) for name, seconds, _ in self._records.stages()]
        told = [", ".join(f"{name} {seconds:.0f} s" for name, seconds in stages)] if stages else []
        return "; ".join([*told, *(asked.sentence() for asked in self.asked())]) or "not recorded"

    def frames(self) -> RunFrames:
        """All records as data frames, verified. Raises BadFile."""
        from evalkit.store.frames import RunFrames, explanations_frame, features_frame, judgements_frame, sources_frame

        explanations = self._records.explanations()
        scores = list(self._records.judgements())
        try:
            return RunFrames(
                sources=sources_frame(self._records.sources()),
                features=features_frame(self._records.features(), explanations, [score for score, _ in scores]),
                explanations=explanations_frame(explanations),
                judgements=judgements_frame(scores),
                meta={**self.identity(), "cost": self._cost(), "verified": self.verified},
            )
        except (TypeError, ValueError) as error:  # of a run without checksums
            path = self.folder / "records.sqlite"
            raise BadFile(
                str(path), expected="the records of a run", seen="values of another kind", fix=REDO
            ) from error


def read_run(folder: str | Path) -> RunFrames:
    """The records of a run as data frames. Raises MissingFile, BadFile."""
    with RunStore.open(Path(folder)) as store:
        return store.frames()
