"""The explainer that keeps the best of several candidates, judged on windows from which they were not written.

Some windows of the explain pool are held out. Another explainer writes each candidate with its own seed from its own part
of the other windows. The client then decides for each candidate which held-out windows it fits (``validation``), and the
candidate with the highest balanced accuracy is kept. In a tie the first candidate is kept, so a model that cannot tell
candidates apart has no influence. The score pool is not used, so the choice does not bias scores. Held-out windows are
never among the windows shown, but may come from the same documents.

Costs ``n`` requests, and ⌈2 · ``n_held`` / ``batch_size``⌉ more for each distinct candidate: by default, 4 + 4 · 2 = 12
requests per feature.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from evalkit.errors import BadConfig, ClientDown, ClientError, NoAnswer, NotRecorded
from evalkit.protocols import Client, Explainer
from evalkit.records import Example, ExplainExamples, Explanation, FeatureId
from evalkit.seeds import derive_request_seed
from explainers.asking import require_client
from explainers.contrastive import ContrastiveExplainer
from explainers.cot import CotExplainer
from explainers.default import DefaultExplainer
from explainers.validation import Validation, held_back, validate

__all__ = ["CANDIDATES", "EnsembleExplainer"]

CANDIDATES: Mapping[str, type] = {
    explainer.name: explainer for explainer in (DefaultExplainer, ContrastiveExplainer, CotExplainer)
}
_MOST_HELD = 4  # at most one in this many active windows is held out
# temporary errors, which say nothing about the candidate: a later attempt may succeed
_PASSING = (ClientDown, NoAnswer, NotRecorded)


class EnsembleExplainer:
    """Keeps the best of several candidates.

    ``of``: the explainer that writes the candidates: default, contrastive or cot.
    ``n``: the number of candidates.
    ``n_held``: how many active, and how many inactive, windows are held out; fewer if there are few windows.
    ``subset``: the share of the other windows that each candidate is written from.
    ``batch_size``: windows per request of the validation.
    ``thinking_tokens``, ``seed``: for the candidates and the validation; see the explainer ``default``.
    ``options``: further options of the explainer ``of``.

    The note of the explanation has the score of every candidate. If no windows can be held out, the first candidate is
    taken, written from all windows, and the note says so. Raises BadConfig.
    """

    name = "ensemble"
    main_option = "of"
    uses_client = True

    def __init__(
        self,
        of: str = "default",
        n: int = 4,
        n_held: int = 10,
        subset: float = 0.75,
        batch_size: int = 10,
        thinking_tokens: int = 0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if of not in CANDIDATES:
            raise _bad("of", f"one of {', '.join(CANDIDATES)}", of)
        for option, value in {"n": n, "n_held": n_held, "batch_size": batch_size}.items():
            if value < 1:
                raise _bad(option, "at least 1", value)
        if not 0 < subset <= 1:
            raise _bad("subset", "a share above 0 and at most 1", subset)
        self.n, self.n_held, self.subset, self.batch_size = n, n_held, subset, batch_size
        self.thinking_tokens, self.seed = thinking_tokens, seed
        self._writers: list[Explainer] = [
            CANDIDATES[of](
                thinking_tokens=thinking_tokens, seed=derive_request_seed(seed, "candidate", number), **options
            )
            for number in range(n)
        ]
        self.version = f"1-{of}-{self._writers[0].version}"

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None) -> Explanation:
        """Describe the feature. Raises BadConfig without a client, ClientError if no candidate can be parsed."""
        client = require_client(self.name, client)
        count = min(self.n_held, len(examples.positives) // _MOST_HELD, (len(examples.negatives) + 1) // 2)
        if not count:
            return await self._first(feature, examples, client)
        key = derive_request_seed(self.seed, examples.source, feature, "held back")
        active, inactive = (held_back(part, count, key) for part in (examples.positives, examples.negatives))
        views = [
            replace(
                examples,
                positives=self._subset(active[1], examples, number),
                negatives=self._subset(inactive[1], examples, number),
            )
            for number in range(self.n)
        ]
        tried = await asyncio.gather(
            *(_try(writer, view, client) for writer, view in zip(self._writers, views, strict=True))
        )
        candidates = [one for one in tried if isinstance(one, Explanation)]
        if not candidates:
            raise next(one for one in tried if isinstance(one, ClientError))
        texts = list(dict.fromkeys(one.text for one in candidates))
        validations = dict(
            zip(
                texts,
                await asyncio.gather(*(self._validated(client, text, active[0], inactive[0], key) for text in texts)),
                strict=True,
            )
        )
        best = max(candidates, key=lambda one: _rank(validations[one.text]))  # in a tie, the first
        note = self._note(tried, best, validations, count)
        return self._explanation(examples, best, note)

    async def _first(self, feature: FeatureId, examples: ExplainExamples, client: Client) -> Explanation:
        """The first candidate that can be parsed, written from all windows. Raises the last ClientError if none can."""
        why = "no inactive windows" if not examples.negatives else f"only {len(examples.positives)} active windows"
        failures = []
        for writer in self._writers:
            tried = await _try(writer, examples, client)
            if isinstance(tried, Explanation):
                return self._explanation(examples, tried, f"not validated: {why}")
            failures.append(tried)
        raise failures[-1]

    async def _validated(
        self, client: Client, text: str, active: Sequence[Example], inactive: Sequence[Example], seed: int
    ) -> Validation:
        return await validate(
            client,
            text,
            active,
            inactive,
            batch_size=self.batch_size,
            seed=seed,
            thinking_tokens=self.thinking_tokens,
        )

    def _subset(self, windows: Sequence[Example], examples: ExplainExamples, number: int) -> tuple[Example, ...]:
        """The windows that candidate ``number`` is written from: a hashed subset, in the order of ``windows``."""
        names = (examples.source, examples.feature, "candidate", number)
        order = sorted(
            range(len(windows)), key=lambda place: derive_request_seed(self.seed, *names, windows[place].window)
        )
        kept = order[: max(1, round(self.subset * len(windows)))]
        return tuple(windows[place] for place in sorted(kept))

    def _note(
        self,
        tried: Sequence[Explanation | ClientError],
        best: Explanation,
        validations: Mapping[str, Validation],
        count: int,
    ) -> str:
        scores = [
            _shown(validations[one.text], 2 * count) if isinstance(one, Explanation) else "no candidate"
            for one in tried
        ]
        place = next(number for number, one in enumerate(tried, 1) if one is best)
        held = f"{count} active and {count} inactive held-out windows"
        return f"candidate {place} of {self.n}; balanced accuracy on {held}: {', '.join(scores)}"

    def _explanation(self, examples: ExplainExamples, chosen: Explanation, note: str) -> Explanation:
        told = "; ".join(filter(None, (note, chosen.note)))
        return Explanation(examples.source, examples.feature, self.name, self.version, chosen.text, told)


async def _try(writer: Explainer, view: ExplainExamples, client: Client) -> Explanation | ClientError:
    """A candidate, or the permanent error that prevented it. Raises temporary errors."""
    try:
        return await writer.explain(view.feature, view, client)
    except _PASSING:
        raise
    except ClientError as error:
        return error


def _rank(validation: Validation) -> float:
    return -1.0 if validation.score is None else validation.score


def _shown(validation: Validation, n_asked: int) -> str:
    if validation.score is None:
        return "no score"
    return f"{validation.score:.2f}" + ("" if validation.n_read == n_asked else f" ({validation.n_read} verdicts)")


def _bad(option: str, expected: str, seen: object) -> BadConfig:
    return BadConfig(
        f"{option} of explainer 'ensemble'", expected=expected, seen=repr(seen), fix="use an allowed value"
    )
