"""The residual quantization autoencoder: weights, encoding to codes, decoding from codes.

Reads and writes the published checkpoint layout through ``rqae.checkpoint``; computes in float32. The input is the
final-normed hidden state; applying the norm is the caller's task.
Source: H. Kamath, Residual Quantization Autoencoders, 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rqae.checkpoint import read_checkpoint, write_checkpoint
from rqae.config import RqaeConfig
from rqae.encoding.blocked import BlockedEncoder
from rqae.encoding.codebook import canonical_indices, grid_codebook, normalised
from rqae.errors import RqaeError

__all__ = ["RQAE", "initial_codebook"]

# A grid stored in bfloat16 differs from the exact one by rounding, at most 2^-9 for numbers up to 1; allow twice that.
_HALF_PRECISION = 4e-3


class RQAE(nn.Module):
    """An RQAE with its layers stacked: w_in (n_q, c, d), b_in (n_q, c), w_out (n_q, d, c), b_out (n_q, d).

    ``codebook`` (n_q, K, c) and ``canonical`` (K,), the lowest index of each code's direction. ``codebook_counts`` (n_q, K)
    is the running share of training tokens that were assigned each code.
    """

    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    codebook: Tensor
    codebook_counts: Tensor
    canonical: Tensor

    def __init__(
        self,
        config: RqaeConfig,
        w_in: Tensor,
        b_in: Tensor,
        w_out: Tensor,
        b_out: Tensor,
        codebook: Tensor | None = None,
        codebook_counts: Tensor | None = None,
    ) -> None:
        """Grid methods need no ``codebook``. Raises RqaeError naming a tensor with a wrong shape, or a wrong codebook."""
        super().__init__()
        self.config = config
        count, width, dim = config.num_quantizers, config.codebook_dim, config.dim
        given = {"w_in": w_in, "b_in": b_in, "w_out": w_out, "b_out": b_out}
        shapes = {
            "w_in": (count, width, dim),
            "b_in": (count, width),
            "w_out": (count, dim, width),
            "b_out": (count, dim),
        }
        counts = torch.zeros(count, config.num_codes) if codebook_counts is None else codebook_counts
        given |= {"codebook": _codebook(config, codebook), "codebook_counts": counts}
        shapes |= {"codebook": (count, config.num_codes, width), "codebook_counts": (count, config.num_codes)}
        for name, tensor in given.items():
            if tuple(tensor.shape) != shapes[name]:
                raise RqaeError(
                    f"tensor {name!r}",
                    expected=f"shape {list(shapes[name])}",
                    seen=f"shape {list(tensor.shape)}",
                    fix="use tensors that match the config",
                )
            self.register_buffer(name, tensor.detach().to(torch.float32))
        self.register_buffer("canonical", canonical_indices(config))
        self._encoder: tuple[tuple[object, ...], BlockedEncoder] | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> RQAE:
        """Read a checkpoint folder; float16, bfloat16 and float32 weights all load. Raises RqaeError."""
        config, tensors = read_checkpoint(Path(folder))
        return cls(config, **tensors)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint folder in the published layout, in float32 unless ``dtype`` says otherwise."""
        names = ("w_in", "b_in", "w_out", "b_out", "codebook", "codebook_counts")
        write_checkpoint(Path(folder), self.config, {name: getattr(self, name) for name in names}, dtype)

    def encode(self, x: Tensor, depth: int | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
        """Codes of final-normed hidden states, x (…, d) → (…, depth), each the lowest index of its direction.

        depth: use only the first ``depth`` quantizers, at proportionally lower cost; None: all.
        dtype: of the result. torch.uint16 holds every code and is the stored type, but torch cannot index with it.

        Raises RqaeError naming the first row that is not finite.
        """
        depth = self._depth(depth)
        if x.shape[-1] != self.config.dim:
            raise RqaeError(
                "RQAE input",
                expected=f"last dimension {self.config.dim}",
                seen=f"shape {list(x.shape)}",
                fix="encode hidden states of the model this RQAE was trained on",
            )
        rows = x.detach().reshape(-1, self.config.dim).to(self.w_in.device)
        return self.encoder().encode(rows, depth, dtype).reshape(*x.shape[:-1], depth)

    def decode(self, codes: Tensor, depth: int | None = None) -> Tensor:
        """Reconstruction from the first ``depth`` codes (None: all given), codes (…, k) → (…, d) float32.

        Raises RqaeError for codes outside the codebook, or for more codes per token than quantizers.
        """
        depth = self._depth(codes.shape[-1] if depth is None else depth)
        if codes.shape[-1] < depth:
            raise RqaeError("RQAE codes", expected=f"{depth} codes", seen=str(codes.shape[-1]), fix="encode deeper")
        return self._part(codes, 0, depth)

    def decode_layers(self, codes: Tensor, layers: Sequence[int]) -> Tensor:
        """The sum of the contributions of the given quantizers only, codes (…, k) → (…, d) float32. Raises RqaeError."""
        limit = min(codes.shape[-1], self.config.num_quantizers)
        if not all(0 <= layer < limit for layer in layers) or len(set(layers)) < len(layers):
            raise RqaeError(
                "RQAE layers",
                expected=f"distinct layers from 0 to {limit - 1}",
                seen=str(list(layers)),
                fix="remove duplicates, or encode deeper",
            )
        chosen = torch.tensor(layers, dtype=torch.int64, device=codes.device)
        vectors = self.vectors(codes[..., :limit])[..., chosen, :].flatten(-2)
        weight = self.w_out[chosen].transpose(1, 2).reshape(-1, self.config.dim)
        return vectors @ weight + self.b_out[chosen].sum(dim=0)

    def reconstructions(self, codes: Tensor, depths: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield (depth, reconstruction) for ``depths`` in ascending order, for the cost of the deepest one.

        The same tensor is reused for every depth: copy it to keep it. Raises RqaeError.
        """
        running, done = torch.zeros(*codes.shape[:-1], self.config.dim, device=codes.device), 0
        for depth in sorted(set(depths)):
            if codes.shape[-1] < self._depth(depth):
                raise RqaeError("RQAE codes", expected=f"{depth} codes", seen=str(codes.shape[-1]), fix="encode deeper")
            running += self._part(codes, done, depth)
            yield depth, running
            done = depth

    def _part(self, codes: Tensor, low: int, high: int) -> Tensor:
        """The contribution of quantizers low..high-1."""
        vectors = self.vectors(codes[..., :high])[..., low:, :].flatten(-2)  # (…, (high - low) · c)
        weight = self.w_out[low:high].transpose(1, 2).reshape(-1, self.config.dim)
        return vectors @ weight + self.b_out[low:high].sum(dim=0)

    def vectors(self, codes: Tensor) -> Tensor:
        """The codebook vectors C_{c_i} of codes of the first k quantizers, (…, k) → (…, k, c)."""
        codes = codes.long()  # torch has neither min() nor indexing for uint16
        low, high = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
        if low < 0 or high >= self.config.num_codes:
            raise RqaeError(
                "RQAE codes",
                expected=f"0 to {self.config.num_codes - 1}",
                seen=f"{low} to {high}",
                fix="use codes of this checkpoint",
            )
        return self.codebook[torch.arange(codes.shape[-1], device=self.codebook.device), codes]

    def encoder(self) -> BlockedEncoder:
        """The precomputed encoder, rebuilt when a weight has changed."""
        tensors = (self.w_in, self.b_in, self.w_out, self.b_out, self.codebook)
        state: tuple[object, ...] = tuple(
            (tensor.data_ptr(), None if tensor.is_inference() else tensor._version, tensor.device) for tensor in tensors
        )
        if self._encoder is None or self._encoder[0] != state:
            self._encoder = state, BlockedEncoder.build(self.config, *tensors, self.canonical)
        return self._encoder[1]

    def _depth(self, depth: int | None) -> int:
        count = self.config.num_quantizers
        if depth is None:
            return count
        if not 0 < depth <= count:
            raise RqaeError("depth", expected=f"1 to {count}", seen=str(depth), fix="use at most the RQAE's quantizers")
        return depth


def _codebook(config: RqaeConfig, given: Tensor | None) -> Tensor:
    """The codebook for computations: the exact grid, or the normalised learned codes. Raises RqaeError."""
    if config.is_grid:
        rounded = config.quantization_method == "round_fsq"
        grid = grid_codebook(config.codebook_size, config.codebook_dim, rounded=rounded).expand(
            config.num_quantizers, -1, -1
        )
        if (
            given is not None
            and given.shape == grid.shape
            and not (given.float() - grid).abs().max() <= _HALF_PRECISION
        ):
            raise RqaeError(
                "tensor 'codebook'",
                expected=f"the {config.quantization_method} grid of {config.codebook_size} levels",
                seen="other values",
                fix="set another quantization_method for a learned codebook",
            )
        return grid if given is None or given.shape == grid.shape else given
    if given is None or not bool(given.float().norm(dim=-1).gt(0).all()):
        raise RqaeError(
            "tensor 'codebook'",
            expected="a learned codebook without zero vectors",
            seen="none" if given is None else "a zero vector",
            fix="pass the codebook of the checkpoint",
        )
    return normalised(given.float())


def initial_codebook(config: RqaeConfig, generator: torch.Generator) -> Tensor:
    """The codebook that training starts from (and keeps): the grid, or seeded random directions, (n_q, K, c)."""
    if config.is_grid:
        return _codebook(config, None)
    shape = (config.num_quantizers, config.num_codes, config.codebook_dim)
    return normalised(torch.randn(shape, generator=generator))
