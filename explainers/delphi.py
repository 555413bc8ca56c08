"""The explainer that reads what eai-delphi wrote: one file a feature, with an explanation as a JSON string.

``FOLDER/explanations/MODULE_latentN.txt`` (or FOLDER itself holds the files). Which module belongs to a dictionary says the
option ``module``, else ``evalkit.json`` in the folder where our own export put one, else the dictionary's name, one part of
which must be the module. What the library writes where it could not read a reply is no explanation and never used as one.
Asks no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from evalkit.errors import BadConfig, BadFile, MissingFile, UnknownFeature
from evalkit.protocols import Client
from evalkit.records import CONTROL_MARK, ExplainExamples, Explanation, FeatureId
from explainers.asking import LONGEST, phrase

__all__ = ["DelphiFilesExplainer"]

CARD = "evalkit.json"
_NAME = re.compile(r"(?P<module>.+)_latent(?P<latent>\d{1,12})\.(?:txt|json)", re.ASCII)
_NO_EXPLANATION = frozenset({"explanation could not be parsed", "no explanation found", ""})
_LARGEST = 1_000_000  # bytes of a file


class DelphiFilesExplainer:
    """Gives every feature the explanation in its file.

    ``path``: the folder. ``module``: whose files are meant, where the dictionary's name does not say it. ``source``: the
    dictionary they explain, a name or a pattern, where the run has several that they might. Raises MissingFile.
    """

    name = "delphi"
    main_option = "path"
    version = "1"

    def __init__(self, path: str, module: str | None = None, source: str | None = None) -> None:
        top = Path(path).expanduser()
        self.folder = top / "explanations" if (top / "explanations").is_dir() else top
        self.module = None if module is None else str(module).replace("/", "--")
        self.source = source
        self._card = top / CARD
        if not self._files:
            raise MissingFile(
                path,
                expected="a folder with explanations/MODULE_latentN.txt",
                seen="no such file in it" if top.is_dir() else "no such folder",
                fix="name the folder of a run of eai-delphi, or what `evalkit export --format delphi` wrote",
            )

    async def prepare(self, sources: Sequence[str]) -> None:
        """Look at whose files these are before the first feature. ``sources``: the names of all sources of the run.

        Raises BadConfig where they explain none of these, or one module's could be those of several; BadFile.
        """
        explained = [name for name in sources if self.explains(name)]
        if not explained:
            self._place(next((name for name in sources if CONTROL_MARK not in name), "no dictionary"), "0")
        modules = [self._place(name, "0")[0] for name in explained]
        if len(set(modules)) < len(modules) or not explained:
            raise BadConfig(
                f"explainer 'delphi' with {self.folder}",
                expected="one dictionary for every module",
                seen=f"{len(explained)}: {', '.join(explained[:3])}"
                if explained
                else f"none in {', '.join(sources)}"[:300],
                fix="say whose features these are: --explainer delphi:FOLDER,source=NAME (or a pattern, '*/l0-32')",
            )

    def explains(self, source: str) -> bool:
        """Whether these files may be about the features of this source: never about a control that is not listed."""
        if self.module is None and source in self._listed:
            return True
        if CONTROL_MARK in source or not (
            self.source is None or source == self.source or fnmatchcase(source, self.source)
        ):
            return False
        return len(self._fitting(source)) == 1

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None = None) -> Explanation:
        """What its file says. Raises UnknownFeature (no file, no explanation in it), BadFile, BadConfig (which module)."""
        module, latent = self._place(examples.source, feature)
        path = self._files.get((module, latent))
        if path is None:
            raise UnknownFeature(
                f"{examples.source} feature {feature}",
                expected=f"{module}_latent{latent}.txt in {self.folder}",
                seen="no such file",
                fix="explain this feature with eai-delphi too, or leave it out",
            )
        text = self._read(path)
        if text.strip().rstrip(".").lower() in _NO_EXPLANATION:
            raise UnknownFeature(
                f"{examples.source} feature {feature}",
                expected=f"an explanation in {path}",
                seen=repr(text),
                fix="explain this feature again, or leave it out",
            )
        told = phrase(text)
        if told is None:
            raise BadFile(
                str(path),
                expected=f"a phrase of at most {LONGEST} characters",
                seen=f"{len(text)} characters, {text[:40]!r}",
                fix="explain this feature again, or leave it out",
            )
        return Explanation(examples.source, feature, self.name, self.version, told, f"from {path.name}")

    @cached_property
    def _files(self) -> dict[tuple[str, str], Path]:
        found = {}
        for path in sorted(self.folder.glob("*_latent*")):
            if name := _NAME.fullmatch(path.name):
                found[name["module"], str(int(name["latent"]))] = path
        return found

    @cached_property
    def _listed(self) -> dict[str, tuple[str, dict[str, str]]]:
        """By dictionary: its module, and the number of every feature."""
        if not self._card.is_file():
            return {}
        try:
            modules = json.loads(self._card.read_text("utf-8"))["modules"]
            return {
                str(one["source"]): (module, {str(feature): str(number) for number, feature in one["features"].items()})
                for module, one in modules.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BadFile(
                str(self._card),
                expected="modules, each with its source and features",
                seen=f"{type(error).__name__}: {error}"[:200],
                fix="export again, or delete that file and name the module",
            ) from error

    def _place(self, source: str, feature: FeatureId) -> tuple[str, str]:
        """Module and number of a feature."""
        if self.module is None and source in self._listed:
            module, numbers = self._listed[source]
            return module, numbers.get(feature, feature)
        fitting = self._fitting(source)
        if len(fitting) != 1:
            modules = self._modules
            raise BadConfig(
                f"explainer 'delphi' for {source}",
                expected=f"a module of {self.folder}: {', '.join(modules[:5])}{' …' if len(modules) > 5 else ''}",
                seen=repr(self.module) if self.module else "none that is a part of the dictionary's name",
                fix="name it: --explainer delphi:FOLDER,module=MODULE",
            )
        return fitting[0], feature

    @cached_property
    def _modules(self) -> list[str]:
        return sorted({module for module, _ in self._files})

    def _fitting(self, source: str) -> list[str]:
        """The modules that may be meant by a dictionary's name."""
        if self.module is not None:
            return [self.module] if self.module in self._modules else []
        parts = {source.replace("/", "--"), *source.split("/")}
        return [module for module in self._modules if module in parts]

    def _read(self, path: Path) -> str:
        seen: Any
        try:
            if path.stat().st_size > _LARGEST or not path.is_file():
                raise ValueError(f"{path.stat().st_size} bytes" if path.is_file() else "no regular file")
            seen = json.loads(path.read_bytes())
            if isinstance(seen, str):
                return seen
            raise ValueError(f"a {type(seen).__name__}")
        except (OSError, ValueError, RecursionError) as error:
            raise BadFile(
                str(path), expected="an explanation as a JSON string", seen=str(error)[:200], fix="write it again"
            ) from error
