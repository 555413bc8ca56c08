"""The part ``density`` of an inspection: the distribution of firing rates over features.

The rates are measured on a corpus or declared by an export.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.inspection.parts.measured import Measured, Rows

__all__ = ["RATE_EDGES", "firing_shares"]

# Bins of log10 of the share of tokens on which a feature fires; rarer features count in the first bin.
RATE_EDGES = np.linspace(-6, 0, 25)


def firing_shares(
    rates: NDArray[np.float64], features: NDArray[np.int64], n_tokens: int | None, features_are: str = "latents"
) -> Measured:
    """The histogram of firing rates.

    ``rates``: (n,), the share of tokens on which each feature fires.
    ``features``: (n,), the ids of the features.
    ``n_tokens``: the number of tokens measured; None if an export declares the rates.
    ``features_are``: the word for the features in figures and notes, in the plural.
    """
    alive = rates[rates > 0]
    counts = np.histogram(np.clip(np.log10(alive), RATE_EDGES[0], 0), RATE_EDGES)[0]
    rows: Rows = [{"low": None, "high": None, "latents": int((rates == 0).sum())}]
    rows += [
        {"low": low, "high": high, "latents": count}
        for low, high, count in zip(RATE_EDGES[:-1].tolist(), RATE_EDGES[1:].tolist(), counts.tolist(), strict=True)
    ]
    for row in rows:
        row["share"] = row["latents"] / max(1, len(rates))
    order = np.argsort(-rates, kind="stable")[:10]
    median = float(np.median(alive)) if len(alive) else None
    further: dict[str, Any] = {
        "tokens": n_tokens,
        "latents": len(rates),
        "median": median,
        "most": [{"latent": int(features[at]), "rate": float(rates[at])} for at in order if rates[at]],
        "features_are": features_are,
    }
    most = ", ".join(f"{one['latent']} ({one['rate']:.1%})" for one in further["most"][:5])
    of = "of tokens, as declared by the export," if n_tokens is None else f"of {n_tokens:,} tokens"
    notes = [
        f"log10 rate: log10 of the share {of} on which each of the {features_are} fires. Median of those that fire: "
        f"{_rate(median)}.",
        f"Most frequent: {most or 'none'}.",
    ]
    return Measured(rows, further, notes)


def _rate(value: float | None) -> str:
    return "–" if value is None else f"1 in {1 / value:,.0f} tokens" if value < 0.1 else f"{value:.1%}"
