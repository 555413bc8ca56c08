"""The parts of the inspection of an RQAE: one function per part returns table rows, figure data and notes.

Each function calls the module that measures and converts the result to JSON values. Writes no files, draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from evalkit.collect.calibration import choose_centres
from evalkit.errors import CorpusError
from evalkit.fit.losses import Losses, measure_losses
from evalkit.fit.rqae import measure_rqae_fit
from evalkit.inspection.parts.ablations import ablations
from evalkit.inspection.parts.measured import Measured
from evalkit.inspection.parts.settings import Settings
from evalkit.inspection.parts.states import RqaeStates
from evalkit.inspection.rqae.cosines import BINS, SMALL, cosine_density, decoded_cosines
from evalkit.inspection.rqae.prefixes import count_prefixes
from evalkit.inspection.rqae.ranks import rank_agreement
from evalkit.inspection.rqae.sae_match import choose_examples, match_latents, summarise
from evalkit.protocols import Progress
from evalkit.sources.rqae.shared_encoder import rqae_errors
from evalkit.sources.sae.source import SaeSource
from evalkit.util.tensor_files import take
from rqae import RQAE, layer_weights
from rqae.feature_sets import FeatureSet

__all__ = ["CANDIDATES", "cosines", "fit", "layers", "prefixes", "ranks", "sae"]

CANDIDATES = 4  # latents recorded per latent wanted, because some fire too rarely to have examples


def prefixes(material: RqaeStates, depths: Sequence[int], progress: Progress) -> Measured:
    """Unique code prefixes over the corpus."""
    found = count_prefixes(material.codes.codes, depths, progress)
    note = (
        f"{found[0].tokens:,} tokens of {material.corpus.n_documents:,} documents. alone: share of tokens whose prefix no "
        "other token has."
    )
    return Measured([asdict(row) for row in found], notes=[note])


def cosines(model: RQAE, settings: Settings) -> Measured:
    """Cosines between decoded codes."""
    rows, histograms = decoded_cosines(model, settings.pairs, settings.seed)
    spaces = {"across quantizers": model.config.dim, "within a quantizer": model.config.codebook_dim}
    middles = (np.arange(BINS) + 0.5) * 2 / BINS - 1
    random = {kind: cosine_density(middles, dim).tolist() for kind, dim in spaces.items() if dim > 2}
    further = {"histograms": histograms, "random": random, "spaces": spaces}
    note = (
        f"small: share of pairs with |cos| < {SMALL}; mean: mean of |cos|. Random directions: in {model.config.dim} "
        "dimensions, computed exactly."
    )
    return Measured([asdict(row) for row in rows], further, [note])


def layers(model: RQAE) -> Measured:
    """The layer weights L_i: the mean length of each quantizer's decoder columns."""
    weights = layer_weights(model).double().cpu()
    total = float(weights.sum()) or 1.0
    rows = [
        {"quantizer": place + 1, "weight": weight, "cumulative": float(running) / total}
        for place, (weight, running) in enumerate(zip(weights.tolist(), weights.cumsum(0), strict=True))
    ]
    note = (
        "weight: L_i, the mean length of a quantizer's decoder columns, which is its weight in an intensity; cumulative: "
        "share of ΣL up to this quantizer."
    )
    return Measured(rows, notes=[note])


def fit(material: RqaeStates, settings: Settings, depths: Sequence[int], progress: Progress) -> Measured:
    """FVU and next-token loss per depth, with the loss for zeros and for the mean state to compare."""
    contexts = material.sample("fit", settings.fit_tokens, settings.seed)
    source, info = material.source, material.subject.info
    found = measure_rqae_fit(material.rqae, material.hidden(contexts), info, depths)
    replacements = {str(depth): replace(source, depth=depth).reconstruct for depth in depths}
    replacements |= ablations(found.mean.float(), info.d_model)
    losses = measure_losses(
        material.language, material.corpus, contexts, material.site, material.limit, replacements, progress
    )
    rows = [
        {
            "depth": depth,
            "fvu": found.raw[depth],
            "fvu_normed": found.normed[depth],
            "loss_change": losses.change(str(depth)).mean,
            "se": losses.change(str(depth)).se,
            "recovered_zero": losses.recovered(str(depth), "zero"),
            "recovered_mean": losses.recovered(str(depth), "mean"),
        }
        for depth in depths
    ]
    return Measured(rows, _about(losses, found.n_tokens), _fit_notes(losses, found.n_tokens))


