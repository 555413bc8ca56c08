"""Sets of RQAE features, each with codes, a label and an origin. They are made from tokens, from vectors or at random.

Reads and writes one safetensors file per set, atomically, with the labels in the header. Nothing is unpickled; shapes,
ranges and the version are checked. Uses no language model and no text: the caller passes the gain of the final norm.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rqae.config import RqaeConfig
from rqae.encoding.codebook import canonical_indices
from rqae.errors import RqaeError
from rqae.features import random_codes
from rqae.model import RQAE

__all__ = ["ORIGINS", "FeatureSet", "check_codes"]

ORIGINS = ("token", "tokens", "vector", "random")
_VERSION = 1
_HEADER = "rqae_feature_set"  # the one key of the header's metadata: a JSON object
_KEYS = {"version", "config", "labels", "origins"}
_DTYPES = {"codes": "U16", "positions": "I64"}
_AGAIN = "save the set again with FeatureSet.save"


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """A set of F features.

    codes: (F, k) int64 on the CPU, of the first k quantizers; each is the lowest index of its direction.
    labels: one per feature.
    origins: one of ORIGINS per feature.
    positions: (F,) int64 or None; the row of the token that a feature was taken from, -1 for a feature without a token.

    Raises RqaeError for codes outside the codebook of ``config``, a wrong shape or dtype, and lists of another length.
    """

    config: RqaeConfig
    codes: Tensor
    labels: tuple[str, ...]
    origins: tuple[str, ...]
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        check_codes(self.config, self.codes, "feature codes")
        count = len(self.codes)
        if not count or self.codes.dtype != torch.int64 or self.codes.device.type != "cpu":
            raise RqaeError(
                "feature codes",
                expected="at least one row of int64 on the CPU",
                seen=f"shape {list(self.codes.shape)}, {self.codes.dtype}, {self.codes.device}",
                fix="give codes as RQAE.encode returns them, moved to the CPU",
            )
        lowest = canonical_indices(self.config)[self.codes]
        if not torch.equal(lowest, self.codes):
            row, column = (lowest != self.codes).nonzero()[0].tolist()
            raise RqaeError(
                f"code {column} of feature {row}",
                expected=f"{int(lowest[row, column])}, the lowest index of its direction",
                seen=str(int(self.codes[row, column])),
                fix="index RQAE.canonical with the codes",
            )
        _check_strings("labels", self.labels, count)
        _check_strings("origins", self.origins, count, ORIGINS)
        given = self.positions
        if given is not None and (
            given.dtype != torch.int64 or tuple(given.shape) != (count,) or bool((given < -1).any())
        ):
            raise RqaeError(
                "feature positions",
                expected=f"shape [{count}], int64, -1 or more",
                seen=f"shape {list(given.shape)}, {given.dtype}, {given.flatten()[:3].tolist()}",
                fix="give one row number per feature, -1 for a feature without a token",
            )

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def depth(self) -> int:
        """Number of quantizers in the codes."""
        return self.codes.shape[1]

    @classmethod
    def from_tokens(
        cls,
        model: RQAE,
        hidden: Tensor,
        *,
        labels: Sequence[str] | None = None,
        positions: Tensor | None = None,
        depth: int | None = None,
    ) -> FeatureSet:
        """One feature for each token: the codes of final-normed hidden states, (F, d). Raises RqaeError."""
        return cls._made(model, model.encode(hidden, depth), "token", labels, positions)

    @classmethod
    def from_vectors(
        cls,
        model: RQAE,
        vectors: Tensor,
        gain: Tensor | None = None,
        *,
        labels: Sequence[str] | None = None,
        depth: int | None = None,
    ) -> FeatureSet:
        """One feature for each direction of the raw hidden state, (F, d), such as an SAE's encoder or decoder columns.

        A vector goes through the final RMS norm (RMS 1, times ``gain`` (d,), which for Gemma is 1 + weight; None: ones)
        and is then encoded. The norm's eps is left out, so the length of a vector does not matter. Raises RqaeError
        naming the first row that is zero, not finite, or zero after the gain.
        """
        dim = model.config.dim
        gain = torch.ones(dim) if gain is None else gain
        for name, tensor, shape in (("vectors", vectors, (len(vectors), dim)), ("gain", gain, (dim,))):
            if tuple(tensor.shape) != shape:
                raise RqaeError(
                    name, expected=f"shape {list(shape)}", seen=f"shape {list(tensor.shape)}",
                    fix="use vectors and norm of the model that this RQAE was trained on",
                )  # fmt: skip
        rows = vectors.detach().double()
        rows = rows / rows.abs().amax(dim=-1, keepdim=True)  # squares of very large or small numbers stay finite
        rows = rows / rows.square().mean(dim=-1, keepdim=True).sqrt() * gain.detach().to(rows)
        bad = ~(rows.isfinite().all(dim=-1) & rows.ne(0).any(dim=-1))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise RqaeError(
                f"vector in row {row}",
                expected="finite numbers that are not all zero, also after the gain",
                seen=str(vectors[row].tolist())[:60],
                fix="drop that row",
            )
        return cls._made(model, model.encode(rows.float(), depth), "vector", labels, None)

    @classmethod
    def random(cls, model: RQAE, count: int, seed: int, *, depth: int | None = None) -> FeatureSet:
        """A control: codes drawn uniformly from each quantizer's distinct codes. The same seed gives the same set."""
        drawn = cls._made(model, random_codes(model, count, seed), "random", None, None)
        return drawn if depth is None else drawn.prefix(depth)

    @classmethod
    def joined(cls, sets: Sequence[FeatureSet]) -> FeatureSet:
        """The features of several sets of one config and depth, in order. Raises RqaeError."""
        if len({(each.config, each.depth) for each in sets}) != 1:
            raise RqaeError(
                "feature sets to join",
                expected="one or more sets with the same config and depth",
                seen=f"{len(sets)} of depths {[each.depth for each in sets]}",
                fix="use sets of one RQAE, and cut them to one depth with prefix",
            )
        positions = None
        if any(each.positions is not None for each in sets):
            none = [torch.full((len(each),), -1) for each in sets]
            positions = torch.cat([n if s.positions is None else s.positions for s, n in zip(sets, none, strict=True)])
        return cls(
            sets[0].config,
            torch.cat([each.codes for each in sets]),
            tuple(label for each in sets for label in each.labels),
            tuple(origin for each in sets for origin in each.origins),
            positions,
        )

    @classmethod
    def _made(
        cls, model: RQAE, codes: Tensor, origin: str, labels: Sequence[str] | None, positions: Tensor | None
    ) -> FeatureSet:
        names = [f"{origin} {row}" for row in range(len(codes))] if labels is None else labels
        return cls(model.config, codes.cpu(), tuple(names), (origin,) * len(codes), positions)

    def prefix(self, depth: int) -> FeatureSet:
        """The ancestors A_depth: each feature cut to its first ``depth`` quantizers. Raises RqaeError."""
        if not 0 < depth <= self.depth:
            raise RqaeError(
                "depth", expected=f"1 to {self.depth}", seen=str(depth), fix="use at most the depth of the codes"
            )
        return replace(self, codes=self.codes[:, :depth].contiguous())

    def ancestors(self, depths: Sequence[int]) -> tuple[FeatureSet, ...]:
        """The set at each of several depths, in their order. Raises RqaeError."""
        return tuple(self.prefix(depth) for depth in depths)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically. Raises RqaeError if it cannot be written."""
        path = Path(path)
        about = {"version": _VERSION, "config": asdict(self.config), "labels": self.labels, "origins": self.origins}
        tensors = {"codes": self.codes.to(torch.uint16).contiguous()}
        if self.positions is not None:
            tensors["positions"] = self.positions.contiguous()
        data = save(tensors, metadata={_HEADER: json.dumps(about, sort_keys=True)})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                Path(name).chmod(0o644)
                Path(name).replace(path)
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            raise RqaeError(
                str(path),
                expected="a file that can be written",
                seen=error.strerror or str(error),
                fix="free space or choose another folder",
            ) from error

    @classmethod
    def load(cls, path: str | Path, config: RqaeConfig | None = None) -> FeatureSet:
        """Read a set; ``config``, if given, must match. Raises RqaeError naming the file and the problem."""
        path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:
                about = _about(path, file.metadata())
                _check_tensors(path, file)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError) as error:
            raise RqaeError(str(path), expected="a safetensors file", seen=str(error)[:160], fix=_AGAIN) from error
        with _named(path):
            made_for, labels, origins = RqaeConfig(**about["config"]), about["labels"], about["origins"]
            codes, positions = tensors["codes"].to(torch.int64), tensors.get("positions")
            found = cls(made_for, codes, tuple(labels), tuple(origins), positions)
        if config is not None and config != found.config:
            raise RqaeError(
                str(path),
                expected=f"features of {config}",
                seen=str(found.config),
                fix="use the RQAE they were made with",
            )
        return found


def check_codes(config: RqaeConfig, codes: Tensor, subject: str) -> None:
    """Raise RqaeError unless ``codes`` is (N, k) integers in the codebook, of 1 ≤ k ≤ n_q quantizers."""
    limit = config.num_quantizers
    if codes.ndim != 2 or not 1 <= codes.shape[1] <= limit or codes.is_floating_point() or codes.dtype == torch.bool:
        raise RqaeError(
            subject,
            expected=f"integers of shape [any, 1 to {limit}]",
            seen=f"shape {list(codes.shape)}, {codes.dtype}",
            fix="give one row of codes for each token or feature",
        )
    values = codes.cpu().numpy() if codes.dtype == torch.uint16 else codes  # torch has no minimum of uint16
    low, high = (int(values.min()), int(values.max())) if codes.numel() else (0, 0)
    if low < 0 or high >= config.num_codes:
        raise RqaeError(
            subject, expected=f"0 to {config.num_codes - 1}", seen=f"{low} to {high}", fix="use codes of this RQAE"
        )


def _check_strings(name: str, values: Sequence[str], count: int, allowed: Sequence[str] | None = None) -> None:
    if len(values) != count or not all(isinstance(each, str) and (not allowed or each in allowed) for each in values):
        raise RqaeError(
            f"feature {name}",
            expected=f"{count} strings" + (f", each one of {', '.join(allowed)}" if allowed else ""),
            seen=f"{len(values)}: {', '.join(map(repr, values[:3]))}"[:80],
            fix=f"give {name} in the order of the codes",
        )


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the file's path to errors about the set read from it."""
    try:
        yield
    except RqaeError as error:
        raise RqaeError(f"{path}: {error.subject}", expected=error.expected, seen=error.seen, fix=_AGAIN) from error


