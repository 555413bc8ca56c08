"""Trains one dictionary and writes its folder: weights, a card with held-out measurements, and the training history.

Takes hidden states from a ``TrainingText``. Writes the files only when training and measurements are finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evalkit.errors import BadConfig
from evalkit.fit.losses import measure_losses
from evalkit.fit.rqae import measure_rqae_fit
from evalkit.fit.sae import measure_fit
from evalkit.protocols import Progress
from evalkit.seeds import derive
from evalkit.sources.formats.gemma_scope import read_weights
from evalkit.subject.attention_sinks import SINK_RATIO
from evalkit.subject.final_norm import denormalise, normalise
from evalkit.subject.language_model import LanguageModel
from evalkit.training.activation_store import ActivationStore
from evalkit.training.activation_stream import ActivationStream
from evalkit.training.activation_text import LossText, TrainingText
from evalkit.training.cards import Card, write_card, write_sae
from evalkit.training.curves import write_curves
from evalkit.training.sae import SaeTrainingConfig, train_sae
from evalkit.util.atomic_files import storage_errors
from evalkit.util.progress import SILENT
from rqae import RQAE
from rqae.training.config import RqaeTrainingConfig
from rqae.training.loop import train_rqae

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["train_rqae_dictionary", "train_sae_dictionary"]

RQAE_DEPTHS = (16, 64, 256)
_CURVE_ROWS = 8192  # held-out rows on which the training curve is measured
_LOSS_CONTEXTS = 64  # held-out contexts on which next-token losses are measured


def train_sae_dictionary(
    text: TrainingText,
    config: SaeTrainingConfig,
    out: Path,
    *,
    command: str,
    checkpoint: Path | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Train an SAE and write it in Gemma Scope's layout below ``out``; returns its folder.

    Raises BadConfig if the hidden states are streamed, because SAE training needs stored ones.
    """
    if not isinstance(text.train, ActivationStore):
        raise BadConfig(
            "hidden states", expected="stored hidden states for an SAE", seen="a stream", fix="leave out --stream"
        )
    weights, report = train_sae(text.train, config, held_out=text.held_out, checkpoint=checkpoint, progress=progress)
    site = text.train.site
    card = Card(
        model=site.model,
        site=site.path,
        name=f"{site}/sae/width-{config.width}/l0-{round(report.fit.l0)}",
        kind="sae",
        command=command,
        corpus=text.parts,
        n_tokens=report.n_tokens,
        n_distinct_tokens=report.n_distinct,
        held_out_tokens=report.fit.n_tokens,
        fvu=report.fit.fvu,
        l0=report.fit.l0,
        alive_share=report.fit.alive_share,
        width=config.width,
        seed=config.seed,
        further={**_left_out(text.train), "trained_for_l0": config.l0, "seconds": round(report.seconds)},
    )
    folder = write_sae(out, weights, card)
    measure_fit(read_weights(folder / "params.npz"), text.held_out.chunks())  # checks that the written file can be read
    return folder


def _left_out(train: ActivationStore | ActivationStream) -> dict[str, Any]:
    rows, sinks = (train.rows, train.sinks) if isinstance(train, ActivationStream) else (len(train), train.record.sinks)
    rule = (
        f"the first token of each context, and tokens whose hidden state is over {SINK_RATIO:g} times the median norm"
    )
    return {"left_out": {"rule": rule, "attention_sinks": sinks, "of_tokens": sinks + rows}}


def train_rqae_dictionary(
    text: TrainingText,
    config: RqaeTrainingConfig,
    out: Path,
    *,
    command: str,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Path:
    """Train an RQAE on final-normed hidden states and write its checkpoint folder ``out``, in float16.

    Also writes ``card.json``, ``training.json`` and a plot of the training history. The card has the FVU by depth and the
    share of codes in use, on all held-out rows. If ``text.losses`` is set, it also has the change in next-token loss when
    reconstructions replace the hidden states.
    """
    started = time.monotonic()
    rows = (normalise(batch, text.info) for batch in text.train.batches(config.batch_tokens, seed=config.seed))
    sample = normalise(text.held_out.sample(_CURVE_ROWS, derive(config.seed, "curve")), text.info)
    model, report = train_rqae(rows, config, held_out=sample, device=device, progress=progress)
    partial = out.with_name(f".{out.name}.partial")
    model.save_pretrained(partial, dtype=torch.float16)
    seconds = time.monotonic() - started
    stored = RQAE.from_pretrained(partial)
    depths = sorted({*(depth for depth in RQAE_DEPTHS if depth < config.num_quantizers), config.num_quantizers})
    fit = measure_rqae_fit(stored, text.held_out.chunks(), text.info, depths)
    site = text.train.site
    n_tokens = report.steps * config.batch_tokens + config.init_tokens
    distinct = text.train.rows if isinstance(text.train, ActivationStream) else len(text.train)
    losses = {} if text.losses is None else _loss_change(stored, text, text.losses, depths, progress)
    card = Card(
        model=site.model,
        site=site.path,
        name=f"{site}/{out.name}",
        kind="rqae",
        command=command,
        corpus=text.parts,
        n_tokens=n_tokens,
        n_distinct_tokens=min(n_tokens, distinct),
        held_out_tokens=fit.n_tokens,
        fvu=fit.raw[config.num_quantizers],
        l0=None,
        alive_share=fit.alive_share,
        width=config.num_quantizers,
        seed=config.seed,
        further={
            **_left_out(text.train),
            "fvu_by_depth": {str(depth): round(fvu, 4) for depth, fvu in fit.raw.items()},
            "fvu_normed_by_depth": {str(depth): round(fvu, 4) for depth, fvu in fit.normed.items()},
            "units": "fvu and fvu_by_depth: raw hidden states; fvu_normed_by_depth: final-normed ones",
            **losses,
            "dead_share_in_training": round(report.dead_share, 4),
            "seconds": round(seconds),
        },
    )
    write_curves(partial, report, card.name)
    write_card(partial, card)
    _put_in_place(partial, out)
    return out


def _put_in_place(partial: Path, out: Path) -> None:
    """Move a finished folder into place. The old card is deleted first and the new one moved last.

    So a card never describes other weights, even if the process dies in between.
    """
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "card.json").unlink(missing_ok=True)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "card.json"):
            path.replace(out / path.name)
        partial.rmdir()


def _loss_change(
    model: RQAE, text: TrainingText, where: LossText, depths: Sequence[int], progress: Progress
) -> dict[str, Any]:
    """Change in next-token loss when reconstructions replace the hidden states, by depth, in nats per token."""
    site = text.train.site.path
    language = LanguageModel.load(where.model, sites=(site,), dtype=where.dtype, device=where.device)
    model = model.to(language.subject.device)

    def reconstruction(depth: int, hidden: Tensor) -> Tensor:
        return denormalise(model.decode(model.encode(normalise(hidden, text.info), depth)), hidden, text.info)

    found = measure_losses(
        language,
        where.corpus,
        where.contexts[:_LOSS_CONTEXTS],
        site,
        text.held_out.record.norm_limit or float("inf"),
        {str(depth): partial(reconstruction, depth) for depth in depths},
        progress,
    )
    changes = {name: found.change(name) for name in found.replaced}
    return {
        "loss_change_by_depth": {name: _finite(change.mean) for name, change in changes.items()},
        "loss_change_se_by_depth": {name: _finite(change.se) for name, change in changes.items()},
        "loss_tokens": len(found.clean),
    }


def _finite(value: float) -> float | None:
    """The rounded value; None if it is not finite, such as a standard error over a single document."""
    return round(value, 4) if math.isfinite(value) else None
