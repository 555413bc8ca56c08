"""One pass over the corpus for all dictionaries: where each selected feature is active, and how strongly.

The corpus is divided into shards of a fixed number of contexts. A shard's file holds, per source, every (token, feature,
excess over the feature's threshold). The files are exact, small because features are sparse, and independent of each
other. A shard on disk is never computed again. Uses the subject model only through ``HiddenStates``; knows nothing of
windows, explainers or judges. Writes ``shard-*.npz`` in the folder it is given.
"""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.errors import BadFile
from evalkit.protocols import FeatureSource, Progress, TokenSource
from evalkit.records import Activations, FeatureId, SourceInfo, TokenBatch
from evalkit.sources.control_marks import as_dictionary
from evalkit.subject.attention_sinks import valid_tokens
from evalkit.util.progress import SILENT
from evalkit.util.sealed_files import open_sealed, sealed_npz

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "SHARD_CONTEXTS",
    "Collection",
    "HiddenStates",
    "SelectedFeatures",
    "active_entries",
    "collect",
]

_LOG = logging.getLogger(__name__)
SHARD_CONTEXTS = 64
_SHARD = "a shard of this run"
_REDO = "delete the file and run again"
# by which the reader of archives says that one without checksums is damaged
_UNREADABLE = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    IndexError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class HiddenStates(Protocol):
    """Returns raw hidden states by site: the subject model, or a cache in front of it.

    ``limits``: by site, the norm above which a token is an attention sink and masked like BOS.
    """

    @property
    def limits(self) -> Mapping[str, float]: ...

    def hidden(self, batch: TokenBatch) -> dict[str, Tensor]:
        """(batch, pos, d_model) float32 per site path."""


class ContextCorpus(Protocol):
    """The part of a corpus that the pass uses."""

    @property
    def n_contexts(self) -> int: ...

    @property
    def context_length(self) -> int: ...

    def batch(self, rows: NDArray[np.int64]) -> TokenBatch: ...


@dataclass(frozen=True, slots=True)
class SelectedFeatures:
    """A bound source, those of its features that this run scores, and its measurements on the calibration sample.

    control: whether the run made the source itself, to hold the dictionaries against
    """

    source: FeatureSource
    features: tuple[FeatureId, ...]
    measured: dict[str, Any] = field(default_factory=dict)
    control: bool = False

    @property
    def info(self) -> SourceInfo:
        """The source's own record, never as a control that it is not; where it declares no L0, with the measured one."""
        info = self.source.info if self.control else as_dictionary(self.source.info)
        return info if info.l0 is not None else replace(info, l0=self.measured.get("l0_measured"))


