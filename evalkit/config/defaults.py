"""The defaults of a run's options, for ``RunConfig`` and for the command line.

Plain values in a module of their own: the command line shows them in its help texts without loading pydantic.
"""

from __future__ import annotations

from typing import Final

CORPUS: Final = "bundled:demo"
TEXT_FIELD: Final = "text"
SPLIT: Final = "train"
DEPTHS: Final = (16, 64, 256)
DENSITY: Final = 0.01
CONTEXT_LENGTH: Final = 128
WINDOW_LENGTH: Final = 32
DTYPE: Final = "bfloat16"
N_FEATURES: Final = 50
N_EXPLAIN: Final = 40
EXPLAIN_BY: Final = "deciles"
N_POSITIVES: Final = 50
POSITIVES_BY: Final = "deciles"
N_NEGATIVES: Final = 50
REPEATS: Final = 1
CONTROLS: Final = ("shuffled", "random-directions", "random-codes", "planted", "permuted", "lexical")
SEED: Final = 0
BATCH_SIZE: Final = 16
DEVICE: Final = "auto"
