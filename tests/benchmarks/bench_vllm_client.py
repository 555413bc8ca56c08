"""The in-process client, compared with sending the same requests one at a time, and with an engine without prefix cache.

Prints JSON lines, medians of three rounds. Needs vLLM: run it with the environment of `make test-engine`.

Latest results (two cores, no GPU, SmolLM2-135M, 16 descriptions x 4 lists of 5 texts): client 4.96 s, one request at a time
16.0 s (3.2 times as long), without prefix cache 16.8 s (3.4 times as long).
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from evalkit.records import JudgeItem, Message
from evalkit.registry import create
from evalkit.subject.download import pull
from scorers.judges.llm.judge import list_prompt, list_schema

ROUNDS = 3
OBJECTS = ["a ship", "the river", "two horses", "an old coat", "the engine", "a letter", "bread", "the moon"]


def questions(round_number: int) -> list[list[Message]]:
    """Requests for judging 16 descriptions on 20 texts each; every round has other texts, so none is cached."""
    asked = []
    for description in range(16):
        for batch in range(4):
            names = [OBJECTS[(description + batch + text) % 8] for text in range(5)]
            texts = [
                JudgeItem(
                    f"{round_number}-{batch}-{text}: they looked at {name} and said that it was not what it had been"
                )
                for text, name in enumerate(names)
            ]
            asked.append(list_prompt(f"things like {OBJECTS[description % 8]}, kind {description}", texts))
    return asked


async def together(client: Any, asked: list[list[Message]]) -> None:
    await asyncio.gather(*(_ask(client, messages) for messages in asked))


async def one_at_a_time(client: Any, asked: list[list[Message]]) -> None:
    for messages in asked:
        await _ask(client, messages)


def _ask(client: Any, messages: list[Message]) -> Awaitable[Any]:
    reply: Awaitable[Any] = client.generate(messages, schema=list_schema(5), max_tokens=36)
    return reply


async def measure(model: Path) -> None:
    ways: list[tuple[str, dict[str, Any], Callable[[Any, list[list[Message]]], Awaitable[None]]]] = [
        ("client", {}, together),
        ("one at a time", {}, one_at_a_time),
        ("without prefix cache", {"engine": {"enable_prefix_caching": False}}, together),
    ]
    seconds = {}
    for name, options, way in ways:
        client = create("clients", "vllm", model=str(model), max_model_len=2048, **options)
        await together(client, questions(99)[:2])  # start, compile grammars
        rounds = []
        for number in range(ROUNDS):
            asked = questions(number)
            started = time.perf_counter()
            await way(client, asked)
            rounds.append(time.perf_counter() - started)
        seconds[name] = statistics.median(rounds)
        await client.close()
        line = {"bench": "64 list questions", "way": name, "seconds": round(seconds[name], 2)}
        print(json.dumps(line | {"times the client": round(seconds[name] / seconds["client"], 2)}), flush=True)


if __name__ == "__main__":
    if importlib.util.find_spec("vllm") is None:
        sys.exit("no vLLM in this environment: `make test-engine` makes one")
    asyncio.run(measure(pull("smollm2-135m", source="registry")))
