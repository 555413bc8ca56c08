"""``evalkit train sae`` and ``evalkit train rqae``: train a dictionary for one site of a subject model on text."""

from __future__ import annotations

import hashlib
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from evalkit.cli.console import progress_bars
from evalkit.errors import BadConfig, require

if TYPE_CHECKING:
    from evalkit.subject.model import Dtype
    from rqae.training.gradients import Precision

__all__ = ["app"]

app = typer.Typer(help="Train a dictionary for one site of a subject model.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="Subject model: hub id, folder or .gguf file.", envvar="EVALKIT_MODEL")]
Site = Annotated[str, typer.Option(help="Site to read, e.g. layers.15: the residual stream after block 15.")]
Corpus = Annotated[str, typer.Option(help="Training text, as for `evalkit run`.")]
HeldOut = Annotated[str, typer.Option(help="Held-out text, from other documents, for measurements.")]
Work = Annotated[Path, typer.Option(help="Folder for hidden states; dictionaries for the same site can share it.")]
Tokens = Annotated[int | None, typer.Option(help="Maximum number of distinct tokens to collect.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial weights and the order of tokens.")]
DtypeName = Annotated[str, typer.Option(help="bfloat16 or float32.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]


@app.command()
def sae(
    model: Model,
    site: Site,
    corpus: Corpus,
    held_out: HeldOut,
    out: Annotated[Path, typer.Option(help="Folder under which layer_N/width_W/average_l0_L/ is written.")],
    work: Work = Path("text/states"),
    width: Annotated[int, typer.Option(help="Number of latents.")] = 2048,
    l0: Annotated[float, typer.Option(help="Target number of active latents per token.")] = 32.0,
    max_tokens: Tokens = None,
    train_tokens: Annotated[int, typer.Option(help="Tokens to train on, counting repeats.")] = 4_000_000,
    seed: Seed = 0,
    dtype: DtypeName = "bfloat16",
    device: Device = "auto",
) -> None:
    """Train a batch-top-k SAE, write it as JumpReLU in Gemma Scope's layout with a card, and print its folder.

    Example: `evalkit train sae --model smollm2-135m --site layers.15 --corpus a.jsonl --held-out b.jsonl --out my_saes`
    """
    require("torch", "model")
    from evalkit.training.activation_text import TextSpec, open_text
    from evalkit.training.dictionaries import train_sae_dictionary
    from evalkit.training.sae import SaeTrainingConfig

    spec = TextSpec(
        model, site, corpus, held_out, work, max_tokens=max_tokens, dtype=cast("Dtype", dtype), device=device
    )
    config = SaeTrainingConfig(width=width, l0=l0, tokens=train_tokens, seed=seed)
    checkpoint = work / f"sae-{width}-{l0:g}-{train_tokens}-{seed}.checkpoint"
    with progress_bars() as progress:
        text = open_text(spec, progress)
        folder = train_sae_dictionary(text, config, out, command=_command(), checkpoint=checkpoint, progress=progress)
    checkpoint.unlink(missing_ok=True)
    sys.stdout.write(f"{folder}\n")


@app.command()
def rqae(
    model: Model,
    site: Site,
    corpus: Corpus,
    held_out: HeldOut,
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    work: Work = Path("text/states"),
    quantizers: Annotated[int, typer.Option(help="Number of quantizers.")] = 256,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 2048,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate, relative to the size of the weights.")
    ] = 2e-2,
    init_tokens: Annotated[
        int, typer.Option(help="Tokens to initialise the weights from; also the size of the shuffle buffer.")
    ] = 65_536,
    precision: Annotated[
        str, typer.Option(help="Precision of the gradients: float32, or bfloat16 on hardware where it is faster.")
    ] = "float32",
    nested_depths: Annotated[
        str,
        typer.Option(
            help="Depths whose error is added to the loss, e.g. 16,64; for an RQAE that is also used at these."
        ),
    ] = "",
    stream: Annotated[
        bool, typer.Option("--stream", help="Store no hidden states on disk; resuming computes them again.")
    ] = False,
    max_tokens: Tokens = None,
    seed: Seed = 0,
    dtype: DtypeName = "bfloat16",
    device: Device = "auto",
) -> None:
    """Train an RQAE on final-normed hidden states, write it in upstream's checkpoint layout, and print its folder.

    All quantizers are trained together, with straight-through gradients and detached residuals. The folder also holds a
    card (FVU per depth, next-token loss and codes in use, measured on held-out text) and a plot of the training. After an
    interruption, run the same command to resume.

    Example: `evalkit train rqae --model smollm2-135m --site layers.15 --corpus a.jsonl --held-out b.jsonl --out my_rqae`
    """
    require("torch", "model")
    from evalkit.subject.model import usable_device
    from evalkit.training.activation_text import TextSpec, open_text
    from evalkit.training.dictionaries import train_rqae_dictionary
    from rqae.training.config import RqaeTrainingConfig

    if precision not in ("float32", "bfloat16"):
        raise BadConfig("--precision", expected="float32 or bfloat16", seen=repr(precision), fix="use one of these")
    spec = TextSpec(
        model,
        site,
        corpus,
        held_out,
        work,
        max_tokens=max_tokens,
        dtype=cast("Dtype", dtype),
        device=device,
        stream=stream,
    )
    with progress_bars() as progress:
        text = open_text(spec, progress)
        config = RqaeTrainingConfig(
            dim=text.info.d_model,
            num_quantizers=quantizers,
            steps=steps,
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            init_tokens=init_tokens,
            precision=cast("Precision", precision),
            nested_depths=_numbers("--nested-depths", nested_depths),
            seed=seed,
        )
        digest = hashlib.blake2b(repr((config, spec)).encode(), digest_size=6).hexdigest()
        checkpoint = work / f"rqae-{quantizers}-{digest}.checkpoint"
        folder = train_rqae_dictionary(
            text,
            replace(config, checkpoint=checkpoint),
            out,
            command=_command(),
            device=usable_device(device),
            progress=progress,
        )
    checkpoint.unlink(missing_ok=True)
    sys.stdout.write(f"{folder}\n")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise BadConfig(
            option, expected="whole numbers separated by commas", seen=repr(text), fix="for example 16,64"
        ) from error


def _command() -> str:
    return shlex.join(["evalkit", *sys.argv[1:]])
