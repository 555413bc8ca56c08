"""What the stand-in chat server says: a judge that goes by shared words, an explainer that names the marked ones.

Replies are a function of the request alone, so that a run against the server scores above chance and repeats exactly.
Pure; knows the prompts' form and nothing else of ours.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter
from contextlib import suppress
from typing import Any

MODEL_KINDS = ("wrong_json", "wrong_length")  # a healthy 200 whose text cannot be used

_LETTER = r"[^\W\d_]"
_FILLERS = ("river", "lamp", "seven", "quiet", "garden", "north", "paper", "yes", "no", "0", "1")


def last_question(prompt: str) -> str:
    """The prompt from the last question of a judge or an explainer on; all of it where there is none."""
    starts = [found.start() for found in re.finditer(r"^(?:Description: |Active:$)", prompt, re.M)]
    return prompt[starts[-1] :] if starts else prompt


def verdicts(question: str) -> list[int]:
    """1 for every text that shares a word of four letters or more with the description; marked words, where any are."""
    description = re.match(r'Description: (".*")$', question, re.M)
    if not description:
        return []
    words = set(_words(json.loads(description[1])))
    wanted = {word for word in words if len(word) >= 4} - {"words", "such"} or words
    return [int(bool(wanted & set(_marked(text) or _words(text)))) for text in _texts(question)]


def explanation(question: str) -> str:
    """The marked words, most frequent first."""
    counts = Counter(word for text in _texts(question) for word in _marked(text))
    found = sorted(counts, key=lambda word: (len(word) < 4, -counts[word], word))[:3]
    return f"words such as {', '.join(found)}" if found else "nothing that stands out"


def answer(prompt: str) -> str:
    """The reply of a model that follows instructions and is not constrained."""
    question = last_question(prompt)
    if question.startswith("Active:"):
        return json.dumps({"explanation": explanation(question)})
    found = verdicts(question)
    if not found:
        return f"a reply of no use, number {random.Random(prompt).randrange(1000)}"
    return json.dumps(found) if "\nTexts:\n" in question else ("no", "yes")[found[0]]


def _texts(question: str) -> list[str]:
    return [json.loads(text) for text in re.findall(r'^(?:\d+\.|Text:) (".*")$', question, re.M)]


def _words(text: str) -> list[str]:
    return re.findall(rf"{_LETTER}+", text.lower())


def _marked(text: str) -> list[str]:
    """The words that marks touch, whole even where a mark covers a piece."""
    return _words(" ".join("".join(found) for found in re.findall(rf"({_LETTER}*)<<(.*?)>>({_LETTER}*)", text, re.S)))


def instance(schema: dict[str, Any], question: str, chance: random.Random, name: str = "") -> Any:
    """A valid instance of a JSON schema, the right answer to the question where it has a place for one.

    Raises ValueError for what it cannot make.
    """
    found, kind = verdicts(question), schema.get("type")
    if "enum" in schema:
        says = ("no", "yes")[found[0]] if found else None
        return says if says in schema["enum"] else chance.choice(schema["enum"])
    if kind == "object":
        return {key: instance(part, question, chance, key) for key, part in schema.get("properties", {}).items()}
    if kind == "array":
        length = max(schema.get("minItems", 0), min(len(found), schema.get("maxItems", len(found))))
        items = schema.get("items", {})
        if found and (set(items.get("enum", ())) == {0, 1} or items.get("type") in ("integer", "boolean")):
            values = (found + [0] * length)[:length]
            return [bool(value) for value in values] if items.get("type") == "boolean" else values
        return [instance(items, question, chance) for _ in range(length)]
    if kind == "string":
        return _string(schema, question, chance, name)
    if kind in ("integer", "number"):
        return chance.randint(schema.get("minimum", 0), schema.get("maximum", schema.get("minimum", 0) + 9))
    if kind in ("boolean", "null"):
        return chance.random() < 0.5 if kind == "boolean" else None
    raise ValueError(f"no instance of {json.dumps(schema)[:80]}")


def _string(schema: dict[str, Any], question: str, chance: random.Random, name: str) -> str:
    if name == "explanation":
        return explanation(question)[: schema.get("maxLength")]
    if "pattern" in schema:
        fitting = [word for word in (answer(question), *_FILLERS) if re.fullmatch(schema["pattern"], word)]
        if not fitting:
            raise ValueError(f"no string for {schema['pattern']!r}")
        return fitting[0]
    text = chance.choice(_FILLERS)
    while len(text) < schema.get("minLength", 0):
        text += f" {chance.choice(_FILLERS)}"
    return text[: schema.get("maxLength")]


def reply_text(body: dict[str, Any]) -> str:
    """The model's reply to the body of a request. Raises ValueError for a constraint it cannot meet."""
    prompt = "\n".join(message["content"] for message in body["messages"] if message["role"] == "user")
    question, chance = last_question(prompt), random.Random(canonical(body["messages"]))
    own = body.get("structured_outputs") or {}
    schema = own.get("json") or body.get("guided_json")
    if (body.get("response_format") or {}).get("type") == "json_schema":
        schema = body["response_format"]["json_schema"]["schema"]
    if schema is not None:
        return json.dumps(instance(json.loads(schema) if isinstance(schema, str) else schema, question, chance))
    if "choice" in own:
        return str(instance({"enum": own["choice"]}, question, chance))
    if "regex" in own:
        return str(instance({"type": "string", "pattern": own["regex"]}, question, chance))
    return answer(prompt)


def spoil(text: str, kind: str | None, chance: random.Random) -> str:
    """The text with a fault of the model in it."""
    with suppress(ValueError):
        if kind == "wrong_length":
            value = json.loads(text)
            inside = next(iter(value.values())) if isinstance(value, dict) else value
            if isinstance(inside, list):
                changed = inside[:-1] if chance.random() < 0.5 else [*inside, 0]
                return json.dumps({next(iter(value)): changed} if isinstance(value, dict) else changed)
    return text[:-1] if kind else text  # an open bracket, an open quote, "ye"


def completion(body: dict[str, Any], text: str, model: str) -> dict[str, Any]:
    """The completion object around a text, cut at the request's limit on tokens."""
    used, prompt = _tokens(text), prompt_tokens(body)
    limit = int(body.get("max_completion_tokens") or body.get("max_tokens") or used)
    cut = used > limit
    if cut:
        text, used = text[: len(text) * limit // used], limit
    logprobs = {"content": _logprobs(text, body.get("top_logprobs") or 0)} if body.get("logprobs") else None
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "length" if cut else "stop"}
    return {
        "id": f"chatcmpl-{sha(body)[:16]}",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": prompt, "completion_tokens": used, "total_tokens": prompt + used},
    }


def _logprobs(text: str, count: int) -> list[dict[str, Any]]:
    """Most probable first; of yes and no, several spellings."""
    shares = [{word: 0.9} for word in re.findall(r"\s*\S+", text)]
    if text in ("yes", "no"):
        other = "no" if text == "yes" else "yes"
        shares = [{f" {text}": 0.81, f" {other}": 0.09, text.title(): 0.08, " maybe": 0.01}]
    content = []
    for share in shares:
        ranked = [{"token": token, "logprob": math.log(p), "bytes": list(token.encode())} for token, p in share.items()]
        content.append({**ranked[0], "top_logprobs": ranked[:count]})
    return content


def _tokens(text: str) -> int:
    return max(1, int(1.3 * len(text.split())))


def prompt_tokens(body: dict[str, Any]) -> int:
    """Tokens of all messages, by a rule of thumb."""
    return sum(_tokens(message["content"]) for message in body["messages"])


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def sha(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()
