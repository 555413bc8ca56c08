"""The corpus: text or token matrices in, contexts of fixed length on disk out.

Reads a source (see corpus_readers), writes a folder: ``tokens.npy`` (contexts, positions) uint32, ``documents.npy``
(contexts,) int64, ``lengths.npy`` (contexts,) int64, ``corpus.json``. Streamed both ways: text is never held as a
whole, tokens are memory-mapped. Knows the tokenizer, nothing of models, features or pools.

Contexts never cross documents. What is left of a document at its end becomes a padded context if it has at least 32
tokens, else it is dropped. With BOS, each context starts with it. ``max_tokens`` keeps the first contexts in the order
of the source. The folder is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evalkit.corpus.readers import Piece, locate, read_pieces
from evalkit.corpus.storage import CorpusWriter, read_matrix, tokenizer_fingerprint
from evalkit.errors import BadConfig, BadFile, CorpusError, MissingFile, RunMismatch
from evalkit.records import TokenBatch
from evalkit.util.progress import SILENT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from evalkit.protocols import Progress

__all__ = ["MIN_TOKENS", "Corpus", "CorpusSettings", "tokenize_corpus"]

MIN_TOKENS = 32  # a shorter rest of a document is dropped
_TEXTS = 64  # pieces tokenised at once
_CHARACTERS = 2_000_000  # and at most about this many characters


@dataclass(frozen=True, slots=True)
class CorpusSettings:
    """What decides the tokens of a corpus: the same settings mean the same folder.

    ``digest`` identifies the source's content, ``tokenizer`` the tokenizer. ``special_ids`` are masked wherever they
    stand, so that no window can cross the separators of a token matrix that packs several documents into a row.
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
        """The settings that must agree; the name of the source is only for reading."""
        return {name: value for name, value in asdict(self).items() if name != "source"}


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
    ) -> None:
        self.settings = settings
        self.skip_first = skip_first
        self.tokens = tokens  # (N, T)
        self.documents = documents  # (N,)
        self.lengths = lengths  # (N,)

    @classmethod
    def open(cls, folder: Path, *, skip_first: int = 1) -> Corpus:
        """Open what ``tokenize_corpus`` wrote; the first ``skip_first`` positions are masked. MissingFile, BadFile."""
        if not (folder / "corpus.json").is_file():
            raise MissingFile(
                str(folder), expected="a corpus folder", seen="no corpus.json in it", fix="tokenise the corpus again"
            )
        try:
            stored = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))["settings"]
            stored["special_ids"] = tuple(stored["special_ids"])
            settings = CorpusSettings(**stored)
            tokens = np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
            documents = np.load(folder / "documents.npy", allow_pickle=False)
            lengths = np.load(folder / "lengths.npy", allow_pickle=False)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise BadFile(
                str(folder), expected="a corpus folder", seen=str(error)[:200], fix="delete it and tokenise again"
            ) from error
        if tokens.ndim != 2 or not len(tokens) == len(documents) == len(lengths):
            raise BadFile(
                str(folder),
                expected="one document id and one length per context",
                seen=f"{tokens.shape}, {documents.shape}, {lengths.shape}",
                fix="delete it and tokenise again",
            )
        return cls(settings, tokens, documents, lengths, skip_first=skip_first)

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
        """The contexts of the given rows.

        ``valid`` is False on special tokens wherever they stand, on padding, and on the first ``skip_first`` positions.
        """
        index = np.asarray(rows, dtype=np.int64).reshape(-1)
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < self.n_contexts:
            raise CorpusError(
                self.settings.source,
                expected=f"rows from 0 to {self.n_contexts - 1}",
                seen=f"rows from {index.min()} to {index.max()}",
                fix="ask for contexts that the corpus has",
            )
        ids = np.asarray(self.tokens[index], dtype=np.int64)  # (B, T)
        position = np.arange(self.context_length)
        valid = (position < self.lengths[index][:, None]) & (position >= self.skip_first)
        valid &= ~np.isin(ids, np.asarray(self.settings.special_ids, dtype=np.int64))
        return TokenBatch(ids, valid, index)

    def batches(self, size: int) -> Iterator[TokenBatch]:
        """All contexts in order, ``size`` at a time."""
        for start in range(0, self.n_contexts, size):
            yield self.batch(np.arange(start, min(start + size, self.n_contexts)))


