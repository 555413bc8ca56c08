"""``evalkit run``, ``collect``, ``explain`` and ``score``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer

from evalkit.cli.console import STDERR, progress_bars
from evalkit.cli.options import (
    AsJson,
    BaseUrl,
    BatchSize,
    Cache,
    ClientOption,
    ClientSettings,
    ContextLength,
    Controls,
    Corpus,
    Density,
    Depths,
    Device,
    Dictionaries,
    DryRun,
    Dtype,
    Embedding,
    Examples,
    ExplainBy,
    Explainers,
    Features,
    Force,
    Format,
    Judges,
    MaxCalls,
    MaxCost,
    MaxTokens,
    Model,
    Negatives,
    Out,
    Positives,
    PositivesBy,
    Preset,
    Prices,
    Repeats,
    Revision,
    Run,
    Scorers,
    Seed,
    Site,
    Split,
    TextField,
    Transform,
    WindowLength,
    config_of_folder,
    config_of_run,
)
from evalkit.cli.plan import print_plan, print_spending

__all__ = ["register"]

_NOT_CONFIGURED = ("run", "dry_run", "as_json")


def register(app: typer.Typer) -> None:
    """Add this module's commands."""
    app.command(rich_help_panel="Score")(run)
    app.command(rich_help_panel="Score")(collect)
    app.command(rich_help_panel="Score")(explain)
    app.command(rich_help_panel="Score")(score)


def run(
    context: typer.Context,
    dictionary: Dictionaries,
    out: Out,
    model: Model = None,
    corpus: Corpus = "bundled:demo",
    site: Site = None,
    format: Format = None,
    transform: Transform = None,
    revision: Revision = None,
    depths: Depths = "16,64,256",
    density: Density = 0.01,
    features: Features = "50",
    explainer: Explainers = None,
    judge: Judges = None,
    scorer: Scorers = None,
    repeats: Repeats = 1,
    client: ClientOption = None,
    base_url: BaseUrl = None,
    client_option: ClientSettings = None,
    cache: Cache = None,
    prices: Prices = None,
    max_calls: MaxCalls = None,
    max_cost: MaxCost = None,
    preset: Preset = None,
    examples: Examples = 40,
    explain_by: ExplainBy = "deciles",
    positives: Positives = 50,
    positives_by: PositivesBy = "deciles",
    negatives: Negatives = 50,
    controls: Controls = "shuffled,random-directions,random-codes,planted,permuted,lexical",
    embedding_model: Embedding = None,
    seed: Seed = 0,
    text_field: TextField = "text",
    split: Split = "train",
    max_tokens: MaxTokens = None,
    context_length: ContextLength = 128,
    window_length: WindowLength = 32,
    batch_size: BatchSize = 16,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    force: Force = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Score feature dictionaries: collect examples, explain the features, judge the explanations.

    Example: `evalkit run --model smollm2-135m -d bundled:rqae-256 -d my_sae/ --out runs/first`
    """
    _execute(config_of_run(locals()), out, ("collect", "explain", "score"), dry_run=dry_run, as_json=as_json)
    if dry_run:
        return
    place = shlex.quote(str(out))
    STDERR.print(f"done: evalkit table {place}   evalkit plot {place}", highlight=False)


def collect(
    context: typer.Context,
    dictionary: Dictionaries,
    out: Out,
    model: Model = None,
    corpus: Corpus = "bundled:demo",
    site: Site = None,
    format: Format = None,
    transform: Transform = None,
    revision: Revision = None,
    depths: Depths = "16,64,256",
    density: Density = 0.01,
    features: Features = "50",
    preset: Preset = None,
    examples: Examples = 40,
    explain_by: ExplainBy = "deciles",
    positives: Positives = 50,
    positives_by: PositivesBy = "deciles",
    negatives: Negatives = 50,
    controls: Controls = "shuffled,random-directions,random-codes,planted,permuted,lexical",
    seed: Seed = 0,
    text_field: TextField = "text",
    split: Split = "train",
    max_tokens: MaxTokens = None,
    context_length: ContextLength = 128,
    window_length: WindowLength = 32,
    batch_size: BatchSize = 16,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Only the first stage of `run`: find where the features fire and draw the examples.

    Example: `evalkit collect --model smollm2-135m -d bundled:rqae-256 --out runs/first`
    """
    _execute(config_of_run(locals()), out, ("collect",))


def explain(
    run: Run,
    explainer: Explainers = None,
    client: ClientOption = None,
    base_url: BaseUrl = None,
    client_option: ClientSettings = None,
    cache: Cache = None,
    prices: Prices = None,
    max_calls: MaxCalls = None,
    max_cost: MaxCost = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Describe the features of a collected run.

    Example: `evalkit explain runs/first --explainer default --client openai:MODEL --base-url http://localhost:8000/v1`
    """
    options = {key: value for key, value in locals().items() if key not in _NOT_CONFIGURED}
    options["judge"] = []  # only the explainer is asked
    _execute(config_of_folder(run, **options), run, ("explain",), dry_run=dry_run, as_json=as_json)


def score(
    run: Run,
    explainer: Explainers = None,
    judge: Judges = None,
    scorer: Scorers = None,
    repeats: Repeats = 1,
    client: ClientOption = None,
    base_url: BaseUrl = None,
    client_option: ClientSettings = None,
    cache: Cache = None,
    prices: Prices = None,
    max_calls: MaxCalls = None,
    max_cost: MaxCost = None,
    device: Device = "auto",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Judge the explanations of a run.

    Example: `evalkit score runs/first --judge llm --client vllm:MODEL --scorer detection`
    """
    options = {key: value for key, value in locals().items() if key not in _NOT_CONFIGURED}
    options["explainer"] = explainer or []  # none named: all that there are explanations of
    _execute(config_of_folder(run, **options), run, ("score",), dry_run=dry_run, as_json=as_json)


def _execute(config: Any, out: Path, stages: tuple[str, ...], *, dry_run: bool = False, as_json: bool = False) -> None:
    if dry_run:
        print_plan(config, out, as_json=as_json)
        return
    from evalkit.pipeline.stages import run as run_stages

    with progress_bars() as progress:
        run_stages(config, out, stages=stages, progress=progress)
    print_spending(out)
