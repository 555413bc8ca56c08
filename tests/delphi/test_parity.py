"""The preset ``delphi`` against eai-delphi itself: the same windows, marks and replies give the same confusion counts.

Its detection and fuzzing scorers and ours (judge ``llm:batch_size=5``) ask one model that answers as a function of what it
is shown, wrong on a fifth of the texts, and in a tenth of the batches with something that is no list. Below that, what it
does differently and ours does not copy, each with the library's own code as the witness:

    replies     a last batch of fewer texts is never read, or takes too long a list as its own; lists on several lines or
                with True and False are not read; "0" counts as 1, null as 0, 7 as 1; what is not read is counted nowhere
    requests    a request that fails is the same as a reply that is not read
    marks       false marks stand at the same places in every window; there are as many as tokens are active on average,
                of which true marks leave out the weak; the option threshold changes nothing; a window with one silent
                token is replaced by a sentence of the library's own
    windows     the explainer's windows are scored too; silent windows come twice; center_examples does the opposite
    prompts     brackets and line breaks of the text are shown as marks and further texts
    order       what is asked of a feature depends on which features came before
    explaining  a reply without an explanation is scored as the explanation "Explanation could not be parsed."
    tables      layers.1 takes in the scores of layers.10
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evalkit.delphi.library import library
from evalkit.markup import render, token_spans
from evalkit.records import Example, Explanation, JudgeItem, Message, Response, ScoreExamples, TestExamples
from evalkit.registry import create
from scorers.judges.llm.parsing import Unparsable, parse_list
from tests.support.delphi_library import use_library

pytestmark = pytest.mark.slow
BATCH, LENGTH, N_FEATURES = 5, 32, 4
WORDS = ["whale", "ship", "sea", "deck", "calm", "night", "storm", "sailor", "captain", "island", "wind", "boat", "oar"]
Shown = tuple[str, tuple[tuple[int, int], ...]]  # a text, and its marks without the white space they begin with


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return use_library(tmp_path_factory)


def chance(*names: object) -> float:
    """A number in [0, 1) of these names."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=6).digest(), "big") / 2**48


def feature_examples(feature: int, n_each: int = 50, active: int = 3) -> ScoreExamples:
    """Windows of words, all different; where the feature fires, one to three tokens of different strength are active."""
    random = np.random.default_rng([7, feature])
    count = iter(range(3 * n_each))

    def window(fires: bool) -> Example:
        number = next(count)
        tokens = tuple(
            f" {word}{number}" if place % 7 == 0 else f" {word}"
            for place, word in enumerate(random.choice(WORDS, LENGTH))
        )
        values = np.zeros(LENGTH)
        if fires:
            places = random.choice(LENGTH, size=random.integers(1, active + 1), replace=False)
            values[places] = random.uniform(0.05, 4.0, size=len(places))
        return Example(1000 * feature + number, number, tokens, tuple(values.tolist()), number % 10 if fires else None)

    windows = [tuple(window(fires) for _ in range(n_each)) for fires in (True, True, False)]
    return ScoreExamples("source", str(feature), 0.0, 0, TestExamples(*windows), TestExamples((), (), ()))


def shown_of(item: JudgeItem) -> Shown:
    return item.text, item.marks or ()


def read_marked(text: str) -> Shown:
    """What the library shows, with marks, as a text and its marks; white space at the start of a mark is not part of it."""
    plain, marks = "", []
    for piece in re.split(r"(<<.*?>>)", text):
        if piece.startswith("<<"):
            inside = piece[2:-2]
            begin = len(plain) + (len(inside) - len(inside.lstrip()) if inside.strip() else 0)
            plain += inside
            marks.append((begin, len(plain)))
        else:
            plain += piece
    return plain, tuple(marks)


class Model:
    """Replies to a batch of texts by what they are. ``labels``: the right answer to every text."""

    def __init__(self, labels: dict[Shown, bool], broken: float = 0.1) -> None:
        self.labels, self.broken = labels, broken

    def answer(self, shown: Shown) -> bool:
        return self.labels[shown] != (chance("wrong", shown) < 0.2)

    def reply(self, batch: Sequence[Shown]) -> str:
        answers = [int(self.answer(shown)) for shown in batch]
        kind = chance("broken", *batch)
        if kind >= self.broken:
            return f"[{', '.join(map(str, answers))}]"
        broken = [
            "I cannot tell.",
            str(answers[:-1]),
            f"{answers[:2]} and {answers[2:]}",
            "[maybe, no, no, no, no]",
            "[1, 0,",
        ]
        return broken[int(kind / self.broken * len(broken))]


