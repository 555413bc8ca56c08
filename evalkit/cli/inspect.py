"""``evalkit inspect``: measures a dictionary over a corpus; prints tables and draws figures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from evalkit.cli.console import STDERR, progress_bars
from evalkit.cli.options import ContextLength, Corpus, Device, Dtype, PrependBos, Split, TextField
from evalkit.config import defaults
from evalkit.errors import require

__all__ = ["register"]

_WHAT, _TEXT = "Dictionary and measurements", "Text"


def register(app: typer.Typer) -> None:
    """Add this module's command."""
    app.command(rich_help_panel="Inspect and check")(inspect)


def inspect(
    dictionary: Annotated[
        str, typer.Argument(metavar="DICTIONARY", help="A dictionary of any format: a file, a folder, or bundled:NAME.")
    ],
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Parts to measure, comma-separated. RQAE: prefixes, cosines, layers, fit, ranks, and sae with --sae. "
            "SAE: fit, density, geometry, loss. Transcoder: fit, density, geometry. Plain directions: geometry. Export of "
            "examples: density. Default: all but loss, which runs the whole model; `all` includes loss.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    sae: Annotated[
        str | None,
        typer.Option(
            help="SAE at the RQAE's site; its latents are compared with RQAE features.", rich_help_panel=_WHAT
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Subject model, as for `evalkit run`; default: the model that the dictionary names.",
            envvar="EVALKIT_MODEL",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(help="Site to read; default: the site that the dictionary names.", rich_help_panel=_WHAT),
    ] = None,
    format_name: Annotated[
        str | None,
        typer.Option(help="Format of the dictionary; default: detected from its files.", rich_help_panel=_WHAT),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Revision of a model and a corpus from the hub.", rich_help_panel=_WHAT)
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(
            help="Depths of an RQAE, comma-separated; default: 1,2,3,4,8,16,64,256,1024 up to the full depth.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    features: Annotated[
        int, typer.Option(help="Number of features in `ranks` and of latents in `sae`.", rich_help_panel=_WHAT)
    ] = 50,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.", rich_help_panel=_WHAT)] = 0,
    corpus: Corpus = defaults.CORPUS,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the corpus to use.", rich_help_panel=_TEXT)] = 100_000,
    fit_tokens: Annotated[
        int, typer.Option(help="Tokens on which FVU, densities and losses are measured.", rich_help_panel=_TEXT)
    ] = 8192,
    text_field: TextField = defaults.TEXT_FIELD,
    split: Split = defaults.SPLIT,
    context_length: ContextLength = defaults.CONTEXT_LENGTH,
    prepend_bos: PrependBos = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for codes, tables and figures; default: runs/inspect-NAME.",
            rich_help_panel="Execution and output",
        ),
    ] = None,
    dtype: Dtype = defaults.DTYPE,
    device: Device = "auto",
    format: Annotated[str, typer.Option("--format", "-f", help="markdown, csv or json.")] = "markdown",
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
) -> None:
    """Measure a dictionary over a corpus.

    RQAE: code prefixes, cosines, layer weights, fit and loss, ranks, and a comparison with an SAE's latents. SAE or
    transcoder: L0, FVU, shrinkage, how often latents fire, and the nearest neighbours of decoder rows; for an SAE also the
    rise in next-token loss. Plain directions: their nearest neighbours. Export of examples: how often its features fire.
    Tables go to stdout, figures to OUT/plots. Results are saved in OUT and reused when the options are the same.

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
        prepend_bos=prepend_bos,
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
