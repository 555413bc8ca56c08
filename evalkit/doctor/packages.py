"""What evalkit and its extras require, and which of it is installed in another version.

Reads the metadata of installed distributions and imports none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evalkit.errors import MissingExtra
from evalkit.installation import installed_version, required

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["requirements", "too_old"]


def requirements(extra: str) -> list[Requirement]:
    """What an extra, or the core where it is empty, asks for on this platform; empty where that is not known.

    Raises MissingExtra where the parser of requirements, which the core brings with matplotlib, is not there.
    """
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "packaging", expected="the package that matplotlib brings", seen="none", fix="pip install packaging"
        ) from error
    found = [Requirement(line) for line in required()]

    def applies(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    return [one for one in found if applies(one, extra) and not (extra and applies(one, ""))]


def too_old(needed: Sequence[Requirement]) -> list[str]:
    """A phrase for each that is installed in a version other than asked for."""
    there = [(one, version) for one in needed if (version := installed_version(one.name)) is not None]
    return [
        f"{one.name} is {version}, needed is {one.specifier}"
        for one, version in there
        if not one.specifier.contains(version, prereleases=True)
    ]
