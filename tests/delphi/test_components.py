"""Explainer, judge and scorers of eai-delphi on our examples and clients."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evalkit.config.run_config import RunConfig
from evalkit.delphi.export import read_scores
from evalkit.errors import BadConfig, ClientDown, ClientError, ContextOverflow, EvalkitError, RequestRefused
from evalkit.evaluate.components import make_tests
from evalkit.installation import install_command
from evalkit.records import Example, ExplainExamples, Explanation, JudgeItem, Message, Response, ScoreExamples
from evalkit.registry import create
from tests.support.builders import examples, random_test
from tests.support.delphi_library import use_library
from tests.support.paths import ROOT

PARTS = [
    ("explainers", "delphi-default"),
    ("scorers", "delphi-detection"),
    ("scorers", "delphi-fuzz"),
    ("judges", "delphi"),
]
EXPLANATION = Explanation("source", "7", "hand", "1", "words with a w")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return use_library(tmp_path_factory)


class Client:
    """Replies with what a function of the last message says; keeps what it was asked."""

    name = "known"

    def __init__(self, reply: Callable[[str], str | Response | EvalkitError]) -> None:
        self.reply = reply
        self.asked: list[list[Message]] = []
        self.options: list[dict[str, Any]] = []

    async def generate(self, messages: Sequence[Message], **options: Any) -> Response:
        self.asked.append(list(messages))
        self.options.append(options)
        found = self.reply(messages[-1].content)
        if isinstance(found, EvalkitError):
            raise found
        return found if isinstance(found, Response) else Response(found)


def texts_of(question: str) -> list[str]:
    return re.findall(r"^Example \d+: (.*)$", question, re.MULTILINE)


def even(text: str) -> bool:
    """Whether the first number in a text is even: the number of the window."""
    found = re.search(r"w(\d+)p", text)
    assert found is not None
    return int(found[1]) % 2 == 0


def by_number(question: str) -> str:
    return json.dumps([int(even(text)) for text in texts_of(question)])


def of_run(client: Client | None, scorer: str, **changes: Any) -> Any:
    """The scorer and its judge, as a run makes them."""
    options = {"model": "m", "dictionaries": ("d",), "scorers": (scorer,), "judges": ("delphi",), "controls": ()}
    (test,) = make_tests(RunConfig.create(**{**options, **changes}), client)
    return test


def score(client: Client, scorer: str, made: ScoreExamples) -> Any:
    test = of_run(client, scorer)
    return asyncio.run(test.scorer.score(EXPLANATION, made, test.judge))


def test_without_the_library_the_install_command_is_named(tmp_path: Path) -> None:
    """Parts are listed as sound, and say what is missing when they are made."""
    code = f"""
