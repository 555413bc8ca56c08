"""Tokenises a corpus: turns text or a token matrix into a folder of contexts of one length.

Streams the text, so it is never in memory as a whole. Contexts never cross documents. The remainder of a document becomes a
padded context if it has at least ``MIN_TOKENS`` tokens, else it is dropped. With BOS, each context starts with it. The
folder is written under a temporary name and renamed when complete. Knows the tokenizer; nothing of models, features or
pools.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evalkit.corpus.contexts import Corpus, CorpusSettings
from evalkit.corpus.readers import Piece, locate, read_pieces
from evalkit.corpus.storage import CorpusWriter, read_matrix, tokenizer_fingerprint
from evalkit.errors import BadConfig, CorpusError, RunMismatch
from evalkit.util.progress import SILENT

if TYPE_CHECKING:
    from evalkit.protocols import Progress

__all__ = ["MIN_TOKENS", "tokenize_corpus"]

_LOG = logging.getLogger(__name__)
MIN_TOKENS = 32  # a shorter remainder of a document is dropped
_TEXTS = 64  # pieces tokenised at once
_CHARACTERS = 2_000_000  # and at most about this many characters at once


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
    """Tokenise a source into contexts in ``folder``, or open the folder if it already holds exactly this corpus.

    source: a .txt file, a folder or pattern of them, .jsonl, .parquet, a data set saved to disk, a hub id,
        ``bundled:NAME``, or a token matrix (.npy, .pt, .safetensors) whose rows are used unchanged, each a document
    context_length: positions per context; a token matrix keeps its own
    text_field: the field of .jsonl and table rows that holds the text
    split, revision: of a data set
    max_tokens: keep only the first contexts, up to this many tokens
    add_bos: start each context with BOS; None does what the tokenizer does by default
    skip_first: positions of each context to mask in batches; not stored on disk

    Raises MissingFile, BadFile, BadShape, CorpusError (no context, or ids outside the vocabulary), RunMismatch (the
    folder holds another corpus), StorageError (disk full; nothing is left behind).
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
            _tell_of_bos(located.files[0], settings, asked=add_bos)
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
            fix="use another folder, or delete this one",
        )
    return corpus


def _wants_bos(tokenizer: Any, add_bos: bool | None) -> bool:
    if add_bos is None:
        ids = tokenizer("a")["input_ids"]
        return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    if add_bos and tokenizer.bos_token_id is None:
        raise BadConfig(
            "prepend_bos",
            expected="a tokenizer with a BOS token",
            seen="none",
            fix="use --no-prepend-bos, which reads contexts without it",
        )
    return add_bos


def _special_ids(tokenizer: Any) -> tuple[int, ...]:
    """BOS, EOS, padding and every other control token; a feature is neither active nor inactive on them."""
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


def _tell_of_bos(path: Path, settings: CorpusSettings, *, asked: bool | None) -> None:
    """A warning where rows of a token matrix, which are used unchanged, do not begin as the run asks for."""
    if asked is None:
        return
    begin = np.asarray(read_matrix(path)[:, 0]) == settings.bos_id
    if (begin != asked).any():
        words = "do not all begin" if asked else "begin"
        _LOG.warning("%s: its rows %s with BOS and are used unchanged", path, words)


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
                fix="use the subject model whose tokenizer produced the matrix",
            )
        for offset, row in enumerate(part):
            writer.add(row[None], start + offset)
        progress.advance(task, part.size)
    progress.finish(task)


def _cut(
    pieces: Iterator[Piece], tokenizer: Any, writer: CorpusWriter, settings: CorpusSettings, progress: Progress
) -> None:
    """Tokenise documents piece by piece and write each context as soon as it is full."""
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
            fix="use a corpus with longer documents" if n_documents else "use a corpus that is not empty",
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
    """Cuts the ids of successive documents into contexts, until ``max_tokens`` are written."""

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
        """Add ids of the current document."""
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
        """Write the remainder of the document if it is long enough, and start the next."""
        if not self.full and len(self._held) >= self._least:
            length = len(self._held) + len(self._bos)
            self.full = self._limit is not None and self._writer.n_tokens + length > self._limit
            if not self.full:
                self._writer.add(np.asarray([[*self._bos, *self._held]], dtype=np.int64), self._document, length)
        self.longest = max(self.longest, self._length)
        self._held, self._length = [], 0
        self._document += 1
