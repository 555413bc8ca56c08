"""``evalkit train sae`` and ``evalkit train rqae``: a dictionary of one site of a subject model, from text."""

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

app = typer.Typer(help="Train a dictionary of one site of a subject model.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="Subject model: hub id, folder or .gguf file.", envvar="EVALKIT_MODEL")]
Site = Annotated[str, typer.Option(help="Site to read, e.g. layers.15: the residual stream after block 15.")]
Corpus = Annotated[str, typer.Option(help="Training text, as for `evalkit run`.")]
HeldOut = Annotated[str, typer.Option(help="Text of other documents, to measure on.")]
Work = Annotated[Path, typer.Option(help="Folder of the hidden states; dictionaries of one site may share it.")]
Tokens = Annotated[int | None, typer.Option(help="Distinct tokens to collect at most.")]
Seed = Annotated[int, typer.Option(help="Seed of initialisation and order.")]
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
    width: Annotated[int, typer.Option(help="Latents.")] = 2048,
    l0: Annotated[float, typer.Option(help="Active latents per token wanted.")] = 32.0,
    max_tokens: Tokens = None,
    train_tokens: Annotated[int, typer.Option(help="Tokens to train on, repeats counted.")] = 4_000_000,
    seed: Seed = 0,
    dtype: DtypeName = "bfloat16",
    device: Device = "auto",
) -> None:
    """Train a batch-top-k SAE, stored as JumpReLU in Gemma Scope's layout with a card; prints its folder.

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
    quantizers: Annotated[int, typer.Option(help="Quantizers.")] = 256,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 2000,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="Peak rate, relative to the size of the weights.")] = 2e-2,
    init_tokens: Annotated[int, typer.Option(help="Tokens that the start is fitted on, and shuffled among.")] = 65_536,
    precision: Annotated[
        str, typer.Option(help="Of the gradients: float32, or bfloat16 where that is faster.")
    ] = "float32",
    nested_depths: Annotated[
        str, typer.Option(help="Depths whose reconstructions count too, e.g. 16,64: for use cut at these.")
    ] = "",
    stream: Annotated[
        bool, typer.Option("--stream", help="Keep no hidden states on disk; resuming computes them again.")
    ] = False,
    max_tokens: Tokens = None,
    seed: Seed = 0,
    dtype: DtypeName = "bfloat16",
    device: Device = "auto",
) -> None:
    """Train an RQAE on final-normed hidden states, in upstream's checkpoint layout; prints its folder.

    All quantizers together, straight through, the residual detached. Beside the weights: a card (FVU by depth, loss of the
    language model, codes in use, all on held-out text) and a plot of the training. The same command resumes after a stop.

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
            option, expected="numbers with commas", seen=repr(text), fix="write for example 16,64"
        ) from error


def _command() -> str:
    return shlex.join(["evalkit", *sys.argv[1:]])