def tokenize_corpus(
    source: str | Path,
    tokenizer: Any,
    folder: Path,
    *,
    context_length: int = 128,
    text_field: str = "text",
    split: str = "train",
    max_tokens: int | None = None,
    add_bos: bool | None = None,
    skip_first: int = 1,
    revision: str | None = None,
    progress: Progress = SILENT,
) -> Corpus:
    """Cut a source into contexts in ``folder``, or open the folder if it holds just that already.

    ``source``: a .txt file, a folder or pattern of them, .jsonl, .parquet (``text_field`` names the text), a data set
    saved to disk or a hub id (``split``, ``revision``), ``bundled:NAME``, or a token matrix (.npy, .pt, .safetensors)
    that is used as it is, each row a context and a document. ``add_bos`` None does what the tokenizer itself does.
    ``skip_first`` positions of every context are masked in its batches; it changes nothing on disk.

    Raises MissingFile, BadFile, BadShape, CorpusError (nothing left to cut, ids outside the vocabulary), RunMismatch
    (the folder holds another corpus), StorageError (disk full; nothing is left behind).
    """
    located = locate(source)
    settings = CorpusSettings(
        source=str(source),
        digest=located.digest(split=split, revision=revision),
        tokenizer=tokenizer_fingerprint(tokenizer),
        context_length=context_length,
        text_field=text_field,
        split=split,
        max_tokens=max_tokens,
        add_bos=_wants_bos(tokenizer, add_bos),
        bos_id=tokenizer.bos_token_id,
        special_ids=_special_ids(tokenizer),
    )
    _check_settings(settings)
    if folder.exists():
        return _reopen(folder, settings, skip_first)
    with CorpusWriter(folder, context_length=context_length, pad_id=0) as writer:
        if located.kind == "matrix":
            _copy_matrix(located.files[0], writer, settings, len(tokenizer), progress)
        else:
            pieces = read_pieces(located, text_field=text_field, split=split, revision=revision)
            _cut(pieces, tokenizer, writer, settings, progress)
        writer.finish({"settings": asdict(settings)})
    return Corpus.open(folder, skip_first=skip_first)


def _reopen(folder: Path, settings: CorpusSettings, skip_first: int) -> Corpus:
    corpus = Corpus.open(folder, skip_first=skip_first)
    wanted, held = settings.key(), corpus.settings.key()
    if differing := [name for name in wanted if wanted[name] != held[name]]:
        name = differing[0]
        raise RunMismatch(
            str(folder),
            expected=f"the corpus {settings.source} with {name} {wanted[name]}",
            seen=f"{corpus.settings.source} with {name} {held[name]}",
            fix="name another folder, or delete this one",
        )
    return corpus


def _wants_bos(tokenizer: Any, add_bos: bool | None) -> bool:
    if add_bos is None:
        ids = tokenizer("a")["input_ids"]
        return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    if add_bos and tokenizer.bos_token_id is None:
        raise BadConfig(
            "add_bos", expected="a tokenizer with a BOS token", seen="none", fix="leave add_bos out, or set it to false"
        )
    return add_bos


