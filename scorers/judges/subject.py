"""The judge that uses the subject model itself: how much more probable does the explanation make the window?

The model is not prompted with a question. It reads pairs of a description and a text (``prompts/subject_v1.toml``), then
the explanation and the window, and the judge uses the probabilities of the window's tokens. Confidence, in nats per token
of the window:

    mean over its tokens of  log p(token | pairs, explanation, tokens before)  −  log p(token | pairs, "", tokens before)

The second term, with the same pairs and an empty description, removes the base rate of the window. With
``direction="explanation"``, the judge uses the probabilities of the explanation's tokens, after the same pairs with each
text first:

    mean over its tokens of  log p(token | pairs, window, tokens before)  −  log p(token | pairs, "", tokens before)

Confidence is not a probability, so scorers fit its match cut-off. The judge caches the term with the empty description.
Reads the model and the prompt file; does not know labels. Windows are shown without marks.
"""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from evalkit.errors import BadConfig, MissingFile
from evalkit.markup import quoted
from evalkit.protocols import Progress
from evalkit.records import Answer, JudgeItem
from scorers.judges.causal import CausalModel

__all__ = ["SubjectJudge", "before_explanation", "before_text"]

Direction: TypeAlias = Literal["text", "explanation"]
Ids: TypeAlias = tuple[int, ...]


@cache
def _pairs() -> list[dict[str, str]]:
    text = files("scorers.judges").joinpath("prompts/subject_v1.toml").read_text(encoding="utf-8")
    found: list[dict[str, str]] = tomllib.loads(text)["pairs"]
    return found


def before_text(explanation: str) -> str:
    """The prompt that precedes the window: the pairs with the description first, then the explanation."""
    pairs = [f"Description: {quoted(pair['description'])}\nText:{pair['text']}\n\n" for pair in _pairs()]
    return "".join([*pairs, f"Description: {quoted(explanation)}\nText:"])


def before_explanation() -> str:
    """The prompt that precedes window and explanation: the pairs with the text first."""
    pairs = [f"Text: {quoted(pair['text'])}\nDescription: {quoted(pair['description'])}\n\n" for pair in _pairs()]
    return "".join([*pairs, "Text:"])


class SubjectJudge:
    """Measures how much an explanation changes the subject model's log-probabilities.

    ``model``: a folder, a ``.gguf`` file, the name of a pulled model or a hub id.
    ``direction``: whose probability is used, that of the window's "text" or that of the "explanation".
    ``dtype``: "bfloat16" or "float32".
    ``device``: "auto", "cpu" or "cuda".
    ``revision``: commit, branch or tag on the hub.
    ``batch_size``: rows; affects speed, never a result.

    Raises BadConfig, MissingFile.
    """

    name = "subject"
    version = "1"
    main_option = "direction"
    uses_subject = True
    probabilistic = False

    def __init__(
        self,
        model: str | Path,
        dtype: str = "bfloat16",
        device: str = "auto",
        revision: str | None = None,
        direction: Direction = "text",
        batch_size: int = 16,
    ) -> None:
        if direction not in ("text", "explanation"):
            raise BadConfig(
                "direction of judge 'subject'",
                expected="text or explanation",
                seen=repr(direction),
                fix="use one of these",
            )
        self.model, self.dtype, self.device, self.revision = _find(str(model)), dtype, device, revision
        self.direction, self.batch_size = direction, batch_size
        self._loaded: CausalModel | None = None
        self._neutral: dict[str, float | None] = {}
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="subject")  # one forward pass at a time

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        """One answer per item, in their order. Raises MissingFile or BadFile if the model cannot be loaded."""
        if not explanation.strip():
            return [Answer(None, reason="the explanation is empty") for _ in items]
        texts = list(dict.fromkeys(item.text for item in items if item.text and item.marks is None))
        gains = self._text_gains if self.direction == "text" else self._explanation_gains
        found = dict(zip(texts, await self._at_work(gains, explanation, texts), strict=True)) if texts else {}
        return [_answer(item, found.get(item.text)) for item in items]

    async def prepare(
        self, items: Sequence[JudgeItem], explanations: Sequence[str] = (), progress: Progress | None = None
    ) -> None:
        """Compute the term with the empty description for every window, in large batches, and cache it."""
        texts = list(dict.fromkeys(item.text for item in items if item.text and item.marks is None))
        if self.direction == "text" and texts:
            await self._at_work(self._add_neutral, texts, progress)

    async def _at_work(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)

    @property
    def _model(self) -> CausalModel:
        if self._loaded is None:
            self._loaded = CausalModel(self.model, self.dtype, self.device, self.revision, self.batch_size)
        return self._loaded

    def _text_gains(self, explanation: str, texts: Sequence[str]) -> list[float | None]:
        """The gain of each text in nats per token, or None if it does not fit the model's context."""
        self._add_neutral(texts, None)
        told = self._means(before_text(explanation), [((), ids) for ids in self._model.ids(texts)])
        return [_minus(one, self._neutral[text]) for one, text in zip(told, texts, strict=True)]

    def _add_neutral(self, texts: Sequence[str], progress: Progress | None) -> None:
        new = [text for text in texts if text not in self._neutral]
        task = progress.start("read windows without explanations", len(new), "windows") if progress else 0
        advance = (lambda rows: progress.advance(task, rows)) if progress else (lambda rows: None)
        means = self._means(before_text(""), [((), ids) for ids in self._model.ids(new)], advance)
        self._neutral.update(zip(new, means, strict=True))
        if progress:
            progress.finish(task)

    def _explanation_gains(self, explanation: str, texts: Sequence[str]) -> list[float | None]:
        (ids,) = self._model.ids([f" {quoted(explanation)}"])
        shown = self._model.ids([f" {quoted(text)}\nDescription:" for text in ("", *texts)])
        neutral, *told = self._means(before_explanation(), [(one, ids) for one in shown])
        return [_minus(one, neutral) for one in told]

    def _means(
        self, prompt: str, rows: Sequence[tuple[Ids, Ids]], advance: Callable[[int], None] = lambda rows: None
    ) -> list[float | None]:
        """Per row, the mean log-probability of the tokens of its second part, given the prompt and its first part.

        None for a row that does not fit the model's context.
        """
        prefix, longest = self._model.prefix_ids(prompt), self._model.longest
        whole = [(*first, *second) for first, second in rows]
        fit = [index for index, ids in enumerate(whole) if longest is None or len(prefix) + len(ids) <= longest]
        found = self._model.log_probabilities(prefix, [whole[index] for index in fit], advance)
        means: list[float | None] = [None] * len(rows)
        for index, row in zip(fit, found, strict=True):
            means[index] = float(np.mean(row[len(rows[index][0]) :], dtype=np.float64))
        return means


def _find(model: str) -> str:
    """The path of a local model, or ``model`` itself as a hub id. Raises MissingFile for a path that does not exist."""
    places = [Path(model).expanduser(), *([] if "/" in model else [Path("models") / model])]
    if found := next((str(place) for place in places if place.exists()), None):
        return found
    if model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise MissingFile(model, expected="the subject model", seen="no such file or folder", fix="check the path")
    return model


def _minus(told: float | None, neutral: float | None) -> float | None:
    return None if told is None or neutral is None else told - neutral


def _answer(item: JudgeItem, gain: float | None) -> Answer:
    if not item.text:
        return Answer(None, reason="the text is empty")
    if item.marks is not None:
        return Answer(None, reason="the judge 'subject' does not support marks")
    if gain is None:
        return Answer(None, reason="explanation and text do not fit the subject model's context")
    return Answer(None, confidence=gain)
