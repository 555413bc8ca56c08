"""Plain directions as features: one matrix (feature, d_model) of probes, neurons or means in a .safetensors or .npz file.

Such a file has no metadata, so options or a ``card.json`` in its folder give the site, whether each direction is two
features (``signed``), and, if there are several tensors, which ones to use (``tensor``, ``bias``). A feature is active on
the share ``density`` of tokens with the largest relu(x · v + b), as for random directions; a threshold of 0 would make
about half of all tokens active. With ``signed``, direction 3 becomes the features ``3+`` and ``3-``, which is
relu(-(x · v + b)): the two ends need separate explanations, and |x · v| would merge them. Vectors are not normalised.
There is no reconstruction. Writes nothing.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from evalkit.errors import BadConfig, BadFile, BadShape, EvalkitError, MissingFile, SiteMismatch, UnknownFeature
from evalkit.records import FeatureId, Site, SourceInfo, SubjectInfo
from evalkit.sources.formats.common import check_options, matrix, read_card, site_from, vector
from evalkit.subject.sites import check_subject
from evalkit.util.npz_files import open_npz
from evalkit.util.tensor_files import Stored, open_safetensors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["DirectionsReader", "DirectionsSource"]

_SUFFIXES = (".safetensors", ".npz")
_MARKERS = ("cfg.json", "config.json", "params.npz", "params.safetensors")
_BIASES = ("bias", "b")
_FLOATS = ("<f2", "<f4", "<f8", "bf16")
_MOST_MEMBERS = 1000  # arrays in an .npz that ``matches`` checks at most


class DirectionsReader:
    """Opens a file with one matrix of directions, or a folder with one such file."""

    format = "directions"
    options = frozenset({"model", "site", "name", "subject", "tensor", "bias", "signed", "density"})

    def matches(self, path: Path) -> bool:
        """Whether ``path`` has exactly one such file, with one floating-point matrix and no config of another format."""
        try:
            file = _file(path)
            beside = file.parent if file else path
            if file is None or any((beside / name).exists() for name in _MARKERS):
                return False
            shapes = _npz_shapes(file) if file.suffix == ".npz" else [one.shape for one in _tensors(file).values()]
        except (EvalkitError, OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
            return False
        return sum(len(shape) == 2 for shape in shapes) == 1 and max(map(len, shapes)) == 2

    def read(self, path: Path, **options: Any) -> Sequence[DirectionsSource]:
        """The source of the file at ``path``.

        ``options``: ``site`` (required without a card), ``model``, ``name``, ``signed``, ``density``; ``tensor`` and
        ``bias``, names of tensors in the file (by default its only matrix, and a vector called ``bias`` or ``b``). All
        except ``subject`` and ``density`` can also be set in ``card.json``. Raises MissingFile, BadFile, BadShape,
        BadConfig.
        """
        check_options(path, options, self.options)
        file = _file(path)
        if file is None or not file.is_file():
            raise MissingFile(
                str(path),
                expected="a .safetensors or .npz file with one matrix, or a folder with one such file",
                seen=_inside(path),
                fix="give the path of the file",
            )
        card = read_card(file.parent)
        given: dict[str, Any] = {
            **{key: card[key] for key in ("tensor", "bias", "signed", "name") if key in card},
            **options,
        }
        tensors = _tensors(file)
        vectors = matrix(file, tensors, _matrix_name(file, tensors, given.get("tensor")), (None, None))
        bias = _bias_name(file, tensors, given.get("bias"), vectors.shape[0])
        return [
            DirectionsSource(
                vectors,
                None if bias is None else vector(file, tensors, bias, vectors.shape[0]),
                site_from(file, options, card=card),
                signed=_flag(file, given.get("signed", False)),
                density=_share(file, given.get("density", 0.01)),
                stem=path.resolve().name if path.is_dir() else file.stem,
                label=given.get("name"),
            )
        ]


@dataclass(frozen=True, eq=False)
class DirectionsSource:
    """Directions of the raw hidden state as features. Activations are in units of the hidden state times vector length.

    ``vectors``: (n, d_model), on disk or in memory.
    ``bias``: (n,), or None for zeros.
    ``density``: the share of tokens to count as active.
    """

    vectors: Stored
    bias: Tensor | None
    site: Site
    signed: bool = False
    density: float = 0.01
    stem: str = "directions"
    label: str | None = None
    thresholds: Mapping[FeatureId, float] = field(default_factory=dict)
    reconstructs: ClassVar[bool] = False
    _kept: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @property
    def name(self) -> str:
        """Unique among the dictionaries of a sweep: model, site, kind, number of features and the file's name."""
        return self.label or f"{self.site}/directions/width-{len(self.features())}/{self.stem}"

    @property
    def info(self) -> SourceInfo:
        """Metadata shown in tables."""
        activation = "relu of ±(x·v + b)" if self.signed else "relu(x·v + b)"
        return SourceInfo(
            self.name,
            "directions",
            self.site.path,
            width=len(self.features()),
            declared={"activation": activation, "density": self.density},
        )

    def bind(self, subject: SubjectInfo) -> Self:
        """Check the width and the site. Raises BadShape for a transposed matrix, SiteMismatch."""
        n, d = self.vectors.shape
        if n == subject.d_model != d:
            raise BadShape(
                self.vectors.what,
                expected=f"a matrix (feature, d_model) of width {subject.d_model}",
                seen=f"shape {(n, d)}",
                fix="save it transposed: one direction per row",
            )
        check_subject(self.name, self.site, d, subject)
        return self

    def features(self) -> Sequence[FeatureId]:
        """``0``, ``1``, …; with ``signed`` ``0+``, ``0-``, ``1+``, …"""
        signs = ("+", "-") if self.signed else ("",)
        return [f"{index}{sign}" for index in range(self.vectors.shape[0]) for sign in signs]

    def activations(
        self, hidden: Float[Tensor, "batch pos d_model"], features: Sequence[FeatureId]
    ) -> Float[Tensor, "batch pos feature"]:
        """relu(±(x · v + b)). Reads only the rows of these features. Raises UnknownFeature, SiteMismatch, BadFile (NaN)."""
        if hidden.shape[-1] != self.vectors.shape[1]:
            raise SiteMismatch(
                self.name,
                expected=f"states of width {self.vectors.shape[1]} at {self.site.path}",
                seen=f"width {hidden.shape[-1]}",
                fix="set its site with the option site=, or use the model it was made from",
            )
        rows, bias = self._rows(tuple(features), hidden.device)
        return torch.relu(hidden.float() @ rows.T + bias)

    def threshold(self, feature: FeatureId) -> float:
        """θ of a feature; 0 before ``with_thresholds``. Raises UnknownFeature."""
        self._index(feature)
        return self.thresholds.get(feature, 0.0)

    def with_thresholds(self, thresholds: Mapping[FeatureId, float]) -> Self:
        """A copy with these thresholds."""
        return replace(self, thresholds=dict(thresholds))

    def reconstruct(self, hidden: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Always raises BadConfig, because plain directions cannot reconstruct the state."""
        raise BadConfig(
            self.name,
            expected="a dictionary that reconstructs the hidden state",
            seen="plain directions",
            fix="skip measurements that need a reconstruction (fit, FVU, loss recovered)",
        )

    def directions(self, features: Sequence[FeatureId]) -> Float[Tensor, "feature d_model"]:
        """The vectors; negated for features with ``-``. Raises UnknownFeature, BadFile (NaN)."""
        return self._rows(tuple(features), torch.device("cpu"))[0]

    def _rows(self, features: tuple[FeatureId, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Signed vectors (feature, d_model) and biases (feature,). The result of the last call is cached."""
        key = (features, device)
        if (found := self._kept.get(key)) is None:
            places = [self._index(feature) for feature in features]
            index = np.array([place for place, _ in places], dtype=np.int64)
            signs = torch.tensor([sign for _, sign in places], dtype=torch.float32)
            bias = torch.zeros(len(index)) if self.bias is None else self.bias[torch.from_numpy(index)]
            rows = self.vectors.take(index, 0)
            found = ((rows * signs[:, None]).to(device), (bias * signs).to(device))
            self._kept.clear()
            self._kept[key] = found
        return found

    def _index(self, feature: FeatureId) -> tuple[int, float]:
        number, sign = (feature[:-1], feature[-1:]) if self.signed else (feature, "+")
        n = self.vectors.shape[0]
        known = number.isascii() and number.isdecimal() and len(number) < 12 and number == str(int(number))
        if not (known and int(number) < n and sign in ("+", "-")):
            raise UnknownFeature(
                f"feature {feature!r} of {self.name}",
                expected=f"{'0+, 0-, … ' if self.signed else '0 '}to {n - 1}{'-' if self.signed else ''}",
                seen=repr(feature),
                fix="choose a direction of this file",
            )
        return int(number), 1.0 if sign == "+" else -1.0


def _file(path: Path) -> Path | None:
    """``path`` itself if it is such a file, or the only such file in a folder, else None."""
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.suffix in _SUFFIXES and file.is_file()]
        return found[0] if len(found) == 1 else None
    return path if path.suffix in _SUFFIXES else None


