"""The command line: thin Typer commands over the library.

Data goes to stdout, progress and logs to stderr. An ``EvalkitError`` becomes one line on stderr and exit code 2;
``--debug`` shows the traceback. Heavy imports happen inside the commands, so that ``evalkit --help`` is fast.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from evalkit.cli import doctor, export, inspect, models, plugins, report, runs, sweep, train
from evalkit.cli.console import STDERR
from evalkit.errors import EvalkitError

__all__ = ["app", "main"]

app = typer.Typer(
    name="evalkit",
    help="Measure how interpretable the features of a language model's dictionaries are, with standard errors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"auto_envvar_prefix": "EVALKIT", "help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from evalkit import __version__

        sys.stdout.write(f"evalkit {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress bars; log warnings only.")] = False,
) -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    STDERR.quiet = quiet
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    for package in ("evalkit", "explainers", "scorers", "rqae"):
        logging.getLogger(package).setLevel(level)


runs.register(app)
sweep.register(app)
report.register(app)
export.register(app)
inspect.register(app)
plugins.register(app)
doctor.register(app)
app.add_typer(models.app, name="models")
app.add_typer(train.app, name="train")


def main() -> None:
    """Entry point of the ``evalkit`` command."""
    debug = "--debug" in sys.argv
    try:
        app()
    except EvalkitError as error:
        if debug:
            raise
        _one_line(error)
        sys.exit(2)
    except ExceptionGroup as group:
        first = _first_error(group)
        if debug or first is None:
            raise
        _one_line(first)
        sys.exit(2)


def _one_line(error: EvalkitError) -> None:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")


def _first_error(group: ExceptionGroup[Exception]) -> EvalkitError | None:
    for error in group.exceptions:
        found = _first_error(error) if isinstance(error, ExceptionGroup) else error
        if isinstance(found, EvalkitError):
            return found
    return None
