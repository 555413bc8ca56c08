"""Intruder: can a judge find the one window where the feature does not fire, among windows where it does?

The judge sees no explanation: the score is high if the windows of the feature visibly have something in common. A group is
shown as plain texts. One of them, at a random place, is the intruder: a window verified inactive. The chance level is
1 / (texts per group). Windows are shown without marks: an intruder has no true marks, and false marks on unlikely tokens
could be recognised whatever the feature is. Does not depend on any particular judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from evalkit.errors import BadConfig
from evalkit.protocols import Judge, PickingJudge
from evalkit.records import Example, Explanation, JudgeItem, Judgement, Pick, Score, ScoreExamples
from evalkit.seeds import generator

__all__ = ["Group", "IntruderScorer"]


@dataclass(frozen=True, slots=True)
class Group:
    """One question.

    ``items``: the texts in the order in which they are shown.
    ``place``: the index of the intruder among them.
    ``window``: the window id of the intruder.
    ``decile``: the median decile of the other windows; of two middle values, the lower.
    """

    items: tuple[JudgeItem, ...]
    place: int
    window: int
    decile: int | None


class IntruderScorer:
    """Makes groups of windows of the score pool; exactly one window of each group is inactive.

    ``n_texts``: windows per group.
    ``n_groups``: the largest number of groups.

    The active windows of a group are neighbours in the order of activation deciles. Otherwise a weak window could be
    mistaken for the intruder in a group of strong ones; it also allows scores to be reported by decile. Each inactive
    window is the intruder of at most one group, so there are as many groups as inactive windows, up to ``n_groups``. Each
    active window is in one group; if that gives too few groups, the active windows are regrouped at random as often as
    needed. A feature with too few windows for one group gets one unscored judgement.

    Raises BadConfig if ``n_texts`` is below 3 or ``n_groups`` is below 1.
    """

    name = "intruder"
    version = "1"
    asks = "pick"
    needs_explanation = False

    def __init__(self, n_texts: int = 5, n_groups: int = 20) -> None:
        if n_texts < 3:
            raise BadConfig(
                "n_texts of scorer 'intruder'",
                expected="at least 3, because of two texts neither is the odd one out",
                seen=str(n_texts),
                fix="use 5",
            )
        if n_groups < 1:
            raise BadConfig("n_groups of scorer 'intruder'", expected="at least 1", seen=str(n_groups), fix="use 20")
        self.n_texts, self.n_groups = n_texts, n_groups

    async def score(self, explanation: Explanation, examples: ScoreExamples, judge: Judge) -> Score:
        """One judgement per group, in the order they were asked; it is a match if the judge picked the intruder.

        The explanation only identifies the feature. All labels are True: the score is the share of matches.
        """
        groups = self.groups(examples)
        judgements: tuple[Judgement, ...]
        if groups:
            picks = await _ask(cast(PickingJudge, judge), groups)
            pairs = zip(groups, picks, strict=True)
            judgements = tuple(_judgement(index, group, pick) for index, (group, pick) in enumerate(pairs))
        else:
            judgements = (self._none(examples),)
        return Score(explanation.source, explanation.feature, self.name, self.version, judgements)

    def items(self, examples: ScoreExamples) -> Sequence[JudgeItem]:
        """Every text that is shown, group by group."""
        return [item for group in self.groups(examples) for item in group.items]

    def groups(self, examples: ScoreExamples) -> list[Group]:
        """The questions, in the order they are asked. A repeat reshuffles the same groups and the texts within each."""
        positives = sorted(examples.test.positives, key=lambda example: example.window)
        negatives = sorted(examples.test.negatives, key=lambda example: example.window)
        if len(positives) < self.n_texts - 1:
            return []
        count = min(self.n_groups, len(negatives))
        picked = _random(examples, "intruders").permutation(len(negatives))[:count]
        dealt = self._deal(positives, count, examples)
        made = [self._group(others, negatives[index], examples) for others, index in zip(dealt, picked, strict=True)]
        return [made[index] for index in _random(examples, "groups", repeat=True).permutation(len(made))]

    def _deal(self, positives: Sequence[Example], count: int, examples: ScoreExamples) -> Iterator[Sequence[Example]]:
        """Yield ``count`` hands of ``n_texts - 1`` neighbours in decile order, round by round.

        Each round sorts the windows by decile, at random within a decile, and cuts them into hands, so that a window is in
        at most one hand of a round. Which windows are left over, and which hands the last round uses, is random.
        """
        size = self.n_texts - 1
        hands, rest = divmod(len(positives), size)
        for first in range(0, count, hands):
            random = _random(examples, "deal", first // hands)
            shuffled = [positives[index] for index in random.permutation(len(positives))]
            left_over = set(random.permutation(len(positives))[:rest].tolist())
            ordered = sorted(shuffled, key=_decile)
            kept = [example for index, example in enumerate(ordered) if index not in left_over]
            chosen = sorted(random.permutation(hands)[: count - first].tolist())
            yield from (kept[hand * size : (hand + 1) * size] for hand in chosen)

    def _group(self, others: Sequence[Example], intruder: Example, examples: ScoreExamples) -> Group:
        random = _random(examples, "place", intruder.window, repeat=True)
        shown = [others[index] for index in random.permutation(len(others))]
        place = int(random.integers(self.n_texts))
        shown.insert(place, intruder)
        deciles = sorted(example.decile for example in others if example.decile is not None)
        middle = deciles[(len(deciles) - 1) // 2] if deciles else None
        return Group(tuple(JudgeItem(example.text) for example in shown), place, intruder.window, middle)

    def _none(self, examples: ScoreExamples) -> Judgement:
        n_positives, n_negatives = len(examples.test.positives), len(examples.test.negatives)
        reason = (
            f"no group of {self.n_texts}: {n_positives} windows where the feature fires "
            f"and {n_negatives} where it does not"
        )
        window = min((example.window for example in (*examples.test.negatives, *examples.test.positives)), default=-1)
        return Judgement(0, window, True, None, None, None, reason=reason)


def _random(examples: ScoreExamples, *names: str | int, repeat: bool = False) -> np.random.Generator:
    """The random generator for one decision about one feature; with ``repeat``, it differs between repeats of the test."""
    again = [f"repeat {examples.repeat}"] if repeat and examples.repeat else []
    return generator(examples.seed, examples.source, examples.feature, IntruderScorer.name, *names, *again)


def _decile(example: Example) -> int:
    return -1 if example.decile is None else example.decile


async def _ask(judge: PickingJudge, groups: Sequence[Group]) -> list[Pick]:
    """One pick per group. If the judge returns the wrong number of picks, all groups are unscored."""
    picks = list(await judge.pick([group.items for group in groups]))
    if len(picks) == len(groups):
        return picks
    return [Pick(None, reason=f"the judge gave {len(picks)} picks for {len(groups)} groups")] * len(groups)


def _judgement(index: int, group: Group, pick: Pick) -> Judgement:
    match, reason = None, pick.reason
    if pick.index is None:
        reason = reason or "the judge picked no text"
    elif not 0 <= pick.index < len(group.items):
        reason = f"the judge picked text {pick.index + 1} of {len(group.items)}"
    else:
        match, reason = pick.index == group.place, None
    return Judgement(index, group.window, True, match, None, None, group.decile, reason)
