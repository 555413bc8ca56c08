"""Checksums of rows: what is hashed when it is written is what SQLite returns for it."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from evalkit.util.sealed_rows import CHECKSUMS, digest_of, forget, hold, holds, sums_of

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.text(st.characters(codec="utf-8"), max_size=8),
)


@settings(deadline=None)
@given(
    st.lists(VALUES, min_size=1, max_size=4),
    st.lists(st.sampled_from(["INTEGER", "REAL", "TEXT", ""]), min_size=4, max_size=4),
)
def test_a_row_has_the_same_digest_before_and_after(values: Sequence[object], kinds: Sequence[str]) -> None:
    """In columns that take the values as they are; in the records a text stands only in a column of texts."""
    fitting = [
        (value, "TEXT" if isinstance(value, str) else "" if kind == "TEXT" or isinstance(value, int) else kind)
        for value, kind in zip(values, kinds, strict=False)
    ]
    database = sqlite3.connect(":memory:")
    database.execute(f"CREATE TABLE t ({', '.join(f'c{place} {kind}' for place, (_, kind) in enumerate(fitting))})")
    database.execute(f"INSERT INTO t VALUES ({', '.join('?' * len(fitting))})", [value for value, _ in fitting])
    assert digest_of([[value for value, _ in fitting]]) == digest_of(database.execute("SELECT * FROM t").fetchall())


def test_whole_numbers_in_columns_of_either_kind() -> None:
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE t (a REAL, b INTEGER, c REAL)")
    row = (3, True, float("nan"))
    database.execute("INSERT INTO t VALUES (?, ?, ?)", row)
    assert database.execute("SELECT * FROM t").fetchone() == (3.0, 1, None)
    assert digest_of([row]) == digest_of(database.execute("SELECT * FROM t"))


def test_every_value_and_the_order_of_rows_count() -> None:
    rows = [("a", 1, 0.5, None), ("b", 2, 0.25, "x")]
    changed = [
        rows[::-1],
        rows[:1],
        [*rows, rows[0]],
        [("a", 1, 0.5, None), ("b", 2, 0.25, "y")],
        [("a", 1, 0.5, None), ("b", 3, 0.25, "x")],
        [("a", 1, 0.5, ""), ("b", 2, 0.25, "x")],
        [("a", 1, 0.5 + 2**-53, None), ("b", 2, 0.25, "x")],
        [("a", "1", 0.5, None), ("b", 2, 0.25, "x")],
        [(b"a", 1, 0.5, None), ("b", 2, 0.25, "x")],
    ]
    digests = [digest_of(one) for one in [rows, *changed]]
    assert len(set(digests)) == len(digests)


def test_blocks_are_held_by_stage_and_source() -> None:
    database = sqlite3.connect(":memory:")
    database.execute(CHECKSUMS)
    hold(database, "scores", "a", "x", [(1,), (2,)])
    hold(database, "scores", "b", "x", [(3,)])
    hold(database, "other", "a", "x", [])
    assert holds(database, "scores", "a", "x") == (2, digest_of([(1,), (2,)]))
    assert holds(database, "scores", "a", "y") is None
    assert set(sums_of(database, "scores")) == {("a", "x"), ("b", "x")}
    assert set(sums_of(database, "scores", "b")) == {("b", "x")}
    hold(database, "scores", "a", "x", [(1,)])
    assert sums_of(database, "scores", "a") == {("a", "x"): (1, digest_of([(1,)]))}
    forget(database, "scores", "a", ["x"])
    forget(database, "other", "a")
    assert set(sums_of(database, "scores")) == {("b", "x")} and sums_of(database, "other") == {}
