"""Runs an inspection: opens the dictionary, loads the saved parts, and measures and saves the missing ones.

The plan for a kind of dictionary gives the arguments of each part and measures it. Reads and writes the inspection's
folder; draws nothing.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from evalkit.corpus.bos import wanted_bos
from evalkit.errors import BadConfig
from evalkit.inspection.parts.cache import Part, bind, load_part, save_part
from evalkit.inspection.parts.measured import Measured
from evalkit.inspection.parts.settings import PARTS_OF, Settings, parse_parts
from evalkit.inspection.plain_plans import DirectionsPlan, ExportPlan
from evalkit.inspection.rqae.plan import RqaePlan
from evalkit.inspection.sae.plan import SaePlan
from evalkit.protocols import ExampleSource, FeatureSource, Progress
from evalkit.sources import load_source
from evalkit.sources.dumps.neuronpedia import NeuronpediaSource
from evalkit.sources.formats.directions import DirectionsSource
from evalkit.sources.rqae.source import RqaeSource
from evalkit.sources.sae.source import SaeSource
from evalkit.store.run_folder import acquire
from evalkit.util.atomic_files import storage_errors
from evalkit.util.progress import SILENT

__all__ = ["Inspection", "inspect_dictionary"]


@dataclass(frozen=True, slots=True, eq=False)
class Inspection:
    """A finished inspection.

    ``about``: name, format, kind, width, site, l0 and fvu of the dictionary, and more for SAEs.
    ``parts``: the parts, in the order of the tables.
    ``folder``: the folder in which the parts are saved.
    """

    about: dict[str, Any]
    parts: list[Part]
    folder: Path


class Plan(Protocol):
    """Knows how to inspect one kind of dictionary.

    ``needs_text``: the parts that need tokens of a corpus.
    ``text``: identifies the model, site and corpus whose tokens and codes the folder holds.
    """

    @property
    def needs_text(self) -> tuple[str, ...]: ...

    @property
    def text(self) -> dict[str, Any]: ...

    def arguments(self) -> dict[str, dict[str, Any]]:
        """For each part, everything that its numbers depend on."""

    def measures(
        self, folder: Path, missing: Sequence[str], progress: Progress
    ) -> Mapping[str, Callable[[], Measured]]:
        """For each missing part, in order, the function that measures it."""

    def about(self, fit: Part | None) -> dict[str, Any]:
        """Facts about the whole dictionary; ``fit`` is the part of that name, None if it was not measured."""


def inspect_dictionary(
    settings: Settings, folder: Path | None = None, only: Sequence[str] = (), progress: Progress = SILENT
) -> Inspection:
    """Inspect a dictionary, measuring only the parts that are not saved in ``folder`` (default: ``runs/inspect-NAME``).

    ``only``: names of parts; an entry may be a comma-separated list. Empty: all parts that are measured by default.

    Raises MissingFile, BadFile, BadConfig (unknown part or depth, several dictionaries, a kind without parts),
    SiteMismatch, CorpusError, RunMismatch (the folder holds codes of another text or model), RunLocked, StorageError.
    """
    source = _open(settings)
    kind = source.info.kind
    if kind not in PARTS_OF:
        raise BadConfig(
            settings.dictionary,
            expected=f"a dictionary of a kind that can be inspected ({', '.join(PARTS_OF)})",
            seen=f"one of kind {kind}",
            fix="choose another dictionary, or score this one with `evalkit run`",
        )
    if settings.sae is not None and kind != "rqae":
        raise BadConfig(
            "--sae",
            expected="an RQAE to compare with that SAE",
            seen=f"{source.name}, a dictionary of kind {kind}",
            fix="leave --sae out",
        )
    settings = replace(settings, prepend_bos=wanted_bos(settings.prepend_bos, [source.info]))
    parts = parse_parts(only, has_sae=settings.sae is not None, kind=kind)
    plan = _plan(settings, source, parts)
    folder = folder or _folder(settings, source)
    found = _parts(plan, parts, folder, progress)
    return Inspection(plan.about(found.get("fit")), [found[name] for name in parts], folder)


def _plan(settings: Settings, source: FeatureSource | ExampleSource, parts: Sequence[str]) -> Plan:
    match source:
        case RqaeSource():
            return RqaePlan(settings, source, parts)
        case SaeSource():
            return SaePlan(settings, source, parts)
        case DirectionsSource():
            return DirectionsPlan(settings, source)
        case NeuronpediaSource():
            return ExportPlan(source)
    raise AssertionError(f"a plan for kind {source.info.kind}")


def _parts(plan: Plan, parts: Sequence[str], folder: Path, progress: Progress) -> dict[str, Part]:
    arguments = plan.arguments()
    found = {name: part for name in parts if (part := load_part(folder, name, arguments[name])) is not None}
    missing = [name for name in parts if name not in found]
    if missing:
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = acquire(folder / "inspect.lock")
        try:
            if set(missing) & set(plan.needs_text):
                bind(folder, plan.text)
            for name, measure in plan.measures(folder, missing, progress).items():
                started = time.monotonic()
                result = measure()
                seconds = round(time.monotonic() - started, 1)
                part = Part(name, arguments[name], result.rows, result.further, result.notes, seconds)
                found[name] = save_part(folder, part)
        finally:
            os.close(lock)
    return found


def _open(settings: Settings) -> FeatureSource | ExampleSource:
    """Opens the dictionary at the path, an RQAE at its full depth. Raises BadConfig if there are several."""
    options: dict[str, Any] = {
        "site": settings.site,
        "subject": Path(settings.model).name if settings.model else None,
        "format": settings.format_name,
    }
    source = load_source(settings.dictionary, depths=(1,), **options)
    if isinstance(source, RqaeSource):
        return load_source(settings.dictionary, depths=(source.encoder.model.config.num_quantizers,), **options)
    return source


def _folder(settings: Settings, source: FeatureSource | ExampleSource) -> Path:
    """The default folder, named after the folder of an RQAE or the name of any other dictionary.

    The folders of SAEs are not used, because their names often give only an L0 or a trainer.
    """
    path = Path(settings.dictionary.removeprefix("bundled:"))
    called = (path.name or "rqae") if isinstance(source, RqaeSource) else source.name
    return Path("runs") / f"inspect-{re.sub(r'[^A-Za-z0-9._-]+', '-', called).strip('-.')}"
