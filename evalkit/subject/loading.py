"""Opens a causal language model and its tokenizer: a hub id, a local folder or a GGUF file.

Reads files (and the hub, through transformers); knows nothing of sites or hidden states. If the hub does not answer
within seconds, only the local cache is used.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalkit.errors import BadFile, MissingFile, require
from evalkit.util.hub import hub_reachable, quiet

if TYPE_CHECKING:
    import torch

__all__ = ["decoder_of", "load_model", "load_whole", "looks_like_path"]

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def looks_like_path(model: str | Path) -> bool:
    """Whether ``model`` is on disk rather than on the hub: it exists, or is written as a path."""
    text = str(model)
    return (
        isinstance(model, Path)
        or Path(text).expanduser().exists()
        or text.endswith(".gguf")
        or text.startswith(("/", "./", "../", "~"))
        or not _HUB_ID.fullmatch(text)
    )


def load_model(
    model: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    gguf_file: str | None = None,
    check: Callable[[str, Any], None] | None = None,
) -> tuple[str, Any, Any]:
    """The model's name, its decoder (without the output head) and its tokenizer.

    ``check(name, config)`` is called before the weights are read. Raises MissingFile (no such folder, hub id not
    reachable), BadFile (not a model, weights missing from it).
    """
    local = Path(str(model)).expanduser()
    name = local.resolve().stem if local.is_file() else local.resolve().name if local.exists() else str(model)
    whole, tokenizer = load_whole(
        model,
        dtype=dtype,
        revision=revision,
        gguf_file=gguf_file,
        check=None if check is None else lambda config: check(name, config),
    )
    return name, decoder_of(whole), tokenizer


def load_whole(
    model: str | Path,
    *,
    dtype: torch.dtype,
    revision: str | None = None,
    gguf_file: str | None = None,
    check: Callable[[Any], None] | None = None,
) -> tuple[Any, Any]:
    """The causal language model with its output head, and its tokenizer. Quantised GGUF weights are dequantised."""
    place, options = _locate(model, revision, gguf_file)
    require("transformers", "model")
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shown = str(model)
    config = _read(
        shown, "a model config", lambda: AutoConfig.from_pretrained(place, trust_remote_code=False, **options)
    )
    if check:
        check(config)
    extra: dict[str, Any] = {"quantization_config": _gguf_config()} if "gguf_file" in options else {}
    with quiet():
        found, report = _read(
            shown,
            "a causal language model",
            lambda: AutoModelForCausalLM.from_pretrained(
                place,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                **extra,
                **options,
            ),
        )
    if missing := sorted(report.get("missing_keys") or ()):
        raise BadFile(
            shown,
            expected="every weight of the model",
            seen=f"{len(missing)} missing, such as {missing[0]}",
            fix="download the model again",
        )
    tokenizer = _read(
        shown, "a tokenizer", lambda: AutoTokenizer.from_pretrained(place, trust_remote_code=False, **options)
    )
    return found, tokenizer


def decoder_of(whole: Any) -> Any:
    """A causal language model without its output head, which some models keep under the name "decoder" (ModernBERT)."""
    found = whole.get_decoder()
    return found if hasattr(found, "config") else whole.base_model


def _gguf_config() -> Any:
    require("gguf", "model")
    require("accelerate", "model")
    from transformers import GgufConfig

    return GgufConfig(dequantize=True)


def _locate(model: str | Path, revision: str | None, gguf_file: str | None) -> tuple[str, dict[str, Any]]:
    """Where transformers should look, and with which options."""
    options: dict[str, Any] = {}
    if gguf_file:
        options["gguf_file"] = gguf_file
    if not looks_like_path(model):
        if revision:
            options["revision"] = revision
        if not hub_reachable():
            log.info("the model hub does not answer; looking for %s in the local cache", model)
            options["local_files_only"] = True
        return str(model), options
    path = Path(model).expanduser()
    wanted = path / gguf_file if gguf_file else path
    if not wanted.exists():
        raise MissingFile(
            str(wanted),
            expected="a model folder, a .gguf file or a hub id",
            seen="no such file or folder",
            fix="check the path, or fetch a model with 'evalkit models pull smollm2-135m'",
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise BadFile(
                str(path), expected="a model folder or a .gguf file", seen="another file", fix="pass the file's folder"
            )
        options["gguf_file"] = path.name
        return str(path.parent), options
    if not gguf_file and not (path / "config.json").exists():
        raise BadFile(
            str(path),
            expected="a model folder with config.json",
            seen="no config.json",
            fix="pass the folder that save_pretrained or the hub wrote, or a .gguf file",
        )
    return str(path), options


def _read(shown: str, what: str, read: Callable[[], Any]) -> Any:
    """Run a loader of transformers and turn its errors into MissingFile or BadFile."""
    try:
        return read()
    except ImportError:
        raise
    except Exception as error:  # transformers raises many classes; all mean that the files are not such a model
        if "trust_remote_code" in str(error):
            raise BadFile(
                shown,
                expected=f"{what} of an architecture that transformers supports",
                seen="a model with code of its own (auto_map), which evalkit never runs",
                fix="use a model whose config.json has a model_type that transformers knows",
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not looks_like_path(shown):
            raise MissingFile(
                shown,
                expected=f"{what} on the hub or in the local cache",
                seen=first[:200],
                fix="check the id and the network, or pass a local folder",
            ) from error
        raise BadFile(
            shown, expected=what, seen=f"{type(error).__name__}: {first[:200]}", fix="download or save the model again"
        ) from error
