"""Finds dictionaries in repositories of the model hub: ``owner/name/layer_12/width_16k/*`` → local folders.

Fetches a repository's file list from the hub, matches the path against it (globs; ``l0_80`` picks the folder with the
nearest average L0) and downloads the files that a dictionary needs into huggingface_hub's cache. If the hub cannot be
reached, it searches that cache instead. If ``EVALKIT_HUB`` is set, the folder tree ``$EVALKIT_HUB/owner/name/…`` replaces
the hub: nothing is copied, and no file outside the tree is read. Knows no dictionary format.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from evalkit.errors import BadConfig, BadFile, MissingFile, StorageError, require
from evalkit.util.hub import hub_reachable

__all__ = ["HUB", "Address", "fetch", "looks_like_address", "parse_address"]

log = logging.getLogger(__name__)

HUB = "hub:"  # prefix of an address that must not be looked up on disk
_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_PART})/({_PART})(?:/(.*))?")
_ALIASES = (  # short names for families of repositories: the pattern of the short name, the repository's name
    (
        re.compile(r"gemma-scope:(2b|9b|27b)(?:-(pt|it))?(?:-(res|att|mlp|transcoders))?(?:/(.*))?"),
        "gemma-scope-{0}-{1}-{2}",
    ),
    (re.compile(r"gemma-scope-2:(270m|1b|4b|12b|27b)(?:-(pt|it))?()(?:/(.*))?"), "gemma-scope-2-{0}-{1}"),
)
_WEIGHTS = frozenset({".npz", ".safetensors", ".pt", ".pth", ".bin"})
_CONFIGS = frozenset({".json", ".yaml", ".yml"})
_UNNEEDED = re.compile(r"(?:.*/)?(?:checkpoints/.*|examples\.safetensors|optimi[sz]er.*|.*\.index\.json)")
_MOST = 100  # weight files per call; a whole repository can hold hundreds of gigabytes
_L0 = re.compile(r"average_l0_(\d+(?:\.\d+)?)")
_WANTED_L0 = re.compile(r"(?:average_l0_~|l0_~?)(\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Address:
    """A path in a repository: the repository's id, and the parts of the path inside it, which may be globs."""

    repository: str
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join((self.repository, *self.parts))


def parse_address(text: str) -> Address | None:
    """Parse ``owner/name``, ``owner/name/path``, ``hub:…`` or an alias such as ``gemma-scope:2b/layer_12``, else None.

    Aliases: ``gemma-scope:{2b,9b,27b}[-it][-att|-mlp|-transcoders]`` (residual stream by default),
    ``gemma-scope-2:{270m,1b,4b,12b,27b}[-it]``.
    """
    bare = text.removeprefix(HUB)
    for pattern, name in _ALIASES:
        if found := pattern.fullmatch(bare):
            repository = "google/" + name.format(found[1], found[2] or "pt", found[3] or "res")
            return _address(repository, found[4])
    found = _ID.fullmatch(bare)
    return _address(f"{found[1]}/{found[2]}", found[3]) if found else None


def looks_like_address(text: str) -> bool:
    """Whether a path that does not exist on disk may be a hub address. It may not if its first part exists on disk."""
    address = parse_address(text)
    return address is not None and (":" in text.split("/")[0] or not Path(text.split("/")[0]).exists())


def fetch(text: str, *, revision: str | None = None) -> list[Path]:
    """The local folders (or files) that the address ``text`` matches, sorted; files are downloaded if necessary.

    Raises BadConfig (not an address; too many weight files), MissingFile (no such repository, no matching path, hub not
    reachable), BadFile (a link that leads out of ``$EVALKIT_HUB``), StorageError (disk full or not writable).
    """
    address = parse_address(text)
    if address is None:
        raise BadConfig(
            text,
            expected="owner/name, owner/name/path, gemma-scope:2b/path or gemma-scope-2:1b/path",
            seen="none of these forms",
            fix="write for example google/gemma-scope-2b-pt-res/layer_12/width_16k/l0_80",
        )
    tree = os.environ.get("EVALKIT_HUB")
    repository = _Tree(Path(tree).expanduser()) if tree else _online(address.repository, revision)
    if tree and revision:
        log.info(
            "EVALKIT_HUB has no revisions: using its copy of %s, ignoring revision %s", address.repository, revision
        )
    files = [file for file in repository.files(address.repository) if ".." not in file.split("/") and file[:1] != "/"]
    roots = _matched(address, files)
    needed = sorted(_needed(roots, files))
    weights = [file for file in needed if _is_weights(file)]
    if len(weights) > _MOST:
        raise BadConfig(
            text,
            expected=f"a path to at most {_MOST} weight files",
            seen=f"{len(weights)} weight files, such as {weights[0]}",
            fix=f"name a folder, such as {address.repository}/{PurePosixPath(weights[0]).parent}, or use a narrower glob",
        )
    folder = repository.bring(address.repository, needed)
    return [folder / root for root in roots]


