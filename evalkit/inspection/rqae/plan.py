"""The inspection plan of an RQAE: the arguments and measurement of each part, and the SAE to compare with."""

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
    """Plan for one RQAE; ``source`` is the RQAE at its full depth.

    Raises BadConfig for a depth that the RQAE does not have, and any error from opening the SAE.
    """

    needs_text = ("prefixes", "fit", "ranks", "sae")

    def __init__(self, settings: Settings, source: RqaeSource, parts: Sequence[str]) -> None:
        self._settings, self._source = settings, source
        wanted = settings.sae is not None and "sae" in parts
        self._other = _open_sae(settings, settings.sae, source) if settings.sae is not None and wanted else None
        self._depths = settings.depths_of(source.depth)
        self._digest = digest(_weights(source))

    @property
    def text(self) -> dict[str, Any]:
        """Identifies the RQAE, model, site and corpus whose codes the folder holds."""
        settings, site = self._settings, self._source.site
        text = {**settings.text(), "model": settings.model or site.model, "site": site.path}
        return {"dictionary": self._digest, **text}

    def arguments(self) -> dict[str, dict[str, Any]]:
        """For each part, everything that its numbers depend on."""
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
        """For each missing part, the function that measures it. The model and the corpus are loaded on first use."""
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
        """Facts about the whole RQAE; ``fvu`` is measured at full depth if ``fit`` has it, otherwise from the card."""
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
    """Opens the SAE to compare with. Raises BadConfig if it is not one SAE with the RQAE's site and width."""
    options: dict[str, Any] = {"site": settings.site, "subject": rqae.site.model, "depths": (1,)}
    sources = open_dictionary(path, **options)
    if len(sources) != 1 or not isinstance(sources[0], SaeSource):
        seen = f"{len(sources)} dictionaries" if len(sources) != 1 else f"one of kind {sources[0].info.kind}"
        raise BadConfig(path, expected="a single SAE", seen=seen, fix="give the folder of one SAE")
    other = sources[0]
    read, wanted = (other.site.path, other.weights.d_model), (rqae.site.path, rqae.encoder.model.config.dim)
    if read != wanted:
        raise BadConfig(
            path,
            expected=f"an SAE of {wanted[0]} with d_model {wanted[1]}, the site of {rqae.label}",
            seen=f"{read[0]}, d_model {read[1]}",
            fix="use an SAE of that site; if this SAE belongs there, set --site",
        )
    return other


def _candidates(settings: Settings, other: SaeSource) -> tuple[str, ...]:
    """The latents to record, drawn by hash: CANDIDATES times as many as wanted."""
    ids = other.features()
    order = np.argsort(hash_priorities(derive(settings.seed, "latents", other.name), np.arange(len(ids))))
    return tuple(ids[place] for place in order[: measurements.CANDIDATES * settings.features])
