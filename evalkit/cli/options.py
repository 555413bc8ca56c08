"""The options that several commands share, and their conversion to a ``RunConfig``. Knows no command."""

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
    "PrependBos",
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

_SCORED, _TEXT, _TEST, _SPEED = "Dictionaries and features", "Text", "Explanations and tests", "Execution and output"
_MODEL = "Language model for explainers and judges"

Model = Annotated[
    str | None,
    typer.Option(
        help="Subject model: a hub id, a folder, a .gguf file, or a name known to `evalkit models pull`. Not needed for "
        "dumps with ready examples.",
        envvar="EVALKIT_MODEL",
        rich_help_panel=_SCORED,
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Revision of a model and a corpus from the hub.", rich_help_panel=_SCORED)
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
        help="vllm:MODEL (vLLM in this process), openai:MODEL (an API or server), openai-batch:MODEL (a batch API: "
        "cheaper, answers within a day), replay:FILE (recorded answers), or a plug-in.",
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
        help="Option of the client, as KEY=VALUE, e.g. temperature=0.5, concurrency=16, requests_per_minute=500, "
        "tensor_parallel_size=2; repeat for several.",
        rich_help_panel=_MODEL,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(help="File of recorded answers that several runs share.", rich_help_panel=_MODEL),
]
Prices = Annotated[
    Path | None,
    typer.Option(
        help="TOML file with a model's prices for prompt and completion, in US dollars per million tokens.",
        rich_help_panel=_MODEL,
    ),
]
MaxCalls = Annotated[
    int | None, typer.Option(help="Stop before the run exceeds this number of requests.", rich_help_panel=_MODEL)
]
MaxCost = Annotated[
    float | None,
    typer.Option(help="Stop before the run exceeds this cost in US dollars; needs --prices.", rich_help_panel=_MODEL),
]
Site = Annotated[
    str | None,
    typer.Option(
        help="Site to read, e.g. layers.15; default: the site that the dictionary names.", rich_help_panel=_SCORED
    ),
]
Depths = Annotated[
    str, typer.Option(help="Depths of an RQAE, in quantizers, comma-separated.", rich_help_panel=_SCORED)
]
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
        help="Format of the dictionaries (see `evalkit plugins`); default: detected from the files.",
        rich_help_panel=_SCORED,
    ),
]
Transform = Annotated[
    str | None,
    typer.Option(
        help="Input transform, replaces the declared one: none, centre, scale:0.16, unit-norm, layer-norm, rms-norm.",
        rich_help_panel=_SCORED,
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Continue with dictionaries that fail the fit check; their results are marked.",
        rich_help_panel=_SPEED,
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
    str, typer.Option(help="Field that holds the text in jsonl, parquet and `datasets` corpora.", rich_help_panel=_TEXT)
]
Split = Annotated[str, typer.Option(help="Split of a `datasets` corpus.", rich_help_panel=_TEXT)]
MaxTokens = Annotated[
    int | None, typer.Option(help="Stop reading the corpus after this many tokens.", rich_help_panel=_TEXT)
]
ContextLength = Annotated[int, typer.Option(help="Tokens per context.", rich_help_panel=_TEXT)]
PrependBos = Annotated[
    bool | None,
    typer.Option(
        "--prepend-bos/--no-prepend-bos",
        help="Whether contexts begin with BOS; default: as the dictionary declares, else as the tokenizer does.",
        rich_help_panel=_TEXT,
    ),
]
WindowLength = Annotated[
    int, typer.Option(help="Tokens per window shown to explainers and judges.", rich_help_panel=_TEXT)
]
Examples = Annotated[int, typer.Option(help="Windows shown to the explainer, per feature.", rich_help_panel=_TEST)]
ExplainBy = Annotated[
    str,
    typer.Option(
        help="How active windows are chosen for the explainer: deciles (spread over activation deciles), top, random, "
        "importance (by squared activation), mixed (top and importance).",
        rich_help_panel=_TEST,
    ),
]
PositivesBy = Annotated[
    str, typer.Option(help="How active windows are chosen for tests; see --explain-by.", rich_help_panel=_TEST)
]
Repeats = Annotated[
    int,
    typer.Option(
        help="How many times a judge that uses a language model repeats each test, in a different order and with a "
        "different seed; with 2 or more, the table's footer splits the variance.",
        rich_help_panel=_TEST,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Published protocol that sets the options you leave out: delphi, saebench or paper. The table's footer "
        "lists its limitations.",
        rich_help_panel=_TEST,
    ),
]
Positives = Annotated[int, typer.Option(help="Active windows per feature and test.", rich_help_panel=_TEST)]
Negatives = Annotated[int, typer.Option(help="Inactive windows per feature.", rich_help_panel=_TEST)]
Controls = Annotated[
    str,
    typer.Option(help="Controls to run with the dictionaries, comma-separated; '' for none.", rich_help_panel=_TEST),
]
Seed = Annotated[int, typer.Option(help="Seed of all random choices.", rich_help_panel=_TEST)]
Embedding = Annotated[
    str | None, typer.Option(help="Embedding model of the embedding judge: folder or hub id.", rich_help_panel=_TEST)
]
BatchSize = Annotated[
    int, typer.Option(help="Contexts per forward pass; does not change the results.", rich_help_panel=_SPEED)
]
Dtype = Annotated[str, typer.Option(help="bfloat16 or float32.", rich_help_panel=_SPEED)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=_SPEED)]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the plan and stop: features, calls, tokens, cost.", rich_help_panel=_SPEED),
]
AsJson = Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON.", rich_help_panel=_SPEED)]

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
    """The configuration from the options of ``run`` or ``collect``. Raises BadConfig if an option is invalid.

    ``options``: all arguments of the command, including its context.
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
    """The options set on the command line or by an environment variable; a preset may set the others."""
    # Compared by name: recent Typer releases have their own parser, whose ParameterSource is not that of the package click.
    return {
        name: value
        for name, value in options.items()
        if getattr(context.get_parameter_source(name), "name", None) not in ("DEFAULT", "DEFAULT_MAP")
    }


def config_of_folder(run: Path, **options: Any) -> Any:
    """The configuration of an existing run, updated with ``options``.

    Raises MissingFile if the folder holds no run, and BadConfig if an option is invalid.
    """
    from evalkit.pipeline.stages import load_config

    return load_config(run, **_fields(options))


def _fields(options: dict[str, Any]) -> dict[str, Any]:
    """The given options as fields of ``RunConfig``; options that are None are left out."""
    from evalkit.registry import parse_option

    given = {_FIELDS.get(key, key): value for key, value in options.items() if value is not None}
    settings = dict(parse_option(text) for text in given.pop("client_option", ()))
    if urls := given.pop("base_url", None):
        settings["base_url"] = urls
    return {**given, "client_options": settings} if settings else given