def _special_ids(tokenizer: Any) -> tuple[int, ...]:
    """BOS, EOS, padding and every other control token: never counted as active or inactive."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return tuple(sorted({*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}))


def _check_settings(settings: CorpusSettings) -> None:
    least = 2 if settings.add_bos else 1
    if settings.context_length < least:
        raise BadConfig(
            "context_length", expected=f"at least {least}", seen=str(settings.context_length), fix="use 128"
        )
    if settings.max_tokens is not None and settings.max_tokens < settings.context_length:
        raise CorpusError(
            "max_tokens",
            expected=f"at least one context of {settings.context_length} tokens",
            seen=str(settings.max_tokens),
            fix="raise max_tokens",
        )


def _copy_matrix(
    path: Path, writer: CorpusWriter, settings: CorpusSettings, vocab_size: int, progress: Progress
) -> None:
    matrix = read_matrix(path)
    rows, width = matrix.shape
    writer.set_width(width)
    if settings.max_tokens is not None:
        rows = min(rows, max(1, settings.max_tokens // width))
    task = progress.start("copying the token matrix", rows * width, "tokens")
    for start in range(0, rows, 4096):
        part = np.asarray(matrix[start : min(start + 4096, rows)])
        low, high = int(part.min()), int(part.max())
        if low < 0 or high >= vocab_size:
            raise CorpusError(
                str(path),
                expected=f"token ids from 0 to {vocab_size - 1}",
                seen=str(low if low < 0 else high),
                fix="use the tokenizer (the model) that the matrix was made with",
            )
        for offset, row in enumerate(part):
            writer.add(row[None], start + offset)
        progress.advance(task, part.size)
    progress.finish(task)


def _cut(
    pieces: Iterator[Piece], tokenizer: Any, writer: CorpusWriter, settings: CorpusSettings, progress: Progress
) -> None:
    """Tokenise the pieces of documents and write whole contexts as they fill up."""
    task = progress.start("tokenising the corpus", settings.max_tokens, "tokens")
    cutter = _Cutter(writer, settings)
    n_documents = 0
    for texts, firsts in _grouped(pieces):
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        before = writer.n_tokens
        for ids, first in zip(encoded, firsts, strict=True):
            if first:
                cutter.end_document()
                n_documents += 1
            cutter.extend(ids)
        progress.advance(task, writer.n_tokens - before)
        if cutter.full:
            break
    cutter.end_document()
    progress.finish(task)
    if not writer.n_contexts:
        raise CorpusError(
            settings.source,
            expected=f"a document of at least {min(MIN_TOKENS, settings.context_length)} tokens",
            seen=f"{n_documents} documents, the longest of {cutter.longest} tokens",
            fix="use a longer corpus" if n_documents else "use a corpus that is not empty",
        )


def _grouped(pieces: Iterator[Piece]) -> Iterator[tuple[list[str], list[bool]]]:
    texts, firsts, size = list[str](), list[bool](), 0
    for text, first in pieces:
        texts.append(text)
        firsts.append(first)
        size += len(text)
        if len(texts) == _TEXTS or size >= _CHARACTERS:
            yield texts, firsts
            texts, firsts, size = [], [], 0
    if texts:
        yield texts, firsts


class _Cutter:
    """Cuts the ids of one document after the other into contexts, until ``max_tokens`` are written."""

    def __init__(self, writer: CorpusWriter, settings: CorpusSettings) -> None:
        self._writer = writer
        self._bos = [settings.bos_id] if settings.add_bos else []
        self._room = settings.context_length - len(self._bos)  # text tokens per context
        self._least = min(MIN_TOKENS, self._room)
        self._limit = settings.max_tokens
        self._held: list[int] = []
        self._document = -1
        self._length = 0
        self.longest = 0
        self.full = False

    def extend(self, ids: Sequence[int]) -> None:
        """More ids of the current document."""
        if self.full:
            return
        self._held.extend(ids)
        self._length += len(ids)
        n_whole = len(self._held) // self._room
        if self._limit is not None:
            n_left = (self._limit - self._writer.n_tokens) // (self._room + len(self._bos))
            self.full = n_whole > n_left
            n_whole = min(n_whole, n_left)
        if n_whole:
            rows = np.asarray(self._held[: n_whole * self._room], dtype=np.int64).reshape(n_whole, self._room)
            bos = np.tile(np.asarray(self._bos, dtype=np.int64), (n_whole, 1))
            self._writer.add(np.concatenate([bos, rows], axis=1), self._document)
            del self._held[: n_whole * self._room]

    def end_document(self) -> None:
        """Write the rest of the document if it is long enough, and begin the next."""
        if not self.full and len(self._held) >= self._least:
            length = len(self._held) + len(self._bos)
            self.full = self._limit is not None and self._writer.n_tokens + length > self._limit
            if not self.full:
                self._writer.add(np.asarray([[*self._bos, *self._held]], dtype=np.int64), self._document, length)
        self.longest = max(self.longest, self._length)
        self._held, self._length = [], 0
        self._document += 1
