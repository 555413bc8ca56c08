"""The inspection plan of an RQAE: arguments of each part, its measurement, and the SAE it is compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evalkit.collect.activations import SelectedFeatures
from evalkit.errors import BadConfig
from evalkit.inspection.parts.cache import Part, digest
from evalkit.inspection.parts.measured import Measured
from evalkit.inspection.parts.settings import Settings
from evalkit.inspection.parts.states import RqaeStates
from evalkit.inspection.rqae import measurements
from evalkit.protocols import Progress
from evalkit.seeds import derive, hash_priorities
from evalkit.sources import open_dictionary
from evalkit.sources.rqae.source import RqaeSource
from evalkit.sources.sae.source import SaeSource

__all__ = ["RqaePlan"]


class RqaePlan:
    """``source`` is the RQAE at its full depth. Raises BadConfig (no such depth), what opening the SAE raises."""

    needs_text = ("prefixes", "fit", "ranks", "sae")

    def __init__(self, settings: Settings, source: RqaeSource, parts: Sequence[str]) -> None:
        self._settings, self._source = settings, source
        wanted = settings.sae is not None and "sae" in parts
        self._other = _open_sae(settings, settings.sae, source) if settings.sae is not None and wanted else None
        self._depths = settings.depths_of(source.depth)
        self._digest = digest(_weights(source))

    @property
    def text(self) -> dict[str, Any]:
        """Whose codes the folder holds."""
        settings, site = self._settings, self._source.site
        text = {**settings.text(), "model": settings.model or site.model, "site": site.path}
        return {"dictionary": self._digest, **text}

    def arguments(self) -> dict[str, dict[str, Any]]:
        """What decides the numbers of each part."""
        settings, of = self._settings, self.text
        at = {"of": of, "depths": list(self._depths)}
        arguments: dict[str, dict[str, Any]] = {
            "prefixes": at,
            "cosines": {"of": self._digest, "pairs": settings.pairs, "seed": settings.seed},
            "layers": {"of": self._digest},
            "fit": {**at, "fit_tokens": settings.fit_tokens, "seed": settings.seed},
            "ranks": {**at, "features": settings.features, "top": settings.top, "seed": settings.seed},
        }
        if self._other is not None:
            counts = {"features": settings.features, "examples": settings.examples, "seed": settings.seed}
            arguments["sae"] = {**at, "sae": _sae_digest(self._other), **counts}
        return arguments

    def measures(self, folder: Path, missing: Sequence[str], progress: Progress) -> dict[str, Callable[[], Measured]]:
        """What computes each missing part. The material is loaded when one of them first asks for it."""
        settings, other, depths = self._settings, self._other, self._depths
        latents: tuple[str, SelectedFeatures] | None = None
        if other is not None and "sae" in missing:
            candidates = _candidates(settings, other)
            chosen = hashlib.blake2b(" ".join(candidates).encode(), digest_size=6).hexdigest()
            latents = f"{_sae_digest(other)[:12]}-{chosen}", SelectedFeatures(other, candidates)
        material = RqaeStates(settings, self._source, folder, progress, whole="fit" in missing, latents=latents)
        model = self._source.encoder.model
        known: dict[str, Callable[[], Measured]] = {
            "prefixes": lambda: measurements.prefixes(material, depths, progress),
            "cosines": lambda: measurements.cosines(model, settings),
            "layers": lambda: measurements.layers(model),
            "fit": lambda: measurements.fit(material, settings, depths, progress),
            "ranks": lambda: measurements.ranks(material, settings, depths),
        }
        if other is not None and latents is not None:
            sae, features = other, latents[1].features
            known["sae"] = lambda: measurements.sae(material, settings, sae, features, depths)
        return {name: known[name] for name in missing}

    def about(self, fit: Part | None) -> dict[str, Any]:
        """``fvu`` is the measured one at full depth where the fit was measured, else the card's."""
        source, info = self._source, self._source.info
        measured = {row["depth"]: row["fvu"] for row in fit.rows} if fit else {}
        return {
            "name": source.label,
            "format": "rqae",
            "kind": info.kind,
            "width": info.width,
            "site": str(source.site),
            "l0": info.l0,
            "fvu": measured.get(source.depth, info.declared.get("fvu")),
        }


def _weights(source: RqaeSource) -> Sequence[Any]:
    model = source.encoder.model
    return model.w_in, model.b_in, model.w_out, model.b_out, model.codebook


def _sae_digest(other: SaeSource) -> str:
    return digest((other.weights, other.steps))


def _open_sae(settings: Settings, path: str, rqae: RqaeSource) -> SaeSource:
    """The dictionary to compare with. Raises BadConfig for another kind, site or width."""
    options: dict[str, Any] = {"site": settings.site, "subject": rqae.site.model, "depths": (1,)}
    sources = open_dictionary(path, **options)
    if len(sources) != 1 or not isinstance(sources[0], SaeSource):
        seen = f"{len(sources)} dictionaries" if len(sources) != 1 else f"one of kind {sources[0].info.kind}"
        raise BadConfig(path, expected="one dictionary, an SAE", seen=seen, fix="name the folder of an SAE")
    other = sources[0]
    read, wanted = (other.site.path, other.weights.d_model), (rqae.site.path, rqae.encoder.model.config.dim)
    if read != wanted:
        raise BadConfig(
            path,
            expected=f"a dictionary of {wanted[0]} with d_model {wanted[1]}, where {rqae.label} reads",
            seen=f"{read[0]}, d_model {read[1]}",
            fix="name one of the same site; if this one is, say so with --site",
        )
    return other


def _candidates(settings: Settings, other: SaeSource) -> tuple[str, ...]:
    """Latents to record, drawn by hash: some more than are wanted."""
    ids = other.features()
    order = np.argsort(hash_priorities(derive(settings.seed, "latents", other.name), np.arange(len(ids))))
    return tuple(ids[place] for place in order[: measurements.CANDIDATES * settings.features])
