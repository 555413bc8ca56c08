"""The promise about servers: one that fails three requests in ten costs time, and not one judgement."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from evalkit.evaluate.components import make_explainers, make_tests
from evalkit.evaluate.explain_stage import explain_features
from evalkit.evaluate.score_stage import score_features
from evalkit.llm.session import open_client
from evalkit.records import REAL
from tests.support.chat_model import MODEL_KINDS
from tests.support.servers import ChatServer
from tests.support.word_features import EACH, collected, make_examples

pytestmark = pytest.mark.slow

FEATURES = 50
KINDS = ("429", "500", "timeout", "reset", "slow_body", "wrong_json", "wrong_length")
TIMEOUT_S = 2.0
KEY = ["feature", "scorer", "item"]


@dataclass(frozen=True)
class Outcome:
    """A finished run: its judgements, its features, and what the server's log holds."""

    judgements: pd.DataFrame
    explanations: pd.DataFrame
    features: pd.DataFrame
    log: list[dict[str, object]]
    retries: list[str]


class _Told(logging.Handler):
    """Keeps why the client asked again."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons.append(record.getMessage())


def run(folder: Path, server: ChatServer, timeout_s: float) -> Outcome:
    """Explain and score all features through the client ``openai``, as the stages of a run do."""
    store, config = collected(
        folder,
        FEATURES,
        explainers=("default",),
        judges=("llm",),
        client=f"openai:{server.model}",
        client_options={"base_url": server.base_url, "timeout_s": timeout_s},
    )
    examples = make_examples(FEATURES)

    async def stages() -> None:
        async with open_client(config, store) as client:
            await explain_features(store, examples, make_explainers(config, client), client)
            tests, explainers = make_tests(config, client), list(make_explainers(config, client))
            await score_features(store, examples, explainers, tests, shuffled=False, seed=0)

    told, logger = _Told(), logging.getLogger("evalkit.llm.clients.openai")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(told)
    try:
        with store:
            asyncio.run(stages())
            frames = store.frames()
    finally:
        logger.removeHandler(told)
        logger.setLevel(level)
    return Outcome(frames.judgements, frames.explanations, frames.features, server.log, told.reasons)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with ChatServer() as server:
        return run(tmp_path_factory.mktemp("healthy"), server, timeout_s=60)


@dataclass(frozen=True)
class Faulty:
    outcome: Outcome
    rerun: Callable[[], Outcome]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faulty")
    with ChatServer(faults=0.3, kinds=KINDS, seed=1) as server:
        yield Faulty(run(folder, server, TIMEOUT_S), lambda: run(folder, server, TIMEOUT_S))


def test_the_run_met_every_fault_and_finished(faulty: Faulty) -> None:
    events = Counter(str(entry["event"]) for entry in faulty.outcome.log)
    assert all(events[f"fault:{kind}"] >= 5 for kind in KINDS), events
    share = sum(events[f"fault:{kind}"] for kind in KINDS) / events["received"]
    assert 0.25 < share < 0.35
    assert set(faulty.outcome.features["status"]) == {"ok"} and len(faulty.outcome.features) == FEATURES
    scored = faulty.outcome.judgements.groupby("feature")["scorer"].nunique()
    assert len(scored) == FEATURES and (scored == 2).all()


def test_every_item_has_its_judgement_and_every_unscored_one_its_reason(faulty: Faulty, healthy: Outcome) -> None:
    found = faulty.outcome.judgements
    assert len(found) == FEATURES * 2 * 2 * EACH  # two scorers, each with positives and as many negatives or decoys
    assert not found.duplicated(KEY).any()
    unscored = found[found["match"].isna()]
    assert unscored["reason"].str.len().gt(0).all() and found["reason"].notna().sum() == len(unscored)
    # a reply of no use is asked for once more: two of them in a row are rare, and take one list of at most five along
    by_nature = set(map(tuple, healthy.judgements.loc[healthy.judgements["match"].isna(), KEY].to_numpy()))
    assert len(set(map(tuple, unscored[KEY].to_numpy())) - by_nature) <= 0.02 * len(found)


def test_scores_are_those_of_a_healthy_server(faulty: Faulty, healthy: Outcome) -> None:
    texts = [outcome.explanations.set_index("feature")["text"].to_dict() for outcome in (faulty.outcome, healthy)]
    assert texts[0] == texts[1] and len(texts[0]) == FEATURES
    columns = [*KEY, "window", "label", "match", "confidence"]
    both = faulty.outcome.judgements[columns].merge(healthy.judgements[columns], on=KEY, suffixes=("", "_healthy"))
    assert len(both) == len(healthy.judgements)
    scored = both[both["match"].notna()]
    for column in ("window", "label", "match", "confidence"):
        assert (scored[column] == scored[f"{column}_healthy"]).all(), column
    # and they are worth something: the stand-in reads explanations, and these features are words
    assert (scored["match"].astype(bool) == scored["label"].astype(bool)).mean() > 0.9


def test_what_was_answered_is_never_asked_again(faulty: Faulty) -> None:
    """A reply that arrived whole, useful or not, was the last one to its request.

    Except one that came too late: the log says "finished" once the last byte is sent, though the client's patience may
    have ended just before it. A machine that is very busy has some of these. So there may be as many answers too many as
    there were time-outs that the server had not made.
    """
    events = Counter(str(entry["event"]) for entry in faulty.outcome.log)
    whole = ("finished", *(f"fault:{kind}" for kind in MODEL_KINDS))
    answers = Counter(entry["body"] for entry in faulty.outcome.log if entry["event"] in whole)
    late = sum("no reply within" in reason for reason in faulty.outcome.retries)
    late -= events["fault:timeout"] + events["fault:slow_body"]
    assert sum(count - 1 for count in answers.values()) <= late
    assert late < 0.1 * events["received"]  # so few that the sentence above says something
    assert len(answers) > FEATURES * 9  # an explanation and two tests of four lists, and some asked once more


def test_it_is_asked_with_the_client_s_patience(faulty: Faulty) -> None:
    attempts = Counter(entry["body"] for entry in faulty.outcome.log if entry["event"] == "received")
    assert max(attempts.values()) <= 10  # the default of max_attempts
    assert max(attempts.values()) >= 3  # so many in a row fail somewhere among hundreds


def test_a_second_run_asks_nothing(faulty: Faulty) -> None:
    before = faulty.outcome
    again = faulty.rerun()
    assert len(again.log) == len(before.log)
    pd.testing.assert_frame_equal(again.judgements, before.judgements)


def test_the_judgements_are_real_ones(healthy: Outcome) -> None:
    assert set(healthy.judgements["control"]) == {REAL}
    assert set(healthy.judgements["scorer"]) == {"detection", "fuzzing"}
    events = Counter(entry["event"] for entry in healthy.log)
    assert events["finished"] == events["received"] == FEATURES * 9
