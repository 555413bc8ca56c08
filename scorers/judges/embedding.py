"""The judge that compares meanings: how near is the explanation to the best three-word piece of the window?

Confidence is the cosine similarity of the two embeddings, the highest over the window's pieces; with marks, over the
pieces that overlap a mark. It is no probability, so scorers fit its match cut-off. Each distinct piece is embedded once
in the life of the judge and kept as float16. Reads the model folder; knows nothing of labels.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evalkit.protocols import Progress
from evalkit.records import Answer, JudgeItem
from scorers.judges.minilm import Embedder, find_model
from scorers.judges.pieces import competing

__all__ = ["EmbeddingJudge"]

_DEFAULT_NAMES = ("minilm", "model", "all-MiniLM-L6-v2")  # as pulled, as packaged, as on the hub
_CHUNK = 1 << 14  # texts tokenized at a time


class EmbeddingJudge:
    """Embeds with all-MiniLM-L6-v2.

    ``model``: its folder (default: wherever it is found, see ``scorers.judges.minilm.find_model``). ``dtype``: bfloat16 or
    float32. ``batch_size``: rows; changes speed, never a result. ``device``: auto, cpu, cuda.
    """

    name = "embedding"
    version = "1"
    probabilistic = False

    def __init__(
        self,
        model: str | Path | None = None,
        dtype: str = "bfloat16",
        batch_size: int = 128,
        device: str = "auto",
    ) -> None:
        self.model, self.dtype, self.batch_size, self.device = find_model(model), dtype, batch_size, device
        self._embedder: Embedder | None = None
        self._row_of: dict[str, int] = {}
        self._row_of_ids: dict[tuple[int, ...], int] = {}
        self._vectors: NDArray[np.float16] = np.empty((0, 0), dtype=np.float16)
        self._lock = threading.Lock()

    @property
    def variant(self) -> str | None:
        """The name of the model when it is another than all-MiniLM-L6-v2; records of the judge then carry it."""
        name = Path(self.model).name
        return None if name in _DEFAULT_NAMES else name

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        """As many answers as items, in their order. Raises MissingFile where the model cannot be found."""
        if not explanation.strip():
            return [Answer(None, reason="the explanation is empty") for _ in items]
        candidates = [competing(item.text, item.marks) if item.text else [] for item in items]
        await self._embed([explanation, *(piece for pieces in candidates for piece in pieces)])
        similarities = iter(self._best(explanation, [pieces for pieces in candidates if pieces]))
        return [
            Answer(None, confidence=float(next(similarities)))
            if pieces
            else Answer(None, reason="nothing is marked" if item.text else "the text is empty")
            for item, pieces in zip(items, candidates, strict=True)
        ]

    async def prepare(
        self, items: Sequence[JudgeItem], explanations: Sequence[str] = (), progress: Progress | None = None
    ) -> None:
        """Embed everything these questions will need, in large batches; ``judge`` then only compares."""
        needed = dict.fromkeys(explanation for explanation in explanations if explanation.strip())
        for item in items:
            if item.text:
                needed.update(dict.fromkeys(competing(item.text, item.marks)))
        await self._embed(needed, progress)

    async def _embed(self, texts: Iterable[str], progress: Progress | None = None) -> None:
        missing = list(dict.fromkeys(text for text in texts if text not in self._row_of))
        if missing:
            await asyncio.to_thread(self._embed_missing, missing, progress)

    def _embed_missing(self, texts: Sequence[str], progress: Progress | None) -> None:
        """Add rows for these texts to the cache. Texts of equal token ids share a row."""
        with self._lock:
            if self._embedder is None:
                self._embedder = Embedder(self.model, self.dtype, self.batch_size, self.device)
            embedder = self._embedder
            ids_of: dict[str, tuple[int, ...]] = {}
            for first in range(0, len(texts), _CHUNK):
                chunk = texts[first : first + _CHUNK]
                ids_of.update(zip(chunk, embedder.token_ids(chunk), strict=True))
            new = [ids for ids in dict.fromkeys(ids_of.values()) if ids not in self._row_of_ids]
            task = progress.start("embed pieces", len(new), "pieces") if progress else 0
            vectors = embedder.embed(
                new, (lambda rows: progress.advance(task, rows)) if progress else lambda rows: None
            )
            if progress:
                progress.finish(task)
            first_row = len(self._row_of_ids)
            self._store(first_row, vectors)
            self._row_of_ids.update(zip(new, range(first_row, first_row + len(new)), strict=True))
            # last: a text with a row has its vector in place, so readers need no lock
            self._row_of.update((text, self._row_of_ids[ids]) for text, ids in ids_of.items())

    def _store(self, first_row: int, vectors: NDArray[np.float32]) -> None:
        needed = first_row + len(vectors)
        if needed > len(self._vectors):
            grown = np.empty((max(needed, 2 * len(self._vectors)), vectors.shape[1]), dtype=np.float16)
            if first_row:
                grown[:first_row] = self._vectors[:first_row]
            self._vectors = grown
        self._vectors[first_row:needed] = vectors

    def _best(self, explanation: str, candidates: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """The highest cosine similarity of each list of pieces. Row by row, so other items change no bit of it."""
        if not candidates:
            return np.empty(0, dtype=np.float32)
        vectors = self._vectors
        rows = [self._row_of[piece] for pieces in candidates for piece in pieces]
        target = vectors[self._row_of[explanation]].astype(np.float32)
        similarity = (vectors[rows].astype(np.float32) * target).sum(axis=1)
        starts = np.cumsum([0, *(len(pieces) for pieces in candidates[:-1])])
        best: NDArray[np.float32] = np.maximum.reduceat(similarity, starts)
        return best
