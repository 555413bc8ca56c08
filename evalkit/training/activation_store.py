"""Stores the hidden states of one site for training dictionaries: written in one pass, read in shuffled batches.

Hidden states of token batches come from a callable, so this module needs neither the subject model nor the corpus.
Writes a folder with ``hidden.bf16`` (rows of d_model bfloat16, in corpus order; exact if the model runs in bfloat16) and
``store.json``. An interrupted build resumes after the last batch on record. Leaves out invalid tokens (BOS, padding, the
first token of a context) and attention sinks later in a context: rows with more than ten times the median norm, whose
squares would outweigh all others. The record counts the sinks left out.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from evalkit.errors import BadConfig, BadFile, BadShape, CorpusError, MissingFile
from evalkit.protocols import Progress
from evalkit.records import Site, TokenBatch
from evalkit.seeds import derive
from evalkit.subject.attention_sinks import sink_limit
from evalkit.util.atomic_files import storage_errors, write_bytes
from evalkit.util.progress import SILENT

__all__ = ["ActivationStore", "Hidden", "StoreRecord", "norm_limit", "valid_rows"]

Hidden = Callable[[TokenBatch], Tensor]
FLUSH_BATCHES = 50  # batches between two updates of the record; at most this many are computed again after a crash


@dataclass(frozen=True, slots=True)
class StoreRecord:
    """The contents of ``store.json``. ``corpus``: free text that names the corpus, as part of the store's identity."""

    model: str
    site: str
    corpus: str
    d_model: int
    max_tokens: int
    rows: int = 0
    batches: int = 0
    sinks: int = 0
    norm_limit: float | None = None
    complete: bool = False


class ActivationStore:
    """Hidden states on disk: ``len(store)`` rows of ``d_model``, opened with ``ActivationStore(folder)``.

    Raises MissingFile or BadFile if the folder does not hold a complete store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = _read_record(folder)
        if not self.record.complete:
            raise BadFile(
                str(folder),
                expected="a complete activation store",
                seen=f"an interrupted build with {self.record.rows} rows",
                fix="build it again with the same arguments; it resumes where it stopped",
            )
        size, expected = (folder / "hidden.bf16").stat().st_size, self.record.rows * self.d_model * 2
        if size != expected:
            raise BadFile(
                str(folder / "hidden.bf16"),
                expected=f"{self.record.rows} rows of {self.d_model} bfloat16, {expected} bytes",
                seen=f"{size} bytes",
                fix="delete the folder and build it again",
            )
        flat = torch.from_file(
            str(folder / "hidden.bf16"), shared=False, size=self.record.rows * self.d_model, dtype=torch.bfloat16
        )
        self._rows = flat.view(self.record.rows, self.d_model)

    @property
    def d_model(self) -> int:
        """Width of the hidden state."""
        return self.record.d_model

    @property
    def site(self) -> Site:
        """The site at which the rows were read."""
        return Site(self.record.model, self.record.site)

    def __len__(self) -> int:
        return self.record.rows

    def rows(self, indices: Tensor) -> Float[Tensor, "row d_model"]:
        """The chosen rows in float32. ``indices``: (row,) int64."""
        return self._rows[indices].float()

    def sample(self, count: int, seed: int) -> Float[Tensor, "row d_model"]:
        """A uniform sample of rows without replacement, in corpus order; all rows if there are fewer than ``count``."""
        return self.rows(_permutation(len(self), derive(seed, "store-sample"))[:count].sort().values)

    def batches(self, batch_size: int, *, seed: int, skip: int = 0) -> Iterator[Float[Tensor, "row d_model"]]:
        """Endless full batches, in a new seeded order each epoch. ``skip``: number of first batches to leave out.

        Raises CorpusError if the store is smaller than a batch.
        """
        per_epoch = len(self) // batch_size
        if per_epoch == 0:
            raise CorpusError(
                str(self.folder),
                expected=f"at least one batch of {batch_size} rows",
                seen=f"{len(self)} rows",
                fix="collect more tokens or lower the batch size",
            )
        epoch, first = divmod(skip, per_epoch)
        while True:
            order = _permutation(len(self), derive(seed, "epoch", epoch))
            for at in range(first, per_epoch):
                yield self.rows(order[at * batch_size : (at + 1) * batch_size])
            epoch, first = epoch + 1, 0

    def chunks(self, size: int = 8192) -> Iterator[Float[Tensor, "row d_model"]]:
        """All rows once, in corpus order, up to ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self._rows[start : start + size].float()

    @classmethod
    def build(
        cls,
        corpus: Iterable[TokenBatch],
        hidden: Hidden,
        site: Site,
        folder: Path,
        *,
        corpus_name: str,
        d_model: int,
        max_tokens: int,
        progress: Progress = SILENT,
    ) -> ActivationStore:
        """Collect the hidden states of up to ``max_tokens`` valid tokens, or open the store if it is complete.

        ``hidden`` returns (batch, pos, d_model) for a token batch. ``corpus`` must yield the same batches in every call, so
        that an interrupted build can resume. Raises BadConfig if the folder holds another store, BadFile if its files are
        damaged, CorpusError if the corpus has no valid token, BadShape if ``hidden`` returns another shape, StorageError
        on a full disk.
        """
        wanted = StoreRecord(site.model, site.path, corpus_name, d_model, max_tokens)
        record = _resume_point(folder, wanted)
        if record.complete:
            return cls(folder)
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "hidden.bf16").open("ab") as stream:
                size, expected = os.fstat(stream.fileno()).st_size, record.rows * d_model * 2
                if size < expected:
                    raise BadFile(
                        stream.name,
                        expected=f"{expected} bytes of {record.rows} stored rows",
                        seen=f"{size} bytes",
                        fix="delete the folder and build it again",
                    )
                stream.truncate(expected)
        task = progress.start(f"activations at {site.path}", max_tokens, "token")
        progress.advance(task, record.rows)
        _collect(corpus, hidden, folder, record, progress, task)
        progress.finish(task)
        return cls(folder)


