"""A tokenised corpus on disk: contexts of one length, memory-mapped, as masked batches.

Reads the folder that ``evalkit.corpus.tokenisation`` writes: ``tokens.npy`` (contexts, positions) uint32,
``documents.npy`` (contexts,) int64, ``lengths.npy`` (contexts,) int64 and ``corpus.json``. Knows nothing of tokenizers,
models, features or pools.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evalkit.errors import BadFile, CorpusError, MissingFile
from evalkit.records import TokenBatch
from evalkit.util.sealed_files import BlockChecks, open_sealed, read_sealed_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Corpus", "CorpusSettings"]

_REDO = "delete the folder of the corpus and run again"


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """Everything that determines the tokens of a corpus: equal settings mean equal folders.

    digest: identifies the content of the source
    tokenizer: fingerprint of the tokenizer
    special_ids: masked at every position, so that no window crosses the separators of a token matrix that packs several
        documents into a row
    """

    source: str
    digest: str
    tokenizer: str
    context_length: int
    text_field: str
    split: str
    max_tokens: int | None
    add_bos: bool
    special_ids: tuple[int, ...]
    bos_id: int | None

    def key(self) -> dict[str, Any]:
        """The settings that must agree for a folder to be reused: all but the name of the source."""
        return {name: value for name, value in asdict(self).items() if name != "source"}


def _load(path: Path) -> NDArray[np.int64]:
    with open_sealed(path, fix=_REDO) as stream:
        found: NDArray[np.int64] = np.load(stream, allow_pickle=False)
    return found


class Corpus:
    """Contexts of one length with document ids, memory-mapped from a folder."""

    def __init__(
        self,
        settings: CorpusSettings,
        tokens: NDArray[np.uint32],
        documents: NDArray[np.int64],
        lengths: NDArray[np.int64],
        *,
        skip_first: int = 1,
        checks: BlockChecks | None = None,
    ) -> None:
        self.settings = settings
        self._checks = checks  # of the file behind ``tokens``, whose rows are verified when they are read
        self.skip_first = skip_first
        self.tokens = tokens  # (N, T)
        self.documents = documents  # (N,)
        self.lengths = lengths  # (N,)

    @classmethod
    def open(cls, folder: Path, *, skip_first: int = 1) -> Corpus:
        """Open a folder written by ``tokenize_corpus``; batches mask the first ``skip_first`` positions.

        Raises MissingFile, BadFile.
        """
        if not (folder / "corpus.json").is_file():
            raise MissingFile(
                str(folder),
                expected="the files of a tokenised corpus",
                seen="no corpus.json in it",
                fix="tokenise the corpus again",
            )
        checks = BlockChecks.of(folder / "tokens.npy", fix=_REDO)
        checks.check(0, 1)  # the block of the header
        try:
            stored = read_sealed_json(folder / "corpus.json", expected="the files of a tokenised corpus", fix=_REDO)[
                "settings"
            ]
            stored["special_ids"] = tuple(stored["special_ids"])
            settings = CorpusSettings(**stored)
            tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
            documents, lengths = _load(folder / "documents.npy"), _load(folder / "lengths.npy")
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise BadFile(
                str(folder), expected="the files of a tokenised corpus", seen=str(error)[:200], fix=_REDO
            ) from error
        if tokens.ndim != 2 or not len(tokens) == len(documents) == len(lengths):
            raise BadFile(
                str(folder),
                expected="one document id and one length per context",
                seen=f"{tokens.shape}, {documents.shape}, {lengths.shape}",
                fix=_REDO,
            )
        return cls(settings, tokens, documents, lengths, skip_first=skip_first, checks=checks)

    @property
    def context_length(self) -> int:
        """Positions per context."""
        return int(self.tokens.shape[1])

    @property
    def n_contexts(self) -> int:
        """Rows of the token matrix."""
        return len(self.tokens)

    @cached_property
    def n_documents(self) -> int:
        """Documents with at least one context."""
        return len(np.unique(self.documents))

    @cached_property
    def n_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.lengths.sum())

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> TokenBatch:
        """The contexts of the given rows. Raises BadFile where the file of the tokens is damaged.

        ``valid`` is False on special tokens, on padding, and on the first ``skip_first`` positions.
        """
        index = np.asarray(rows, dtype=np.int64).reshape(-1)
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < self.n_contexts:
            raise CorpusError(
                self.settings.source,
                expected=f"rows from 0 to {self.n_contexts - 1}",
                seen=f"rows from {index.min()} to {index.max()}",
                fix="request rows that the corpus has",
            )
        self._verify(index)
        ids = np.asarray(self.tokens[index], dtype=np.int64)  # (B, T)
        position = np.arange(self.context_length)
        valid = (position < self.lengths[index][:, None]) & (position >= self.skip_first)
        valid &= ~np.isin(ids, np.asarray(self.settings.special_ids, dtype=np.int64))
        return TokenBatch(ids, valid, index)

    def _verify(self, rows: NDArray[np.int64]) -> None:
        if self._checks is None:
            return
        width = self.tokens.itemsize * self.context_length  # bytes of a row
        first = self._checks.size - self.tokens.nbytes  # after the header
        for row in np.unique(rows).tolist():
            self._checks.check(first + row * width, first + (row + 1) * width)

    def batches(self, size: int) -> Iterator[TokenBatch]:
        """All contexts in order, ``size`` at a time."""
        for start in range(0, self.n_contexts, size):
            yield self.batch(np.arange(start, min(start + size, self.n_contexts)))
