"""Whether contexts begin with BOS: as the user says, else as the dictionaries declare, else as the tokenizer does.

A dictionary's states depend on it: the first token of a context takes up much of the attention, and which one that is
changes the states of all others. Knows records; no tokenizer and no corpus.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from evalkit.errors import BadConfig
from evalkit.records import SourceInfo

__all__ = ["PREPEND_BOS", "wanted_bos"]

_LOG = logging.getLogger(__name__)
PREPEND_BOS = "prepend_bos"  # among what a source declares


def wanted_bos(given: bool | None, sources: Iterable[SourceInfo]) -> bool | None:
    """Whether contexts begin with BOS; None for what the tokenizer does by itself.

    ``given``: the user's option, None if there is none. Raises BadConfig for dictionaries that declare different things,
    because all dictionaries of a run read the same contexts.
    """
    declared = {source.name: found for source in sources if (found := source.declared.get(PREPEND_BOS)) is not None}
    if given is not None:
        for name in (name for name, found in declared.items() if found != given):
            _LOG.warning("%s declares %s %s; contexts %s BOS", name, PREPEND_BOS, not given, _have(given))
        return given
    by_value = {found: name for name, found in declared.items()}
    if len(by_value) > 1:
        raise BadConfig(
            PREPEND_BOS,
            expected="dictionaries that all declare the same, because they read the same contexts",
            seen=f"true for {by_value[True]} and false for {by_value[False]}",
            fix="score them in runs of their own, or decide with --prepend-bos or --no-prepend-bos",
        )
    return next(iter(by_value), None)


def _have(bos: bool) -> str:
    return "begin with" if bos else "have no"