def active_entries(
    selected: SelectedFeatures, hidden: Tensor, batch: TokenBatch, valid: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """(row in the flattened batch, feature index, excess) of every activation above the feature's threshold.

    The excess is the activation minus the threshold, so it is positive even where the threshold is negative.
    """
    source, features = selected.source, selected.features
    if isinstance(source, TokenSource):
        values = source.token_activations(batch, features)
    else:
        values = source.activations(hidden, features)  # (batch, pos, feature)
    thresholds = torch.tensor([source.threshold(feature) for feature in features], dtype=values.dtype)
    excess = values - thresholds.to(values.device)
    active = (excess > 0) & valid.to(values.device)[..., None]
    rows, columns = active.flatten(0, 1).nonzero(as_tuple=True)
    picked = excess.flatten(0, 1)[rows, columns]
    return rows.cpu().numpy(), columns.cpu().numpy(), picked.float().cpu().numpy()


@dataclass(frozen=True, slots=True)
class Collection:
    """The shard files of a finished or unfinished pass."""

    folder: Path
    n_contexts: int
    context_length: int

    @property
    def n_shards(self) -> int:
        return -(-self.n_contexts // SHARD_CONTEXTS)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:06d}.npz"

    def rows(self, shard: int) -> NDArray[np.int64]:
        first = shard * SHARD_CONTEXTS
        return np.arange(first, min(first + SHARD_CONTEXTS, self.n_contexts))

    def missing(self) -> list[int]:
        return [shard for shard in range(self.n_shards) if not self.path(shard).exists()]

    def write(self, shard: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write one shard and its checksums. Raises StorageError."""
        with sealed_npz(self.path(shard)) as stream:
            np.savez(stream, allow_pickle=False, **arrays)

    def read(self, source: int) -> Activations:
        """All entries of one source, by its index in the run. Raises BadFile for a damaged shard."""
        tokens, features, values, n_tokens = [], [], [], 0
        for shard in range(self.n_shards):
            path = self.path(shard)
            try:
                with (
                    open_sealed(path, fix=_REDO, expected=_SHARD) as stream,
                    np.load(stream, allow_pickle=False) as arrays,
                ):
                    base = shard * SHARD_CONTEXTS * self.context_length
                    tokens.append(arrays[f"{source}.token"].astype(np.int64) + base)
                    features.append(arrays[f"{source}.feature"].astype(np.int64))
                    values.append(arrays[f"{source}.value"])
                    n_tokens += int(arrays["n_tokens"][source])
            except _UNREADABLE as error:
                raise BadFile(str(path), expected=_SHARD, seen="a damaged archive", fix=_REDO) from error
        return Activations(np.concatenate(tokens), np.concatenate(features), np.concatenate(values), n_tokens)


def collect(
    corpus: ContextCorpus,
    states: HiddenStates,
    selected: Sequence[SelectedFeatures],
    folder: Path,
    *,
    batch_size: int,
    progress: Progress = SILENT,
) -> Collection:
    """Compute the missing shards. ``batch_size`` (contexts per forward) affects speed and memory only."""
    collection = Collection(folder, corpus.n_contexts, corpus.context_length)
    missing = collection.missing()
    if not missing:
        return collection
    task = progress.start(
        "collect activations", sum(len(collection.rows(s)) for s in missing) * corpus.context_length, "tokens"
    )
    for shard in missing:
        _LOG.debug("shard %06d: starting forward passes", shard)
        arrays = _collect_shard(corpus, states, selected, collection.rows(shard), batch_size, progress, task)
        collection.write(shard, arrays)
    progress.finish(task)
    return collection


def _collect_shard(
    corpus: ContextCorpus,
    states: HiddenStates,
    selected: Sequence[SelectedFeatures],
    rows: NDArray[np.int64],
    batch_size: int,
    progress: Progress,
    task: int,
) -> dict[str, NDArray[np.generic]]:
    found: list[list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]] = [[] for _ in selected]
    n_tokens = [0 for _ in selected]
    for first in range(0, len(rows), batch_size):
        batch = corpus.batch(rows[first : first + batch_size])
        by_site = states.hidden(batch)
        valid = {site: valid_tokens(hidden, batch, states.limits[site]) for site, hidden in by_site.items()}
        for index, one in enumerate(selected):
            site = one.source.site.path
            n_tokens[index] += int(valid[site].sum())
            token, feature, value = active_entries(one, by_site[site], batch, valid[site])
            parts = found[index]
            parts.append((token + first * corpus.context_length, feature, value))
        progress.advance(task, batch.token_ids.size)
    arrays: dict[str, NDArray[np.generic]] = {"n_tokens": np.asarray(n_tokens, dtype=np.int64)}
    small = np.uint16 if SHARD_CONTEXTS * corpus.context_length <= 1 << 16 else np.uint32
    for index, parts in enumerate(found):
        arrays[f"{index}.token"] = np.concatenate([part[0] for part in parts]).astype(small)
        arrays[f"{index}.feature"] = np.concatenate([part[1] for part in parts]).astype(np.uint32)
        arrays[f"{index}.value"] = np.concatenate([part[2] for part in parts]).astype(np.float32)
    return arrays
