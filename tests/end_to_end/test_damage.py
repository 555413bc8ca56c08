"""A tenth of ``make prove-damage``, with another seed: no damaged file gives another table unnoticed, or a traceback."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.support.damaged_runs import PAIRS, DamagedRuns


@pytest.mark.slow
def test_no_damage_goes_unnoticed(tmp_path: Path) -> None:
    runs = DamagedRuns(tmp_path)
    found = [one for pair in PAIRS for one in runs.outcomes(pair, 2, seed=28)]
    assert not [one for one in found if one.is_fault]
    counts = Counter(one.verdict for one in found)
    assert counts.total() == 28 and counts["noticed"] >= 14, counts
