"""What evalkit and its extras ask for, which of it is installed, and the command that installs the rest.

Reads the metadata of installed distributions and imports none of them.
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
    """Of a distribution as pip names it; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def known_extras() -> list[str]:
    """The extras of the installed evalkit; none where it is only imported from its source folder."""
    try:
        return importlib.metadata.metadata("evalkit").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return []


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
    try:
        found = [Requirement(line) for line in importlib.metadata.requires("evalkit") or ()]
    except importlib.metadata.PackageNotFoundError:
        return []

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


def install_command(extra: str = "", *, again: bool = False) -> str:
    """The command that installs an extra, or the core where it is empty.

    Where the installed metadata does not know the extra, or with ``again``, evalkit itself is installed anew.
    """
    brackets = f"[{extra}]" if extra else ""
    root = Path(evalkit.__file__).resolve().parent.parent
    known = known_extras()
    if known and not again and (not extra or extra in known):
        return "pip install " + shlex.quote(f"evalkit{brackets}")
    if (root / "pyproject.toml").is_file():
        return "pip install -e " + shlex.quote(f"{root}{brackets}")
    return "pip install --upgrade " + shlex.quote(f"evalkit{brackets}")
