"""``evalkit inspect``: tables and figures about a dictionary over a corpus."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from evalkit.cli.console import STDERR, progress_bars
from evalkit.cli.options import ContextLength, Corpus, Device, Dtype, Split, TextField
from evalkit.config import defaults
from evalkit.errors import require

__all__ = ["register"]

_WHAT, _TEXT = "What is measured", "Text"


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command(rich_help_panel="Look around")(inspect)


def inspect(
    dictionary: Annotated[
        str, typer.Argument(metavar="DICTIONARY", help="A dictionary of any format: a file, a folder, or bundled:NAME.")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Part, several with commas. Of an RQAE: prefixes, cosines, layers, fit, ranks, sae. Of an SAE or "
            "transcoder: fit, density, geometry; of an SAE also loss, which runs the whole model and must be named. Of "
            "plain directions: geometry; of an export of examples: density. Default: all others. all: every one.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    sae: Annotated[
        str | None,
        typer.Option(help="SAE of an RQAE's site, to look for its latents.", rich_help_panel=_WHAT),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Subject model, as for `evalkit run`; default: what the dictionary says.",
            envvar="EVALKIT_MODEL",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    site: Annotated[
        str | None, typer.Option(help="Site to read; default: what the dictionary says.", rich_help_panel=_WHAT)
    ] = None,
    format_name: Annotated[
        str | None,
        typer.Option(help="Format of the dictionary, where its files do not tell.", rich_help_panel=_WHAT),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Revision of what comes from a hub: model and corpus.", rich_help_panel=_WHAT)
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(
            help="Depths of an RQAE, comma-separated; default: 1,2,3,4,8,16,64,256,1024.", rich_help_panel=_WHAT
        ),
    ] = None,
    features: Annotated[
        int, typer.Option(help="Token features of `ranks`, latents of `sae`.", rich_help_panel=_WHAT)
    ] = 50,
    seed: Annotated[int, typer.Option(help="Seed of every draw.", rich_help_panel=_WHAT)] = 0,
    corpus: Corpus = defaults.CORPUS,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the corpus to encode.", rich_help_panel=_TEXT)] = 100_000,
    fit_tokens: Annotated[
        int, typer.Option(help="Tokens that FVU, densities and losses are measured on.", rich_help_panel=_TEXT)
    ] = 8192,
    text_field: TextField = defaults.TEXT_FIELD,
    split: Split = defaults.SPLIT,
    context_length: ContextLength = defaults.CONTEXT_LENGTH,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of codes, tables and figures; default: runs/inspect-NAME.", rich_help_panel="Speed and place"
        ),
    ] = None,
    dtype: Dtype = defaults.DTYPE,
    device: Device = "auto",
    format: Annotated[str, typer.Option("--format", "-f", help="markdown, csv or json.")] = "markdown",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Measure a dictionary over a corpus.

    An RQAE: code prefixes, cosines, layer weights, fit and loss, ranks, an SAE's latents. An SAE or transcoder: L0, FVU,
    shrinkage, how often latents fire, how close decoder rows lie, and what the language model loses with an SAE in place.
    Plain directions: how close they lie. An export of examples: how often its features fire.
    Tables go to stdout, figures to OUT/plots. Nothing is computed twice: with the same options they come from OUT.

    Example: `evalkit inspect bundled:rqae-256 --sae bundled:sae/layer_15/width_2k/average_l0_32`
    """
    for module in ("torch", "transformers", "safetensors"):
        require(module, "model")
    from evalkit.inspection.figures import draw_parts
    from evalkit.inspection.inspect import inspect_dictionary
    from evalkit.inspection.parts.settings import Settings, parse_depths
    from evalkit.inspection.tables import check_format, render_inspection

    shown = check_format("json" if as_json else format)
    settings = Settings(
        dictionary=dictionary.rstrip("/") or dictionary,
        model=model,
        corpus=corpus,
        site=site,
        sae=sae,
        format_name=format_name,
        max_tokens=max_tokens,
        fit_tokens=fit_tokens,
        context_length=context_length,
        text_field=text_field,
        split=split,
        revision=revision,
        features=features,
        depths=parse_depths(depths),
        seed=seed,
        dtype=dtype,
        device=device,
    )
    with progress_bars() as progress:
        found = inspect_dictionary(settings, out, only or (), progress)
    paths = draw_parts(found.about, found.parts, found.folder / "plots")
    sys.stdout.write(render_inspection(found.about, found.parts, shown))
    sys.stdout.flush()
    names = ", ".join(path.name for path in paths if path.suffix == ".png")
    STDERR.print(f"figures in {found.folder / 'plots'}: {names}", highlight=False)
