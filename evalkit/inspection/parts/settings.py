"""The options of an inspection and their validation.

Opens no files. The device is not part of an inspection's identity, because it changes numbers only by rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from evalkit.errors import BadConfig

__all__ = ["PARTS", "PARTS_OF", "Settings", "parse_depths", "parse_parts"]

# In the order of the tables. The part "sae" needs an SAE to compare the RQAE with.
PARTS = ("prefixes", "cosines", "layers", "fit", "ranks", "sae")
# The part "loss" runs the whole model, so it is measured only on request.
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
    """The options of one inspection. Raises BadConfig if a value is invalid.

    ``model``, ``site``: None: those that the dictionary names.
    ``sae``: an SAE for the same site as the RQAE, to compare it with.
    ``format_name``: format of the dictionary; None: detected from its files.
    ``max_tokens``: tokens of the corpus to use.
    ``prepend_bos``: whether contexts begin with BOS; None: as the dictionary declares, else as the tokenizer does.
    ``fit_tokens``: tokens on which FVU, firing counts and losses are measured.
    ``features``: number of features in the part "ranks" and of latents in the part "sae".
    ``depths``: depths of an RQAE; None: a default list up to the full depth.
    ``pairs``: number of pairs of codes of each kind in the part "cosines".
    ``top``: number of tokens per feature in the part "ranks".
    ``examples``: number of contexts per latent and set in the part "sae".
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
    prepend_bos: bool | None = None
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
        """The depths to measure for an RQAE with ``quantizers`` quantizers, ascending.

        Raises BadConfig if a depth is outside 1 to ``quantizers``.
        """
        if self.depths is None:
            return tuple(sorted({*(depth for depth in _DEPTHS if depth < quantizers), quantizers}))
        if not self.depths or not all(0 < depth <= quantizers for depth in self.depths):
            raise BadConfig(
                "depths",
                expected=f"depths from 1 to {quantizers}, the number of quantizers of the RQAE",
                seen=", ".join(map(str, self.depths)) or "none",
                fix="leave --depths out, or give depths in this range",
            )
        return tuple(sorted(set(self.depths)))

    def text(self) -> dict[str, Any]:
        """The options that tokens and hidden states depend on; a folder holds the codes for one set of their values."""
        names = ("model", "corpus", "site", "max_tokens", "context_length", "text_field", "split", "revision", "dtype")
        found = {name: getattr(self, name) for name in names}
        return found if self.prepend_bos is None else {**found, "prepend_bos": self.prepend_bos}


def parse_depths(text: str | None) -> tuple[int, ...] | None:
    """Parses ``16,64,256`` into numbers; None stays None. Raises BadConfig for anything else."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise BadConfig(
            "depths", expected="whole numbers separated by commas", seen=repr(text), fix="for example 16,64,256"
        ) from error


def parse_parts(only: Sequence[str], *, has_sae: bool, kind: str = "rqae") -> tuple[str, ...]:
    """The parts to measure for a dictionary of kind ``kind``, in the order of the tables.

    ``only``: names of parts; an entry may be a comma-separated list. Empty: all possible parts except those measured only
        on request. "all": all possible parts.
    ``has_sae``: whether there is an SAE to compare with, which the part "sae" needs.

    Raises BadConfig for an unknown part, and for the part "sae" without an SAE.
    """
    known = PARTS_OF[kind]
    names = [name.strip() for text in only for name in text.split(",") if name.strip()]
    for name in names:
        if name not in (*known, "all"):
            whose = "" if kind == "rqae" else f", the parts of a dictionary of kind {kind}"
            raise BadConfig(
                "--only", expected=f"some of {', '.join(known)}{whose}", seen=repr(name), fix="use one of these"
            )
        if name == "sae" and not has_sae:
            raise BadConfig("--only sae", expected="an SAE to compare with", seen="none", fix="add --sae DICT")
    possible = [name for name in known if name != "sae" or has_sae]
    wanted = names or [name for name in possible if name not in _ON_REQUEST]
    return tuple(name for name in known if name in (possible if "all" in wanted else wanted))
