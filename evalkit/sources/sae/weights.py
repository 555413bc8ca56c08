"""The one normalised record of an SAE's or transcoder's weights, and what it computes: activations, reconstruction, fit.

Knows nothing of files and formats, sites or names; matrices may stay on disk (``Stored``) and are then read by the columns
and tiles that are asked for. Only per-token top-k needs every latent for one; all others multiply the asked columns.
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
_TILE, _NARROWEST = 1 << 13, 256  # latents multiplied at a time where all are: as many as tokens leave room for
_ROOM = 1 << 23  # activations held at a time
_TOP_TILE = 1 << 11  # fixed, so that products have one shape and activations the same bits for every batch


@dataclass(frozen=True, slots=True, eq=False)
class Gate:
    """What a gated encoder has beside x W: a latent is active where x W + ``gate_bias`` > 0, and then as strong as
    relu(x W · exp(``r_mag``) + ``mag_bias``). All (n,). Source: Rajamanoharan et al., arXiv 2404.16014, eq. 3-6.
    """

    gate_bias: Tensor
    r_mag: Tensor
    mag_bias: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SaeWeights:
    """The weights of one SAE or transcoder in one form, float32; matrices may be on disk (``Stored``).

    ``w_enc`` (d_in, n), ``b_enc`` (n,), ``w_dec`` (n, d_out), ``b_dec`` (d_out,). ``shift`` (d_in,) is subtracted from the
    input (the formats that subtract ``b_dec`` say so here). ``threshold`` (n,) makes it a JumpReLU, ``gate`` a gated one,
    ``k`` a top-k per token, or with ``grouped`` the maximum of each of k groups. ``decoder_scaled``: pre-activations times
    the length of the latent's decoder row, which the decoder divides by again. ``w_skip`` (d_out, d_in) is a linear path
    around the latents. Raises BadShape when the shapes do not fit together.
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
                expected=f"1 to {self.width}, the width" + (", which divides it" if self.grouped else ""),
                seen=str(self.k),
                fix="check the config beside the weights",
            )

    @property
    def d_model(self) -> int:
        """Width of what it reads."""
        return int(self.w_enc.shape[0])

    @property
    def d_out(self) -> int:
        """Width of what it reconstructs."""
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
        """Activations of every latent, all in memory: for dictionaries that are not wide.

        Source: Gemma Scope, arXiv 2408.05147, eq. 1 and 3 (JumpReLU: the pre-activation where it exceeds θ, else 0).
        """
        return torch.cat([active for _, active in self.tiles(hidden)], dim=-1)

    def decode(self, activations: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction from activations of every latent (a skip path apart). Source: arXiv 2408.05147, eq. 2."""
        found = self.b_dec.to(activations.device)
        for low in range(0, self.width, _TILE):
            tile = slice(low, min(low + _TILE, self.width))
            found = found + self.decoded(activations[..., tile], tile)
        return found

    def columns(
        self, hidden: Float[Tensor, "*batch d_model"], index: Sequence[int], latents: Latents | None = None
    ) -> Float[Tensor, "*batch latent"]:
        """Activations of some latents. ``latents``: what ``gather`` gave for them, where it is kept."""
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
        """Activations of every latent, a few thousand latents at a time; each is read from disk once."""
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
        """What these latents add to the reconstruction; ``b_dec`` and the skip path are not in it."""
        rows = take(self.w_dec, index, 0).to(activations.device)
        if self.decoder_scaled:
            activations = activations / rows.norm(dim=1).clamp_min(1e-12)
        return activations @ rows

    def reconstruct(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction, tile by tile."""
        found = self.constant(hidden)
        for tile, active in self.tiles(hidden):
            found += self.decoded(active, tile)
        return found

    def constant(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        """The part of the reconstruction that no latent makes: ``b_dec`` and the skip path. A tensor of its own."""
        found = self.b_dec.to(hidden.device).expand(*hidden.shape[:-1], self.d_out)
        return found.clone() if self.w_skip is None else found + hidden @ whole(self.w_skip).to(hidden.device).T

    def gather(self, index: Index, device: torch.device) -> Latents:
        """The encoder of some latents, in memory."""
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
        """The k largest activations of each token, and whose they are."""
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
        """Activations, for every non-linearity that looks at one latent at a time."""
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
    """Latents at a time for so many tokens."""
    tokens = max(1, hidden.numel() // max(1, hidden.shape[-1]))
    return max(min(_NARROWEST, _TILE), min(_TILE, _ROOM // tokens))


def _group_winners(active: Tensor, size: int) -> Tensor:
    """(…, latent) in groups of ``size``: the largest of each group where it is, zero elsewhere; the first of equal ones."""
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
