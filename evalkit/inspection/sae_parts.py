"""One function per part of the inspection of an SAE or transcoder: the rows of its table, what its figure needs, and notes.

Each asks the module that holds the measurement and puts the answer into JSON values. Knows no folder and no figure.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.errors import BadConfig
from evalkit.inspection.compute import Measured, Rows, ablations
from evalkit.inspection.geometry import ALL_UP_TO, Neighbours, nearest_rows, random_nearest, random_rank
from evalkit.inspection.losses import measure_losses
from evalkit.inspection.material import States
from evalkit.inspection.sae_fit import SaeMeasure, measure_rows
from evalkit.inspection.settings import Settings
from evalkit.protocols import Progress
from evalkit.seeds import derive
from evalkit.sources.sae import SaeSource
from evalkit.subject import usable_device

__all__ = ["SaeMaterial", "check_loss", "density", "fit", "geometry", "loss"]

RATE_EDGES = np.linspace(-6, 0, 25)  # log10 of the share of tokens a latent fires on; rarer ones count in the first bin
_COSINE_EDGES = np.linspace(-1, 1, 201)
_FINE_EDGES = np.linspace(-1, 1, 2001)  # of the curve of random directions
_RANKS = (1, 10, 100)
_SIMULATED_UP_TO = 16_384  # rows: so many random directions are held against each other for their in-degrees
_BINS = 40  # of what is counted by token
Floats = NDArray[np.float64]


class SaeMaterial(States):
    """The sampled tokens of an inspection and what one pass over the dictionary finds on them."""

    def __init__(
        self, settings: Settings, source: SaeSource, folder: Any, progress: Progress, *, whole: bool = False
    ) -> None:
        super().__init__(settings, source.site, folder, progress, whole=whole)
        self._source = source

    @cached_property
    def source(self) -> SaeSource:
        """The dictionary bound to the subject model. Raises SiteMismatch."""
        return self._source.bind(self.subject.info)

    @cached_property
    def contexts(self) -> NDArray[np.int64]:
        """Drawn by hash, with at least ``fit_tokens`` tokens together if there are as many."""
        return self.sample("fit", self._settings.fit_tokens, self._settings.seed)

    @cached_property
    def measured(self) -> SaeMeasure:
        """Fit and firing counts: ``fit`` and ``density`` share the pass."""
        source = self.source
        task = self._progress.start("hidden states", len(self.contexts), "contexts")
        read, wanted = [], []
        for hidden, target in self.pairs(self.contexts):
            read.append(hidden)
            wanted.append(target)
        self._progress.finish(task)
        same = self.out == self.site
        hidden = torch.cat(read)
        task = self._progress.start(f"{source.weights.width:,} latents on {len(hidden):,} tokens", None, "tokens")
        found = measure_rows(source, hidden, None if same else torch.cat(wanted))
        self._progress.finish(task)
        return found


def fit(material: SaeMaterial) -> Measured:
    """L0, FVU, cosine, shrinkage and the share of latents alive."""
    found, declared = material.measured, material.source.declared
    row = {
        "tokens": found.n_tokens,
        "l0": found.l0,
        "l0_declared": declared.get("l0", material.source.l0),
        "fvu": found.fvu,
        "fvu_declared": declared.get("fvu"),
        "cosine": float(found.cosines.mean()),
        "norm_ratio": float(found.norm_ratios.mean()),
        "rescale": found.rescale,
        "fvu_rescaled": found.fvu_rescaled,
        "alive_share": found.alive_share,
        "alive_declared": declared.get("alive_share"),
    }
    further = {"by_token": {"l0": _histogram(found.active, whole=True)}}
    further["by_token"] |= {"cosine": _histogram(found.cosines), "norm_ratio": _histogram(found.norm_ratios)}
    notes = [
        f"{found.n_tokens:,} tokens; BOS, the first token of a context and attention sinks are left out.",
        "norm ratio: mean of ‖reconstruction‖ / ‖state‖. best rescaling: the one factor on the reconstruction's distance "
        "from the mean state that lowers the FVU most; above 1 the dictionary shrinks. alive: fires on one of the tokens.",
    ]
    return Measured([row], further, notes)


def _histogram(values: NDArray[Any], *, whole: bool = False) -> dict[str, list[float]]:
    """Shares of tokens in equal bins over all but the outermost 0.1% on either side, which count in the first and last."""
    low, high = np.quantile(values, [0.001, 0.999])
    if whole:  # bins of whole numbers
        step = max(1, math.ceil((high - low + 1) / _BINS))
        edges = np.arange(math.floor(low), math.ceil(high) + step + 1, step) - 0.5
    else:
        middle, reach = (low + high) / 2, max((high - low) / 2, 0.01)
        edges = np.linspace(middle - reach, middle + reach, _BINS + 1)
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return {"edges": edges.tolist(), "shares": (counts / len(values)).tolist()}


def density(material: SaeMaterial) -> Measured:
    """How many latents fire how often, and how many never do."""
    found = material.measured
    rates = found.counts / found.n_tokens
    alive = rates[rates > 0]
    counts = np.histogram(np.clip(np.log10(alive), RATE_EDGES[0], 0), RATE_EDGES)[0]
    rows: Rows = [{"low": None, "high": None, "latents": int((rates == 0).sum())}]
    rows += [
        {"low": low, "high": high, "latents": count}
        for low, high, count in zip(RATE_EDGES[:-1].tolist(), RATE_EDGES[1:].tolist(), counts.tolist(), strict=True)
    ]
    for row in rows:
        row["share"] = row["latents"] / len(rates)
    order = np.argsort(-found.counts, kind="stable")[:10]
    median = float(np.median(alive)) if len(alive) else None
    further: dict[str, Any] = {
        "tokens": found.n_tokens,
        "latents": len(rates),
        "median": median,
        "most": [{"latent": int(latent), "rate": float(rates[latent])} for latent in order if rates[latent]],
    }
    most = ", ".join(f"{one['latent']} ({one['rate']:.1%})" for one in further["most"][:5])
    notes = [
        f"Bins of log10 of the share of {found.n_tokens:,} tokens on which a latent fires; median of those that do: "
        f"{_rate(median)}.",
        f"Most often: {most or 'none'}.",
    ]
    return Measured(rows, further, notes)


def _rate(value: float | None) -> str:
    return "–" if value is None else f"1 in {1 / value:,.0f} tokens" if value < 0.1 else f"{value:.1%}"


def geometry(source: SaeSource, settings: Settings, progress: Progress) -> Measured:
    """The nearest neighbours of decoder rows by cosine, beside those of random directions."""
    device = usable_device(settings.device)
    found = nearest_rows(source.weights.w_dec, settings.seed, progress, device)
    n, dim = found.total - found.zero, source.weights.d_out
    random = _random_degrees(n, dim, settings.seed, device)
    rows = [*_cosine_rows(found, n, dim), _degree_row(found, random)]
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
    }
    return Measured(rows, further, _geometry_notes(found, dim))


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
    """How often each of n random directions is the nearest of another; None where drawing them would take long."""
    if not 1 < n <= _SIMULATED_UP_TO:
        return None
    generator = torch.Generator().manual_seed(derive(seed, "random directions") % 2**63)
    return nearest_rows(torch.randn(n, dim, generator=generator), device=device).in_degrees


def _degree_row(found: Neighbours, random: NDArray[np.int64] | None) -> dict[str, Any]:
    degrees = found.in_degrees
    return {
        "statistic": "latents that share one nearest neighbour",
        "value": int(degrees.max(initial=0)),
        "random": None if random is None else int(random.max()),
        "latents": [int(degrees.argmax())] if len(found.rows) else [],
    }


def _geometry_notes(found: Neighbours, dim: int) -> list[str]:
    notes = [
        f"Cosines of {found.total:,} decoder rows. random: that of as many random directions in {dim} dimensions, in which "
        "on average so many rows have a nearer neighbour; the largest in-degree is that of one draw of them.",
    ]
    if found.sampled:
        notes.append(
            f"Above {ALL_UP_TO:,} rows a sample drawn by hash looks for its neighbours: {len(found.rows):,} rows against "
            "all. Ranks and in-degrees are among these."
        )
    if found.zero:
        notes.append(f"{found.zero:,} rows are zero and left out.")
    return notes


def check_loss(source: SaeSource) -> None:
    """Raises BadConfig for a dictionary whose reconstruction cannot take the place of what it reads."""
    if source.site.out != source.site.path or source.site.path.endswith(":in"):
        raise BadConfig(
            "--only loss",
            expected="a dictionary that reconstructs the output of the module it reads",
            seen=f"{source.site.path} → {source.site.out}",
            fix="leave the part loss out",
        )


def loss(material: SaeMaterial, progress: Progress) -> Measured:
    """Next-token loss with the reconstruction in place, beside those with the states zeroed or all at their mean."""
    source, contexts = material.source, material.contexts
    total, count = torch.zeros(source.weights.d_model, dtype=torch.float64), 0
    for chunk in material.hidden(contexts):
        total += chunk.double().sum(0).cpu()
        count += len(chunk)
    replacements = {"reconstruction": source.reconstruct}
    replacements |= ablations((total / max(1, count)).float(), source.weights.d_model)
    found = measure_losses(
        material.language, material.corpus, contexts, material.site, material.limit, replacements, progress
    )
    clean = float(found.clean.mean(dtype=np.float64))
    rows: Rows = [{"states": "the model's own", "loss": clean, "loss_change": 0.0, "se": 0.0, "recovered_zero": 1.0,
                   "recovered_mean": 1.0}]  # fmt: skip
    for name in ("reconstruction", "mean", "zero"):
        change = found.change(name)
        rows.append(
            {
                "states": name,
                "loss": clean + change.mean,
                "loss_change": change.mean,
                "se": change.se,
                "recovered_zero": found.recovered(name, "zero"),
                "recovered_mean": found.recovered(name, "mean"),
            }
        )
    notes = [
        f"{len(found.clean):,} predictions, nats per token; SE clustered by document. recovered: 1 - loss change / that of "
        "zeros (of the mean state) in place of the states.",
        "BOS, the first token of a context and attention sinks keep their own hidden states.",
    ]
    return Measured(rows, {"predictions": len(found.clean)}, notes)
