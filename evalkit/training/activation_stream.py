"""Hidden states that are computed during training and not stored, for corpora whose states do not fit on disk.

They come from a callable, in batches of contexts, in a new order each epoch. Resumed training has to compute the states
that were already used once more; ``activation_store`` avoids that. Needs neither the subject model nor corpus files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from evalkit.corpus.contexts import Corpus
from evalkit.records import Site
from evalkit.seeds import derive
from evalkit.training.activation_store import Hidden, norm_limit, valid_rows

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = ["ActivationStream"]

_CONTEXTS = 16  # per forward pass


class ActivationStream:
    """Rows of the chosen contexts of a corpus, without attention sinks.

    ``rows``, ``sinks``: rows used and sinks left out so far, in the first epoch.
    """

    def __init__(self, corpus: Corpus, contexts: NDArray[np.int64], hidden: Hidden, site: Site, d_model: int) -> None:
        self.site, self.d_model = site, d_model
        self.rows = self.sinks = 0
        self._corpus, self._contexts, self._hidden = corpus, contexts, hidden

    def batches(self, batch_size: int, *, seed: int) -> Iterator[Float[Tensor, "row d_model"]]:
        """Endless batches in float32, each the rows of a few contexts. ``batch_size`` is ignored."""
        epoch, limit = 0, None
        while True:
            order = np.random.default_rng(derive(seed, "stream", epoch)).permutation(self._contexts)
            for start in range(0, len(order), _CONTEXTS):
                batch = self._corpus.batch(order[start : start + _CONTEXTS])
                found = valid_rows(batch, self._hidden(batch), self.site, self.d_model)
                limit = norm_limit(found) if limit is None else limit
                kept = found.float().norm(dim=1) <= limit
                if epoch == 0:
                    self.rows, self.sinks = self.rows + int(kept.sum()), self.sinks + int((~kept).sum())
                yield found[kept].float()
            epoch += 1
