"""The options of an inspection, and their checks.

Opens no files. The device changes numbers by rounding only and is not part of the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from evalkit.errors import BadConfig

__all__ = ["PARTS", "PARTS_OF", "Settings", "parse_depths", "parse_parts"]

# in the order of the tables; "sae" needs an SAE to compare the RQAE with
PARTS = ("prefixes", "cosines", "layers", "fit", "ranks", "sae")
# "loss" needs the whole model, so it is measured on request only
_SAE_PARTS = ("fit", "density", "geometry", "loss")
PARTS_OF = {
    "rqae": PARTS,
    "sae": _SAE_PARTS,
    "transcoder": _SAE_PARTS,
    "directions": ("geometry",),
    "neuronpedia": ("density",),
}
_ON_REQUEST = ("loss",)
_DEPTHS = (1, 2, 3, 4, 8, 16, 64, 256, 1024)


@dataclass(frozen=True, slots=True)
class Settings:
    """One inspection. ``max_tokens`` bounds the corpus, ``fit_tokens`` the sample for FVU, firing counts and losses.

    ``model`` None is the one that the dictionary names, ``format_name`` None the format that its files show, ``depths``
    None the usual ones. ``sae`` is another dictionary of the same site. Counts are in features (``features``), tokens
    (``top``), contexts (``examples``) and pairs (``pairs``). Raises BadConfig.
    """

    dictionary: str
    model: str | None = None
    corpus: str = "bundled:demo"
    site: str | None = None
    sae: str | None = None
    format_name: str | None = None
    max_tokens: int = 100_000
    fit_tokens: int = 8192
    context_length: int = 128
    text_field: str = "text"
    split: str = "train"
    revision: str | None = None
    features: int = 50
    depths: tuple[int, ...] | None = None
    seed: int = 0
    dtype: str = "bfloat16"
    device: str = field(default="auto", compare=False)
    pairs: int = 1_000_000
    top: int = 128
    examples: int = 10

    def __post_init__(self) -> None:
        for name in ("max_tokens", "fit_tokens", "features", "pairs", "top", "examples"):
            if getattr(self, name) < 1:
                raise BadConfig(name, expected="at least 1", seen=str(getattr(self, name)), fix="raise it")
        if self.dtype not in ("bfloat16", "float32"):
            raise BadConfig("dtype", expected="bfloat16 or float32", seen=repr(self.dtype), fix="use one of these")

    def depths_of(self, quantizers: int) -> tuple[int, ...]:
        """The depths to measure for an RQAE with this many quantizers, ascending. Raises BadConfig."""
        if self.depths is None:
            return tuple(sorted({*(depth for depth in _DEPTHS if depth < quantizers), quantizers}))
        if not self.depths or not all(0 < depth <= quantizers for depth in self.depths):
            raise BadConfig(
                "depths",
                expected=f"depths from 1 to {quantizers}, the RQAE's quantizers",
                seen=", ".join(map(str, self.depths)) or "none",
                fix="leave --depths out, or name some of these",
            )
        return tuple(sorted(set(self.depths)))

    def text(self) -> dict[str, Any]:
        """The options that the tokens and hidden states depend on; a folder holds the codes for one choice of them."""
        names = ("model", "corpus", "site", "max_tokens", "context_length", "text_field", "split", "revision", "dtype")
        return {name: getattr(self, name) for name in names}


def parse_depths(text: str | None) -> tuple[int, ...] | None:
    """``16,64,256`` as numbers; None stays None. Raises BadConfig."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise BadConfig(
            "depths", expected="numbers with commas between them", seen=repr(text), fix="write for example 16,64,256"
        ) from error


def parse_parts(only: Sequence[str], *, has_sae: bool, kind: str = "rqae") -> tuple[str, ...]:
    """The parts asked for, each given by name or several with commas, of a dictionary of some kind. Raises BadConfig.

    Without a name: all possible parts except those on request; ``all`` includes these.
    """
    known = PARTS_OF[kind]
    names = [name.strip() for text in only for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*known, "all"):
            whose = "" if kind == "rqae" else f", the parts of a dictionary of kind {kind}"
            raise BadConfig(
                "--only", expected=f"some of {', '.join(known)}{whose}", seen=repr(name), fix="name one of these"
            )
        if name == "sae" and not has_sae:
            raise BadConfig("--only sae", expected="a dictionary to compare with", seen="none", fix="add --sae DICT")
    possible = [name for name in known if name != "sae" or has_sae]
    wanted = names or [name for name in possible if name not in _ON_REQUEST]
    return tuple(name for name in known if name in (possible if "all" in wanted else wanted))
