"""All errors that users can get. Every message says what was expected, what was seen, and how to fix it.

Does not know the rest of the package. The command line prints an ``EvalkitError`` as one line and exits with code 2;
library callers catch the branch of the tree that they can handle.

    EvalkitError
    ├── InputError            invalid input: a file, an option, text or a feature
    │   ├── MissingFile       a path that does not exist
    │   ├── BadFile           a file that cannot be read in its format
    │   │   └── DamagedFile   a file of a run that does not hold what was written to it
    │   ├── BadShape          a tensor with an unexpected shape or dtype
    │   ├── BadConfig         an invalid option or TOML key, or an invalid combination of options
    │   ├── CorpusError       a corpus that is empty, too short, or whose tokens do not fit the model
    │   └── UnknownFeature    a feature id that is not in the dictionary
    ├── SiteMismatch          a dictionary used with a subject model or site on which it was not trained
    ├── RunMismatch           a run folder with a run of another configuration
    ├── RunLocked             a run folder to which another process is writing
    ├── PluginError           an unknown or broken plug-in
    ├── MissingExtra          an optional dependency that is not installed
    ├── ClientError           a language-model client that cannot answer
    │   ├── NotRecorded       a request that the replay client has no answer for
    │   ├── ContextOverflow   a prompt that does not fit the model's context
    │   ├── RequestRefused    a request that the server rejects; a retry would get the same error
    │   ├── NoAnswer          a request without an answer after all retries
    │   └── ClientDown        a model that answers no request: not running, wrong key or wrong name
    ├── BudgetSpent           the next request would exceed --max-calls or --max-cost
    ├── StageFailed           a stage in which every feature failed
    └── StorageError          a disk that is full or not writable
"""

from __future__ import annotations

import importlib
import json
from types import ModuleType

from evalkit.installation import install_command

__all__ = [
    "BadConfig",
    "BadFile",
    "BadShape",
    "BudgetSpent",
    "ClientDown",
    "ClientError",
    "ContextOverflow",
    "CorpusError",
    "DamagedFile",
    "EvalkitError",
    "InputError",
    "MissingExtra",
    "MissingFile",
    "NoAnswer",
    "NotRecorded",
    "PluginError",
    "RequestRefused",
    "RunLocked",
    "RunMismatch",
    "SiteMismatch",
    "StageFailed",
    "StorageError",
    "UnknownFeature",
    "json_problem",
    "require",
]


class EvalkitError(Exception):
    """Base class of all errors. ``subject``: the file, feature or option that the message is about."""

    def __init__(self, subject: str, *, expected: str, seen: str, fix: str) -> None:
        self.subject, self.expected, self.seen, self.fix = subject, expected, seen, fix
        super().__init__(f"{subject}: expected {expected}; seen {seen}; fix: {fix}")


class InputError(EvalkitError):
    """Invalid input: a file, an option, text or a feature."""


class MissingFile(InputError):
    """A path that does not exist."""


class BadFile(InputError):
    """A file that cannot be read in its format."""


class DamagedFile(BadFile):
    """A file of a run that does not hold what was written to it. It ends the stage that meets it."""


class BadShape(InputError):
    """A tensor with an unexpected shape or dtype."""


class BadConfig(InputError):
    """An invalid option or TOML key, or an invalid combination of options."""


class CorpusError(InputError):
    """A corpus that is empty, too short, or whose tokens do not fit the subject model."""


class UnknownFeature(InputError):
    """A feature id that is not in the dictionary."""


class SiteMismatch(EvalkitError):
    """A dictionary used with a subject model or site on which it was not trained."""


class RunMismatch(EvalkitError):
    """A run folder with a run of another configuration."""


class RunLocked(EvalkitError):
    """A run folder to which another process is writing."""


class PluginError(EvalkitError):
    """An unknown or broken plug-in."""


class MissingExtra(EvalkitError):
    """An optional dependency that is not installed."""


class ClientError(EvalkitError):
    """A language-model client that cannot answer."""


class NotRecorded(ClientError):
    """A request that the replay client has no recorded answer for."""


class ContextOverflow(ClientError):
    """A prompt that does not fit the model's context.

    ``limit``: the model's context in tokens, if known.
    ``needed``: tokens that the prompt and the reply need, if known.
    """

    def __init__(self, subject: str, *, limit: int | None, needed: int | None, fix: str) -> None:
        self.limit, self.needed = limit, needed
        super().__init__(
            subject,
            expected=f"prompt and reply within the model's context of {limit or '?'} tokens",
            seen=f"{needed or 'more'} tokens",
            fix=fix,
        )


class RequestRefused(ClientError):
    """A request that the server rejects; a retry would get the same error."""


class NoAnswer(ClientError):
    """A request without an answer after all retries. Other requests may have been answered."""


class ClientDown(ClientError):
    """A model that answers no request: it is not running, or the key or the name is wrong."""


class BudgetSpent(EvalkitError):
    """The next request would exceed the limit on calls or cost. Answers received so far are kept."""


class StageFailed(EvalkitError):
    """A stage in which every feature failed."""


class StorageError(EvalkitError):
    """A disk that is full or not writable."""


def json_problem(error: Exception) -> str:
    """Why a JSON file could not be read, in plain words; the text of other errors, cut to 200 characters."""
    match error:
        case json.JSONDecodeError():
            return f"invalid JSON (line {error.lineno}, column {error.colno})"
        case UnicodeDecodeError():
            return "text that is not UTF-8"
        case RecursionError():
            return "JSON that is nested too deeply"
        case OSError():
            return error.strerror or str(error)
        case KeyError():
            return f"no key {error}"
        case ValueError() if "digits" in str(error):
            return "a number with too many digits"
        case TypeError() | AttributeError():
            return "JSON of another structure"
    return str(error)[:200]


def require(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency.

    Raises MissingExtra, with the command that installs the dependency, if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingExtra(
            module,
            expected=f"the package {module!r} to be installed",
            seen="no such package",
            fix=install_command(extra),
        ) from error
