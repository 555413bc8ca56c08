"""Random damage to the bytes of a file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def damaged_copies(data: bytes, seed: int, *, lost: int) -> Iterator[tuple[int, bytes]]:
    """The place of the damage and the damaged bytes: 300 times one flipped bit, 100 times ``lost`` bytes of zeros."""
    random = np.random.default_rng(seed)
    for number in range(400):
        damaged = bytearray(data)
        place = int(random.integers(len(data)))
        if number < 300:
            damaged[place] ^= 1 << int(random.integers(8))
        else:
            damaged[place : place + lost] = bytes(min(lost, len(data) - place))
        yield place, bytes(damaged)
