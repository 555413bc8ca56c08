"""Measures how much the next-token loss rises when the hidden states at a site are replaced.

BOS, the first token of a context and attention sinks keep their own states, as in the published model. A prediction counts
if the corpus masks neither the token at its position nor the token that it predicts. Knows nothing of dictionaries: a
replacement is any function of hidden states. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.corpus.contexts import Corpus
from evalkit.errors import CorpusError
from evalkit.fit.estimates import over_tokens
from evalkit.protocols import Progress
from evalkit.records import TokenBatch
from evalkit.subject.attention_sinks import valid_tokens
from evalkit.subject.language_model import LanguageModel
from evalkit.util.progress import SILENT

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LossChange", "Losses", "Replacement", "measure_losses"]

Replacement: TypeAlias = "Callable[[Tensor], Tensor]"  # maps hidden states (batch, pos, d_model) to the same shape


@dataclass(frozen=True, slots=True)
class LossChange:
    """Mean loss with a replacement minus the loss without it, in nats per token, and its SE clustered by document."""

    mean: float
    se: float


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """Next-token losses in nats.

    ``clean``: (token,), without a replacement.
    ``replaced``: (token,) for each replacement, by its name.
    ``documents``: (token,), the document of each token.
    """

    clean: NDArray[np.float32]
    replaced: dict[str, NDArray[np.float32]]
    documents: NDArray[np.int64]

    def change(self, name: str) -> LossChange:
        """The mean rise in loss that a replacement causes."""
        return LossChange(*over_tokens(self.replaced[name].astype(np.float64) - self.clean, self.documents))

    def recovered(self, name: str, ablation: str) -> float:
        """1 − rise in loss of the replacement / rise in loss of the ablation; NaN if the ablation changes nothing.

        1 means a perfect replacement, 0 means no better than the ablation.

        Source: "loss recovered" in Gemma Scope, arXiv 2408.05147, section 4.
        """
        cost = self.change(ablation).mean
        return 1 - self.change(name).mean / cost if cost else float("nan")


def measure_losses(
    language: LanguageModel,
    corpus: Corpus,
    contexts: NDArray[np.int64],
    site: str,
    limit: float,
    replacements: Mapping[str, Replacement],
    progress: Progress = SILENT,
) -> Losses:
    """Losses over the given contexts, without and with each replacement at ``site``.

    ``contexts``: (context,), rows of the corpus.
    ``limit``: states with a larger norm count as attention sinks and are not replaced.

    Raises CorpusError if no prediction counts.
    """
    task = progress.start("next-token losses", len(contexts) * (1 + len(replacements)), "contexts")
    clean: list[Tensor] = []
    replaced: dict[str, list[Tensor]] = {name: [] for name in replacements}
    documents: list[NDArray[np.int64]] = []
    for batch in _batches(corpus, contexts, language.contexts_per_forward(corpus.context_length)):
        counted = torch.from_numpy(batch.valid[:, :-1] & batch.valid[:, 1:])
        clean.append(language.losses(batch.token_ids)[counted])
        progress.advance(task, len(batch.contexts))
        for name, replacement in replacements.items():
            patch = _leaving_alone(replacement, batch, limit)
            replaced[name].append(language.losses(batch.token_ids, site=site, replace=patch)[counted])
            progress.advance(task, len(batch.contexts))
        documents.append(np.repeat(corpus.documents[batch.contexts], counted.sum(dim=1).numpy()))
    progress.finish(task)
    if not sum(map(len, clean)):
        raise CorpusError(
            "corpus", expected="two valid tokens in a row", seen="none", fix="use a longer corpus or more --fit-tokens"
        )
    found = {name: torch.cat(parts).numpy() for name, parts in replaced.items()}
    return Losses(torch.cat(clean).numpy(), found, np.concatenate(documents))


def _batches(corpus: Corpus, contexts: NDArray[np.int64], size: int) -> Iterator[TokenBatch]:
    for start in range(0, len(contexts), size):
        yield corpus.batch(contexts[start : start + size])


def _leaving_alone(replacement: Replacement, batch: TokenBatch, limit: float) -> Replacement:
    """A version of ``replacement`` in which masked tokens and attention sinks keep their own states."""

    def patch(hidden: Tensor) -> Tensor:
        return torch.where(valid_tokens(hidden, batch, limit)[..., None], replacement(hidden), hidden)

    return patch