def _about(losses: Losses, tokens: int) -> dict[str, Any]:
    ablated = {name: asdict(losses.change(name)) for name in ("zero", "mean")}
    return {
        "loss": float(losses.clean.mean(dtype=np.float64)),
        "ablated": ablated,
        "predictions": len(losses.clean),
        "tokens": tokens,
    }


def _fit_notes(losses: Losses, tokens: int) -> list[str]:
    about = _about(losses, tokens)
    zero, mean = (about["ablated"][name]["mean"] for name in ("zero", "mean"))
    return [
        f"{tokens:,} tokens for FVU, {about['predictions']:,} predictions for the loss; SE clustered by document.",
        f"loss change: nats per token, relative to {about['loss']:.3f} without replacement; {zero:+.3f} with zeros, "
        f"{mean:+.3f} with the mean state. recovered: 1 - loss change / loss change of that ablation.",
        "BOS, the first token of a context and attention sinks keep their own hidden states.",
    ]


def ranks(material: RqaeStates, settings: Settings, depths: Sequence[int]) -> Measured:
    """Spearman's correlation of intensity with cosine, over the best tokens of each token feature."""
    corpus, tokens = material.corpus, material.tokens
    everywhere = np.zeros(corpus.n_contexts, np.uint8)
    spare = settings.features // 10 + 5  # some centres may be attention sinks, which are not in the code store
    for wanted in (settings.features + spare, settings.features):
        try:
            centres = choose_centres(corpus, everywhere, wanted, settings.seed)
            break
        except CorpusError:
            if wanted == settings.features:
                raise
    numbers = np.array([centre.context * corpus.context_length + centre.position for centre in centres])
    rows = np.minimum(np.searchsorted(tokens, numbers), len(tokens) - 1)
    known = np.flatnonzero(tokens[rows] == numbers)[: settings.features]
    found, values = rank_agreement(
        material.rqae, material.codes.codes, rows[known], material.normed, depths, settings.top
    )
    further = {"values": values.tolist(), "top": settings.top, "centres": [centres[place].feature for place in known]}
    note = (
        f"Over the {settings.top} tokens of highest intensity out of {len(tokens):,}, without the feature's own token; SE "
        "over features. features: those with different intensities, of all tried."
    )
    return Measured([asdict(row) for row in found], further, [note])


def sae(
    material: RqaeStates, settings: Settings, other: SaeSource, candidates: Sequence[str], depths: Sequence[int]
) -> Measured:
    """Pearson's correlation of an SAE's latents with RQAE features made from them."""
    length = material.corpus.context_length
    chosen = choose_examples(material.activations, length, range(len(candidates)), settings.features, settings.examples)
    if not chosen:
        raise CorpusError(
            other.name,
            expected=f"latents that fire in at least {3 * settings.examples} contexts",
            seen=f"none of {len(candidates)} in {material.corpus.n_contexts} contexts",
            fix="raise --max-tokens",
        )
    ids = [candidates[one.latent] for one in chosen]
    columns = take(other.weights.w_enc, np.array([int(name) for name in ids]), 1).T.contiguous()
    with rqae_errors(CorpusError):
        made = FeatureSet.from_vectors(material.rqae, columns, torch.from_numpy(material.subject.info.norm_gain))
    values = match_latents(
        material.rqae, material.codes.codes, material.tokens, length, chosen, made.codes.numpy(), depths
    )
    note = (
        f"{len(chosen)} latents of {other.name}, {settings.examples} contexts each; SE over latents. top: the contexts in "
        "which the latent fires most strongly; median: those around the median of all contexts in which it fires."
    )
    rows = [asdict(row) for row in summarise(values, depths)]
    return Measured(rows, {"values": values.tolist(), "latents": ids, "dictionary": other.name}, [note])
