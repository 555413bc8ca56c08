"""The judge that compares embeddings: how similar is the explanation to the most similar three-word piece of the window?

Confidence is the highest cosine similarity between the explanation and a piece of the window. With marks, only pieces that
overlap a mark count. Optionally the whole window is the only piece. Confidence is not a probability, so scorers fit its
match cut-off. The judge embeds each distinct text once and caches its vector as float16; texts requested while a batch is
being embedded are collected into the next batch. Reads the model folder; does not know labels.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import BadConfig
from evalkit.protocols import Progress
from evalkit.records import Answer, JudgeItem, Pick, Simulation
from scorers.judges.minilm import Embedder, find_model
from scorers.judges.pieces import competing
from scorers.judges.text_units import spread, units
from scorers.picking import why_no_pick

__all__ = ["EmbeddingJudge"]

Pieces: TypeAlias = Literal["best", "whole"]
# names of the default model: the pulled folder, the folder in the package, and the name on the hub
_DEFAULT_NAMES = ("minilm", "model", "all-MiniLM-L6-v2")
_CHUNK = 1 << 14  # texts tokenized at a time
_SHARPNESS = 4  # exponent: cosines differ little between tokens, whereas features fire strongly on few tokens


class EmbeddingJudge:
    """Compares embeddings of all-MiniLM-L6-v2.

    ``model``: the folder of the model; by default, ``scorers.judges.minilm.find_model`` searches for it.
    ``dtype``: "bfloat16" or "float32".
    ``batch_size``: rows; affects speed, never a result.
    ``device``: "auto", "cpu" or "cuda".
    ``pieces``: "best" (pieces of three words) or "whole" (the window as one text, without support for marks).

    Raises BadConfig, MissingFile.
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
        pieces: Pieces = "best",
    ) -> None:
        if pieces not in ("best", "whole"):
            raise BadConfig(
                "pieces of judge 'embedding'", expected="best or whole", seen=repr(pieces), fix="use one of these"
            )
        self.model, self.dtype, self.batch_size, self.device = find_model(model), dtype, batch_size, device
        self.pieces = pieces
        self._embedder: Embedder | None = None
        self._row_of: dict[str, int] = {}
        self._row_of_ids: dict[tuple[int, ...], int] = {}
        self._vectors: NDArray[np.float16] = np.empty((0, 0), dtype=np.float16)
        self._lock = threading.Lock()
        self._waiting: SimpleQueue[list[str]] = SimpleQueue()

    @property
    def variant(self) -> str | None:
        """The name of the model in the judge's records; None for all-MiniLM-L6-v2."""
        name = Path(self.model).name
        return None if name in _DEFAULT_NAMES else name

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        """One answer per item, in their order. Raises MissingFile if the model cannot be found."""
        if not explanation.strip():
            return [Answer(None, reason="the explanation is empty") for _ in items]
        candidates = [self._candidates(item) for item in items]
        await self._embed([explanation, *(piece for pieces in candidates for piece in pieces)])
        similarities = iter(self._best(explanation, [pieces for pieces in candidates if pieces]))
        return [
            Answer(None, confidence=float(next(similarities))) if pieces else Answer(None, reason=self._why_none(item))
            for item, pieces in zip(items, candidates, strict=True)
        ]

    async def pick(self, groups: Sequence[Sequence[JudgeItem]]) -> Sequence[Pick]:
        """The text of each group with the lowest mean similarity to the others. Compares whole texts; ignores marks."""
        await self._embed(item.text for group in groups if why_no_pick(group) is None for item in group)
        return [self._pick(group) for group in groups]

    async def simulate(self, explanation: str, windows: Sequence[Sequence[str]]) -> Sequence[Simulation]:
        """Per token, the fourth power of the similarity of its word or punctuation; 0 for tokens outside of both."""
        if not explanation.strip():
            return [Simulation(None, "the explanation is empty") for _ in windows]
        found = [units("".join(window)) for window in windows]
        await self._embed([explanation, *(unit for one in found for unit, _ in one)])
        return [
            Simulation(spread(window, [span for _, span in one], (np.maximum(similarity, 0) ** _SHARPNESS).tolist()))
            for window, one in zip(windows, found, strict=True)
            for similarity in (self._best(explanation, [[unit] for unit, _ in one]),)
        ]

    async def prepare(
        self, items: Sequence[JudgeItem], explanations: Sequence[str] = (), progress: Progress | None = None
    ) -> None:
        """Embed all texts that these questions need, in large batches, so that ``judge`` only has to compare vectors."""
        needed = dict.fromkeys(explanation for explanation in explanations if explanation.strip())
        for item in items:
            needed.update(dict.fromkeys(self._candidates(item)))
        await self._embed(needed, progress)

    def _candidates(self, item: JudgeItem) -> list[str]:
        """The texts that are compared with the explanation; empty if the item cannot be answered."""
        if not item.text:
            return []
        if self.pieces == "best":
            return competing(item.text, item.marks)
        return [item.text] if item.marks is None else []

    def _why_none(self, item: JudgeItem) -> str:
        if not item.text:
            return "the text is empty"
        return "nothing is marked" if self.pieces == "best" else "marks are not supported with pieces=whole"

    async def _embed(self, texts: Iterable[str], progress: Progress | None = None) -> None:
        missing = list(dict.fromkeys(text for text in texts if text not in self._row_of))
        if missing:
            self._waiting.put(missing)
            await asyncio.to_thread(self._embed_missing, missing, progress)

    def _embed_missing(self, texts: Sequence[str], progress: Progress | None) -> None:
        """Embed these texts and all others that wait, and cache their vectors. Texts with equal token ids share a row."""
        with self._lock:
            texts = self._missing(texts)
            if not texts:
                return  # another call has embedded them in the meantime
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
            # must be last: readers hold no lock, so a text may get its row only after the vector is stored
            self._row_of.update((text, self._row_of_ids[ids]) for text, ids in ids_of.items())

    def _missing(self, texts: Sequence[str]) -> list[str]:
        wanted = dict.fromkeys(texts)
        while True:
            try:
                wanted.update(dict.fromkeys(self._waiting.get_nowait()))
            except Empty:
                return [text for text in wanted if text not in self._row_of]

    def _store(self, first_row: int, vectors: NDArray[np.float32]) -> None:
        needed = first_row + len(vectors)
        if needed > len(self._vectors):
            grown = np.empty((max(needed, 2 * len(self._vectors)), vectors.shape[1]), dtype=np.float16)
            if first_row:
                grown[:first_row] = self._vectors[:first_row]
            self._vectors = grown
        self._vectors[first_row:needed] = vectors

    def _best(self, explanation: str, candidates: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        """For each list of pieces, the highest cosine similarity of the explanation with one of them."""
        if not candidates:
            return np.empty(0, dtype=np.float32)
        vectors = self._vectors
        rows = [self._row_of[piece] for pieces in candidates for piece in pieces]
        target = vectors[self._row_of[explanation]].astype(np.float32)
        similarity = (vectors[rows].astype(np.float32) * target).sum(axis=1)
        starts = np.cumsum([0, *(len(pieces) for pieces in candidates[:-1])])
        best: NDArray[np.float32] = np.maximum.reduceat(similarity, starts)
        return best

    def _pick(self, group: Sequence[JudgeItem]) -> Pick:
        if (reason := why_no_pick(group)) is not None:
            return Pick(None, reason)
        vectors = self._vectors[[self._row_of[item.text] for item in group]].astype(np.float64)  # (text, width)
        similarity = vectors @ vectors.T
        np.fill_diagonal(similarity, 0.0)
        return Pick(int(similarity.sum(axis=1).argmin()))
