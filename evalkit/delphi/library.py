"""The door to eai-delphi (formerly sae-auto-interp): its modules, our clients and examples under its contracts.

The library is an extra, imported late. Its package of clients imports vLLM when it is imported at all, whether or not it
is used; here it is opened without that, and asks for the engine only when somebody does. Knows no prompts and no files;
what asks and scores is in ``delphi_parts``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from evalkit.errors import EvalkitError, MissingExtra
from evalkit.installation import install_command
from evalkit.protocols import Client
from evalkit.records import Example, Message
from evalkit.seeds import derive_request_seed

__all__ = ["Asking", "library", "library_version", "record_of", "without_engine"]

MAX_TOKENS = 500  # of a reply, as its own engine client has it
_CLIENTS = {"Client": "client", "Offline": "offline", "OpenRouter": "openrouter"}  # what its package of clients exports


class _Candidate(NamedTuple):
    """A possible token with its log-probability, under the names that the library reads."""

    token: str
    logprob: float


class _Token(NamedTuple):
    token: str
    top_logprobs: list[_Candidate]


def library(module: str) -> Any:
    """A module of the library, such as ``scorers``. Raises MissingExtra, which names what is missing."""
    library_version()
    without_engine()
    try:
        return importlib.import_module(f"delphi.{module}")
    except ModuleNotFoundError as error:
        raise _missing(f"the package {error.name!r}, which eai-delphi imports,") from error


def library_version() -> str:
    """The version of the library. Raises MissingExtra."""
    try:
        return importlib.metadata.version("eai-delphi")
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing("the package 'eai-delphi'") from error


def _missing(what: str) -> MissingExtra:
    fix = f"{install_command('delphi')} && pip install --no-deps eai-delphi==0.1.3"
    return MissingExtra("eai-delphi", expected=f"{what} to be installed", seen="no such package", fix=fix)


def without_engine() -> None:
    """Let the library's modules be imported where there is no vLLM, and without starting to import it where there is.

    Puts a package of the same folder and names in the place of ``delphi.clients``, whose own beginning imports them all.
    Its log, which would repeat for every unread reply what our records say, is left to its critical messages.
    """
    if "delphi.clients" in sys.modules or importlib.util.find_spec("delphi") is None:
        return
    top: Any = importlib.import_module("delphi")
    top.clients = package = ModuleType("delphi.clients")
    package.__path__ = [str(Path(folder) / "clients") for folder in top.__path__]
    package.__dict__["__getattr__"] = _client_class
    sys.modules["delphi.clients"] = package
    log = logging.getLogger("delphi")
    if log.level == logging.NOTSET:
        log.setLevel(logging.CRITICAL)


def _client_class(name: str) -> Any:
    if name not in _CLIENTS:
        raise AttributeError(f"module 'delphi.clients' has no attribute {name!r}")
    return getattr(importlib.import_module(f"delphi.clients.{_CLIENTS[name]}"), name)


class Asking:
    """One of our clients under the library's contract. ``outcomes``: every reply, or the error instead of it, in order.

    The library's temperature is not passed on: that is the client's own, as everywhere here. ``seed`` is mixed with the
    request. A reply is what the model answers, without what it thought aloud before.
    """

    def __init__(self, client: Client, seed: int = 0, max_tokens: int = MAX_TOKENS) -> None:
        self.model = client.name
        self.outcomes: list[str | EvalkitError] = []
        self._client, self._seed, self._max_tokens = client, seed, max_tokens

    async def generate(self, prompt: Sequence[dict[str, Any]], **options: Any) -> Any:
        """The library's own ``Response``. Raises what the client raises."""
        messages = [Message(message["role"], message["content"]) for message in prompt]
        place = len(self.outcomes)
        self.outcomes.append("")
        try:
            response = await self._client.generate(
                messages,
                logprobs=int(options.get("top_logprobs") or 0),
                seed=derive_request_seed(self._seed, *(message.content for message in messages)),
                max_tokens=int(options.get("max_tokens") or self._max_tokens),
            )
        except EvalkitError as error:
            self.outcomes[place] = error
            raise
        self.outcomes[place] = response.answer
        tokens = [
            _Token(max(token, key=lambda name: token[name]), [_Candidate(*pair) for pair in token.items()])
            for token in response.logprobs
            if token
        ]
        return library("clients.client").Response(text=response.answer, logprobs=tokens or None)


def record_of(
    feature: str,
    *,
    peak: float,
    train: Sequence[Example] = (),
    test: Sequence[Example] = (),
    silent: Sequence[Example] = (),
    explanation: str = "",
) -> Any:
    """The library's ``LatentRecord`` of our examples, in their order.

    Activating ones carry their decile as quantile and their activations, also in tenths of ``peak``, rounded up, as its
    own sampler makes them. Token ids, which only its embedding of texts reads, are not known and 0.
    """
    import torch

    latents, samplers = library("latents.latents"), library("latents.samplers")
    record = latents.LatentRecord(latents.Latent("evalkit", feature), explanation=explanation)

    def active(examples: Sequence[Example]) -> list[Any]:
        made = [
            latents.ActivatingExample(**_plain(torch, example), quantile=example.decile or 0) for example in examples
        ]
        normalized: list[Any] = samplers.normalize_activations(made, peak)
        return normalized

    record.train, record.test = active(train), active(test)
    record.examples = sorted([*record.train, *record.test], key=lambda example: -example.max_activation)
    record.not_active = [latents.NonActivatingExample(**_plain(torch, example), distance=-1.0) for example in silent]
    return record


def _plain(torch: Any, example: Example) -> dict[str, Any]:
    return {
        "tokens": torch.zeros(len(example.tokens), dtype=torch.int64),
        "activations": torch.tensor(example.activations, dtype=torch.float32),
        "str_tokens": list(example.tokens),
    }
