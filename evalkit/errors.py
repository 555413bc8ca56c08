"""Every error a user can meet, and the one way to word it: expected, seen, fix.

Knows nothing of the rest of the package. The command line turns an ``EvalkitError`` into one line and exit code 2;
library callers catch the branch they care about.

    EvalkitError
    ├── InputError            what the user pointed at is not what it should be
    │   ├── MissingFile       a path that is not there
    │   ├── BadFile           a file that cannot be read as what it claims to be
    │   ├── BadShape          a tensor whose shape or dtype is not the expected one
    │   ├── BadConfig         an option, a TOML key or a combination of them
    │   ├── CorpusError       an empty corpus, one too short, one whose tokens do not fit the model
    │   └── UnknownFeature    a feature id outside the dictionary
    ├── SiteMismatch          a dictionary bound to a subject model or site it was not trained on
    ├── RunMismatch           a run folder that holds a run of another configuration
    ├── RunLocked             a run folder that another process is writing
    ├── PluginError           a plug-in that is unknown or broken
    ├── MissingExtra          an optional dependency that is not installed
    ├── ClientError           a language-model client that cannot answer
    │   ├── NotRecorded       a request that the replay client has no answer for
    │   ├── ContextOverflow   a prompt that does not fit the model's context
    │   ├── RequestRefused    a request that is answered with the same error however often it is sent
    │   ├── NoAnswer          a request that got no answer in spite of every retry
    │   └── ClientDown        a model that answers nobody: gone, not started, wrong key, wrong name
    ├── BudgetSpent           the next request would go over --max-calls or --max-cost
    ├── StageFailed           a stage in which every feature failed
    └── StorageError          a disk that is full or not writable
"""

from __future__ import annotations

import importlib
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
    "require",
]


class EvalkitError(Exception):
    """Base of the tree. ``subject`` is the file, feature or option the message is about."""

    def __init__(self, subject: str, *, expected: str, seen: str, fix: str) -> None:
        self.subject, self.expected, self.seen, self.fix = subject, expected, seen, fix
        super().__init__(f"{subject}: expected {expected}; seen {seen}; fix: {fix}")


class InputError(EvalkitError):
    """What the user pointed at is not what it should be."""


class MissingFile(InputError):
    """A path that is not there."""


class BadFile(InputError):
    """A file that cannot be read as what it claims to be."""


class BadShape(InputError):
    """A tensor whose shape or dtype is not the expected one."""


class BadConfig(InputError):
    """An option, a TOML key, or a combination of them."""


class CorpusError(InputError):
    """A corpus that is empty, too short, or whose tokens do not fit the subject model."""


class UnknownFeature(InputError):
    """A feature id outside the dictionary."""


class SiteMismatch(EvalkitError):
    """A dictionary bound to a subject model or site that it was not trained on."""


class RunMismatch(EvalkitError):
    """A run folder that holds a run of another configuration."""


class RunLocked(EvalkitError):
    """A run folder that another process is writing."""


class PluginError(EvalkitError):
    """A plug-in that is unknown or broken."""


class MissingExtra(EvalkitError):
    """An optional dependency that is not installed."""


class ClientError(EvalkitError):
    """A language-model client that cannot answer."""


class NotRecorded(ClientError):
    """A request that the replay client has no recorded answer for."""


class ContextOverflow(ClientError):
    """A prompt that does not fit. ``limit`` is the model's context in tokens, ``needed`` what it would take, if known."""

    def __init__(self, subject: str, *, limit: int | None, needed: int | None, fix: str) -> None:
        self.limit, self.needed = limit, needed
        super().__init__(
            subject,
            expected=f"prompt and reply within the model's context of {limit or '?'} tokens",
            seen=f"{needed or 'more'} tokens",
            fix=fix,
        )


class RequestRefused(ClientError):
    """A request that is answered with the same error however often it is sent."""


class NoAnswer(ClientError):
    """A request that got no answer in spite of every retry; others may have got theirs."""


class ClientDown(ClientError):
    """A model that answers nobody: gone, not started, wrong key, wrong name."""


class BudgetSpent(EvalkitError):
    """The next request would go over the limit on calls or cost; what was answered is kept."""


class StageFailed(EvalkitError):
    """A stage in which every feature failed."""


class StorageError(EvalkitError):
    """A disk that is full or not writable."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency late.

    Raises MissingExtra, naming the command that installs it, when it is absent.
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
