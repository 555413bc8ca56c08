"""Defaults of a run's options, shared by ``RunConfig`` and the command line.

They are plain values in a separate module, so that the command line can show them in help texts without importing pydantic.
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
