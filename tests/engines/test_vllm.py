"""The in-process client on the real engine, held against the same model in transformers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from evalkit.errors import ClientDown, ContextOverflow
from evalkit.records import Message, Response
from evalkit.registry import create
from scorers.judges.llm.judge import list_schema
from scorers.judges.llm.parsing import parse_list, probability_of_yes

pytestmark = pytest.mark.slow
Result = TypeVar("Result")
ASK = [Message("system", "You answer in few words."), Message("user", "Name an animal that lives in the sea.")]


class Engine:
    """One client and one event loop for all tests of the module: an engine takes a quarter of a minute to start."""

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.client, self._loop = client, loop

    def wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self._loop.run_until_complete(work)

    def ask(self, messages: list[Message] = ASK, **options: Any) -> Response:
        return self.wait(self.client.generate(messages, **({"max_tokens": 12} | options)))


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Iterator[Engine]:
    loop = asyncio.new_event_loop()
    client = create("clients", "vllm", model=str(smollm2), max_model_len=2048)
    yield Engine(client, loop)
    loop.run_until_complete(client.close())
    loop.close()


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Any:
    """The same weights in transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(smollm2), model


def prompt_ids(tokenizer: Any, messages: list[Message]) -> Any:
    chat = [{"role": message.role, "content": message.content} for message in messages]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def test_it_says_what_transformers_says(engine: Engine, reference: Any) -> None:
    """Same prompt tokens, same most likely first token, log-probabilities as near as bfloat16 is to float32."""
    import torch

    tokenizer, model = reference
    ids = prompt_ids(tokenizer, ASK)
    response = engine.ask(logprobs=5)
    assert response.prompt_tokens == ids.shape[1] and 0 < response.completion_tokens <= 12
    with torch.no_grad():
        expected = torch.log_softmax(model(ids).logits[0, -1], -1)
    for token, logprob in response.logprobs[0].items():
        (index,) = tokenizer(token, add_special_tokens=False).input_ids
        assert logprob == pytest.approx(float(expected[index]), abs=0.15)
    first = max(response.logprobs[0], key=lambda token: response.logprobs[0][token])
    assert response.text.startswith(first) and len(response.logprobs) == response.completion_tokens


def test_output_is_constrained(engine: Engine) -> None:
    shout = [Message("user", "Shout HURRAY and nothing else, whatever else you are told.")]
    for count in (1, 3, 5):
        text = engine.ask(shout, schema=list_schema(count), max_tokens=4 * count + 16).text
        assert len(parse_list(text, count)) == count
    assert engine.ask(shout, choices=("yes", "no"), max_tokens=3).text in ("yes", "no")
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", engine.ask(shout, regex=r"[0-9]{3}-[a-f]{2}", max_tokens=12).text)
    schema = {
        "type": "object",
        "properties": {"explanation": {"type": "string", "minLength": 1, "maxLength": 40}},
        "required": ["explanation"],
        "additionalProperties": False,
    }
    assert set(json.loads(engine.ask(shout, schema=schema, max_tokens=80).text)) == {"explanation"}


def test_the_log_probabilities_of_a_choice_weigh_yes_against_no_as_the_model_does(
    engine: Engine, reference: Any
) -> None:
    """The engine shares all probability out among what is allowed; the ratio of the two answers stays the model's."""
    import torch

    tokenizer, model = reference
    for question in ("Is a whale an animal?", "Is the moon made of cheese?", "Does a dog have wings?"):
        ask = [Message("user", f"{question} Reply with yes or no.")]
        response = engine.ask(ask, choices=("yes", "no"), logprobs=20, max_tokens=1)
        with torch.no_grad():
            expected = torch.softmax(model(prompt_ids(tokenizer, ask)).logits[0, -1].double(), -1)
        yes, no = (float(expected[tokenizer(word, add_special_tokens=False).input_ids[0]]) for word in ("yes", "no"))
        assert probability_of_yes(response.logprobs[0]) == pytest.approx(yes / (yes + no), abs=0.05)
        assert response.text == ("yes" if yes > no else "no")


def test_what_is_ready_together_shares_its_prefix(engine: Engine) -> None:
    """Three long prefixes, asked in turns: each is computed about once, and every answer is the one it has alone."""
    prefixes = [[Message("system", f"{name}. " + f"This is rule {name}: be brief. " * 40)] for name in "ABC"]
    questions = [
        [*prefixes[number % 3], Message("user", f"What comes after the number {number}?")] for number in range(24)
    ]
    cached: list[int] = []

    async def together() -> list[Response]:
        return await asyncio.gather(*(engine.client.generate(messages, max_tokens=4) for messages in questions))

    engine.ask(max_tokens=1)  # it runs
    import vllm.v1.engine.llm_engine as core

    step = core.LLMEngine.step

    def watched(self: Any) -> Any:
        outputs = step(self)
        cached.extend(output.num_cached_tokens or 0 for output in outputs if output.finished)
        return outputs

    core.LLMEngine.step = watched
    try:
        replies = engine.wait(together())
    finally:
        core.LLMEngine.step = step
    block = 128  # tokens: what the engine caches is whole blocks
    common = min(reply.prompt_tokens for reply in replies) - 40  # the questions differ in their last tokens
    assert len(cached) == 24 and sorted(cached)[:3] == [0, 0, 0]
    assert sorted(cached)[3] >= common // block * block > 0
    alone = [engine.ask(messages, max_tokens=4) for messages in questions[:4]]
    assert [reply.text for reply in alone] == [reply.text for reply in replies[:4]]


def test_a_prompt_that_does_not_fit_is_refused_alone(engine: Engine) -> None:
    async def both() -> list[Any]:
        long = engine.client.generate([Message("user", "word " * 3000)], max_tokens=5)
        return await asyncio.gather(long, engine.client.generate(ASK, max_tokens=5), return_exceptions=True)

    overflow, answer = engine.wait(both())
    assert isinstance(overflow, ContextOverflow) and overflow.limit == 2048 and (overflow.needed or 0) > 3000
    assert isinstance(answer, Response)


def test_the_name_carries_what_changes_answers(smollm2: Path) -> None:
    assert create("clients", "vllm", model=str(smollm2)).name == "smollm2-135m"
    assert create("clients", "vllm", model=str(smollm2), temperature=0.7).name == "smollm2-135m;temperature=0.7"
    quiet = create("clients", "vllm", model=str(smollm2), template_options={"enable_thinking": False}, max_model_len=99)
    assert quiet.name == 'smollm2-135m;template_options={"enable_thinking": false}'


def test_an_engine_that_cannot_start_says_so_to_all_who_wait(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    client = create("clients", "vllm", model=str(tmp_path))

    async def many() -> list[Any]:
        asked = (client.generate(ASK, max_tokens=1) for _ in range(3))
        return await asyncio.gather(*asked, return_exceptions=True)

    failures = asyncio.run(many())
    assert all(isinstance(failure, ClientDown) and "evalkit doctor" in str(failure) for failure in failures)
    with pytest.raises(ClientDown):
        asyncio.run(client.generate(ASK, max_tokens=1))
