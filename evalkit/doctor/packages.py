"""The requirements of evalkit and its extras, the installed versions, and the command that installs what is missing.

Reads the metadata of installed distributions and imports none of them. Writes nothing.
"""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import evalkit
from evalkit.errors import MissingExtra

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["install_command", "installed_version", "known_extras", "requirements", "too_old"]


def installed_version(distribution: str) -> str | None:
    """The version of a distribution, by its name for pip; None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def known_extras() -> list[str]:
    """The extras of the installed evalkit; empty if evalkit is imported from a source folder without being installed."""
    try:
        return importlib.metadata.metadata("evalkit").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []


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
    try:
        found = [Requirement(line) for line in importlib.metadata.requires("evalkit") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []

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


def install_command(extra: str = "", *, again: bool = False) -> str:
    """The command that installs an extra; the core if ``extra`` is empty.

    ``again``: whether to reinstall evalkit itself. This is also done if the installed metadata lacks the extra.
    """
    brackets = f"[{extra}]" if extra else ""
    root = Path(evalkit.__file__).resolve().parent.parent
    known = known_extras()
    if known and not again and (not extra or extra in known):
        return "pip install " + shlex.quote(f"evalkit{brackets}")
    if (root / "pyproject.toml").is_file():
        return "pip install -e " + shlex.quote(f"{root}{brackets}")
    return "pip install --upgrade " + shlex.quote(f"evalkit{brackets}")
