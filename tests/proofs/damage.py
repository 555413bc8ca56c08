"""``make prove-damage``: 280 damaged run folders; none gives another table unnoticed, and none ends in a traceback.

Fourteen pairs of a file and a command that reads it, twenty damaged copies of each. The test of CI draws a tenth of this
with another seed. Prints a line per pair and one per fault; exit code 1 where there is a fault.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.support.damaged_runs import PAIRS, DamagedRuns

FOLDERS_OF_EACH = 20
SEED = 280  # the test of CI draws with 28


def main() -> int:
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        runs = DamagedRuns(Path(folder))
        for pair in PAIRS:
            found = list(runs.outcomes(pair, FOLDERS_OF_EACH, SEED))
            counts = Counter(one.verdict for one in found)
            total += counts
            print(f"{pair}: {', '.join(f'{count} {verdict}' for verdict, count in sorted(counts.items()))}", flush=True)
            for one in found:
                if one.is_fault:
                    print(f"  FAULT {one.verdict} after {one.kind}: {one.said[-2000:]}", flush=True)
    print(f"all {total.total()}: {', '.join(f'{count} {verdict}' for verdict, count in sorted(total.items()))}")
    return 1 if set(total) - {"unharmed", "noticed"} else 0


if __name__ == "__main__":
    sys.exit(main())
