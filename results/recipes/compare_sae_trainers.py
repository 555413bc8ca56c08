"""Trains one SAE with our trainer or with sae-lens on the same activations, and measures both the same way.

    python results/recipes/compare_sae_trainers.py TRAIN_STORE HELD_OUT_STORE --trainer ours --tokens 1000000
    python results/recipes/compare_sae_trainers.py TRAIN_STORE HELD_OUT_STORE --trainer sae-lens --tokens 1000000

sae-lens needs a separate environment (install torch==2.13.0 first, then sae-lens==6.54.0). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from evalkit.fit.sae import measure_fit
from evalkit.sources.sae.weights import SaeWeights
from evalkit.training.activation_store import ActivationStore
from evalkit.training.sae import SaeTrainingConfig, train_sae


def with_sae_lens(store: ActivationStore, options: argparse.Namespace) -> SaeWeights:
    """sae-lens's batch-top-k SAE with its defaults, except learning rate, warm-up, decay and bfloat16, which equal ours."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    torch.manual_seed(options.seed)
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=store.d_model, d_sae=options.width, k=options.l0, normalize_activations="expected_average_only_in"
        )
    )
    steps = options.tokens // options.batch_size
    config = SAETrainerConfig(
        total_training_samples=options.tokens,
        train_batch_size_samples=options.batch_size,
        lr=options.learning_rate,
        lr_end=options.learning_rate / 1000,
        lr_warm_up_steps=round(0.03 * steps),
        lr_decay_steps=round(0.25 * steps),
        autocast=options.bfloat16,
        dead_feature_window=max(1, 200_000 // options.batch_size),
        n_batches_for_norm_estimate=20,
        logger=LoggingConfig(log_to_wandb=False),
    )
    sae = SAETrainer(config, sae, store.batches(options.batch_size, seed=options.seed)).fit()
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    b_enc = state["b_enc"]
    if sae.cfg.apply_b_dec_to_input:
        b_enc = b_enc - state["b_dec"] @ state["W_enc"]
    threshold = state["threshold"].float()
    if options.calibrate:
        rows = store.sample(16_384, options.seed)
        pre = torch.relu(rows @ state["W_enc"] + b_enc).flatten()
        threshold = torch.full_like(threshold, float(pre.topk(round(options.l0 * len(rows))).values.min()))
    return SaeWeights(state["W_enc"], b_enc, state["W_dec"], state["b_dec"], threshold)


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--trainer", choices=("ours", "sae-lens"), required=True)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--l0", type=float, default=32.0)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--calibrate", action="store_true", help="with sae-lens, set the threshold after training, as ours does"
    )
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    store, held_out = ActivationStore(options.store), ActivationStore(options.held_out)
    wall, cpu = time.monotonic(), time.process_time()
    if options.trainer == "ours":
        config = SaeTrainingConfig(
            width=options.width,
            l0=options.l0,
            tokens=options.tokens,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            seed=options.seed,
            bfloat16=options.bfloat16,
        )
        weights, _ = train_sae(store, config, held_out=held_out)
    else:
        weights = with_sae_lens(store, options)
    seconds, cpu_seconds = time.monotonic() - wall, time.process_time() - cpu
    with torch.no_grad():
        fit = measure_fit(weights, held_out.chunks())
    print(
        json.dumps(
            {
                "trainer": options.trainer,
                "tokens": options.tokens,
                "learning_rate": options.learning_rate,
                "calibrated": options.calibrate or options.trainer == "ours",
                "fvu": round(fit.fvu, 4),
                "l0": round(fit.l0, 2),
                "dead_share": round(1 - fit.alive_share, 4),
                "seconds": round(seconds, 1),
                "cpu_seconds": round(cpu_seconds, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