class OurClient:
    """The model behind our contract: finds in the question which of the texts it knows, in their order."""

    name = "known"

    def __init__(self, model: Model, items: Sequence[JudgeItem]) -> None:
        self.model = model
        shown = [item.text if item.marks is None else render(item.text, item.marks) for item in items]
        self.quoted = {json.dumps(text): shown_of(item) for text, item in zip(shown, items, strict=True)}

    async def generate(self, messages: Sequence[Message], **_: Any) -> Response:
        question = next(m.content for m in reversed(messages) if any(text in m.content for text in self.quoted))
        found = sorted((question.find(text), shown) for text, shown in self.quoted.items() if text in question)
        return Response(self.model.reply([shown for _, shown in found]))


class TheirClient:
    """The same behind theirs."""

    model = "known"

    def __init__(self, reply: Callable[[Sequence[Shown]], str]) -> None:
        self.reply = reply
        self.batches: list[list[Shown]] = []

    async def generate(self, prompt: Sequence[dict[str, str]], **_: Any) -> Any:
        texts = re.findall(r"^Example \d+: (.*)$", prompt[-1]["content"], re.MULTILINE)
        self.batches.append([read_marked(text) for text in texts])
        return library("clients.client").Response(text=self.reply(self.batches[-1]))


class InOrder:
    """In place of its random generator: puts samples in a given order."""

    def __init__(self, order: Sequence[Shown]) -> None:
        self.order = {shown: place for place, shown in enumerate(order)}

    def shuffle(self, samples: list[Any]) -> None:
        samples.sort(key=lambda sample: self.order[read_marked(sample.text)])


def record(feature: str, positives: Sequence[Example], silent: Sequence[tuple[Example, Sequence[float]]]) -> Any:
    """A record of the library, made without the bridge. ``silent``: windows with the activations they are given."""
    import torch

    latents = library("latents.latents")
    made = latents.LatentRecord(latents.Latent("layers.1", int(feature)), explanation="things of the sea")

    def common(example: Example, values: Sequence[float]) -> dict[str, Any]:
        tokens = torch.arange(len(example.tokens))
        return {"tokens": tokens, "activations": torch.tensor(values), "str_tokens": list(example.tokens)}

    made.test = [latents.ActivatingExample(**common(one, one.activations), quantile=one.decile) for one in positives]
    made.not_active = [latents.NonActivatingExample(**common(one, values), distance=-1.0) for one, values in silent]
    return made


def ask_theirs(name: str, made: Any, client: Any, order: Sequence[Shown] | None = None, **options: Any) -> list[Any]:
    scorer = getattr(library("scorers"), name)(client, n_examples_shown=BATCH, **options)
    if order is not None:
        scorer.rng = InOrder(order)
    outputs: list[Any] = asyncio.run(scorer(made)).score
    return outputs


def confusion(outputs: Sequence[Any]) -> dict[str, int]:
    """By the library's own account."""
    import pandas as pd

    table = library("log.result_analysis").compute_confusion(
        pd.DataFrame([{"prediction": one.prediction, "activating": one.activating} for one in outputs])
    )
    return {key: int(value) for key, value in table.items()}


@pytest.mark.parametrize("kind", ["detection", "fuzzing"])
def test_the_same_confusion_counts(kind: str) -> None:
    """Feature by feature: TP, FP, TN, FN, and so many unread."""
    unread = 0
    for feature in range(N_FEATURES):
        examples = feature_examples(feature)
        scorer = create("scorers", kind)
        items = scorer.items(examples)
        order = [shown_of(item) for item in items]
        assert len(order) == len(set(order)) == 100  # no batch is short, see below what becomes of one that is
        labels = {shown_of(trial.item): trial.label for trial in scorer._trials(examples, "test")}
        model = Model(labels)
        judge = create("judges", "llm", client=OurClient(model, items), batch_size=BATCH)
        ours = asyncio.run(
            scorer.score(Explanation("source", str(feature), "hand", "1", "things of the sea"), examples, judge)
        )

        test = examples.test
        if kind == "detection":
            made = record(str(feature), test.positives, [(one, one.activations) for one in test.negatives])
        else:
            made = record(str(feature), test.positives, [(one, falsely(one, labels)) for one in test.decoys])
        client = TheirClient(model.reply)
        theirs = ask_theirs({"detection": "DetectionScorer", "fuzzing": "FuzzingScorer"}[kind], made, client, order)

        assert [shown for batch in client.batches for shown in batch] == order  # the same texts with the same marks
        counts = confusion(theirs)
        mine = [(one.label, one.match) for one in ours.judgements]
        assert [(one.activating, one.prediction) for one in theirs] == mine
        assert counts["true_positives"] == mine.count((True, True)) > 20
        assert counts["false_negatives"] == mine.count((True, False)) > 2
        assert counts["false_positives"] == mine.count((False, True)) > 2
        assert counts["true_negatives"] == mine.count((False, False)) > 20
        assert ours.n_unscored == sum(one.prediction is None for one in theirs) == 100 - counts["total_examples"]
        unread += ours.n_unscored
    assert 20 <= unread <= 80


