"""The source of all randomness: hashes of a seed and names, never a shared generator.

Each random draw depends only on the names of its purpose. Results therefore do not depend on the order of work, the batch
size, a resumed run or the number of workers. Pure functions; reads and writes nothing.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["derive", "derive_request_seed", "generator", "hash_priorities"]


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for (seed, names). Source: BLAKE2b, RFC 7693."""
    return _hashed(8, seed, names) >> 1


def derive_request_seed(seed: int, *names: str | int) -> int:
    """A 31-bit seed for (seed, names), which every language-model API accepts. Source: BLAKE2b, RFC 7693."""
    return _hashed(4, seed, names) >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """The random generator for (seed, names), independent of the generators for other names."""
    return np.random.default_rng(_hashed(16, seed, names))


def hash_priorities(key: int, ids: ArrayLike) -> NDArray[np.uint64]:
    """A uniform 64-bit priority per id. The k ids of smallest priority are a uniform sample, in any order of arrival.

    Source: the splitmix64 finaliser (Steele, Lea, Flood 2014), applied twice around the key.
    """
    values = np.asarray(ids).astype(np.uint64)
    with np.errstate(over="ignore"):
        return _mix(_mix(values + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(key))


def _hashed(n_bytes: int, seed: int, names: tuple[str | int, ...]) -> int:
    # "replace": corpus text may contain half a surrogate pair, which cannot be encoded
    payload = "\x1f".join([str(seed), *map(str, names)]).encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(payload, digest_size=n_bytes).digest(), "big")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
