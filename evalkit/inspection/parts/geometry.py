"""The part ``geometry`` of an inspection: how similar the directions of a dictionary are to each other.

Turns the neighbours found by ``nearest_rows`` into table rows, figure data and notes, for any matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.inspection.parts.measured import Measured, Rows
from evalkit.inspection.parts.nearest_rows import ALL_UP_TO, Neighbours, nearest_rows, random_nearest, random_rank
from evalkit.inspection.parts.settings import Settings
from evalkit.protocols import Progress
from evalkit.seeds import derive
from evalkit.subject.model import usable_device
from evalkit.util.tensor_files import Matrix

__all__ = ["geometry"]

_COSINE_EDGES = np.linspace(-1, 1, 201)
_FINE_EDGES = np.linspace(-1, 1, 2001)  # bins of the curve of random directions
_RANKS = (1, 10, 100)
_SIMULATED_UP_TO = 16_384  # with more rows, simulating the in-degrees of random directions takes too long


def geometry(
    matrix: Matrix,
    settings: Settings,
    progress: Progress,
    rows_are: str = "decoder rows",
    features_are: str = "latents",
) -> Measured:
    """The nearest neighbours by cosine of the rows of ``matrix`` (n, d), with those of random directions to compare.

    ``rows_are``, ``features_are``: the words for rows and features in figures and notes, in the plural.
    """
    device = usable_device(settings.device)
    found = nearest_rows(matrix, settings.seed, progress, device)
    n, dim = found.total - found.zero, int(matrix.shape[1])
    random = _random_degrees(n, dim, settings.seed, device)
    rows = [*_cosine_rows(found, n, dim), _degree_row(found, random, features_are)]
    shares = np.histogram(found.cosines, _COSINE_EDGES)[0] / max(1, len(found.cosines))
    comparable = dim > 1 and n > 1
    degrees = np.bincount(found.in_degrees)
    if found.zero:
        degrees[0] -= found.zero
    further = {
        "density": (shares / np.diff(_COSINE_EDGES)).tolist(),
        "random": random_nearest(_FINE_EDGES, n, dim).tolist() if comparable else None,
        "in_degrees": degrees.tolist(),
        "random_in_degrees": None if random is None else np.bincount(random).tolist(),
        "rows": len(found.rows),
        "of": found.total,
        "sampled": found.sampled,
        "dim": dim,
        "rows_are": rows_are,
        "features_are": features_are,
    }
    return Measured(rows, further, _notes(found, dim, rows_are))


def _cosine_rows(found: Neighbours, n: int, dim: int) -> Rows:
    order = np.argsort(-found.cosines, kind="stable")
    rows: Rows = []
    for rank in _RANKS:
        if rank <= len(order):
            at = order[rank - 1]
            rows.append(
                {
                    "statistic": f"{_ordinal(rank)} nearest-neighbour cosine",
                    "value": float(found.cosines[at]),
                    "random": random_rank(rank, len(order), n, dim) if dim > 1 and n > 1 else None,
                    "latents": [int(found.rows[at]), int(found.nearest[at])],
                }
            )
    if len(order):
        middle = random_rank(max(1, len(order) // 2), len(order), n, dim) if dim > 1 and n > 1 else None
        median = float(np.median(found.cosines))
        rows.append({"statistic": "median nearest-neighbour cosine", "value": median, "random": middle, "latents": []})
    return rows


def _ordinal(rank: int) -> str:
    return "largest" if rank == 1 else f"{rank}th largest"


def _random_degrees(n: int, dim: int, seed: int, device: str) -> NDArray[np.int64] | None:
    """How often each of n random directions is the nearest neighbour of another; None if that takes too long."""
    if not 1 < n <= _SIMULATED_UP_TO:
        return None
    generator = torch.Generator().manual_seed(derive(seed, "random directions") % 2**63)
    return nearest_rows(torch.randn(n, dim, generator=generator), device=device).in_degrees


def _degree_row(found: Neighbours, random: NDArray[np.int64] | None, features_are: str) -> dict[str, Any]:
    degrees = found.in_degrees
    return {
        "statistic": f"{features_are} that share one nearest neighbour",
        "value": int(degrees.max(initial=0)),
        "random": None if random is None else int(random.max()),
        "latents": [int(degrees.argmax())] if len(found.rows) else [],
    }


def _notes(found: Neighbours, dim: int, rows_are: str) -> list[str]:
    notes = [
        f"Cosines of {found.total:,} {rows_are}. random: the same for as many random directions in {dim} dimensions; "
        "cosines are expected values, the in-degree is that of one random draw.",
    ]
    if found.sampled:
        notes.append(
            f"With more than {ALL_UP_TO:,} rows, neighbours are searched for a random sample of {len(found.rows):,} rows, "
            "among all rows. Ranks and in-degrees refer to the sample."
        )
    if found.zero:
        notes.append(f"{found.zero:,} rows are zero and left out.")
    return notes