def falsely(example: Example, labels: dict[Shown, bool]) -> list[float]:
    """Activations that make the library mark what our scorer marked falsely."""
    marks = next(marks for text, marks in labels if text == example.text)
    return [float(any(a < end and start < b for a, b in marks)) for start, end in token_spans(example.tokens)]


def plain_record(n_active: int, n_silent: int, feature: int = 0, active: int = 3) -> Any:
    test = feature_examples(feature, max(n_active, n_silent), active).test
    return record(
        str(feature), test.positives[:n_active], [(one, one.activations) for one in test.negatives[:n_silent]]
    )


def test_a_short_last_batch_is_never_read() -> None:
    """Twelve texts, every reply right and of the right length; ours asks for two answers and reads them."""
    client = TheirClient(lambda batch: json.dumps([1] * len(batch)))
    outputs = ask_theirs("DetectionScorer", plain_record(6, 6), client)
    assert [len(batch) for batch in client.batches] == [5, 5, 2]
    assert [one.prediction for one in outputs] == [True] * 10 + [None] * 2
    too_long = ask_theirs("DetectionScorer", plain_record(6, 6), TheirClient(lambda batch: "[1, 1, 1, 1, 1]"))
    assert [one.prediction for one in too_long] == [True] * 12  # five answers about two texts

    class Exact:
        name = "exact"

        async def generate(self, messages: Sequence[Message], *, schema: Any, **_: Any) -> Response:
            return Response(json.dumps([1] * schema["minItems"]))

    judge = create("judges", "llm", client=Exact(), batch_size=BATCH)
    answers = asyncio.run(judge.judge("x", [JudgeItem(f"text {n}") for n in range(12)]))
    assert [answer.match for answer in answers] == [True] * 12


@pytest.mark.parametrize(
    ("reply", "theirs", "ours"),
    [
        ("[True, False, True, False, True]", None, [1, 0, 1, 0, 1]),
        ("[1, 0,\n 1, 0, 1]", None, [1, 0, 1, 0, 1]),
        ('["0", "0", "0", "0", "1"]', [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]),
        ('["maybe", "maybe", "", "", ""]', [1, 1, 0, 0, 0], None),
        ("[null, null, null, null, 1]", [0, 0, 0, 0, 1], None),
        ("[7, 0, 0, 0, -1]", [1, 0, 0, 0, 1], None),
        ("[0, 0, 0, 0, 1] or rather [1, 1, 1, 1, 1]", [0, 0, 0, 0, 1], None),
        ("Texts [1] and [2] match: [1, 1, 0, 0, 0]", None, None),
        ("[1, 0, 1, 0, 1]", [1, 0, 1, 0, 1], [1, 0, 1, 0, 1]),
    ],
)
def test_what_is_read_in_a_reply(reply: str, theirs: list[int] | None, ours: list[int] | None) -> None:
    outputs = ask_theirs("DetectionScorer", plain_record(3, 2), TheirClient(lambda batch: reply))
    predictions = [one.prediction for one in outputs]
    assert predictions == ([None] * 5 if theirs is None else [bool(number) for number in theirs])
    if ours is None:
        with pytest.raises(Unparsable):
            parse_list(reply, 5)
    else:
        assert parse_list(reply, 5) == tuple(map(bool, ours))


def test_what_is_not_read_is_counted_nowhere() -> None:
    """Half of the replies are no lists; ``failed_count`` says 0 and rates are of the other half."""
    replies = iter([f"[{', '.join('1' * 5)}]", "no list"] * 4)
    outputs = ask_theirs("DetectionScorer", plain_record(20, 20), TheirClient(lambda batch: next(replies)))
    assert sum(one.prediction is None for one in outputs) == 20
    counts = confusion(outputs)
    assert counts["failed_count"] == 0 and counts["total_examples"] == 20


def test_a_failed_request_is_a_reply_that_is_not_read() -> None:
    def down(batch: Sequence[Shown]) -> str:
        raise ConnectionError("nobody there")

    outputs = ask_theirs("DetectionScorer", plain_record(5, 5), TheirClient(down))
    assert [one.prediction for one in outputs] == [None] * 10


