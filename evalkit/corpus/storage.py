"""The files of a corpus: writes the token folder atomically, reads token matrices made by other tools.

Knows numpy, torch and safetensors files; no text and no tokenizer beyond its fingerprint. Never unpickles: ``.npy``
with allow_pickle=False, ``.pt`` with weights_only=True.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
from array import array
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from evalkit.errors import BadFile, BadShape, StorageError, require
from evalkit.util.sealed_files import seal

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CorpusWriter", "read_matrix", "tokenizer_fingerprint"]

_HEADER_BYTES = 128  # of an .npy file of version 1.0 with a two-dimensional shape
_NAMES = ("tokens", "input_ids")
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


class CorpusWriter:
    """Writes contexts to a hidden folder beside the target and renames it at the end; removes it on errors."""

    def __init__(self, folder: Path, *, context_length: int, pad_id: int) -> None:
        self._folder = folder
        self._temp = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
        self._width = context_length
        self._pad_id = pad_id
        self._documents = array("q")
        self._lengths = array("q")
        self._stream: IO[bytes] | None = None
        self.n_tokens = 0

    def __enter__(self) -> Self:
        try:
            shutil.rmtree(self._temp, ignore_errors=True)
            self._temp.mkdir(parents=True)
            self._stream = (self._temp / "tokens.npy").open("wb")
            self._stream.write(bytes(_HEADER_BYTES))  # the real header needs the number of rows
        except OSError as error:
            raise self._storage(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            try:
                self._stream.close()
            except OSError as late:  # the disk may be full only when the last buffered bytes are written
                error = error or late
        shutil.rmtree(self._temp, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in _DISK:
            raise self._storage(error) from error

    @property
    def n_contexts(self) -> int:
        """Contexts written so far."""
        return len(self._lengths)

    def set_width(self, context_length: int) -> None:
        """Change the context length; only before the first context is written."""
        self._width = context_length

    def add(self, rows: NDArray[np.integer[Any]], document: int, length: int | None = None) -> None:
        """Append contexts (n, width) of one document. ``length``: tokens of a single context that is padded."""
        full = np.full((len(rows), self._width), self._pad_id, dtype=np.uint32)
        full[:, : rows.shape[1]] = rows
        assert self._stream is not None  # for the type checker: only used inside "with"
        self._stream.write(full.tobytes())
        self._documents.extend([document] * len(rows))
        self._lengths.extend([length or self._width] * len(rows))
        self.n_tokens += len(rows) * (length or self._width)

    def finish(self, description: dict[str, Any]) -> None:
        """Complete the files and rename the folder to its final name."""
        assert self._stream is not None
        header = io.BytesIO()
        shape = (self.n_contexts, self._width)
        facts = {"descr": "<u4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, facts)  # type: ignore[no-untyped-call]
        if len(header.getvalue()) != _HEADER_BYTES:
            raise RuntimeError(f"an .npy header of {len(header.getvalue())} bytes for the shape {shape}")
        self._stream.seek(0)
        self._stream.write(header.getvalue())
        self._stream.close()
        documents = np.frombuffer(self._documents, dtype=np.int64)
        np.save(self._temp / "documents.npy", documents, allow_pickle=False)
        np.save(self._temp / "lengths.npy", np.frombuffer(self._lengths, dtype=np.int64), allow_pickle=False)
        counts = {
            "n_contexts": self.n_contexts,
            "n_documents": len(np.unique(documents)),
            "n_tokens": self.n_tokens,
        }
        text = json.dumps(description | {"counts": counts}, indent=1, ensure_ascii=False)
        (self._temp / "corpus.json").write_text(text, encoding="utf-8")
        for name in ("tokens.npy", "documents.npy", "lengths.npy", "corpus.json"):
            seal(self._temp / name)
        try:
            self._temp.rename(self._folder)
        except OSError:
            # If the folder exists, another process finished first, and the caller opens that process's folder.
            if not (self._folder / "corpus.json").exists():
                raise

    def _storage(self, error: OSError) -> StorageError:
        return StorageError(
            str(self._folder),
            expected="space to write the tokenised corpus",
            seen=error.strerror or str(error),
            fix="free some space, or choose a folder on another disk",
        )


def read_matrix(path: Path) -> NDArray[Any]:
    """The token matrix (rows, positions) of a file, of an integer dtype; memory-mapped if the format allows.

    A .safetensors file or a dict in a .pt file may hold other tensors too if one is called ``tokens`` or ``input_ids``.
    Raises BadFile, BadShape.
    """
    try:
        if path.suffix == ".npy":
            found = {"tokens": np.load(path, mmap_mode="r", allow_pickle=False)}
        elif path.suffix == ".safetensors":
            require("safetensors", "model")
            from safetensors.numpy import load_file

            found = load_file(path)
        else:
            found = _load_pt(path)
    except Exception as error:  # numpy, torch and safetensors each raise their own classes
        raise BadFile(
            str(path),
            expected=f"a token matrix in a {path.suffix} file, without pickled objects",
            seen=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}",
            fix="save the matrix as .npy or .safetensors",
        ) from error
    named = [name for name in found if name in _NAMES] or list(found)
    if len(named) != 1:
        raise BadShape(
            str(path),
            expected="one tensor, or one of them called 'tokens' or 'input_ids'",
            seen=f"tensors {', '.join(named) or '(none)'}",
            fix="save only the token matrix",
        )
    matrix: NDArray[Any] = found[named[0]]
    if matrix.ndim != 2 or not matrix.size or not np.issubdtype(matrix.dtype, np.integer):
        raise BadShape(
            str(path),
            expected="an integer matrix (contexts, positions) that is not empty",
            seen=f"shape {tuple(matrix.shape)}, {matrix.dtype}",
            fix="save token ids, one row per context",
        )
    return matrix


def _load_pt(path: Path) -> dict[str, NDArray[Any]]:
    torch = require("torch", "model")
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    tensors = loaded if isinstance(loaded, dict) else {"tokens": loaded}
    return {name: tensor.numpy() for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of everything that determines a tokenizer's ids, equal in every process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: dict[str, Any] = {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        state = json.loads(backend.to_str())
        state.pop("truncation", None)  # left over from earlier calls; they do not change what we ask for
        state.pop("padding", None)
    state["special"] = sorted(tokenizer.all_special_ids)
    text = json.dumps(state, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
