"""The whole subject model with its output head: next-token losses, optionally with replaced hidden states at one site.

``Subject`` reads hidden states and stops early; this model runs to the end. Both share one copy of the weights. Knows
nothing of dictionaries, corpora or averages. Reads model files only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from evalkit.subject.loading import decoder_of, load_whole
from evalkit.subject.model import Dtype, Subject, torch_dtype, usable_device

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["LanguageModel"]

_LOGITS = 1 << 25  # limit of logits per forward pass: 128 MiB in float32


class LanguageModel:
    """A causal language model, and ``subject``, which reads hidden states of the same weights."""

    def __init__(self, whole: nn.Module, subject: Subject) -> None:
        self._whole = whole
        self.subject = subject

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        sites: Sequence[str],
        dtype: Dtype = "bfloat16",
        device: str = "auto",
        revision: str | None = None,
    ) -> LanguageModel:
        """Load a model like ``Subject.load``, but with all blocks and the output head. Raises the same errors."""
        computed_in = torch_dtype(dtype)
        device = usable_device(device)
        whole, tokenizer = load_whole(model, dtype=computed_in, revision=revision)
        whole.eval().requires_grad_(False).to(device)
        decoder = decoder_of(whole)
        name = Path(str(model)).name
        return cls(whole, Subject(decoder, tokenizer, name=name, sites=sites, device=device, keep_blocks=True))

    def contexts_per_forward(self, length: int) -> int:
        """The number of contexts of ``length`` tokens per forward pass, limited by the size of the logits."""
        return max(1, _LOGITS // (length * self.subject.vocab_size))

    def losses(
        self,
        token_ids: NDArray[np.integer[Any]],
        *,
        site: str | None = None,
        replace: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "batch pos-1"]:
        """Cross-entropy in nats of every token except the first, given the tokens before it; float32, on the CPU.

        Column t is the loss of the prediction made at position t. ``replace`` maps the hidden states (batch, pos,
        d_model) at ``site`` to those that the forward pass continues with. Contexts may be padded on the right; the losses
        of padding are meaningless. Raises BadConfig (no such site), BadShape (see ``Subject.replaced``).
        """
        ids = torch.from_numpy(np.ascontiguousarray(token_ids, dtype=np.int64)).to(self.subject.device)
        patched = nullcontext() if site is None or replace is None else self.subject.replaced(site, replace)
        with torch.inference_mode(), patched:
            logits: Tensor = self._whole(input_ids=ids, use_cache=False).logits
            found = cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return found.reshape(ids.shape[0], -1).cpu()
