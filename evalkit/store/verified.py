"""Reads records and verifies them: every row against its checksum, and that no row is missing.

A damaged row is always an error. A missing explanation or score is an error in a run that is only read; a command that
writes to the run records it again. Knows the tables; writes nothing.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from evalkit.errors import DamagedFile
from evalkit.store.layout import REDO, block_of, records_errors
from evalkit.store.tables import SCORE_KEY
from evalkit.util.sealed_rows import Sum, digest_of, sums_of

__all__ = ["VerifiedRecords"]

_LOG = logging.getLogger(__name__)
Row = tuple[Any, ...]


class VerifiedRecords:
    """The rows of one file of records. ``repairs``: whether missing explanations and scores will be recorded again."""

    def __init__(self, path: Path, connection: sqlite3.Connection, *, repairs: bool) -> None:
        self._path = path
        self._connection = connection
        self._repairs = repairs

    def sources(self) -> list[Row]:
        """All of them, in the order of the run."""
        rows = self._rows("SELECT * FROM sources ORDER BY position")
        self._check("sources", rows, lambda row: ("", row[1]))
        return rows

    def features(self, source: str | None = None) -> list[Row]:
        """Those of a source in the order of selection, or all."""
        where, values = ("", ()) if source is None else ("WHERE source = ?", (source,))
        rows = self._rows(f"SELECT * FROM features {where} ORDER BY source, position", *values)
        self._check("features", rows, lambda row: (row[0], row[1]), source=source)
        return rows

    def explanations(self, source: str | None = None) -> list[Row]:
        """All explanations, failed ones too, of a source or of all."""
        where, values = ("", ()) if source is None else ("WHERE source = ?", (source,))
        rows = self._rows(f"SELECT * FROM explanations {where} ORDER BY source, feature, explainer", *values)
        self._check("explanations", rows, lambda row: (row[0], block_of(row[1], row[2])), source=source, redone=True)
        return rows

    def asked(self) -> list[Row]:
        """What language models were asked, by model."""
        rows = self._rows("SELECT * FROM asked ORDER BY model")
        self._check("asked", rows, lambda row: ("", row[0]))
        return rows

    def stages(self) -> list[Row]:
        """Stages in the order in which they first ended. One that is missing is run again, so it is no damage."""
        rows = self._rows("SELECT name, seconds, detail FROM stages ORDER BY rowid")
        copies: dict[str, float] = dict(self._rows("SELECT name, seconds FROM stage_seconds"))
        held = self._sums("stages")
        for name, seconds, detail in rows:
            if held.get(("", name)) != (1, digest_of([(name, detail)])) or copies.get(name) != seconds:
                raise self._damaged(f"another row of the stage {name}")
        return rows

    def scores(self) -> list[Row]:
        """All scores, failed ones too; their judgements are not read."""
        return self._verified_scores(self._sums("scores"))

    def _verified_scores(self, held: dict[tuple[str, str], Sum]) -> list[Row]:
        rows = self._rows(f"SELECT * FROM scores ORDER BY {SCORE_KEY}")
        held = dict(held)
        for row in rows:
            _, checksum = held.pop((row[0], block_of(*row[1:7])), (0, b""))
            if checksum[:8] != digest_of([row]):
                raise self._damaged(f"another score of {row[0]} feature {row[1]}")
        self._lost("scores", held)
        return rows

    def judgements(self) -> Iterator[tuple[Row, list[Row]]]:
        """Every score with its judgements; the rows are whole."""
        held = self._sums("scores")
        with records_errors(self._path):
            every = self._connection.execute(f"SELECT * FROM judgements ORDER BY {SCORE_KEY}, item")
            judged = {key: list(rows) for key, rows in groupby(every, lambda row: row[:7])}
        for score in self._verified_scores(held):
            rows = judged.get(score[:7], [])
            count, checksum = held[score[0], block_of(*score[1:7])]
            if count != len(rows):
                raise self._damaged(f"{len(rows)} judgements instead of {count} of {score[0]} feature {score[1]}")
            if checksum[8:] != digest_of(row[7:] for row in rows):
                raise self._damaged(f"other judgements of {score[0]} feature {score[1]}")
            yield score, rows

    def _rows(self, query: str, *values: str) -> list[Row]:
        with records_errors(self._path):
            return self._connection.execute(query, values).fetchall()

    def _sums(self, stage: str, source: str | None = None) -> dict[tuple[str, str], Sum]:
        with records_errors(self._path):
            return sums_of(self._connection, stage, source)

    def _check(
        self,
        table: str,
        rows: Sequence[Row],
        block: Callable[[Row], tuple[str, str]],
        *,
        source: str | None = None,
        redone: bool = False,
    ) -> None:
        """Compare rows that are a block each with what is held of them. ``redone``: whether missing ones may be."""
        held = self._sums(table, source)
        for row in rows:
            if held.pop(block(row), None) != (1, digest_of([row])):
                raise self._damaged(f"another row of {table}, {' '.join(str(part) for part in block(row) if part)}")
        if held and not redone:
            raise self._damaged(f"{len(held)} rows of {table} less than were written")
        self._lost(table, held)

    def _lost(self, table: str, held: Iterable[tuple[str, str]]) -> None:
        if not (missing := list(held)):
            return
        seen = f"{len(missing)} {table} less than were written, such as one of {missing[0][0]}"
        if not self._repairs:
            raise DamagedFile(
                str(self._path),
                expected="the records that were written",
                seen=seen,
                fix="repeat the commands of this run: they record what is missing",
            )
        _LOG.warning("%s: damaged: %s; what this command computes is recorded again", self._path, seen)

    def _damaged(self, seen: str) -> DamagedFile:
        return DamagedFile(str(self._path), expected="the records that were written", seen=seen, fix=REDO)