def fuzzed(made: Any, **options: Any) -> tuple[list[Shown], list[Shown]]:
    """What it shows with true marks, and with false ones."""
    client = TheirClient(lambda batch: "[1, 1, 1, 1, 1]")
    outputs = ask_theirs("FuzzingScorer", made, client, **options)
    shown = [one for batch in client.batches for one in batch]
    texts = {"".join(one.str_tokens): one.activating for one in outputs}
    return [one for one in shown if texts.get(one[0])], [one for one in shown if texts.get(one[0]) is False]


def positions(shown: Shown) -> frozenset[int]:
    """Which tokens are marked, by counting words."""
    text, marks = shown
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    return frozenset(place for place, start in enumerate(starts) if any(a <= start < b for a, b in marks))


def test_false_marks_stand_at_the_same_places_everywhere() -> None:
    """Its generator is seeded again for every window; ours differ from window to window."""
    true, false = fuzzed(plain_record(30, 30))
    assert len({positions(one) for one in false}) == 1
    assert len({positions(one) for one in true}) > 20
    assert all(24 in positions(one) for one in false)  # and the token at three quarters is always one of them
    scorer = create("scorers", "fuzzing")
    trials = scorer._trials(feature_examples(0), "test")
    assert len({positions(shown_of(trial.item)) for trial in trials if not trial.label}) > 40


def test_false_marks_are_more_than_true_ones() -> None:
    """As many as tokens are active on average, rounded up; true marks leave the weak ones out. Ours: the same number."""
    true, false = fuzzed(plain_record(30, 30, active=8))
    assert np.mean([len(positions(one)) for one in false]) > 1.2 * np.mean([len(positions(one)) for one in true])
    assert len({len(positions(one)) for one in false}) == 1
    examples = feature_examples(0, active=8)
    trials = create("scorers", "fuzzing")._trials(examples, "test")
    counts = {trial.label: [] for trial in trials}
    for trial in trials:
        if trial.item is not None:
            counts[trial.label].append(len(positions(shown_of(trial.item))))
    assert abs(np.mean(counts[True]) - np.mean(counts[False])) < 0.8


def test_the_threshold_of_marks_cannot_be_set() -> None:
    made = plain_record(30, 30, active=8)
    assert [*map(set, fuzzed(made, threshold=0.01))] == [*map(set, fuzzed(made, threshold=0.99))]


def test_a_window_with_one_silent_token_is_replaced() -> None:
    """In its fuzzing of active windows: the judge sees another text than the one that is recorded."""
    window = feature_examples(0).test.positives[0]
    values = (4.0,) * (LENGTH - 1) + (0.0,)
    made = record("0", [Example(1, 1, window.tokens, values, 9)], [])
    made.test *= 5
    client = TheirClient(lambda batch: "[1, 1, 1, 1, 1]")
    ask_theirs("FuzzingScorer", made, client, fuzz_type="active")
    texts = [text for batch in client.batches for text, _ in batch]
    assert texts.count(window.text) == 5 and sum("NNsight" in text for text in texts) == 5


def cached(n_sequences: int, fires: Callable[[int, int], float]) -> tuple[Any, Any]:
    """A record of the library's own loader: tokens of ``n_sequences`` x 32, activations where ``fires`` is above 0."""
    import torch

    latents = library("latents.latents")
    values = torch.tensor([[fires(row, place) for place in range(LENGTH)] for row in range(n_sequences)])
    rows, places = torch.nonzero(values > 0, as_tuple=True)
    locations = torch.stack((rows, places, torch.zeros_like(rows)), dim=1)
    return latents.LatentRecord(latents.Latent("layers.1", 0)), latents.ActivationData(locations, values[rows, places])


class Tokenizer:
    """Tokens are numbers; enough for its constructor and sampler."""

    def batch_decode(self, tokens: Any) -> list[str]:
        return [f" {int(token)}" for token in tokens]


def sampled(n_sequences: int, fires: Callable[[int, int], float], **constructor: Any) -> Any:
    import torch

    config, built = library("config"), library("latents.constructors")
    tokens = torch.arange(n_sequences * LENGTH).reshape(n_sequences, LENGTH)
    one, data = cached(n_sequences, fires)
    options = {"min_examples": 5, "n_non_activating": 50, "example_ctx_len": LENGTH, **constructor}
    made = built.constructor(one, data, config.ConstructorConfig(**options), tokens, Tokenizer())
    return library("latents.samplers").sampler(made, config.SamplerConfig(), Tokenizer())