def _inside(path: Path) -> str:
    if not path.exists():
        return "no such file or folder"
    names = [file.name for file in sorted(path.iterdir())] if path.is_dir() else [path.name]
    return ", ".join(names[:5]) or "an empty folder"


def _tensors(file: Path) -> dict[str, Stored]:
    found = open_npz(file) if file.suffix == ".npz" else open_safetensors(file)
    return {name: tensor for name, tensor in found.items() if tensor.dtype in _FLOATS}


def _npz_shapes(file: Path) -> list[tuple[int, ...]]:
    """Shapes of the floating-point arrays, read from their headers only."""
    shapes = []
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist()[:_MOST_MEMBERS]:
            with archive.open(member) as stream:
                if np.lib.format.read_magic(stream) != (1, 0):  # type: ignore[no-untyped-call]
                    continue
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)  # type: ignore[no-untyped-call]
                if dtype.kind == "f":
                    shapes.append(shape)
    return shapes


def _matrix_name(file: Path, tensors: Mapping[str, Stored], given: Any) -> str:
    if given is not None:
        return str(given)
    matrices = sorted(name for name, tensor in tensors.items() if tensor.ndim == 2)
    if len(matrices) == 1:
        return matrices[0]
    if not matrices:
        shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in sorted(tensors.items()))
        raise BadFile(
            str(file),
            expected="a floating-point matrix (feature, d_model)",
            seen=shapes[:200] or "no floating-point tensor",
            fix="save one direction per row",
        )
    raise BadConfig(
        str(file),
        expected="one matrix, or the option tensor= with the name of one",
        seen=f"{len(matrices)} matrices: {', '.join(matrices)}"[:200],
        fix=f"pass for example tensor={matrices[0]}, or set tensor in card.json",
    )


def _bias_name(file: Path, tensors: Mapping[str, Stored], given: Any, n: int) -> str | None:
    if given is not None:
        return str(given)
    return next((name for name in _BIASES if name in tensors and tensors[name].shape == (n,)), None)


def _flag(file: Path, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadConfig(str(file), expected="signed: true or false", seen=repr(value)[:40], fix="correct the option")
    return value


def _share(file: Path, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise BadConfig(str(file), expected="density between 0 and 1", seen=repr(value)[:40], fix="correct the option")
    return float(value)
