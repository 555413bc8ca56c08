"""Counts the prompt tokens that the language-model judge uses per feature, for both versions of its prompts, by batch size.

Detection and fuzzing on 100 windows of 32 tokens of the bundled text, tokenised by SmolLM2 and counted with its chat
template; means over 8 features. ``besides_texts``: tokens of a request without those of its texts (but with their quotes,
numbers and marks). ``after_shared``: tokens of all requests without the longest prefix that each shares with an earlier
one. Prints JSON lines. Needs SmolLM2's tokenizer in models/; runs no model.

Run: ``python tests/benchmarks/bench_prompts.py``.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evalkit.records import Message, Response
from scorers.judges.llm.judge import LlmJudge
from tests.support.real_windows import cut_windows, frequent_words, items_of

N_FEATURES = 8
SETTINGS = [{"batch_size": 5}, {"batch_size": 10}, {"batch_size": 20}, {"mode": "single"}]


class CountingClient:
    """Answers every request with a reply that fits its constraint, or with ``bad_reply``; keeps the requests' tokens."""

    name = "counting"

    def __init__(self, tokenizer: Any, bad_reply: str | None = None) -> None:
        self.tokenizer, self.bad_reply = tokenizer, bad_reply
        self.requests: list[list[int]] = []

    async def generate(
        self, messages: Sequence[Message], *, schema: Mapping[str, Any] | None = None, **options: Any
    ) -> Response:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        self.requests.append(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        good = "no" if schema is None else json.dumps([0] * schema["minItems"])
        return Response(good if self.bad_reply is None else self.bad_reply)


def requests_of(tokenizer: Any, explanation: str, items: Any, **options: Any) -> list[list[int]]:
    """The tokens of every request about the items of one test."""
    client = CountingClient(tokenizer, options.pop("bad_reply", None))
    asyncio.run(LlmJudge(client, **options).judge(explanation, items))
    return client.requests


def unshared(requests: Sequence[Sequence[int]]) -> int:
    """Number of tokens of the requests without the longest prefix that each shares with an earlier one."""
    total, seen = 0, set()
    for tokens in requests:
        prefixes = [hash(tuple(tokens[:end])) for end in range(1, len(tokens) + 1)]
        total += sum(prefix not in seen for prefix in prefixes)
        seen |= set(prefixes)
    return total


def main() -> None:
    from transformers import AutoTokenizer

    from evalkit.subject.download import pull

    root = Path(__file__).resolve().parents[2]
    folder = pull("smollm2-135m", to=root / "models/smollm2-135m", source="registry")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = cut_windows(tokenizer)
    features = [items_of(windows, word) for word in frequent_words(windows, N_FEATURES)]
    for settings in SETTINGS:
        for version in (1, 2):
            line: dict[str, Any] = {"texts_a_request": settings.get("batch_size", "1, single form"), "prompt": version}
            spent: dict[str, list[int]] = {"detection": [], "fuzzing": []}
            besides, after, again = [], [], []
            for feature in features:
                asked: list[list[int]] = []
                for scorer, (explanation, items) in feature.items():
                    requests = requests_of(tokenizer, explanation, items, prompt_version=version, **settings)
                    texts = [len(tokenizer(item.text, add_special_tokens=False)["input_ids"]) for item in items]
                    spent[scorer].append(sum(map(len, requests)))
                    besides.append((spent[scorer][-1] - sum(texts)) / len(requests))
                    asked += requests
                    first, second = requests_of(
                        tokenizer,
                        explanation,
                        items[: settings.get("batch_size", 1)],
                        prompt_version=version,
                        bad_reply="I am sorry, but I cannot tell from these texts.",
                        **settings,
                    )
                    again.append(len(second) - len(first))
                after.append(unshared(asked))
            line |= {scorer: round(statistics.mean(tokens)) for scorer, tokens in spent.items()}
            line["both"] = line["detection"] + line["fuzzing"]
            line["besides_texts"] = round(statistics.mean(besides))
            line["after_shared"] = round(statistics.mean(after))
            line["more_if_asked_again"] = round(statistics.mean(again))
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
