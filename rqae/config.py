"""The settings that describe an RQAE: exactly the keys of a checkpoint's ``config.json``.

Holds no tensors; reads and writes no files.
"""

from __future__ import annotations

from dataclasses import dataclass

from rqae.errors import RqaeError

__all__ = ["GRID_METHODS", "MAX_CODES", "RqaeConfig"]

GRID_METHODS = ("round_fsq", "fsq")
MAX_CODES = 65_536  # codes are stored as uint16
_MAX_CODEBOOK_DIM = 16
_MAX_SIZE = 1 << 20  # of the model dimension and of the number of quantizers


@dataclass(frozen=True, slots=True)
class RqaeConfig:
    """The shape of an RQAE and the kind of its codebook.

    dim: width of the hidden states, d_model.
    codebook_dim: dimensions of a codebook vector.
    codebook_size: levels per dimension for the grid methods, number of codes otherwise.
    num_quantizers: quantizers, the full depth.
    quantization_method: "round_fsq" is the normalised grid, "fsq" the plain grid, anything else a learned codebook.

    Raises RqaeError for a size that is not a positive integer or is above its limit.
    """

    dim: int
    codebook_dim: int = 4
    codebook_size: int = 5
    num_quantizers: int = 256
    quantization_method: str = "round_fsq"

    def __post_init__(self) -> None:
        limits = {
            "dim": _MAX_SIZE,
            "codebook_dim": _MAX_CODEBOOK_DIM,
            "codebook_size": MAX_CODES,
            "num_quantizers": _MAX_SIZE,
        }
        for name, limit in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise RqaeError(
                    f"RQAE config key {name!r}",
                    expected=f"an integer from 1 to {limit}",
                    seen=repr(value)[:80],
                    fix="correct config.json, or use the one that came with the weights",
                )
        if not isinstance(self.quantization_method, str):
            raise RqaeError(
                "RQAE config key 'quantization_method'",
                expected="a string such as 'round_fsq'",
                seen=repr(self.quantization_method)[:80],
                fix="correct config.json",
            )
        if self.num_codes > MAX_CODES:
            raise RqaeError(
                "RQAE codebook",
                expected=f"at most {MAX_CODES} codes",
                seen=f"{self.codebook_size}^{self.codebook_dim} = {self.num_codes}",
                fix="use fewer levels or fewer dimensions",
            )

    @property
    def is_grid(self) -> bool:
        """Whether the codebook is a fixed grid rather than learned."""
        return self.quantization_method in GRID_METHODS

    @property
    def num_codes(self) -> int:
        """Rows of each quantizer's codebook (625 for 5 levels in 4 dimensions)."""
        return int(self.codebook_size**self.codebook_dim) if self.is_grid else self.codebook_size
