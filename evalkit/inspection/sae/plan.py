"""The inspection plan of an SAE or transcoder: the arguments and measurement of each part, and facts about the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evalkit.inspection.parts.cache import Part, digest
from evalkit.inspection.parts.geometry import geometry
from evalkit.inspection.parts.measured import Measured
from evalkit.inspection.parts.settings import Settings
from evalkit.inspection.sae import measurements
from evalkit.protocols import Progress
from evalkit.sources.sae.source import SaeSource

__all__ = ["SaePlan"]


class SaePlan:
    """Plan for one SAE or transcoder.

    Raises BadConfig if ``parts`` contains "loss" and the reconstruction cannot replace the state that it reads.
    """

    needs_text = ("fit", "density", "loss")

    def __init__(self, settings: Settings, source: SaeSource, parts: Sequence[str]) -> None:
        if "loss" in parts:
            measurements.check_loss(source)
        self._settings, self._source = settings, source
        self._digest = digest((source.weights, source.steps))

    @property
    def text(self) -> dict[str, Any]:
        """Identifies the dictionary, model, site and corpus on which the parts are measured."""
        settings, site = self._settings, self._source.site
        named = {"model": settings.model or site.model, "site": site.path, "reconstructs": site.out}
        return {"dictionary": self._digest, **settings.text(), **named}

    def arguments(self) -> dict[str, dict[str, Any]]:
        """For each part, everything that its numbers depend on."""
        settings = self._settings
        sample = {"of": self.text, "fit_tokens": settings.fit_tokens, "seed": settings.seed}
        declared = {"l0": self._source.l0, **self._source.declared}
        return {
            "fit": {**sample, "declared": declared},
            "density": sample,
            "geometry": {"of": self._digest, "seed": settings.seed},
            "loss": sample,
        }

    def measures(self, folder: Path, missing: Sequence[str], progress: Progress) -> dict[str, Callable[[], Measured]]:
        """For each missing part, the function that measures it. The model is loaded on first use."""
        settings, source = self._settings, self._source
        material = measurements.SaeStates(settings, source, folder, progress, whole="loss" in missing)
        known: dict[str, Callable[[], Measured]] = {
            "fit": lambda: measurements.fit(material),
            "density": lambda: measurements.density(material),
            "geometry": lambda: geometry(source.weights.w_dec, settings, progress),
            "loss": lambda: measurements.loss(material, progress),
        }
        return {name: known[name] for name in missing}

    def about(self, fit: Part | None) -> dict[str, Any]:
        """Facts about the whole dictionary; ``l0`` and ``fvu`` are measured if ``fit`` is given, otherwise declared."""
        source, weights = self._source, self._source.weights
        declared = {"l0": source.declared.get("l0", source.l0), "fvu": source.declared.get("fvu")}
        measured = fit.rows[0] if fit else declared
        return {
            "name": source.name,
            "format": source.format,
            "kind": source.kind,
            "width": weights.width,
            "site": str(source.site),
            "l0": measured["l0"],
            "fvu": measured["fvu"],
            "l0_declared": declared["l0"],
            "fvu_declared": declared["fvu"],
            "reconstructs": source.site.out,
            "activation": weights.activation + (f" (k = {weights.k})" if weights.k is not None else ""),
            "transform": source.transform(),
            "w_enc": list(weights.w_enc.shape),
            "w_dec": list(weights.w_dec.shape),
        }