def _about(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    """Read the header's JSON object; check its keys and their types."""
    text = (metadata or {}).get(_HEADER)
    if text is None:
        raise RqaeError(str(path), expected=f"a feature set, with {_HEADER!r} in its header", seen="none", fix=_AGAIN)
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RqaeError(f"{path}: header", expected="a JSON object", seen="invalid JSON", fix=_AGAIN) from error
    version = about.get("version") if isinstance(about, dict) else None
    if type(version) is int and version > _VERSION:
        raise RqaeError(f"{path}: version", expected=str(_VERSION), seen=str(version)[:20], fix="update the package")
    kinds = {"config": dict, "labels": list, "origins": list}
    if (
        not isinstance(about, dict)
        or set(about) != _KEYS
        or type(version) is not int
        or version != _VERSION
        or not all(isinstance(about[key], kind) for key, kind in kinds.items())
        or set(about["config"]) != {field.name for field in fields(RqaeConfig)}
    ):
        raise RqaeError(
            f"{path}: header",
            expected=f"an object with {', '.join(sorted(_KEYS))} (version {_VERSION})",
            seen=text[:80],
            fix=_AGAIN,
        )
    return about


def _check_tensors(path: Path, file: Any) -> None:
    names = set(file.keys())
    if not {"codes"} <= names <= set(_DTYPES):
        raise RqaeError(
            f"{path}: tensors", expected="codes and optionally positions", seen=str(sorted(names))[:80], fix=_AGAIN
        )
    for name in sorted(names):
        dtype = file.get_slice(name).get_dtype()
        if dtype != _DTYPES[name]:
            raise RqaeError(
                f"{path}: tensor {name!r}", expected=f"dtype {_DTYPES[name]}", seen=f"dtype {dtype}", fix=_AGAIN
            )
