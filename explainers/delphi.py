"""The explainer that reads explanations from files of eai-delphi: one file per feature, with a JSON string.

The files are ``FOLDER/explanations/MODULE_latentN.txt``, or directly in FOLDER. The module of a dictionary is given by the
option ``module``, else by ``evalkit.json`` in the folder (written by our own export), else by the dictionary's name, one
part of which must be the module. The texts that the library writes for unreadable replies are rejected. Makes no API calls;
writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from evalkit.errors import BadConfig, BadFile, MissingFile, UnknownFeature, json_problem
from evalkit.protocols import Client
from evalkit.records import CONTROL_KIND, ExplainExamples, Explanation, FeatureId
from evalkit.sources.dumps.delphi_layout import CARD, LATENT_FILE, module_name
from explainers.asking import LONGEST, phrase

__all__ = ["DelphiFilesExplainer"]

_NO_EXPLANATION = frozenset({"explanation could not be parsed", "no explanation found", ""})
_LARGEST = 1_000_000  # bytes of a file


class DelphiFilesExplainer:
    """Returns for every feature the explanation in its file.

    ``path``: the folder.
    ``module``: the module whose files are used; needed if the dictionary's name does not contain it.
    ``source``: the dictionary that the files explain, as a name or a pattern; needed if several could be meant.

    Raises MissingFile if the folder has no such files.
    """

    name = "delphi"
    main_option = "path"
    version = "1"

    def __init__(self, path: str, module: str | None = None, source: str | None = None) -> None:
        top = Path(path).expanduser()
        self.folder = top / "explanations" if (top / "explanations").is_dir() else top
        self.module = None if module is None else module_name(str(module))
        self.source = source
        self._card = top / CARD
        self._controls: frozenset[str] | None = None
        if not self._files:
            raise MissingFile(
                path,
                expected="a folder with explanations/MODULE_latentN.txt",
                seen="no such file in it" if top.is_dir() else "no such folder",
                fix="give the folder of a run of eai-delphi, or the output of `evalkit export --format delphi`",
            )

    def set_controls(self, controls: Collection[str]) -> None:
        """``controls``: sources of the run that the files are not about, unless the files list them."""
        self._controls = frozenset(controls)

    def _is_control(self, source: str) -> bool:
        return f"/{CONTROL_KIND}" in source if self._controls is None else source in self._controls

    async def prepare(self, sources: Sequence[str]) -> None:
        """Check which sources the files explain, before the first feature. ``sources``: all names in the run.

        Raises BadConfig if the files explain none of them, or if a module fits several; BadFile for a bad evalkit.json.
        """
        explained = [name for name in sources if self.explains(name)]
        if not explained:
            self._place(next((name for name in sources if not self._is_control(name)), "no dictionary"), "0")
        modules = [self._place(name, "0")[0] for name in explained]
        if len(set(modules)) < len(modules) or not explained:
            raise BadConfig(
                f"explainer 'delphi' with {self.folder}",
                expected="exactly one dictionary per module",
                seen=f"{len(explained)}: {', '.join(explained[:3])}"
                if explained
                else f"none in {', '.join(sources)}"[:300],
                fix="name the dictionary: --explainer delphi:FOLDER,source=NAME (or a pattern, '*/l0-32')",
            )

    def explains(self, source: str) -> bool:
        """Whether the files may explain features of this source. A control must be listed in ``evalkit.json``."""
        if self.module is None and source in self._listed:
            return True
        if self._is_control(source) or not (
            self.source is None or source == self.source or fnmatchcase(source, self.source)
        ):
            return False
        return len(self._fitting(source)) == 1

    async def explain(self, feature: FeatureId, examples: ExplainExamples, client: Client | None = None) -> Explanation:
        """The explanation in the feature's file.

        Raises UnknownFeature if there is no file or no explanation in it, BadConfig if the module is unclear, BadFile.
        """
        module, latent = self._place(examples.source, feature)
        path = self._files.get((module, latent))
        if path is None:
            raise UnknownFeature(
                f"{examples.source} feature {feature}",
                expected=f"{module}_latent{latent}.txt in {self.folder}",
                seen="no such file",
                fix="explain this feature with eai-delphi, or leave it out",
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
            if name := LATENT_FILE.fullmatch(path.name):
                found[name["module"], str(int(name["latent"]))] = path
        return found

    @cached_property
    def _listed(self) -> dict[str, tuple[str, dict[str, str]]]:
        """Per dictionary in ``evalkit.json``: its module, and the number of each of its features."""
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
                seen=json_problem(error)[:200],
                fix="repeat the export, or delete this file and name the module with module=MODULE",
            ) from error

    def _place(self, source: str, feature: FeatureId) -> tuple[str, str]:
        """The module and the number of a feature."""
        if self.module is None and source in self._listed:
            module, numbers = self._listed[source]
            return module, numbers.get(feature, feature)
        fitting = self._fitting(source)
        if len(fitting) != 1:
            modules = self._modules
            raise BadConfig(
                f"explainer 'delphi' for {source}",
                expected=f"a module of {self.folder}: {', '.join(modules[:5])}{' …' if len(modules) > 5 else ''}",
                seen=repr(self.module) if self.module else "none that is part of the dictionary's name",
                fix="name the module: --explainer delphi:FOLDER,module=MODULE",
            )
        return fitting[0], feature

    @cached_property
    def _modules(self) -> list[str]:
        return sorted({module for module, _ in self._files})

    def _fitting(self, source: str) -> list[str]:
        """The modules that a dictionary's name may refer to."""
        if self.module is not None:
            return [self.module] if self.module in self._modules else []
        parts = {module_name(source), *source.split("/")}
        return [module for module in self._modules if module in parts]

    def _read(self, path: Path) -> str:
        seen: Any
        try:
            if path.stat().st_size > _LARGEST or not path.is_file():
                raise ValueError(f"{path.stat().st_size} bytes, too large" if path.is_file() else "not a regular file")
            seen = json.loads(path.read_bytes())
            if isinstance(seen, str):
                return seen
            raise ValueError(f"JSON of type {type(seen).__name__}")
        except (OSError, ValueError, RecursionError) as error:
            raise BadFile(
                str(path),
                expected="an explanation as a JSON string",
                seen=json_problem(error)[:200],
                fix="write the file again, or leave this feature out",
            ) from error
