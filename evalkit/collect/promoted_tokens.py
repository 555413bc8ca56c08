"""The tokens that a feature promotes: those whose logits rise most if its direction is added just before the output.

The logit lens of decoder directions: W_U · (gain ⊙ d), minus its mean over the vocabulary. All features of a run share one
pass over the unembedding, a few thousand rows at a time. Knows directions and tokenizers; nothing of dictionaries, corpora
or explainers. Writes nothing.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; for features Bloom & Lin 2024, "Understanding SAE features
with the logit lens".
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evalkit.corpus.token_text import token_pieces
from evalkit.errors import EvalkitError
from evalkit.protocols import DirectedSource
from evalkit.records import FeatureId
from evalkit.subject.unembedding import OutputHead, read_output_head

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import NDArray
    from torch import Tensor

    from evalkit.collect.activations import SelectedFeatures
    from evalkit.subject.model import Subject

__all__ = ["PROMOTED", "promoted_by_source", "promoted_tokens", "token_texts"]

_LOG = logging.getLogger(__name__)
PROMOTED = 20  # tokens kept per feature
_SPARE = 3  # candidates per kept token: several ids may have the same text
_ROOM = 1 << 22  # numbers per tile in memory: logits, and rows of the unembedding
_UNUSED = re.compile(r"[<\[]\|?(?:unused|reserved|extra|dummy|placeholder|special)[\w ]*\|?[>\]]", re.IGNORECASE)


def promoted_by_source(
    selected: Sequence[SelectedFeatures],
    subject: Subject,
    model: str,
    *,
    revision: str | None = None,
    k: int = PROMOTED,
) -> list[dict[FeatureId, tuple[str, ...]]]:
    """The promoted tokens of every source's features, in the order of ``selected``; empty for sources without directions.

    ``model``: the folder or hub id that the subject was loaded from. If the model's head cannot be read, logs a warning
    and returns no tokens.
    """
    nothing: list[dict[FeatureId, tuple[str, ...]]] = [{} for _ in selected]
    directed = [isinstance(one.source, DirectedSource) and bool(one.features) for one in selected]
    if not any(directed):
        return nothing
    try:
        head = read_output_head(model, subject.info, vocab_size=subject.vocab_size, revision=revision)
        if head is None:
            _LOG.warning("no promoted tokens: no unembedding of %s in a safetensors or torch checkpoint", model)
            return nothing
        found = [_directions(one, head, subject) if has else None for one, has in zip(selected, directed, strict=True)]
        if all(rows is None for rows in found):
            return nothing
        texts = token_texts(subject.tokenizer, subject.vocab_size)
        tokens = iter(promoted_tokens(torch.cat([rows for rows in found if rows is not None]), head, texts, k))
    except EvalkitError as error:
        _LOG.warning("no promoted tokens: %s", error)
        return nothing
    return [
        {} if rows is None else {feature: next(tokens) for feature in one.features}
        for one, rows in zip(selected, found, strict=True)
    ]


def _directions(selected: SelectedFeatures, head: OutputHead, subject: Subject) -> Tensor | None:
    """Directions of one source's features; None unless they are added to the residual stream that the head reads."""
    if not isinstance(selected.source, DirectedSource) or not subject.in_stream(selected.source.site.out):
        return None
    rows = selected.source.directions(selected.features)
    return None if rows is None or rows.shape[1] != head.gain.numel() else rows.float().cpu()


def promoted_tokens(
    directions: Float[Tensor, "feature d_model"], head: OutputHead, texts: Sequence[str | None], k: int = PROMOTED
) -> list[tuple[str, ...]]:
    """For each direction, the ``k`` texts whose logits it raises most above the mean logit, strongest first.

    ``texts``: the text of each token id, None to leave the id out (see ``token_texts``). Ids with the same text count
    once; among equal logits the lower id comes first. A direction that raises fewer than ``k`` logits gets fewer texts.
    Logits are summed in float64 and compared in float32, so a direction's result does not depend on the others.
    Raises BadFile.
    """
    rows = head.before_unembedding(directions.double())
    usable = torch.isfinite(rows).all(dim=1) & (rows != 0).any(dim=1)
    shown = torch.tensor([text is not None for text in texts])
    features, ids = _strongest(rows[usable], head, shown, _SPARE * k)
    found: list[list[str]] = [[] for _ in range(len(rows))]
    places = usable.nonzero().flatten().tolist()
    for feature, token in zip(features.tolist(), ids.tolist(), strict=True):
        tokens, text = found[places[feature]], texts[token]
        if text is not None and len(tokens) < k and text not in tokens:
            tokens.append(text)
    return [tuple(tokens) for tokens in found]


def _strongest(
    rows: Tensor, head: OutputHead, shown: Tensor, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(feature, token id) of at least the ``count`` highest logits of each feature above its mean, by feature and rank."""
    n_tokens, d_model = head.unembedding.shape
    size = max(count, _ROOM // max(len(rows), d_model))
    floor = torch.full((len(rows),), -torch.inf)  # no token below it is among the highest
    total = torch.zeros(len(rows), dtype=torch.float64)
    features, ids, values = [], [], []
    for low in range(0, n_tokens if len(rows) else 0, size):
        tile = head.unembedding.take(slice(low, min(low + size, n_tokens)), 0).double()
        logits = (tile @ rows.T).float()  # (token, feature)
        total += logits.sum(dim=0, dtype=torch.float64)
        logits[~shown[low : low + size]] = -torch.inf
        if len(logits) >= count:
            floor = torch.maximum(floor, logits.topk(count, dim=0).values[-1])
        token, feature = ((logits >= floor) & torch.isfinite(logits)).nonzero(as_tuple=True)
        features.append(feature.numpy())
        ids.append((token + low).numpy())
        values.append(logits[token, feature].numpy())
    if not features:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    feature_of, id_of, value_of = np.concatenate(features), np.concatenate(ids), np.concatenate(values)
    raised = value_of > (total / n_tokens).numpy()[feature_of]
    feature_of, id_of, value_of = feature_of[raised], id_of[raised], value_of[raised]
    order = np.lexsort((id_of, -value_of, feature_of))
    return feature_of[order], id_of[order]


def token_texts(tokenizer: Any, vocab_size: int) -> list[str | None]:
    """The text of every id; None for special and unused tokens, ids without one, and parts of characters."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    texts = [None if index in special else token_pieces(tokenizer, (index,))[0] for index in range(vocab_size)]
    return [text if text and "\ufffd" not in text and not _UNUSED.fullmatch(text) else None for text in texts]
