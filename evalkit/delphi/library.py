"""Access to eai-delphi (formerly sae-auto-interp): its modules, and adapters for our clients and examples.

The library is an extra and is imported late. Its package of clients always imports vLLM; here it is replaced, so that vLLM
is imported only when the client for it is used. Does not know prompts; reads and writes no files. The plug-ins that use
this module are in ``components``.
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

MAX_TOKENS = 500  # limit for a reply; the default of the library's own engine client
# the exports of the package ``delphi.clients``: name → module
_CLIENTS = {"Client": "client", "Offline": "offline", "OpenRouter": "openrouter"}


class _Candidate(NamedTuple):
    """A candidate token with its log-probability, with the field names that the library expects."""

    token: str
    logprob: float


class _Token(NamedTuple):
    token: str
    top_logprobs: list[_Candidate]


def library(module: str) -> Any:
    """A module of the library, such as ``scorers``. Raises MissingExtra with the name of the missing package."""
    library_version()
    without_engine()
    try:
        return importlib.import_module(f"delphi.{module}")
    except ModuleNotFoundError as error:
        raise _missing(f"the package {error.name!r}, which eai-delphi imports,") from error


def library_version() -> str:
    """The installed version of the library. Raises MissingExtra if it is not installed."""
    try:
        return importlib.metadata.version("eai-delphi")
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing("the package 'eai-delphi'") from error


def _missing(what: str) -> MissingExtra:
    fix = f"{install_command('delphi')} && pip install --no-deps eai-delphi==0.1.3"
    return MissingExtra("eai-delphi", expected=f"{what} to be installed", seen="no such package", fix=fix)


def without_engine() -> None:
    """Make the library importable without vLLM, and avoid the slow import of vLLM if it is installed.

    Replaces the package ``delphi.clients``, whose ``__init__`` imports all clients, by a package with the same folder and
    names that imports each client on first use. Also silences the library's log below critical messages, because it would
    repeat every unreadable reply, which our records contain already.
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
    """Adapts one of our clients to the client interface of the library.

    ``outcomes``: per request, in order, the reply or the error.
    ``seed``: hashed with each request into the seed that is sent to the client.
    ``max_tokens``: limit for a reply, unless the library sets its own.

    The library's temperature is ignored; the client's own applies, as everywhere in evalkit. Replies are passed on without
    the reasoning of the model.
    """

    def __init__(self, client: Client, seed: int = 0, max_tokens: int = MAX_TOKENS) -> None:
        self.model = client.name
        self.outcomes: list[str | EvalkitError] = []
        self._client, self._seed, self._max_tokens = client, seed, max_tokens

    async def generate(self, prompt: Sequence[dict[str, Any]], **options: Any) -> Any:
        """The reply as the library's ``Response``. Raises the client's errors."""
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
    """The library's ``LatentRecord`` with our examples, in their order.

    ``train``, ``test``: active windows; their decile becomes the quantile.
    ``silent``: inactive windows.
    ``peak``: the library's normalised activations are tenths of it, rounded up, as in the library's own sampler.

    Token ids are unknown here and set to 0; the library uses them only to embed texts.
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
