"""Runs the fit check once per dictionary and rejects dictionaries that fail it; with ``force`` it only marks them.

Reads and writes ``fit.json`` in the run folder. Takes hidden states from the subject model and tokens from the corpus;
knows nothing else of them.
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

from evalkit.errors import BadFile, MissingFile, SiteMismatch
from evalkit.fit.check import FitReport, check_fit, fit_sites, gather_states
from evalkit.protocols import FeatureSource, Progress
from evalkit.records import TokenBatch
from evalkit.seeds import derive, hash_priorities
from evalkit.sources.sae.source import SaeSource
from evalkit.util.progress import SILENT
from evalkit.util.sealed_files import read_sealed_json, write_sealed
from evalkit.util.tensor_files import take

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["admit"]

_LOG = logging.getLogger(__name__)
_TOKENS = 4096  # tokens in the sample, including masked ones
_BATCH = 16  # contexts per forward pass
_COLUMNS = 16  # encoder columns, and decoder rows, that enter a fingerprint


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
    """Returns the measurements of the bound sources, by name.

    Sources whose measurements are in ``path`` with the same weights are not checked again. Raises SiteMismatch for the
    first source that fails; with ``force``, logs a warning instead, and the source's record has the key ``fit_refused``.
    """
    known = _read(path)
    prints = {source.name: _fingerprint(source) for source in sources}
    wanted = [source for source in sources if known.get(source.name, {}).get("fingerprint") != prints[source.name]]
    for report in _check(wanted, subject, corpus, seed, progress) if wanted else ():
        known[report.name] = {"fingerprint": prints[report.name], **report.as_json()}
    if wanted:
        write_sealed(path, (json.dumps(known, indent=1) + "\n").encode())
    for source in sources:
        found = known[source.name]
        for warning in found.get("fit_warnings", ()):
            _LOG.warning("%s: %s", source.name, warning)
        if refused := found.get("fit_refused"):
            if not force:
                raise SiteMismatch(source.name, **refused)
            _LOG.warning("%s: fit check failed, continuing because of --force: %s", source.name, refused["seen"])
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
    """The recorded measurements; empty if the file is damaged, because the check is quick to repeat."""
    try:
        held = read_sealed_json(path, expected="what the fit check measured", fix="delete it and run again")
    except MissingFile:
        return {}
    except BadFile as error:
        _LOG.warning("%s; it is measured again", error)
        return {}
    return held if isinstance(held, dict) else {}


def _fingerprint(source: FeatureSource) -> str:
    """A hash to detect that a name now stands for other weights.

    For an SAE it covers the bias and threshold vectors and a sample of latents; for other sources only the name.
    """
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