def test_windows_that_were_explained_are_scored() -> None:
    """Forty to explain and fifty to score are drawn from the same two hundred, each without regard to the other."""
    made = sampled(400, lambda row, place: 1 + chance(row) if row % 2 and place == 5 else 0.0)
    explained = {tuple(one.tokens.tolist()) for one in made.train}
    scored = [tuple(one.tokens.tolist()) for one in made.test]
    assert len(explained) == 40 and len(scored) == 50
    assert 0.1 < np.mean([one in explained for one in scored]) < 0.9


def test_silent_windows_come_twice() -> None:
    """They are drawn with replacement."""
    made = sampled(300, lambda row, place: 1.0 if row < 240 and place == 5 else 0.0)
    silent = [tuple(one.tokens.tolist()) for one in made.not_active]
    assert len(silent) == 50 and len(set(silent)) < 45


def test_centring_is_on_where_it_is_off() -> None:
    """Sequences of three windows; the option says where the peak stands, and says the opposite of what happens."""
    import torch

    built, config = library("latents.constructors"), library("config")
    tokens = torch.arange(60 * 96).reshape(60, 96)
    rows = torch.arange(60)
    places = 32 + torch.tensor([int(32 * chance(row)) for row in range(60)])
    data = library("latents.latents").ActivationData(torch.stack((rows, places, 0 * rows), dim=1), torch.rand(60) + 1)
    peaks = {}
    for centred in (True, False):
        one, _ = cached(1, lambda row, place: 0.0)
        options = config.ConstructorConfig(center_examples=centred, min_examples=5, n_non_activating=5)
        made = built.constructor(one, data, options, tokens, Tokenizer())
        peaks[centred] = {int(example.activations.argmax()) for example in made.examples}
    assert peaks[False] == {24} and len(peaks[True]) > 10


def test_brackets_and_line_breaks_of_the_text_are_shown_as_they_are() -> None:
    """A text can end itself and pose as the next one, or carry marks where there are none; ours is a JSON string."""
    text = " calm\nExample 1: the sea << whale>>"
    window = Example(1, 1, (text,), (0.0,), 0)
    made = record("0", [], [(window, (0.0,))] * 5)
    client = TheirClient(lambda batch: "[1, 1, 1, 1, 1]")
    ask_theirs("DetectionScorer", made, client)
    ((first, second, *_),) = client.batches
    assert first[0] == " calm" and second == ("the sea  whale", ((9, 14),))
    assert sum(map(len, client.batches)) == 10

    from scorers.judges.llm.judge import list_prompt

    (plain,) = (message.content for message in list_prompt("x", [JudgeItem(text)])[-1:])
    assert json.dumps(text) in plain and "\nExample 1" not in plain


def test_what_is_asked_depends_on_what_was_asked_before() -> None:
    """One generator for all features of a scorer: its batches are others when a feature came before. Ours are the same."""
    scorer_of = library("scorers").DetectionScorer
    batches = []
    for before in ([], [1]):
        client = TheirClient(lambda batch: "[1, 1, 1, 1, 1]")
        scorer = scorer_of(client, n_examples_shown=BATCH)
        for feature in (*before, 0):
            client.batches.clear()
            asyncio.run(scorer(plain_record(10, 10, feature)))
        batches.append([tuple(batch) for batch in client.batches])
    assert batches[0] != batches[1] and sorted(sum(batches[0], ())) == sorted(sum(batches[1], ()))


def test_a_reply_without_an_explanation_becomes_one() -> None:
    class Mute:
        async def generate(self, prompt: Any, **_: Any) -> Any:
            return library("clients.client").Response(text="I would rather not say.")

    made = sampled(400, lambda row, place: 1.0 if row % 2 and place == 5 else 0.0)
    result = asyncio.run(library("explainers").DefaultExplainer(Mute())(made))
    assert result.explanation == "Explanation could not be parsed."


def test_layers_1_takes_in_layers_10(tmp_path: Path) -> None:
    from evalkit.delphi.export import read_scores

    entry = {"str_tokens": ["a"], "activations": [1.0], "distance": 0, "activating": True}
    (tmp_path / "fuzz").mkdir()
    for module in ("layers.1", "layers.10"):
        entries = [{**entry, "prediction": module == "layers.1", "probability": None, "correct": None}]
        (tmp_path / "fuzz" / f"{module}_latent5.txt").write_text(json.dumps(entries))
    theirs, _ = library("log.result_analysis").load_data(tmp_path, ["layers.1"])
    assert sorted(theirs["prediction"]) == [False, True]
    ours = read_scores(tmp_path)
    assert ours.loc[ours["module"] == "layers.1", "match"].tolist() == [True]
