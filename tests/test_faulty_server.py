"""The promise about servers: one that fails three requests in ten costs time, and not one judgement."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

import evalkit
from evalkit.calls import open_client
from evalkit.config import RunConfig
from evalkit.examples import FeatureExamples
from evalkit.judging import REAL, explain_features, score_features
from evalkit.parts import make_explainers, make_judges, make_scorers
from evalkit.records import Example, ExplainExamples, ScoreExamples, SourceInfo, TestExamples
from evalkit.store import FeatureRow, RunStore
from tests.chat_model import MODEL_KINDS
from tests.servers import ChatServer

pytestmark = pytest.mark.slow

FEATURES, SHOWN, EACH, WINDOW = 50, 5, 8, 14
SOURCE = "words/one-each"
KINDS = ("429", "500", "timeout", "reset", "slow_body", "wrong_json", "wrong_length")
TIMEOUT_S = 1.0
KEY = ["feature", "scorer", "item"]


def windows() -> list[tuple[str, ...]]:
    """The text that comes with the package, cut into windows of as many words."""
    path = Path(evalkit.__file__).parent / "data/corpus/demo.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return [
        tuple(pieces[first : first + WINDOW])
        for pieces in (re.findall(r"\s*\S+", text) for text in texts)
        for first in range(0, len(pieces) - WINDOW, WINDOW)
    ]


def make_examples() -> dict[str, dict[str, FeatureExamples]]:
    """Features that fire on one word each, wherever it stands alone."""
    cut = windows()
    words = [{piece.strip() for piece in window if re.fullmatch(r"\s*[a-z]{5,9}", piece)} for window in cut]
    places: dict[str, list[int]] = defaultdict(list)
    for number, found in enumerate(words):
        for word in found:
            places[word].append(number)
    enough = sorted(word for word in places if len(places[word]) >= SHOWN + 2 * EACH)
    chosen = enough[:: len(enough) // FEATURES][:FEATURES]
    return {SOURCE: {word: one_feature(word, places[word], cut) for word in chosen}}


def one_feature(word: str, places: list[int], cut: list[tuple[str, ...]]) -> FeatureExamples:
    def examples(numbers: list[int]) -> tuple[Example, ...]:
        return tuple(
            Example(number, 0, cut[number], tuple(float(piece.strip() == word) for piece in cut[number]), 5)
            for number in numbers
        )

    silent = [number for number in range(0, len(cut), 97) if word not in "".join(cut[number]).lower()]
    shown, active, decoys = (places[:SHOWN], places[SHOWN : SHOWN + EACH], places[SHOWN + EACH : SHOWN + 2 * EACH])
    test = TestExamples(examples(active), examples(decoys), examples(silent[:EACH]))
    return FeatureExamples(
        ExplainExamples(SOURCE, word, 0.0, 1.0, examples(shown)), ScoreExamples(SOURCE, word, 0.0, 1, test, test)
    )


@dataclass(frozen=True)
class Outcome:
    """A finished run: its judgements, its features, and what the server's log holds."""

    judgements: pd.DataFrame
    explanations: pd.DataFrame
    features: pd.DataFrame
    log: list[dict[str, object]]


def run(folder: Path, server: ChatServer) -> Outcome:
    """Explain and score all features through the client ``openai``, as the stages of a run do."""
    config = RunConfig.create(
        model="none",
        dictionaries=("none",),
        explainers=("default",),
        judges=("llm",),
        client=f"openai:{server.model}",
        client_options={"base_url": server.base_url, "timeout_s": TIMEOUT_S},
    )
    examples = make_examples()

    async def stages(store: RunStore) -> None:
        async with open_client(config, store) as client:
            await explain_features(store, examples, make_explainers(config, client), client)
            judges, explainers = make_judges(config, client), list(make_explainers(config, client))
            scorers = make_scorers(config)
            await score_features(store, examples, explainers, judges, scorers, shuffled=False, seed=0)

    with RunStore.create(folder, config.identity()) as store:
        store.write_sources([SourceInfo(SOURCE, "sae", "layers.1", FEATURES, 1.0, None)], [{}])
        rows = [FeatureRow(SOURCE, word, n, "ok", None, 0.0, 0.0, 1.0, 1.0) for n, word in enumerate(examples[SOURCE])]
        store.write_features(SOURCE, rows)
        asyncio.run(stages(store))
        frames = store.frames()
    return Outcome(frames.judgements, frames.explanations, frames.features, server.log)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    with ChatServer() as server:
        return run(tmp_path_factory.mktemp("healthy"), server)


@dataclass(frozen=True)
class Faulty:
    outcome: Outcome
    rerun: Callable[[], Outcome]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    folder = tmp_path_factory.mktemp("faulty")
    with ChatServer(faults=0.3, kinds=KINDS, seed=1) as server:
        yield Faulty(run(folder, server), lambda: run(folder, server))


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

    Except where the server's last byte and the client's patience met: the log says "finished" once the kernel has the
    bytes, the client may have hung up in that moment. Such a request was received a time-out earlier.
    """
    answers: dict[object, list[dict[str, object]]] = defaultdict(list)
    begun: dict[tuple[object, object], float] = {}
    for entry in faulty.outcome.log:
        begun.setdefault((entry["body"], entry["attempt"]), float(str(entry["time"])))
        if entry["event"] in ("finished", *(f"fault:{kind}" for kind in MODEL_KINDS)):
            answers[entry["body"]].append(entry)
    for body, given in answers.items():
        late = [one for one in given if float(str(one["time"])) - begun[body, one["attempt"]] > 0.8 * TIMEOUT_S]
        assert len(given) - len(late) <= 1 and (len(given) <= 1 or given[-1] not in late), given
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
