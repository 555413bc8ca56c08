"""Hidden states of a small sample of contexts, computed before the pass over the corpus and kept on disk.

The sample decides the RQAE features (one token occurrence each), the thresholds that are corpus quantiles, and which
features are alive. The later pass reuses these states, so no context goes through the subject model twice. Knows nothing
of explainers and judges. Reads and writes ``calibration.safetensors``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from evalkit.collect.activations import ContextCorpus
from evalkit.errors import BadFile, CorpusError
from evalkit.protocols import FeatureSource, Progress
from evalkit.records import FeatureId, TokenBatch
from evalkit.seeds import derive, hash_priorities
from evalkit.subject.attention_sinks import sink_limit, valid_tokens
from evalkit.util.progress import SILENT
from evalkit.util.sealed_files import verify, write_sealed

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Calibration", "Centre", "calibrate", "choose_centres", "sample_activations", "top_share_threshold"]

_BATCH = 16  # contexts per forward
_REDO = "delete the file and run again"


class _Corpus(ContextCorpus, Protocol):
    documents: NDArray[np.int64]


class _Subject(Protocol):
    def hidden(self, token_ids: NDArray[np.int64]) -> dict[str, Tensor]: ...


@dataclass(frozen=True, slots=True)
class Centre:
    """One token occurrence of the explain pool that an RQAE feature is made from."""

    feature: FeatureId
    context: int
    position: int


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Cached hidden states of some contexts, by site. Implements ``HiddenStates``: other contexts go to the subject model.

    rows: (context,) corpus rows, ascending
    sample: (context,) True in the uniform sample; the other contexts are there for their centres
    limits: by site, the norm above which a token is an attention sink
    """

    corpus: _Corpus
    subject: _Subject
    rows: NDArray[np.int64]
    sample: NDArray[np.bool_]
    states: dict[str, Float[Tensor, "context pos d_model"]]
    limits: dict[str, float]

    def hidden(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Hidden states of a batch, from the cache where possible."""
        places = np.minimum(np.searchsorted(self.rows, batch.contexts), len(self.rows) - 1)
        known = self.rows[places] == batch.contexts
        fresh = self.subject.hidden(batch.token_ids[~known]) if not known.all() else {}
        result = {}
        for site, states in self.states.items():
            shape = (len(known), *states.shape[1:])
            merged = torch.empty(shape, dtype=torch.float32, device=fresh[site].device if fresh else states.device)
            merged[torch.from_numpy(known)] = states[places[known]].float().to(merged.device)
            if fresh:
                merged[torch.from_numpy(~known)] = fresh[site]
            result[site] = merged
        return result

    def sample_batches(self) -> Sequence[TokenBatch]:
        """The uniform sample, in batches of whole contexts."""
        rows = self.rows[self.sample]
        return [self.corpus.batch(rows[first : first + _BATCH]) for first in range(0, len(rows), _BATCH)]

    def centre_states(self, site: str, centres: Sequence[Centre]) -> Float[Tensor, "centre d_model"]:
        """Raw hidden states of the centres."""
        rows = np.searchsorted(self.rows, [centre.context for centre in centres])
        return self.states[site][rows, [centre.position for centre in centres]].float()


def choose_centres(corpus: _Corpus, pools: NDArray[np.uint8], n: int, seed: int) -> list[Centre]:
    """Draw ``n`` of the distinct token ids in the explain pool, uniformly, and one occurrence of each; by hash.

    ``pools`` (context,): 0 where a context belongs to the explain pool. Raises CorpusError for fewer than ``n`` ids.
    """
    rows = np.flatnonzero(pools == 0)
    best_priority: dict[int, int] = {}
    best_place: dict[int, int] = {}
    for first in range(0, len(rows), 256):
        batch = corpus.batch(rows[first : first + 256])
        places = (batch.contexts[:, None] * corpus.context_length + np.arange(corpus.context_length))[batch.valid]
        ids = batch.token_ids[batch.valid]
        priorities = hash_priorities(derive(seed, "centre occurrence"), places)
        order = np.argsort(priorities)
        unique, where = np.unique(ids[order], return_index=True)
        for token, place, priority in zip(
            unique.tolist(), places[order][where].tolist(), priorities[order][where].tolist(), strict=True
        ):
            if priority < best_priority.get(token, 1 << 64):
                best_priority[token], best_place[token] = priority, place
    if len(best_place) < n:
        raise CorpusError(
            "corpus",
            expected=f"at least {n} different tokens in the explain pool",
            seen=str(len(best_place)),
            fix="use a longer corpus or fewer --features",
        )
    tokens = np.array(sorted(best_place), dtype=np.int64)
    drawn = tokens[np.argsort(hash_priorities(derive(seed, "centre token"), tokens))[:n]]
    centres = []
    for token in drawn.tolist():
        context, position = divmod(best_place[token], corpus.context_length)
        centres.append(Centre(f"{token}@{context}.{position}", context, position))
    return centres


def calibrate(
    corpus: _Corpus,
    subject: _Subject,
    path: Path,
    *,
    sites: Sequence[str],
    n_contexts: int,
    centres: Sequence[Centre],
    seed: int,
    progress: Progress = SILENT,
) -> Calibration:
    """Read the states from ``path``, or compute and write them. Raises BadFile, StorageError."""
    order = np.argsort(hash_priorities(derive(seed, "calibration"), np.arange(corpus.n_contexts)))
    sample = order[:n_contexts]
    rows = np.unique(np.concatenate([sample, [centre.context for centre in centres]]).astype(np.int64))
    if path.exists():
        states = _read(path, rows, sites)
    else:
        states = _compute(corpus, subject, rows, sites, progress)
        write_sealed(path, save({"rows": torch.from_numpy(rows), **{f"site.{s}": states[s] for s in sites}}))
    in_sample = np.isin(rows, sample)
    valid = torch.from_numpy(corpus.batch(rows[in_sample]).valid)
    limits = {
        site: sink_limit(found[torch.from_numpy(in_sample)][valid].float().norm(dim=-1))
        for site, found in states.items()
    }
    return Calibration(corpus, subject, rows, in_sample, states, limits)


def _compute(
    corpus: _Corpus, subject: _Subject, rows: NDArray[np.int64], sites: Sequence[str], progress: Progress
) -> dict[str, Tensor]:
    task = progress.start("calibrate", len(rows) * corpus.context_length, "tokens")
    parts: dict[str, list[Tensor]] = {site: [] for site in sites}
    for first in range(0, len(rows), _BATCH):
        batch = corpus.batch(rows[first : first + _BATCH])
        by_site = subject.hidden(batch.token_ids)
        for site in sites:
            parts[site].append(_compact(by_site[site].cpu()))
        progress.advance(task, batch.token_ids.size)
    progress.finish(task)
    states = {}
    for site, found in parts.items():
        exact = all(part.dtype == torch.bfloat16 for part in found)
        states[site] = torch.cat([part if exact else part.float() for part in found])
    return states


def _compact(states: Tensor) -> Tensor:
    """The states in bfloat16 where that is lossless (after a bfloat16 forward), else unchanged."""
    half = states.to(torch.bfloat16)
    return half if torch.equal(half.float(), states) else states


def _read(path: Path, rows: NDArray[np.int64], sites: Sequence[str]) -> dict[str, Tensor]:
    verify(path, fix=_REDO)
    try:
        with safe_open(path, framework="pt") as stored:
            if not np.array_equal(stored.get_tensor("rows").numpy(), rows):
                raise ValueError("other contexts")
            return {site: stored.get_tensor(f"site.{site}") for site in sites}
    except (SafetensorError, ValueError, OSError) as error:
        raise BadFile(str(path), expected="the calibration states of this run", seen=str(error), fix=_REDO) from error


def sample_activations(
    source: FeatureSource, features: Sequence[FeatureId], calibration: Calibration
) -> Float[Tensor, "token feature"]:
    """Activations on the unmasked tokens of the calibration sample; float32, on the CPU."""
    parts = []
    for batch in calibration.sample_batches():
        hidden = calibration.hidden(batch)[source.site.path]
        valid = valid_tokens(hidden, batch, calibration.limits[source.site.path])
        parts.append(source.activations(hidden, features)[valid].float().cpu())
    return torch.cat(parts)


def top_share_threshold(values: Float[Tensor, "token feature"], shares: Sequence[float]) -> list[float]:
    """Per feature, the value that the given share of tokens exceeds (ties count as not exceeding)."""
    ordered = values.sort(dim=0, descending=True).values
    last = len(values) - 1
    places = [min(last, max(1, round(share * len(values)))) for share in shares]
    return [float(ordered[place, column]) for column, place in enumerate(places)]
