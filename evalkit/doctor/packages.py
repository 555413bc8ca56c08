"""The requirements of evalkit and its extras, and which of them are installed in another version.

Reads the metadata of installed distributions and imports none of them. Writes nothing.
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
    """The requirements of an extra on this platform; of the core if ``extra`` is empty.

    The list is empty if evalkit is not installed. Raises MissingExtra if the package ``packaging``, which is installed with
    matplotlib, is missing.
    """
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError as error:
        raise MissingExtra(
            "packaging",
            expected="the package 'packaging' to be installed, as matplotlib requires",
            seen="no such package",
            fix="pip install packaging",
        ) from error
    found = [Requirement(line) for line in required()]

    def applies(requirement: Requirement, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    return [one for one in found if applies(one, extra) and not (extra and applies(one, ""))]


def too_old(needed: Sequence[Requirement]) -> list[str]:
    """A phrase for each package that is installed in a version that does not satisfy the requirement."""
    there = [(one, version) for one in needed if (version := installed_version(one.name)) is not None]
    return [
        f"{one.name} {version} is installed, {one.specifier} is required"
        for one, version in there
        if not one.specifier.contains(version, prereleases=True)
    ]
