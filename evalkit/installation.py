"""How evalkit was installed, and so the command that installs more of it.

The distribution is called ``evalkit-autointerp``: the name ``evalkit`` on the package index belongs to another project.
Reads the metadata of installed distributions; imports nothing of evalkit.
"""

from __future__ import annotations

import json
import shlex
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["DISTRIBUTION", "install_command", "installed_version", "known_extras", "required"]

DISTRIBUTION = "evalkit-autointerp"
_SOURCE = Path(__file__).resolve().parents[1]


def installed_version(name: str) -> str | None:
    """The version of a distribution, under its name on the package index; None if it is not installed."""
    found = _distribution(name)
    return None if found is None else found.version


def known_extras() -> list[str]:
    """The extras that the installed metadata lists; empty if evalkit is imported from a source folder only."""
    found = _distribution(DISTRIBUTION)
    return [] if found is None else found.metadata.get_all("Provides-Extra") or []


def required() -> list[str]:
    """The requirements of evalkit and of its extras, one per line of the metadata; empty if evalkit is not installed."""
    found = _distribution(DISTRIBUTION)
    return [] if found is None else found.requires or []


def install_command(extra: str = "", *, again: bool = False) -> str:
    """The shell command that installs an extra, or the core where ``extra`` is empty, from where evalkit itself came.

    ``again``: install evalkit itself anew, because the installed metadata is older than the source folder.
    """
    found = _distribution(DISTRIBUTION)
    stale = found is None or again or (extra and extra not in known_extras())
    pip = "uv pip" if found is not None and (found.read_text("INSTALLER") or "").strip() == "uv" else "pip"
    if stale and (_SOURCE / "pyproject.toml").is_file():
        options, target = "-e ", _with_extra(str(_SOURCE), extra)
    else:
        options, target = _origin(found, extra)
        options = "--upgrade " if stale and not options else options
    return f"{pip} install {options}{shlex.quote(target)}"


def _origin(found: Distribution | None, extra: str) -> tuple[str, str]:
    """pip's options and the requirement that lead to where evalkit came from: a folder, a file, a repository or the index.

    Source: "Recording the Direct URL Origin of installed distributions", PEP 610.
    """
    direct = _direct_url(found)
    url = direct.get("url")
    if not isinstance(url, str):
        return "", _with_extra(DISTRIBUTION, extra)
    if isinstance(vcs := direct.get("vcs_info"), dict):
        return "", f"{_with_extra(DISTRIBUTION, extra)} @ {vcs.get('vcs', 'git')}+{url}@{vcs.get('commit_id', '')}"
    parts = urlsplit(url)
    if parts.scheme != "file":
        return "", f"{_with_extra(DISTRIBUTION, extra)} @ {url}"
    path = Path(unquote(parts.path))
    if not path.exists():  # the wheel or the folder is gone
        return "", _with_extra(DISTRIBUTION, extra)
    folder = direct.get("dir_info")
    editable = isinstance(folder, dict) and folder.get("editable") is True
    return "-e " if editable else "", _with_extra(str(path), extra)


def _direct_url(found: Distribution | None) -> dict[str, Any]:
    try:
        content = json.loads((found.read_text("direct_url.json") if found else None) or "{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _with_extra(target: str, extra: str) -> str:
    return f"{target}[{extra}]" if extra else target


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
