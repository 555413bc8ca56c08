"""The weights of an SAE or transcoder in one common form, and its computations: activations and reconstruction.

Matrices may stay on disk (``Stored``); then only the requested columns and tiles are read. Activations of chosen latents
need only their columns of the encoder, except with per-token top-k, which has to compute every latent. Knows nothing of
files and formats, sites or names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch

from evalkit.errors import BadShape
from evalkit.util.tensor_files import Index, Matrix, take, whole

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Activation", "Gate", "Latents", "SaeWeights"]

Activation: TypeAlias = Literal["relu", "jumprelu", "gated", "topk", "groupmax"]
_TILE, _NARROWEST = 1 << 13, 256  # most and fewest latents per tile; the number of tokens decides between them
_ROOM = 1 << 23  # activations in memory at a time
_TOP_TILE = 1 << 11  # fixed, so that products have one shape and activations are bit-equal for every batch


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """Parameters of a gated encoder, all (n,). Source: Rajamanoharan et al., arXiv 2404.16014, eq. 3-6.

    A latent is active where x W + ``gate_bias`` > 0; its activation is then relu(x W · exp(``r_mag``) + ``mag_bias``).
    """

    gate_bias: Tensor
    r_mag: Tensor
    mag_bias: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SaeWeights:
    """The weights of one SAE or transcoder, float32; matrices may be on disk (``Stored``).

    ``w_enc``, ``b_enc``, ``w_dec``, ``b_dec``: (d_in, n), (n,), (n, d_out), (d_out,).
    ``threshold``: (n,), for a JumpReLU.
    ``gate``: for a gated SAE.
    ``k``: for top-k per token; with ``grouped``, the maximum of each of k groups of latents instead.
    ``shift``: (d_in,), subtracted from the input (``b_dec`` in formats that subtract it).
    ``decoder_scaled``: multiply pre-activations by the norm of the latent's decoder row, and divide by it when decoding.
    ``w_skip``: (d_out, d_in), a linear path around the latents.

    Raises BadShape if the shapes do not fit together.
    """

    w_enc: Matrix
    b_enc: Tensor
    w_dec: Matrix
    b_dec: Tensor
    threshold: Tensor | None = None
    gate: Gate | None = None
    k: int | None = None
    grouped: bool = False
    shift: Tensor | None = None
    decoder_scaled: bool = False
    w_skip: Matrix | None = None

    def __post_init__(self) -> None:
        if self.w_enc.ndim != 2:
            raise _bad_shape("w_enc", "two dimensions (d_model, width)", self.w_enc)
        if self.w_dec.ndim != 2:
            raise _bad_shape("w_dec", "two dimensions (width, d_model)", self.w_dec)
        if self.b_dec.ndim != 1:
            raise _bad_shape("b_dec", "one dimension (d_model)", self.b_dec)
        width, d_out = (self.width,), len(self.b_dec)
        expected: dict[str, tuple[int, ...]] = {
            "b_enc": width,
            "w_dec": (self.width, d_out),
            "b_dec": (d_out,),
            "threshold": width,
            "shift": (self.d_model,),
            "w_skip": (d_out, self.d_model),
        }
        found = {name: getattr(self, name) for name in expected}
        for name in ("gate_bias", "r_mag", "mag_bias") if self.gate is not None else ():
            expected[name], found[name] = width, getattr(self.gate, name)
        for name, shape in expected.items():
            if found[name] is not None and tuple(found[name].shape) != shape:
                raise _bad_shape(name, f"shape {shape}", found[name])
        if self.k is not None and not (0 < self.k <= self.width and (not self.grouped or self.width % self.k == 0)):
            raise BadShape(
                "k",
                expected=f"1 to {self.width}, the width" + (", and a divisor of it" if self.grouped else ""),
                seen=str(self.k),
                fix="check the config that belongs to the weights",
            )

    @property
    def d_model(self) -> int:
        """Width of its input."""
        return int(self.w_enc.shape[0])

    @property
    def d_out(self) -> int:
        """Width of its reconstruction."""
        return int(self.w_dec.shape[1])

    @property
    def width(self) -> int:
        """Number of latents."""
        return int(self.w_enc.shape[1])

    @property
    def activation(self) -> Activation:
        """The encoder's non-linearity."""
        if self.k is not None:
            return "groupmax" if self.grouped else "topk"
        if self.gate is not None:
            return "gated"
        return "relu" if self.threshold is None else "jumprelu"

    def encode(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch width"]:
        """Activations of every latent, all in memory; for wide dictionaries use ``tiles``.

        Source: Gemma Scope, arXiv 2408.05147, eq. 1 and 3 (JumpReLU: the pre-activation where it exceeds θ, else 0).
        """
        return torch.cat([active for _, active in self.tiles(hidden)], dim=-1)

    def decode(self, activations: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction from activations of every latent, without the skip path. Source: arXiv 2408.05147, eq. 2."""
        found = self.b_dec.to(activations.device)
        for low in range(0, self.width, _TILE):
            tile = slice(low, min(low + _TILE, self.width))
            found = found + self.decoded(activations[..., tile], tile)
        return found

    def columns(
        self, hidden: Float[Tensor, "*batch d_model"], index: Sequence[int], latents: Latents | None = None
    ) -> Float[Tensor, "*batch latent"]:
        """Activations of the latents in ``index``. ``latents``: the result of ``gather`` for them, if already computed."""
        if self.k is None:
            return (latents or self.gather(np.array(index, dtype=np.int64), hidden.device)).activations(hidden)
        if self.grouped:
            size = self.width // self.k
            groups = sorted({each // size for each in index})
            members = np.concatenate([np.arange(group * size, (group + 1) * size) for group in groups])
            pre = self.gather(members, hidden.device).pre(hidden)
            kept = _group_winners(torch.relu(pre), size)
            place = {int(member): at for at, member in enumerate(members)}
            return kept[..., [place[each] for each in index]]
        values, places = self._top(hidden)
        found = [(values * (places == each)).sum(dim=-1) for each in index]
        return torch.stack(found, dim=-1) if found else values[..., :0]

    def tiles(self, hidden: Float[Tensor, "*batch d_model"]) -> Iterator[tuple[slice, Float[Tensor, "*batch latent"]]]:
        """Activations of every latent, in tiles of up to a few thousand latents; each latent is read from disk once."""
        size = _tile_for(hidden)
        if self.k is not None and self.grouped:
            group = self.width // self.k
            size = max(1, size // group) * group
        top = self._top(hidden) if self.activation == "topk" else None
        for low in range(0, self.width, size):
            tile = slice(low, min(low + size, self.width))
            if top is not None:
                values, places = top
                inside = (places >= tile.start) & (places < tile.stop)
                active = values.new_zeros(*values.shape[:-1], tile.stop - tile.start)
                active.scatter_add_(-1, (places - tile.start).clamp(0, tile.stop - tile.start - 1), values * inside)
            elif self.k is not None:
                active = _group_winners(torch.relu(self.gather(tile, hidden.device).pre(hidden)), self.width // self.k)
            else:
                active = self.gather(tile, hidden.device).activations(hidden)
            yield tile, active

    def decoded(self, activations: Float[Tensor, "*batch latent"], index: Index) -> Float[Tensor, "*batch d_out"]:
        """The contribution of these latents to the reconstruction, without ``b_dec`` and the skip path."""
        rows = take(self.w_dec, index, 0).to(activations.device)
        if self.decoder_scaled:
            activations = activations / rows.norm(dim=1).clamp_min(1e-12)
        return activations @ rows

    def reconstruct(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of the state, computed tile by tile."""
        found = self.constant(hidden)
        for tile, active in self.tiles(hidden):
            found += self.decoded(active, tile)
        return found

    def constant(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        """The part of the reconstruction that does not come from latents: ``b_dec`` and the skip path. A new tensor."""
        found = self.b_dec.to(hidden.device).expand(*hidden.shape[:-1], self.d_out)
        return found.clone() if self.w_skip is None else found + hidden @ whole(self.w_skip).to(hidden.device).T

    def gather(self, index: Index, device: torch.device) -> Latents:
        """Read the encoder of some latents into memory."""
        chosen = index if isinstance(index, slice) else torch.from_numpy(index)

        def part(vector: Tensor) -> Tensor:
            return vector.to(device)[chosen if isinstance(chosen, slice) else chosen.to(device)]

        return Latents(
            w_enc=take(self.w_enc, index, 1).to(device),
            b_enc=part(self.b_enc),
            threshold=None if self.threshold is None else part(self.threshold),
            gate=None
            if self.gate is None
            else Gate(*map(part, (self.gate.gate_bias, self.gate.r_mag, self.gate.mag_bias))),
            scale=take(self.w_dec, index, 0).norm(dim=1).to(device) if self.decoder_scaled else None,
            shift=None if self.shift is None else self.shift.to(device),
        )

    def _top(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest activations of each token, and the indices of their latents."""
        assert self.k is not None
        values = places = None
        for low in range(0, self.width, _TOP_TILE):
            high = min(low + _TOP_TILE, self.width)
            pre = torch.relu(self.gather(slice(low, high), hidden.device).pre(hidden))
            best, where = pre.topk(min(self.k, high - low), dim=-1)
            where = where + low
            if values is not None and places is not None:
                best, where = torch.cat([values, best], dim=-1), torch.cat([places, where], dim=-1)
                best, kept = best.topk(min(self.k, best.shape[-1]), dim=-1)
                where = where.gather(-1, kept)
            values, places = best, where
        assert values is not None and places is not None
        return values, places


@dataclass(frozen=True, slots=True, eq=False)
class Latents:
    """The encoder of some latents of a dictionary, in memory and on one device."""

    w_enc: Tensor
    b_enc: Tensor
    threshold: Tensor | None
    gate: Gate | None
    scale: Tensor | None
    shift: Tensor | None

    def pre(self, hidden: Tensor) -> Tensor:
        """Pre-activations."""
        found = self._product(hidden) + self.b_enc
        return found if self.scale is None else found * self.scale

    def activations(self, hidden: Tensor) -> Tensor:
        """Activations, for non-linearities that act on each latent separately (not top-k)."""
        if self.gate is not None:
            product = self._product(hidden)
            strength = torch.relu(product * self.gate.r_mag.exp() + self.gate.mag_bias)
            active = strength * (product + self.gate.gate_bias > 0)
            return active if self.scale is None else active * self.scale
        pre = self.pre(hidden)
        active = torch.relu(pre)
        return active if self.threshold is None else active * (pre > self.threshold)

    def _product(self, hidden: Tensor) -> Tensor:
        return (hidden if self.shift is None else hidden - self.shift) @ self.w_enc


def _tile_for(hidden: Tensor) -> int:
    """Latents per tile for this number of tokens."""
    tokens = max(1, hidden.numel() // max(1, hidden.shape[-1]))
    return max(min(_NARROWEST, _TILE), min(_TILE, _ROOM // tokens))


def _group_winners(active: Tensor, size: int) -> Tensor:
    """(…, latent) in groups of ``size``: keep the largest of each group (the first of equal ones), set others to zero."""
    groups = active.reshape(*active.shape[:-1], -1, size)
    best, where = groups.max(dim=-1, keepdim=True)
    return torch.zeros_like(groups).scatter_(-1, where, best).reshape(active.shape)


def _bad_shape(name: str, expected: str, tensor: Matrix) -> BadShape:
    return BadShape(
        f"tensor {name}",
        expected=expected,
        seen=f"shape {tuple(tensor.shape)}",
        fix="check that all tensors belong to one SAE and are not transposed",
    )
