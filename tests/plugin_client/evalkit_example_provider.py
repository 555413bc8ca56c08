import asyncio
import json
import os
from urllib.request import Request, urlopen

from evalkit import NoAnswer, Response


class ExampleClient:
    """Asks a provider with a protocol of its own; the key comes from EXAMPLE_API_KEY."""

    def __init__(self, model, url="http://127.0.0.1:8000"):
        self.name, self.url = model, url

    async def generate(self, messages, *, max_tokens, **constraints):
        prompt = "\n\n".join(f"{message.role}:\n{message.content}" for message in messages)
        return await asyncio.to_thread(self.ask, {"model": self.name, "prompt": prompt, "limit": max_tokens})

    def ask(self, question):
        key = {"Authorization": f"Bearer {os.environ.get('EXAMPLE_API_KEY', '')}"}
        try:
            with urlopen(Request(f"{self.url}/complete", json.dumps(question).encode(), key), timeout=60) as reply:
                return Response((found := json.load(reply))["output"], (), *found["used"])
        except (OSError, ValueError, KeyError) as error:
            raise NoAnswer(self.url, expected="a reply", seen=str(error), fix="see that it is up") from error