def _collect(
    corpus: Iterable[TokenBatch], hidden: Hidden, folder: Path, record: StoreRecord, progress: Progress, task: int
) -> None:
    with storage_errors(folder), (folder / "hidden.bf16").open("ab") as stream:
        for batch in islice(corpus, record.batches, None):
            if record.rows >= record.max_tokens:
                break
            found = valid_rows(batch, hidden(batch), Site(record.model, record.site), record.d_model)
            if record.norm_limit is None:
                record = replace(record, norm_limit=norm_limit(found))
            kept = found.float().norm(dim=1) <= (record.norm_limit or math.inf)
            rows = found[kept][: record.max_tokens - record.rows]
            stream.write(rows.view(torch.int16).numpy().tobytes())
            sinks = record.sinks + int((~kept).sum())
            record = replace(record, rows=record.rows + len(rows), batches=record.batches + 1, sinks=sinks)
            progress.advance(task, len(rows))
            if record.batches % FLUSH_BATCHES == 0:
                stream.flush()
                os.fsync(stream.fileno())
                _write_record(folder, record)
        stream.flush()
        os.fsync(stream.fileno())
    if record.rows == 0:
        raise CorpusError(record.corpus, expected="at least one valid token", seen="none", fix="give a longer corpus")
    _write_record(folder, replace(record, complete=True))


def valid_rows(batch: TokenBatch, hidden: Tensor, site: Site, d_model: int) -> Float[Tensor, "row d_model"]:
    """The hidden states of a batch's valid tokens, bfloat16 on the CPU. Raises BadShape."""
    expected = (*batch.token_ids.shape, d_model)
    if tuple(hidden.shape) != expected:
        raise BadShape(
            f"hidden states at {site}",
            expected=f"shape {expected}",
            seen=f"shape {tuple(hidden.shape)}",
            fix="check the site and the width of the subject model",
        )
    return hidden[torch.from_numpy(np.ascontiguousarray(batch.valid))].to(torch.bfloat16).cpu().contiguous()


def norm_limit(rows: Float[Tensor, "row d_model"]) -> float:
    """The norm above which a row counts as an attention sink, from the rows of the first batch."""
    return sink_limit(rows.float().norm(dim=1))


def _resume_point(folder: Path, wanted: StoreRecord) -> StoreRecord:
    if not (folder / "store.json").exists():
        return wanted
    seen = _read_record(folder)
    identity = replace(seen, rows=0, batches=0, sinks=0, norm_limit=None, complete=False)
    if identity != wanted:
        raise BadConfig(
            str(folder),
            expected=f"a store of {wanted.model}/{wanted.site} over {wanted.corpus}, {wanted.max_tokens} tokens",
            seen=f"a store of {seen.model}/{seen.site} over {seen.corpus}, {seen.max_tokens} tokens",
            fix="choose another folder or delete this one",
        )
    return seen


def _read_record(folder: Path) -> StoreRecord:
    path = folder / "store.json"
    try:
        return StoreRecord(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError as error:
        raise MissingFile(
            str(path), expected="an activation store", seen="no such file", fix="build one, or check the folder"
        ) from error
    except (ValueError, TypeError) as error:
        raise BadFile(
            str(path),
            expected="the record of an activation store",
            seen="other contents",
            fix="delete the folder and build it again",
        ) from error


def _write_record(folder: Path, record: StoreRecord) -> None:
    write_bytes(folder / "store.json", json.dumps(asdict(record), indent=1).encode())


def _permutation(count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).permutation(count))
