"""The options that several commands share, and how they become a configuration. Knows no command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "AsJson",
    "BaseUrl",
    "BatchSize",
    "Cache",
    "ClientOption",
    "ClientSettings",
    "ContextLength",
    "Controls",
    "Corpus",
    "Density",
    "Depths",
    "Device",
    "Dictionaries",
    "DryRun",
    "Dtype",
    "Embedding",
    "Examples",
    "ExplainBy",
    "Explainers",
    "Features",
    "Force",
    "Format",
    "Judges",
    "MaxCalls",
    "MaxCost",
    "MaxTokens",
    "Model",
    "Negatives",
    "Out",
    "Positives",
    "PositivesBy",
    "Preset",
    "Prices",
    "Repeats",
    "Revision",
    "Run",
    "Scorers",
    "Seed",
    "Site",
    "Split",
    "TextField",
    "Transform",
    "WindowLength",
    "config_of_folder",
    "config_of_run",
]

_SCORED, _TEXT, _TEST, _SPEED = "What is scored", "Text", "How it is tested", "Speed and place"
_MODEL = "Language model of LLM explainers and judges"

Model = Annotated[
    str | None,
    typer.Option(
        help="Subject model: a hub id, a folder, a .gguf file, or a name known to `evalkit models pull`. Needed unless the "
        "dictionaries are dumps with ready examples.",
        envvar="EVALKIT_MODEL",
        rich_help_panel=_SCORED,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Revision of what comes from a hub: model and corpus.", rich_help_panel=_SCORED)
]
Dictionaries = Annotated[
    list[str],
    typer.Option(
        "--dictionary",
        "-d",
        help="Dictionary: a folder or file, a hub id (OWNER/NAME/FOLDER), gemma-scope:2b/layer_12/width_16k/*, "
        "saelens:RELEASE/ID, or bundled:NAME; globs allowed. Repeat for several.",
        rich_help_panel=_SCORED,
    ),
]
Out = Annotated[Path, typer.Option(help="Run folder; an unfinished run is resumed.", rich_help_panel=_SPEED)]
Run = Annotated[Path, typer.Argument(help="Run folder.")]
Explainers = Annotated[
    list[str] | None, typer.Option("--explainer", help="Explainer; repeat for several.", rich_help_panel=_TEST)
]
Judges = Annotated[list[str] | None, typer.Option("--judge", help="Judge; repeat for several.", rich_help_panel=_TEST)]
Scorers = Annotated[
    list[str] | None, typer.Option("--scorer", help="Scorer; repeat for several.", rich_help_panel=_TEST)
]
ClientOption = Annotated[
    str | None,
    typer.Option(
        help="vllm:MODEL (in this process), openai:MODEL (an API or server), openai-batch:MODEL (the same within a day, "
        "cheaper), replay:FILE (recorded answers), or a plug-in.",
        rich_help_panel=_MODEL,
    ),
]
BaseUrl = Annotated[
    list[str] | None,
    typer.Option(
        "--base-url", help="URL of an OpenAI-compatible server, with /v1; repeat for several.", rich_help_panel=_MODEL
    ),
]
ClientSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--client-option",
        help="KEY=VALUE of the client, e.g. temperature=0.5, concurrency=16, requests_per_minute=500, "
        "tensor_parallel_size=2; repeat for several.",
        rich_help_panel=_MODEL,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(help="File of recorded answers that is shared with other runs.", rich_help_panel=_MODEL),
]
Prices = Annotated[
    Path | None,
    typer.Option(
        help="TOML file: per model, prompt and completion in US dollars per million tokens.", rich_help_panel=_MODEL
    ),
]
MaxCalls = Annotated[
    int | None, typer.Option(help="Stop before the run has sent more requests than this.", rich_help_panel=_MODEL)
]
MaxCost = Annotated[
    float | None,
    typer.Option(
        help="Stop before the run has cost more than this, in US dollars; needs --prices.", rich_help_panel=_MODEL
    ),
]
Site = Annotated[
    str | None,
    typer.Option(help="Site to read, e.g. layers.15; default: what the dictionary says.", rich_help_panel=_SCORED),
]
Depths = Annotated[str, typer.Option(help="RQAE depths, in quantizers, comma-separated.", rich_help_panel=_SCORED)]
Density = Annotated[
    float, typer.Option(help="Share of tokens on which an RQAE feature counts as active.", rich_help_panel=_SCORED)
]
Features = Annotated[
    str,
    typer.Option(
        help="Features per dictionary: 50 (at random among those that fire), ids:0-99,512, file:IDS.txt, or "
        "density:1e-4..1e-2:50.",
        rich_help_panel=_SCORED,
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        help="Format of the dictionaries (see `evalkit plugins`); default: told by the files.", rich_help_panel=_SCORED
    ),
]
Transform = Annotated[
    str | None,
    typer.Option(
        help="Input transform instead of the declared one: none, centre, scale:0.16, unit-norm, layer-norm, rms-norm.",
        rich_help_panel=_SCORED,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force", help="Go on where the fit check refuses a dictionary; results are marked.", rich_help_panel=_SPEED
    ),
]
Corpus = Annotated[
    str,
    typer.Option(
        help="Text (txt, jsonl, parquet, folder, `datasets` id), a token matrix (npy, pt, safetensors), or bundled:demo.",
        rich_help_panel=_TEXT,
    ),
]
TextField = Annotated[
    str, typer.Option(help="Field of the text in jsonl, parquet and datasets.", rich_help_panel=_TEXT)
]
Split = Annotated[str, typer.Option(help="Split of a `datasets` corpus.", rich_help_panel=_TEXT)]
MaxTokens = Annotated[
    int | None, typer.Option(help="Stop reading the corpus after so many tokens.", rich_help_panel=_TEXT)
]
ContextLength = Annotated[int, typer.Option(help="Tokens per context.", rich_help_panel=_TEXT)]
WindowLength = Annotated[
    int, typer.Option(help="Tokens per window shown to explainer and judge.", rich_help_panel=_TEXT)
]
Examples = Annotated[int, typer.Option(help="Windows shown to the explainer, per feature.", rich_help_panel=_TEST)]
ExplainBy = Annotated[
    str,
    typer.Option(
        help="Active windows to show: deciles (spread over activation deciles), top, random, importance (by squared "
        "activation), mixed (top and importance).",
        rich_help_panel=_TEST,
    ),
]
PositivesBy = Annotated[str, typer.Option(help="Active windows to test: as for --explain-by.", rich_help_panel=_TEST)]
Repeats = Annotated[
    int,
    typer.Option(
        help="Times that a judge which asks a language model is asked, each in another order and with another seed; from 2 "
        "on the table splits the variance.",
        rich_help_panel=_TEST,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Test as others do, where options are not given: delphi, saebench or paper. The table says what is wrong "
        "with it.",
        rich_help_panel=_TEST,
    ),
]
Positives = Annotated[int, typer.Option(help="Active windows per feature and test.", rich_help_panel=_TEST)]
Negatives = Annotated[int, typer.Option(help="Inactive windows per feature.", rich_help_panel=_TEST)]
Controls = Annotated[
    str,
    typer.Option(help="Controls to run beside the dictionaries, comma-separated; '' for none.", rich_help_panel=_TEST),
]
Seed = Annotated[int, typer.Option(help="Seed of every draw.", rich_help_panel=_TEST)]
Embedding = Annotated[
    str | None, typer.Option(help="Embedding model of the embedding judge: folder or hub id.", rich_help_panel=_TEST)
]
BatchSize = Annotated[int, typer.Option(help="Contexts per forward pass; changes no result.", rich_help_panel=_SPEED)]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.", rich_help_panel=_SPEED)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=_SPEED)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Say what would be done: features, calls, tokens, cost.", rich_help_panel=_SPEED),
]
AsJson = Annotated[bool, typer.Option("--json", help="With --dry-run: as JSON.", rich_help_panel=_SPEED)]

_FIELDS = {
    "dictionary": "dictionaries",
    "examples": "n_explain",
    "positives": "n_positives",
    "negatives": "n_negatives",
    "explainer": "explainers",
    "judge": "judges",
    "scorer": "scorers",
}


def config_of_run(options: dict[str, Any]) -> Any:
    """The configuration that the options of ``run`` or ``collect`` give. Raises BadConfig.

    ``options``: all arguments of the command, its context among them.
    """
    from evalkit.config.feature_selection import parse_features
    from evalkit.config.run_config import RunConfig

    context = options["context"]
    options = {name: value for name, value in options.items() if name != "context"}
    if options.get("preset") is not None:
        options = _given(options, context)
    wanted = _fields({key: value for key, value in options.items() if key not in ("out", "dry_run", "as_json")})
    wanted["dictionaries"] = [path.rstrip("/") or path for path in wanted["dictionaries"]]
    if "features" in wanted:
        wanted |= parse_features(wanted.pop("features")).fields()
    for name in ("depths", "controls"):
        if name in wanted:
            wanted[name] = tuple(part.strip() for part in wanted[name].split(",") if part.strip())
    return RunConfig.create(**wanted)


def _given(options: dict[str, Any], context: typer.Context) -> dict[str, Any]:
    """The options set on the command line or by an environment variable; a preset decides about the others."""
    # by name: recent Typer releases bring their own parser, whose sources are not those of the package click
    return {
        name: value
        for name, value in options.items()
        if getattr(context.get_parameter_source(name), "name", None) not in ("DEFAULT", "DEFAULT_MAP")
    }


def config_of_folder(run: Path, **options: Any) -> Any:
    """The configuration of an existing run, with what the options change. Raises MissingFile, BadConfig."""
    from evalkit.pipeline.stages import load_config

    return load_config(run, **_fields(options))


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    """Options as fields of the configuration; those that were not given are left to its defaults."""
    from evalkit.registry import parse_option

    given = {_FIELDS.get(key, key): value for key, value in options.items() if value is not None}
    settings = dict(parse_option(text) for text in given.pop("client_option", ()))
    if urls := given.pop("base_url", None):
        settings["base_url"] = urls
    return {**given, "client_options": settings} if settings else given
