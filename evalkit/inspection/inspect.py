"""An inspection from its settings: opens the RQAE, takes the parts that are kept, computes the others, keeps them.

The only module that knows the order of the parts and what decides each. Writes the inspection's folder; draws nothing.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evalkit.collection import Chosen
from evalkit.errors import BadConfig
from evalkit.files import storage_errors
from evalkit.inspection import compute
from evalkit.inspection.keeping import Part, bind, digest, keep, kept
from evalkit.inspection.material import Material
from evalkit.inspection.settings import Settings
from evalkit.progress import SILENT
from evalkit.protocols import FeatureSource, Progress
from evalkit.run_folder import acquire
from evalkit.seeds import derive, hash_priorities
from evalkit.sources import open_dictionary
from evalkit.sources.rqae import RqaeSource
from evalkit.sources.sae import SaeSource

__all__ = ["Inspection", "inspect_rqae"]

_NEEDS_TEXT = ("prefixes", "fit", "ranks", "sae")


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """``about``: name, format, kind, width, site, l0 and fvu of the RQAE; ``parts`` in the order of tables."""

    about: dict[str, Any]
    parts: list[Part]


def inspect_rqae(settings: Settings, folder: Path, parts: Sequence[str], progress: Progress = SILENT) -> Inspection:
    """The parts of an inspection, computed where they are not kept in ``folder``.

    Raises MissingFile, BadFile, BadConfig (no RQAE, no such depth), SiteMismatch, CorpusError, RunMismatch (the folder
    holds the codes of another text or model), RunLocked, StorageError.
    """
    source = _open_rqae(settings)
    other = _open_sae(settings, settings.sae, source) if settings.sae is not None and "sae" in parts else None
    depths = settings.depths_of(source.depth)
    arguments = _arguments(settings, source, other, depths)
    found = {name: part for name in parts if (part := kept(folder, name, arguments[name])) is not None}
    missing = [name for name in parts if name not in found]
    if missing:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = acquire(folder / "inspect.lock")
        try:
            if set(missing) & set(_NEEDS_TEXT):
                bind(folder, arguments["prefixes"]["of"])
            for name, measure in _measures(settings, source, other, depths, folder, missing, progress).items():
                started = time.monotonic()
                result = measure()
                seconds = round(time.monotonic() - started, 1)
                part = Part(name, arguments[name], result.rows, result.further, result.notes, seconds)
                found[name] = keep(folder, part)
        finally:
            os.close(lock)
    ordered = [found[name] for name in parts]
    return Inspection(_about(source, found.get("fit")), ordered)


def _measures(
    settings: Settings,
    source: RqaeSource,
    other: SaeSource | None,
    depths: Sequence[int],
    folder: Path,
    missing: Sequence[str],
    progress: Progress,
) -> dict[str, Callable[[], compute.Measured]]:
    """What computes each missing part. The material is loaded when one of them first asks for it."""
    latents: tuple[str, Chosen] | None = None
    if other is not None and "sae" in missing:
        candidates = _candidates(settings, other)
        chosen = hashlib.blake2b(" ".join(candidates).encode(), digest_size=6).hexdigest()
        latents = f"{digest(_weights(other))[:12]}-{chosen}", Chosen(other, candidates)
    material = Material(settings, source, folder, progress, whole="fit" in missing, latents=latents)
    model = source.encoder.model
    known: dict[str, Callable[[], compute.Measured]] = {
        "prefixes": lambda: compute.prefixes(material, depths, progress),
        "cosines": lambda: compute.cosines(model, settings),
        "layers": lambda: compute.layers(model),
        "fit": lambda: compute.fit(material, settings, depths, progress),
        "ranks": lambda: compute.ranks(material, settings, depths),
    }
    if other is not None and latents is not None:
        sae, features = other, latents[1].features
        known["sae"] = lambda: compute.sae(material, settings, sae, features, depths)
    return {name: known[name] for name in missing}


def _arguments(
    settings: Settings, source: RqaeSource, other: SaeSource | None, depths: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """What decides the numbers of each part."""
    weights = digest(_weights(source))
    text = {**settings.text(), "model": settings.model or source.site.model, "site": source.site.path}
    of: dict[str, Any] = {"dictionary": weights, **text}
    at = {"of": of, "depths": list(depths)}
    arguments: dict[str, dict[str, Any]] = {
        "prefixes": at,
        "cosines": {"of": weights, "pairs": settings.pairs, "seed": settings.seed},
        "layers": {"of": weights},
        "fit": {**at, "fit_tokens": settings.fit_tokens, "seed": settings.seed},
        "ranks": {**at, "features": settings.features, "top": settings.top, "seed": settings.seed},
    }
    if other is not None:
        counts = {"features": settings.features, "examples": settings.examples, "seed": settings.seed}
        arguments["sae"] = {**at, "sae": digest(_weights(other)), **counts}
    return arguments


def _weights(source: FeatureSource) -> Sequence[Any]:
    if isinstance(source, RqaeSource):
        model = source.encoder.model
        return model.w_in, model.b_in, model.w_out, model.b_out, model.codebook
    if isinstance(source, SaeSource):
        weights = source.weights
        return weights.w_enc, weights.b_enc, weights.w_dec, weights.b_dec, weights.threshold
    return ()


def _open_rqae(settings: Settings) -> RqaeSource:
    """The RQAE at its full depth. Raises BadConfig for another kind of dictionary, or several."""
    options = {"site": settings.site, "subject": Path(settings.model).name if settings.model else None}
    shallow = _only(settings.dictionary, open_dictionary(settings.dictionary, depths=(1,), **options), RqaeSource)
    quantizers = shallow.encoder.model.config.num_quantizers
    whole: RqaeSource = _only(
        settings.dictionary, open_dictionary(settings.dictionary, depths=(quantizers,), **options), RqaeSource
    )
    return whole


def _open_sae(settings: Settings, path: str, rqae: RqaeSource) -> SaeSource:
    """The dictionary to compare with. Raises BadConfig for another kind, site or width."""
    options: dict[str, Any] = {"site": settings.site, "subject": rqae.site.model, "depths": (1,)}
    other: SaeSource = _only(path, open_dictionary(path, **options), SaeSource)
    read, wanted = (other.site.path, other.weights.d_model), (rqae.site.path, rqae.encoder.model.config.dim)
    if read != wanted:
        raise BadConfig(
            path,
            expected=f"a dictionary of {wanted[0]} with d_model {wanted[1]}, where {rqae.label} reads",
            seen=f"{read[0]}, d_model {read[1]}",
            fix="name one of the same site; if this one is, say so with --site",
        )
    return other


def _only(path: str, sources: Sequence[FeatureSource], kind: type[Any]) -> Any:
    wanted = "an RQAE checkpoint" if kind is RqaeSource else "an SAE"
    if len(sources) != 1 or not isinstance(sources[0], kind):
        seen = f"{len(sources)} dictionaries" if len(sources) != 1 else f"one of kind {sources[0].info.kind}"
        raise BadConfig(path, expected=f"one dictionary, {wanted}", seen=seen, fix=f"name the folder of {wanted}")
    return sources[0]


def _candidates(settings: Settings, other: SaeSource) -> tuple[str, ...]:
    """Latents to record, drawn by hash: some more than are wanted."""
    ids = other.features()
    order = np.argsort(hash_priorities(derive(settings.seed, "latents", other.name), np.arange(len(ids))))
    return tuple(ids[place] for place in order[: compute.CANDIDATES * settings.features])


def _about(source: RqaeSource, fit: Part | None) -> dict[str, Any]:
    """``fvu`` is the measured one at full depth where the fit was measured, else the card's."""
    info = source.info
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
