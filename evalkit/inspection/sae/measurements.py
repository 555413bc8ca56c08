"""The parts of the inspection of an SAE or transcoder: one function per part returns table rows, figure data and notes.

Each function calls the module that measures and converts the result to JSON values. Writes no files, draws nothing.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.errors import BadConfig
from evalkit.fit.losses import measure_losses
from evalkit.fit.sae import SaeMeasure, measure_rows
from evalkit.inspection.parts.ablations import ablations
from evalkit.inspection.parts.density import firing_shares
from evalkit.inspection.parts.measured import Measured, Rows
from evalkit.inspection.parts.settings import Settings
from evalkit.inspection.parts.states import States
from evalkit.protocols import Progress
from evalkit.sources.sae.source import SaeSource

__all__ = ["SaeStates", "check_loss", "density", "fit", "loss"]

_BINS = 40  # bins of histograms over tokens


class SaeStates(States):
    """The sampled tokens of an inspection, and the results of one pass over the dictionary for these tokens."""

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
        """Contexts drawn by hash, with at least ``fit_tokens`` tokens in total; all if the corpus has fewer."""
        return self.sample("fit", self._settings.fit_tokens, self._settings.seed)

    @cached_property
    def measured(self) -> SaeMeasure:
        """Fit and firing counts, measured in one pass for both ``fit`` and ``density``."""
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


def fit(material: SaeStates) -> Measured:
    """L0, FVU, cosine, shrinkage and the share of latents that are alive."""
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
        "norm ratio: mean of ‖reconstruction‖ / ‖state‖. best rescaling: the factor for the difference between "
        "reconstruction and mean state that gives the lowest FVU; above 1, the dictionary shrinks. alive: share of latents "
        "that fire on at least one of the tokens.",
    ]
    return Measured([row], further, notes)


def _histogram(values: NDArray[Any], *, whole: bool = False) -> dict[str, list[float]]:
    """Shares of tokens in bins of equal width from the 0.1% to the 99.9% quantile.

    Tokens outside this range count in the first or last bin. ``whole``: centre the bins on whole numbers.
    """
    low, high = np.quantile(values, [0.001, 0.999])
    if whole:
        step = max(1, math.ceil((high - low + 1) / _BINS))
        edges = np.arange(math.floor(low), math.ceil(high) + step + 1, step) - 0.5
    else:
        middle, reach = (low + high) / 2, max((high - low) / 2, 0.01)
        edges = np.linspace(middle - reach, middle + reach, _BINS + 1)
    counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return {"edges": edges.tolist(), "shares": (counts / len(values)).tolist()}


def density(material: SaeStates) -> Measured:
    """The distribution of firing rates over latents, and the number of latents that never fire."""
    found = material.measured
    return firing_shares(found.counts / found.n_tokens, np.arange(len(found.counts)), found.n_tokens)


def check_loss(source: SaeSource) -> None:
    """Raises BadConfig if the reconstruction of the dictionary cannot replace the state that it reads."""
    if source.site.out != source.site.path or source.site.path.endswith(":in"):
        raise BadConfig(
            "--only loss",
            expected="a dictionary that reconstructs the output of the module it reads",
            seen=f"{source.site.path} → {source.site.out}",
            fix="leave the part loss out",
        )


def loss(material: SaeStates, progress: Progress) -> Measured:
    """Next-token loss with the states replaced by the reconstruction and, to compare, by their mean and by zeros."""
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
        f"{len(found.clean):,} predictions, nats per token; SE clustered by document. recovered: 1 - loss change / loss "
        "change with zeros (with the mean state) in place of the states.",
        "BOS, the first token of a context and attention sinks keep their own hidden states.",
    ]
    return Measured(rows, {"predictions": len(found.clean)}, notes)
