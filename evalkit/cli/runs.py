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
    PrependBos,
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
from evalkit.config import defaults

__all__ = ["register"]

# Defaults in the form in which they are written on the command line.
_DEPTHS, _FEATURES = ",".join(map(str, defaults.DEPTHS)), str(defaults.N_FEATURES)
_CONTROLS = ",".join(defaults.CONTROLS)
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
    corpus: Corpus = defaults.CORPUS,
    site: Site = None,
    format: Format = None,
    transform: Transform = None,
    revision: Revision = None,
    depths: Depths = _DEPTHS,
    density: Density = defaults.DENSITY,
    features: Features = _FEATURES,
    explainer: Explainers = None,
    judge: Judges = None,
    scorer: Scorers = None,
    repeats: Repeats = defaults.REPEATS,
    client: ClientOption = None,
    base_url: BaseUrl = None,
    client_option: ClientSettings = None,
    cache: Cache = None,
    prices: Prices = None,
    max_calls: MaxCalls = None,
    max_cost: MaxCost = None,
    preset: Preset = None,
    examples: Examples = defaults.N_EXPLAIN,
    explain_by: ExplainBy = defaults.EXPLAIN_BY,
    positives: Positives = defaults.N_POSITIVES,
    positives_by: PositivesBy = defaults.POSITIVES_BY,
    negatives: Negatives = defaults.N_NEGATIVES,
    controls: Controls = _CONTROLS,
    embedding_model: Embedding = None,
    seed: Seed = defaults.SEED,
    text_field: TextField = defaults.TEXT_FIELD,
    split: Split = defaults.SPLIT,
    max_tokens: MaxTokens = None,
    context_length: ContextLength = defaults.CONTEXT_LENGTH,
    prepend_bos: PrependBos = None,
    window_length: WindowLength = defaults.WINDOW_LENGTH,
    batch_size: BatchSize = defaults.BATCH_SIZE,
    dtype: Dtype = defaults.DTYPE,
    device: Device = defaults.DEVICE,
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
    STDERR.print(f"done; to see the results: evalkit table {place}; evalkit plot {place}", highlight=False)


def collect(
    context: typer.Context,
    dictionary: Dictionaries,
    out: Out,
    model: Model = None,
    corpus: Corpus = defaults.CORPUS,
    site: Site = None,
    format: Format = None,
    transform: Transform = None,
    revision: Revision = None,
    depths: Depths = _DEPTHS,
    density: Density = defaults.DENSITY,
    features: Features = _FEATURES,
    preset: Preset = None,
    examples: Examples = defaults.N_EXPLAIN,
    explain_by: ExplainBy = defaults.EXPLAIN_BY,
    positives: Positives = defaults.N_POSITIVES,
    positives_by: PositivesBy = defaults.POSITIVES_BY,
    negatives: Negatives = defaults.N_NEGATIVES,
    controls: Controls = _CONTROLS,
    seed: Seed = defaults.SEED,
    text_field: TextField = defaults.TEXT_FIELD,
    split: Split = defaults.SPLIT,
    max_tokens: MaxTokens = None,
    context_length: ContextLength = defaults.CONTEXT_LENGTH,
    prepend_bos: PrependBos = None,
    window_length: WindowLength = defaults.WINDOW_LENGTH,
    batch_size: BatchSize = defaults.BATCH_SIZE,
    dtype: Dtype = defaults.DTYPE,
    device: Device = defaults.DEVICE,
    force: Force = False,
) -> None:
    """Run only the first stage of `run`: find where the features fire and draw the examples.

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
    options["judge"] = []  # this stage runs explainers only
    _execute(config_of_folder(run, **options), run, ("explain",), dry_run=dry_run, as_json=as_json)


def score(
    run: Run,
    explainer: Explainers = None,
    judge: Judges = None,
    scorer: Scorers = None,
    repeats: Repeats = defaults.REPEATS,
    client: ClientOption = None,
    base_url: BaseUrl = None,
    client_option: ClientSettings = None,
    cache: Cache = None,
    prices: Prices = None,
    max_calls: MaxCalls = None,
    max_cost: MaxCost = None,
    device: Device = defaults.DEVICE,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Judge the explanations of a run.

    Example: `evalkit score runs/first --judge llm --client vllm:MODEL --scorer detection`
    """
    options = {key: value for key, value in locals().items() if key not in _NOT_CONFIGURED}
    options["explainer"] = explainer or []  # by default, all explainers whose explanations the run holds
    _execute(config_of_folder(run, **options), run, ("score",), dry_run=dry_run, as_json=as_json)


def _execute(config: Any, out: Path, stages: tuple[str, ...], *, dry_run: bool = False, as_json: bool = False) -> None:
    if dry_run:
        print_plan(config, out, as_json=as_json)
        return
    from evalkit.pipeline.stages import run as run_stages

    with progress_bars() as progress:
        run_stages(config, out, stages=stages, progress=progress)
    print_spending(out)