from evalkit.registry import create, list_plugins
print([plugin.error for plugin in list_plugins() if plugin.name.startswith("delphi-")])
for kind, name in {PARTS!r}:
    try:
        create(kind, name, **({{"client": type("C", (), {{"name": "c"}})()}} if kind == "judges" else {{}}))
    except Exception as error:
        print(type(error).__name__, error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    first, *others = done.stdout.splitlines()
    assert first == "[None, None, None]"
    assert others == [
        "MissingExtra eai-delphi: expected the package 'eai-delphi' to be installed; seen no such package; "
        f"fix: {install_command('delphi')} && pip install --no-deps eai-delphi==0.1.3"
    ] * len(PARTS)


@pytest.mark.slow
def test_what_it_needs_is_named_too(installed: Path, tmp_path: Path) -> None:
    """The library without one of the packages that it imports."""
    for name in ("delphi", "eai_delphi-0.1.3.dist-info"):
        (tmp_path / name).symlink_to(installed / name)
    code = "from evalkit.registry import create; create('scorers', 'delphi-fuzz')"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert re.search(
        r"MissingExtra: eai-delphi: expected the package '\w+', which eai-delphi imports, to be inst", done.stderr
    )


@pytest.mark.slow
def test_the_engine_is_not_imported_before_it_is_asked_for(installed: Path) -> None:
    """Its package of clients imports vLLM at once; here it opens without, and looks for the engine when that is named."""
    code = """
import sys
from evalkit.delphi.library import library
library("scorers"), library("explainers"), library("latents")
import delphi.clients
print("vllm" in sys.modules, delphi.clients.Client.__module__)
try:
    delphi.clients.Offline
    print("there")
except ModuleNotFoundError as error:
    print(error.name)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{installed}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    first, second = done.stdout.splitlines()[-2:]
    assert first == "False delphi.clients.client" and second in ("there", "vllm")


def explain_examples() -> ExplainExamples:
    test = random_test(8, seed=1)
    strong = [replace(one, activations=tuple(3 * value for value in one.activations)) for one in test.positives[:4]]
    return ExplainExamples("source", "7", 0.0, 6.0, (*strong, *test.positives[4:]))


@pytest.mark.slow
def test_the_explainer_shows_our_windows_and_reads_its_phrase(installed: Path) -> None:
    client = Client(lambda question: "Let me see.\n[EXPLANATION]: words of numbered windows ")
    explainer = create("explainers", "delphi-default")
    made = explain_examples()
    found = asyncio.run(explainer.explain("7", made, client))
    assert (found.text, found.explainer, found.version) == ("words of numbered windows", "delphi-default", "0.1.3")
    ((*_, question),) = client.asked
    for example in made.positives:
        fires = [value > 0.3 * example.peak for value in example.activations]
        marked = "".join(
            f"{'<<' * (now and not before)}{token}{'>>' * (now and not after)}"
            for token, now, before, after in zip(
                example.tokens, fires, [False, *fires], [*fires[1:], False], strict=False
            )
        )
        assert marked in question.content
    # tenths of the feature's peak of 6, rounded up: 3 is 5, 1 is 2
    assert {int(level) for level in re.findall(r'" : (\d+)\)', question.content)} == {5, 2}
    assert client.options == [{"logprobs": 0, "seed": client.options[0]["seed"], "max_tokens": 500}]


@pytest.mark.slow
def test_a_reply_without_an_explanation_is_a_failure(installed: Path) -> None:
    """The library would call it "Explanation could not be parsed." and score that."""
    explainer = create("explainers", "delphi-default")
    with pytest.raises(
        ClientError, match=r"expected a reply with \[EXPLANATION\]: followed by a phrase; seen 'No idea'"
    ):
        asyncio.run(explainer.explain("7", explain_examples(), Client(lambda question: "No idea")))
    with pytest.raises(BadConfig, match="explainer 'delphi-default': expected a client"):
        asyncio.run(explainer.explain("7", explain_examples(), None))
    with pytest.raises(BadConfig, match="judge 'delphi': expected a client"):
        of_run(None, "delphi-fuzz")


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["delphi-detection", "delphi-fuzz"])
def test_judgements_are_of_the_windows_that_were_shown(installed: Path, scorer: str, tmp_path: Path) -> None:
    made = examples(random_test(20, seed=3))
    client = Client(by_number)
    found = score(client, scorer, made)
    windows = {one.window: one for one in (*made.test.positives, *made.test.negatives)}
    shown = [text for messages in client.asked for text in texts_of(messages[-1].content)]
    assert len(found.judgements) == len(shown) == 40 and len(client.asked) == 8
    assert [one.item for one in found.judgements] == list(range(40))
    for judgement, text in zip(found.judgements, shown, strict=True):
        example = windows[judgement.window]
        assert text.replace("<<", "").replace(">>", "") == example.text
        assert ("<<" in text) == (scorer == "delphi-fuzz")
        assert judgement.label == (example.peak > 0) and judgement.match == even(example.text)
        assert judgement.decile == (example.decile if judgement.label else None)
        assert (judgement.confidence, judgement.probability, judgement.reason) == (float(even(text)), None, None)
    assert (found.scorer, found.version) == (scorer, "0.1.3")
    assert {one.window for one in found.judgements} == set(windows)

    import orjson
    from delphi.scorers.classifier.sample import ClassifierOutput

    written = [
        ClassifierOutput(
            [*windows[one.window].tokens], [*windows[one.window].activations], 0, one.label, one.match, None
        )
        for one in found.judgements
    ]
    (tmp_path / "fuzz").mkdir()
    (tmp_path / "fuzz" / "layers.1_latent7.txt").write_bytes(orjson.dumps(written))  # as it writes them itself
    read = read_scores(tmp_path)
    assert read["match"].tolist() == [one.match for one in found.judgements]
    assert read["label"].tolist() == [one.label for one in found.judgements]


@pytest.mark.slow
def test_false_marks_may_go_on_active_windows(installed: Path) -> None:
    made = examples(random_test(10, seed=3))
    client = Client(by_number)
    found = score(client, "delphi-fuzz:fuzz_type=active", made)
    positives = {one.window for one in made.test.positives}
    assert sorted(one.window for one in found.judgements) == sorted([*positives, *positives])
    assert sum(one.label for one in found.judgements) == 10
    with pytest.raises(BadConfig, match="fuzz_type: expected default or active; seen 'wild'"):
        create("scorers", "delphi-fuzz", fuzz_type="wild")


@pytest.mark.slow
def test_what_is_not_read_is_unscored_with_the_reason(installed: Path) -> None:
    replies = iter(
        ["no list", ContextOverflow("prompt", limit=10, needed=20, fix="x"), *(["[1, 1, 1, 1, 1]"] * 2), "[1, 1]"]
    )
    made = examples(random_test(11, seed=3))
    found = score(Client(lambda question: next(replies)), "delphi-detection", made)
    reasons = [one.reason for one in found.judgements]
    assert reasons[:5] == ["eai-delphi requires a list of 5 answers: 'no list'"] * 5
    assert all(str(reason).startswith("prompt: expected prompt and reply within") for reason in reasons[5:10])
    assert reasons[10:20] == [None] * 10
    last = "eai-delphi requires a list of 5 answers, although the last batch has only 2 texts: '[1, 1]'"
    assert reasons[20:] == [last] * 2
    assert [one.match for one in found.judgements] == [None] * 10 + [True] * 10 + [None] * 2


@pytest.mark.slow
@pytest.mark.parametrize("ask", ["scorer", "judge"])
def test_what_concerns_every_text_ends_the_score(installed: Path, ask: str) -> None:
    """The library takes every failure for a reply that it cannot read; a model that is down is none."""
    down = ClientDown("model", expected="an answer", seen="nobody", fix="start it")
    refused = RequestRefused("request", expected="one it can answer", seen="400", fix="see")
    made = examples(random_test(10, seed=3))
    for error in (down, refused):
        with pytest.raises(type(error)) as caught:
            client = Client(lambda question, error=error: error)
            if ask == "scorer":
                score(client, "delphi-detection", made)
            else:
                asyncio.run(create("judges", "delphi", client=client).judge("x", [JudgeItem("a"), JudgeItem("b")]))
        assert caught.value is error


@pytest.mark.slow
def test_features_do_not_depend_on_what_came_before(installed: Path) -> None:
    """The library shuffles with one generator for all features; here each has its own. A repeat has another order."""
    made = examples(random_test(20, seed=3))
    client = Client(by_number)
    test = of_run(client, "delphi-detection")
    runs = [
        asyncio.run(test.scorer.score(EXPLANATION, one, test.judge)) for one in (made, made, replace(made, repeat=1))
    ]
    orders = [[one.window for one in found.judgements] for found in runs]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


@pytest.mark.slow
def test_probabilities_of_its_answers(installed: Path) -> None:
    """P(1) against P(0) at each answer of the list, from the candidates of its token."""
    shares = [0.9, 0.2, 0.6, 0.5, 0.01]

    def reply(question: str) -> Response:
        tokens: list[dict[str, float]] = []
        for place, share in enumerate(shares):
            tokens.append({"[" if place == 0 else ", ": 0.0})
            tokens.append({"1": math.log(0.8 * share), "0": math.log(0.8 * (1 - share)), "x": math.log(0.2)})
        return Response("[1, 0, 1, 1, 0]", logprobs=[*tokens, {"]": 0.0}])

    client = Client(reply)
    found = score(client, "delphi-detection:log_prob=true", examples(random_test(5, seed=3)))
    assert [one.probability for one in found.judgements] == pytest.approx(2 * shares)
    assert [one.confidence for one in found.judgements] == pytest.approx(2 * shares)
    assert [one.match for one in found.judgements] == 2 * [True, False, True, True, False]
    assert {options["logprobs"] for options in client.options} == {5}


@pytest.mark.slow
def test_its_prompts_as_a_judge_of_our_questions(installed: Path) -> None:
    """Seven plain and six marked texts in any order; a last batch is asked for as many answers as it has."""
    client = Client(by_number)
    items = [
        JudgeItem(f"the w{n}p thing", ((4, 8),) if n % 2 else None) if n < 12 else JudgeItem(f"w{n}p end")
        for n in range(13)
    ]
    answers = asyncio.run(create("judges", "delphi", client=client).judge("numbers", items))
    assert [answer.match for answer in answers] == [n % 2 == 0 for n in range(13)]
    sizes = sorted(len(texts_of(messages[-1].content)) for messages in client.asked)
    assert sizes == [1, 2, 5, 5]
    marked = [text for messages in client.asked for text in texts_of(messages[-1].content) if "<<" in text]
    assert sorted(marked)[:2] == ["the <<w11p>> thing", "the <<w1p >>thing"] and len(marked) == 6
    assert asyncio.run(create("judges", "delphi", client=client).judge("numbers", [])) == []


@pytest.mark.slow
def test_records_name_the_model_and_the_judge(installed: Path) -> None:
    client = Client(by_number)
    tests = [of_run(client, name) for name in ("delphi-detection", "delphi-fuzz:batch_size=3")]
    assert [(test.scorer_name, test.judge_name) for test in tests] == [
        ("delphi-detection", "delphi@known"),
        ("delphi-fuzz:batch_size=3", "delphi:batch_size=3@known"),
    ]
    for name in ("delphi-detection:max_tokens=20", "delphi-fuzz:max_tokens=20"):
        score(client, name, examples(random_test(5, seed=1)))
        assert client.options[-1]["max_tokens"] == 20
    with pytest.raises(BadConfig, match="scorer 'delphi-detection': expected its own judge, 'delphi'; seen 'oracle'"):
        oracle = type("Oracle", (), {"name": "oracle"})()
        asyncio.run(tests[0].scorer.score(EXPLANATION, examples(random_test(5, seed=1)), oracle))
    with pytest.raises(BadConfig, match="batch_size of judge 'delphi': expected at least 1; seen 0"):
        create("judges", "delphi", client=client, batch_size=0)


def test_windows_of_the_builders_are_what_these_tests_take_them_for() -> None:
    window: Example = random_test(2, seed=0).positives[1]
    assert even(window.text) is (window.window % 2 == 0)
