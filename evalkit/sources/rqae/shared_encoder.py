"""The encoding that the sources of one RQAE checkpoint share: raw hidden states in, codes out, recent results cached.

Applies the subject model's final norm. Knows nothing of features; reads and writes no files.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from evalkit.errors import BadConfig, InputError
from evalkit.records import SubjectInfo
from evalkit.subject.final_norm import normalise
from rqae import RQAE, RqaeError

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["SharedEncoder", "rqae_errors"]

_REMEMBERED_BYTES = 128 << 20


@contextmanager
def rqae_errors(kind: type[InputError]) -> Iterator[None]:
    """Turn errors of the RQAE package into errors of this package, of the given kind."""
    try:
        yield
    except RqaeError as error:
        raise kind(error.subject, expected=error.expected, seen=error.seen, fix=error.fix) from error


class SharedEncoder:
    """Encodes raw hidden states into codes at the deepest depth in use, for all sources of one checkpoint.

    Codes of recent batches are cached by the content of the batch (2 bytes per code), so several depths cost one encoding.
    """

    def __init__(self, model: RQAE, depth: int, subject: SubjectInfo | None = None) -> None:
        self.model, self.depth, self.subject = model, depth, subject
        self._remembered: OrderedDict[bytes, Tensor] = OrderedDict()
        self._bytes = 0
        self._bound: SharedEncoder | None = None

    def bound(self, subject: SubjectInfo) -> SharedEncoder:
        """The encoder bound to a subject model; all sources that bind to the same model share it."""
        if self._bound is None or self._bound.subject is not subject:
            self._bound = SharedEncoder(self.model, self.depth, subject)
        return self._bound

    def codes(self, hidden: Float[Tensor, "*batch d_model"]) -> Int[Tensor, "row depth"]:
        """Codes of raw hidden states, one row per token.

        Raises BadShape, BadConfig (not bound to a subject model), InputError (not finite).
        """
        subject = self.known_subject()
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        key = _digest(rows)
        if (found := self._remembered.get(key)) is not None:
            self._remembered.move_to_end(key)
            return found.to(rows.device, torch.int64)
        if self.model.w_in.device != rows.device:
            self.model.to(rows.device)
        with rqae_errors(InputError):
            codes = self.model.encode(normalise(rows, subject), self.depth)
        self._remember(key, codes.to("cpu", torch.uint16))
        return codes

    def known_subject(self) -> SubjectInfo:
        """The subject model it is bound to. Raises BadConfig if there is none."""
        if self.subject is None:
            raise BadConfig(
                "RQAE", expected="a source bound to a subject model", seen="no subject model", fix="call bind first"
            )
        return self.subject

    def _remember(self, key: bytes, codes: Tensor) -> None:
        self._remembered[key] = codes
        self._bytes += codes.nbytes
        while self._bytes > _REMEMBERED_BYTES and len(self._remembered) > 1:
            self._bytes -= self._remembered.popitem(last=False)[1].nbytes


def _digest(rows: Tensor) -> bytes:
    shape = f"{tuple(rows.shape)} {rows.dtype}".encode()
    content = rows.contiguous().cpu().view(torch.uint8).numpy().data if rows.numel() else b""
    return hashlib.blake2b(content, digest_size=16, key=hashlib.blake2b(shape, digest_size=16).digest()).digest()
