"""Lets dictionaries into a run: the fit check of every source, made once, kept, and refused or marked.

Reads and writes ``fit.json`` in the run folder. Knows subject model and corpus only as what gives states and tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.errors import SiteMismatch
from evalkit.fit.check import FitReport, check_fit, fit_sites, gather_states
from evalkit.protocols import FeatureSource, Progress
from evalkit.records import TokenBatch
from evalkit.seeds import derive, hash_priorities
from evalkit.sources.sae.source import SaeSource
from evalkit.util.atomic_files import write_bytes
from evalkit.util.progress import SILENT
from evalkit.util.tensor_files import take

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["admit"]

_LOG = logging.getLogger(__name__)
_TOKENS = 4096  # of the sample, together with what is masked
_BATCH = 16  # contexts per forward
_COLUMNS = 16  # encoder columns in a fingerprint


class _Subject(Protocol):
    def layer_neighbours(self, site: str) -> tuple[str, ...]: ...

    def hidden(self, token_ids: NDArray[np.int64], *, sites: Sequence[str] | None = None) -> dict[str, Tensor]: ...


class _Corpus(Protocol):
    @property
    def n_contexts(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    def batch(self, rows: NDArray[np.int64]) -> TokenBatch: ...


def admit(
    sources: Sequence[FeatureSource],
    subject: _Subject,
    corpus: _Corpus,
    path: Path,
    *,
    seed: int,
    force: bool = False,
    progress: Progress = SILENT,
) -> dict[str, dict[str, Any]]:
    """What was measured of each bound source, by name. Checks only those that ``path`` does not know with these weights.

    Raises SiteMismatch for the first that is refused, unless ``force``; its record then says ``fit_refused``.
    """
    known = _read(path)
    prints = {source.name: _fingerprint(source) for source in sources}
    wanted = [source for source in sources if known.get(source.name, {}).get("fingerprint") != prints[source.name]]
    for report in _check(wanted, subject, corpus, seed, progress) if wanted else ():
        known[report.name] = {"fingerprint": prints[report.name], **report.as_json()}
    if wanted:
        write_bytes(path, (json.dumps(known, indent=1) + "\n").encode())
    for source in sources:
        found = known[source.name]
        for warning in found.get("fit_warnings", ()):
            _LOG.warning("%s: %s", source.name, warning)
        if refused := found.get("fit_refused"):
            if not force:
                raise SiteMismatch(source.name, **refused)
            _LOG.warning("%s: fit check failed, continuing because of --force: seen %s", source.name, refused["seen"])
    return {name: {key: value for key, value in one.items() if key != "fingerprint"} for name, one in known.items()}


def _check(
    sources: Sequence[FeatureSource], subject: _Subject, corpus: _Corpus, seed: int, progress: Progress
) -> list[FitReport]:
    pairs = {source.name: fit_sites(subject, source.site) for source in sources}
    sites = list(dict.fromkeys(site for found in pairs.values() for pair in found for site in pair))
    count = -(-_TOKENS // corpus.context_length)
    order = np.argsort(hash_priorities(derive(seed, "fit check"), np.arange(corpus.n_contexts)), kind="stable")
    rows = np.sort(order[:count])
    batches = [corpus.batch(rows[first : first + _BATCH]) for first in range(0, len(rows), _BATCH)]
    states = gather_states(subject, batches, sites, progress)
    reports = []
    task = progress.start("fit check", len(sources), "dictionaries")
    for source in sources:
        reports.append(check_fit(source, pairs[source.name], states))
        progress.advance(task)
    progress.finish(task)
    return reports


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """What is kept; nothing where it cannot be read, as it is quickly made again."""
    try:
        held = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _fingerprint(source: FeatureSource) -> str:
    """Changes when the weights behind a name do: of an SAE its vectors and some columns, else only the name."""
    digest = hashlib.blake2b(source.name.encode(), digest_size=12)
    if isinstance(source, SaeSource):
        weights = source.weights
        some = np.unique(np.linspace(0, weights.width - 1, _COLUMNS).astype(np.int64))
        parts = [weights.b_enc, weights.b_dec, weights.threshold, weights.shift]
        parts += [take(weights.w_enc, some, 1), take(weights.w_dec, some, 0)]
        for part in parts:
            if part is not None:
                digest.update(part.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        digest.update(f"{source.transform()} {weights.k} {weights.activation}".encode())
    return digest.hexdigest()
