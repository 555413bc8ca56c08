"""Hand-made examples, and judges with known behaviour: independent code paths to hold the scorers against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from evalkit.records import Answer, Example, Explanation, JudgeItem, ScoreExamples, TestExamples

EXPLANATION = Explanation("source", "7", "hand", "1", "whales")
LENGTH = 32


def window(number: int, active: Sequence[int] = (), length: int = LENGTH, value: float = 1.0) -> Example:
    """A window of one-word tokens; each word names the window and the position, so texts are all different."""
    tokens = tuple(f" w{number}p{place}" for place in range(length))
    values = tuple(value if place in active else 0.0 for place in range(length))
    return Example(number, number, tokens, values, decile=number % 10 if active else None)


def examples(
    test: TestExamples, calibration: TestExamples | None = None, seed: int = 0, theta: float = 0.0
) -> ScoreExamples:
    empty = TestExamples((), (), ())
    return ScoreExamples("source", "7", theta, seed, test, calibration or empty)


def random_test(count: int, seed: int, first: int = 0, starts: Sequence[int] = range(1, 30)) -> TestExamples:
    """``count`` windows of each kind; active ones have one to three marked runs of one or two tokens."""
    random = np.random.default_rng(seed)

    def active(number: int) -> Example:
        places: set[int] = set()
        for start in random.choice(np.asarray(starts), size=random.integers(1, 4)):
            places |= set(range(int(start), min(LENGTH, int(start) + int(random.integers(1, 3)))))
        return window(number, sorted(places))

    return TestExamples(
        tuple(active(first + i) for i in range(count)),
        tuple(active(first + count + i) for i in range(count)),
        tuple(window(first + 2 * count + i) for i in range(count)),
    )


class OracleJudge:
    """Answers with what a function of the item says; remembers every item it was asked."""

    name, version = "oracle", "1"

    def __init__(self, answer: Callable[[JudgeItem], Answer], probabilistic: bool = True) -> None:
        self.answer, self.probabilistic = answer, probabilistic
        self.asked: list[JudgeItem] = []

    async def judge(self, explanation: str, items: Sequence[JudgeItem]) -> Sequence[Answer]:
        self.asked += items
        return [self.answer(item) for item in items]