def _address(repository: str, path: str | None) -> Address | None:
    parts = tuple(part for part in (path or "").split("/") if part not in ("", "."))
    return None if ".." in parts else Address(repository, parts)


def _matched(address: Address, files: Sequence[str]) -> list[str]:
    """The paths in ``files`` that match the address: weight files, or folders with weight files at any depth below."""
    weights = [PurePosixPath(file).parts for file in files if _is_weights(file)]
    depth = len(address.parts)
    roots = {parts[:depth] for parts in weights if _fits(parts, address.parts)}
    if not roots and depth:
        roots = _nearest_l0(address, weights)
    if not roots:
        raise MissingFile(
            str(address),
            expected="a path in that repository with a dictionary in it",
            seen=_seen(address, weights),
            fix="check the path; globs such as layer_12/width_16k/* work, and l0_80 picks the nearest average L0",
        )
    return sorted("/".join(root) for root in roots)


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    return len(parts) >= len(pattern) and all(map(fnmatchcase, parts, pattern))


def _nearest_l0(address: Address, weights: Sequence[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """For each parent folder, the ``average_l0_N`` nearest to the L0 in the address's last part; the lower on a tie."""
    wanted = _WANTED_L0.fullmatch(address.parts[-1])
    if not wanted:
        return set()
    above, l0 = address.parts[:-1], float(wanted[1])
    there: dict[tuple[str, ...], dict[float, str]] = {}
    for parts in weights:
        if len(parts) > len(above) and _fits(parts, above) and (found := _L0.fullmatch(parts[len(above)])):
            there.setdefault(parts[: len(above)], {})[float(found[1])] = found[0]
    roots = set()
    for folder, choices in sorted(there.items()):
        nearest = min(choices, key=lambda value: (abs(value - l0), value))
        roots.add((*folder, choices[nearest]))
        log.info(
            "%s: the nearest average L0 to %g is %g; available: %s",
            "/".join((address.repository, *folder)),
            l0,
            nearest,
            ", ".join(f"{value:g}" for value in sorted(choices)),
        )
    return roots


def _seen(address: Address, weights: Sequence[tuple[str, ...]]) -> str:
    """Describe the first part of the address that does not exist, and similar names in its place."""
    if not weights:
        return "no weight files in the repository"
    known = 0
    while known < len(address.parts) and any(_fits(parts, address.parts[: known + 1]) for parts in weights):
        known += 1
    inside = {parts[known] for parts in weights if len(parts) > known and _fits(parts, address.parts[:known])}
    missing = address.parts[known] if known < len(address.parts) else ""
    near = get_close_matches(missing, inside, n=4, cutoff=0.5) or sorted(inside)[:6]
    return f"no {missing} there, but {', '.join(near)}" if near else f"no {missing} there"


def _is_weights(file: str) -> bool:
    return PurePosixPath(file).suffix in _WEIGHTS and not _UNNEEDED.fullmatch(file)


def _needed(roots: Iterable[str], files: Sequence[str]) -> Iterator[str]:
    """Weights and configs at and below the roots, and configs in the folders above them."""
    wanted = [PurePosixPath(root) for root in roots]
    inside = {*wanted, *(root.parent for root in wanted if root.suffix in _WEIGHTS)}
    above = {parent for root in wanted for parent in root.parents}
    for file in files:
        path = PurePosixPath(file)
        near = path.parent in above or not inside.isdisjoint(path.parents)
        config = near and path.suffix in _CONFIGS and not _UNNEEDED.fullmatch(file)
        if config or (_is_weights(file) and any(root == path or root in path.parents for root in wanted)):
            yield file


class _Tree:
    """A local folder tree that replaces the hub (``EVALKIT_HUB``)."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def files(self, repository: str) -> list[str]:
        """Every file of the repository, except links that lead out of the tree. Raises MissingFile."""
        folder = self._root / repository
        if not folder.is_dir() or not self._inside(folder):
            there = sorted(f"{path.parent.name}/{path.name}" for path in self._root.glob("*/*") if path.is_dir())
            near = get_close_matches(repository, there, n=4, cutoff=0.5) or there[:6]
            raise MissingFile(
                repository,
                expected=f"a folder of that name in {self._root} (EVALKIT_HUB)",
                seen=", ".join(near) or ("an empty folder" if self._root.is_dir() else "no such folder"),
                fix="check the name, or unset EVALKIT_HUB to use the hub itself",
            )
        found = []
        for above, folders, names in os.walk(folder, followlinks=False):
            folders.sort()
            for name in sorted(names):
                path = Path(above) / name
                if path.is_file() and self._inside(path):
                    found.append(path.relative_to(folder).as_posix())
        return found

    def bring(self, repository: str, files: Sequence[str]) -> Path:
        """The repository's folder; nothing to download. Raises BadFile if a needed folder has a link out of the tree."""
        folder = self._root / repository
        for near in sorted({(folder / file).parent for file in files}):
            for path in sorted(near.iterdir()):
                if not self._inside(path):
                    raise BadFile(
                        str(path),
                        expected=f"a file inside {self._root} (EVALKIT_HUB)",
                        seen="a link that leads out of it",
                        fix="copy the file there, or remove the link",
                    )
        return folder

    def _inside(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self._root.resolve())


class _Cache:
    """The local cache of huggingface_hub, used if the hub cannot be reached."""

    def __init__(self, revision: str | None) -> None:
        self._revision = revision

    def files(self, repository: str) -> list[str]:
        """The cached files of the revision. Raises MissingFile."""
        folder = self.bring(repository, ())
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def bring(self, repository: str, files: Sequence[str]) -> Path:
        """The cached folder of the revision; nothing is downloaded. Raises MissingFile."""
        del files
        with _hub_errors(repository, "in the local cache (the hub cannot be reached)"):
            return _snapshot(repository, self._revision, None, local_files_only=True)


class _Hub:
    """The hub itself. Files are downloaded at the commit that the file list came from, so that the two match."""

    def __init__(self, revision: str | None) -> None:
        self._revision = revision

    def files(self, repository: str) -> list[str]:
        """The file list of the revision. Raises MissingFile."""
        from huggingface_hub import HfApi

        with _hub_errors(repository, "on the hub"):
            info = HfApi(endpoint=os.environ.get("HF_ENDPOINT")).model_info(repository, revision=self._revision)
            self._revision = info.sha or self._revision
            return sorted(file.rfilename for file in info.siblings or ())

    def bring(self, repository: str, files: Sequence[str]) -> Path:
        """Download the files that are not cached; returns the folder. Raises MissingFile, StorageError."""
        log.info("%s: getting %d files from the hub or the local cache", repository, len(files))
        with _hub_errors(repository, "on the hub"):
            patterns = [glob.escape(file) for file in files]
            return _snapshot(repository, self._revision, patterns, endpoint=os.environ.get("HF_ENDPOINT"))


def _online(repository: str, revision: str | None) -> _Cache | _Hub:
    require("huggingface_hub", "model")
    if hub_reachable():
        return _Hub(revision)
    log.info("the model hub cannot be reached; looking for %s in the local cache", repository)
    return _Cache(revision)


def _snapshot(repository: str, revision: str | None, patterns: list[str] | None, **options: Any) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=patterns,
            cache_dir=os.environ.get("HF_HUB_CACHE"),
            **options,
        )
    finally:
        if shown:
            enable_progress_bars()
    return Path(str(folder))


@contextmanager
def _hub_errors(repository: str, where: str) -> Iterator[None]:
    """Turn any error of huggingface_hub into StorageError or MissingFile."""
    try:
        yield
    except OSError as error:
        if error.errno in (28, 122, 30, 13):  # disk full, over quota, read-only, permission denied
            raise StorageError(
                repository,
                expected="a local cache that is writable and has room for it",
                seen=error.strerror or str(error),
                fix="free space, or set HF_HUB_CACHE to another folder",
            ) from error
        raise _missing(repository, where, error) from error
    except Exception as error:  # huggingface_hub and its HTTP client raise a dozen kinds
        raise _missing(repository, where, error) from error


def _missing(repository: str, where: str, error: Exception) -> MissingFile:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return MissingFile(
        repository,
        expected=f"a repository with that name {where}",
        seen=f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:300],
        fix="check the name, revision and network (set HF_TOKEN for gated repositories), or give a local folder",
    )
