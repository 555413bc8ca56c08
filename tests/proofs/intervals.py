"""``make prove-intervals``: 50,000 simulated tables; the 95% interval must cover the true accuracy in 94 to 96% of them.

The test of CI draws a tenth of this with another seed. Prints a line per accuracy; exit code 1 where a share is outside.
"""

from __future__ import annotations

import sys

import numpy as np

from tests.support.simulated_judges import coverage

TABLES_OF_EACH = 2500  # of every accuracy in every scene
SEED = 120  # the test of CI draws with 20


def main() -> int:
    covered, alone = coverage(SEED, TABLES_OF_EACH)
    shares = {f"accuracy {accuracy:g}": hits for accuracy, hits in covered.items()}
    shares["all"] = [hit for hits in covered.values() for hit in hits]
    failed = 0
    for name, hits in shares.items():
        inside = 0.94 <= np.mean(hits) <= 0.96
        failed += not inside
        print(
            f"{name}: {np.mean(hits):.4f} of {len(hits):,} tables covered{'' if inside else '  OUTSIDE 0.94 to 0.96'}"
        )
    print(f"with an error over features alone, in the scene with the largest window effect: {np.mean(alone):.4f}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
