"""Turns a failed validation of options into one BadConfig, which names the option and says how to fix it.

Knows pydantic's error types, but shows none of its messages. Reads and writes nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from evalkit.errors import BadConfig

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

__all__ = ["bad_option"]

# Wording by pydantic's error type; names in braces are filled in from the error's context.
_EXPECTED = {
    "greater_than_equal": "a number of at least {ge:g}",
    "greater_than": "a number above {gt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "less_than": "a number below {lt:g}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "dict_type": "a table of options",
    "too_short": "a list of {min_length} or more entries",
    "too_long": "a list of at most {max_length} entries",
    "missing": "a value",
}
# A dictionary is given as text or as a table; pydantic puts these names of the two forms into an error's location.
_UNION_BRANCHES = ("str", "DictionarySpec")
_MOST_SHOWN = 80  # characters of a rejected value that a message shows


def bad_option(error: ValidationError, known: Collection[str], of_dictionary: Collection[str]) -> BadConfig:
    """The first failure as a BadConfig; the message suggests a known name for a misspelt one.

    ``known``: names of the run's options.
    ``of_dictionary``: names of the options of a single dictionary.
    """
    first = _first(error.errors(include_url=False))
    option = ".".join(str(part) for part in first["loc"] if part not in _UNION_BRANCHES) or "options"
    seen = repr(first["input"])
    fix = "see `evalkit run --help`"
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        near = difflib.get_close_matches(name, known if len(first["loc"]) == 1 else of_dictionary, n=1)
        fix = f"did you mean {near[0]!r}?" if near else "remove it"
        return BadConfig(option, expected="the name of an existing option", seen=repr(name), fix=fix)
    if first["type"] == "missing":
        seen = "none"
    shown = seen if len(seen) <= _MOST_SHOWN else f"{seen[:_MOST_SHOWN]}…"
    return BadConfig(option, expected=_expected(first), seen=shown, fix=fix)


def _first(errors: list[ErrorDetails]) -> ErrorDetails:
    """The first useful error.

    pydantic also tries to read a dictionary given as a table as text. For such a table this skips the error that it is not
    text and returns the error inside the table.
    """
    first = errors[0]
    if first["loc"][-1:] == ("str",) and isinstance(first["input"], Mapping):
        return next((one for one in errors if "DictionarySpec" in one["loc"]), first)
    return first


def _expected(error: ErrorDetails) -> str:
    limits: dict[str, Any] = error.get("ctx", {})
    if error["type"] == "literal_error":
        names = re.findall("'([^']*)'", str(limits["expected"]))
        return f"one of {', '.join(names)}"
    if error["type"] == "string_type" and error["loc"][-1:] == ("str",):
        return "a path, or a table with path and options"
    return _EXPECTED.get(error["type"], "a valid value").format(**limits)
