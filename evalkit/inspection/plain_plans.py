"""Inspection plans for plain directions and for exports of examples, which reconstruct nothing and need no corpus.

For directions, the geometry is measured; for an export, the declared firing rates of its features are summarised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from evalkit.errors import BadFile
from evalkit.inspection.parts.cache import Part, digest
from evalkit.inspection.parts.density import firing_shares
from evalkit.inspection.parts.geometry import geometry
from evalkit.inspection.parts.measured import Measured
from evalkit.inspection.parts.settings import Settings
from evalkit.protocols import Progress
from evalkit.sources.dumps.neuronpedia import NeuronpediaSource
from evalkit.sources.formats.directions import DirectionsSource

__all__ = ["DirectionsPlan", "ExportPlan"]


class _Plan:
    needs_text: ClassVar[tuple[str, ...]] = ()
    text: ClassVar[dict[str, Any]] = {}

    def _about(self, source: DirectionsSource | NeuronpediaSource) -> dict[str, Any]:
        info = source.info
        return {"name": source.name, "kind": info.kind, "site": str(source.site), "reconstructs": source.site.out}


class DirectionsPlan(_Plan):
    """Plan for a matrix of directions: its geometry."""

    def __init__(self, settings: Settings, source: DirectionsSource) -> None:
        self._settings, self._source = settings, source

    def arguments(self) -> dict[str, dict[str, Any]]:
        """For each part, everything that its numbers depend on."""
        return {"geometry": {"of": digest((self._source.vectors,)), "seed": self._settings.seed}}

    def measures(self, folder: Path, missing: Sequence[str], progress: Progress) -> dict[str, Callable[[], Measured]]:
        """For each missing part, the function that measures it."""
        vectors, settings = self._source.vectors, self._settings
        known = {"geometry": lambda: geometry(vectors, settings, progress, "directions", "directions")}
        return {name: known[name] for name in missing}

    def about(self, fit: Part | None) -> dict[str, Any]:
        """Facts about the whole matrix, including the share of tokens on which a feature counts as active."""
        source = self._source
        return {
            **self._about(source),
            "format": "directions",
            "width": len(source.features()),
            "activation": source.info.declared["activation"],
            "active": f"on the top {source.density:.1%} of tokens",
            "vectors": list(source.vectors.shape),
        }


class ExportPlan(_Plan):
    """Plan for an export: how often its features fire."""

    def __init__(self, source: NeuronpediaSource) -> None:
        self._source = source

    def arguments(self) -> dict[str, dict[str, Any]]:
        """For each part, everything that its numbers depend on: the files, by name, size and modification time."""
        files = [
            (file.name, (state := file.stat()).st_size, state.st_mtime_ns) for file in self._source.feature_files()
        ]
        return {"density": {"of": [str(self._source.folder.resolve()), *map(list, files)]}}

    def measures(self, folder: Path, missing: Sequence[str], progress: Progress) -> dict[str, Callable[[], Measured]]:
        """For each missing part, the function that measures it."""
        known = {"density": self._density}
        return {name: known[name] for name in missing}

    def about(self, fit: Part | None) -> dict[str, Any]:
        """Facts that the export gives; ``width`` counts only features with a text, because an export omits dead ones."""
        return {**self._about(self._source), "format": "neuronpedia", "width": len(self._source.features())}

    def _density(self) -> Measured:
        shares = self._source.densities()
        if not shares:
            raise BadFile(
                str(self._source.folder / "features"),
                expected="frac_nonzero of the features, in features/batch-N.jsonl.gz",
                seen="none",
                fix="also download all batches of features/",
            )
        features = np.array([int(feature) for feature in shares])
        return firing_shares(np.array(list(shares.values())), features, None, "features")
