"""Finds explainers, judges, scorers, sources and clients by name.

Built-ins are listed here as strings; plug-ins are found as entry points of installed packages. A class is imported only
when it is used, so a broken plug-in fails only then, and ``evalkit plugins`` can show why. Reads package metadata; writes
nothing. Entry-point groups: ``evalkit.explainers``, ``evalkit.judges``, ``evalkit.scorers``, ``evalkit.sources``,
``evalkit.clients``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeAlias

from evalkit.abilities import abilities_of, main_option_of
from evalkit.errors import BadConfig, EvalkitError, PluginError

__all__ = [
    "BUILT_INS",
    "KINDS",
    "Kind",
    "Part",
    "Plugin",
    "create",
    "list_plugins",
    "load_class",
    "names",
    "parse_option",
    "parse_part",
]

Kind: TypeAlias = Literal["explainers", "judges", "scorers", "sources", "clients"]
KINDS: tuple[Kind, ...] = ("explainers", "judges", "scorers", "sources", "clients")

BUILT_INS: dict[Kind, dict[str, str]] = {
    "explainers": {
        "words": "explainers.words:WordsExplainer",
        "patterns": "explainers.patterns:PatternsExplainer",
        "default": "explainers.default:DefaultExplainer",
        "contrastive": "explainers.contrastive:ContrastiveExplainer",
        "cot": "explainers.cot:CotExplainer",
        "ensemble": "explainers.ensemble:EnsembleExplainer",
        "neuronpedia": "explainers.neuronpedia:NeuronpediaExplainer",
        "token-logits": "explainers.token_logits:TokenLogitsExplainer",
        "promoted": "explainers.token_logits:PromotedExplainer",
        "delphi": "explainers.delphi:DelphiFilesExplainer",
        "delphi-default": "evalkit.delphi.components:DelphiExplainer",
    },
    "judges": {
        "embedding": "scorers.judges.embedding:EmbeddingJudge",
        "lexical": "scorers.judges.lexical:LexicalJudge",
        "llm": "scorers.judges.llm.judge:LlmJudge",
        "delphi": "evalkit.delphi.components:DelphiJudge",
        "subject": "scorers.judges.subject:SubjectJudge",
    },
    "scorers": {
        "detection": "scorers.detection:DetectionScorer",
        "fuzzing": "scorers.fuzzing:FuzzingScorer",
        "intruder": "scorers.intruder:IntruderScorer",
        "embedding": "scorers.embedding:EmbeddingScorer",
        "delphi-detection": "evalkit.delphi.components:DelphiDetectionScorer",
        "delphi-fuzz": "evalkit.delphi.components:DelphiFuzzScorer",
        "simulation": "scorers.simulation:SimulationScorer",
        "surprisal": "scorers.surprisal:SurprisalScorer",
    },
    "sources": {
        "gemma-scope": "evalkit.sources.formats.gemma_scope:GemmaScopeReader",
        "gemma-scope-2": "evalkit.sources.formats.gemma_scope_2:GemmaScope2Reader",
        "dictionary-learning": "evalkit.sources.formats.dictionary_learning:DictionaryLearningReader",
        "nabeshima": "evalkit.sources.formats.nabeshima:NabeshimaReader",
        "sparsify": "evalkit.sources.formats.sparsify:SparsifyReader",
        "rqae": "evalkit.sources.rqae.source:RqaeReader",
        "saelens": "evalkit.sources.formats.saelens:SaeLensReader",
        "neuronpedia": "evalkit.sources.dumps.neuronpedia:NeuronpediaReader",
        "delphi": "evalkit.sources.dumps.delphi:DelphiReader",
        "directions": "evalkit.sources.formats.directions:DirectionsReader",  # last: accepts what no other format does
    },
    "clients": {
        "openai": "evalkit.llm.clients.openai:OpenAIClient",
        "openai-batch": "evalkit.llm.clients.batch.client:OpenAIBatchClient",
        "replay": "evalkit.llm.clients.replay:ReplayClient",
        "vllm": "evalkit.llm.clients.vllm:VllmClient",
    },
}


@dataclass(frozen=True, slots=True)
class Part:
    """A registered name with options, such as ``llm:single,batch_size=1``.

    ``label``: the part in its canonical spelling, as it is stored in records.
    """

    name: str
    label: str
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plugin:
    """One row of ``evalkit plugins``.

    ``error``: why the plug-in cannot be loaded; None if it can.
    ``abilities``: phrases for its optional abilities; see ``evalkit.abilities``.
    """

    kind: Kind
    name: str
    origin: str
    target: str
    error: str | None
    abilities: tuple[str, ...] = ()


@cache
def _entry_points(kind: Kind) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"evalkit.{kind}")}


def names(kind: Kind) -> list[str]:
    """All names of a kind, built-ins first."""
    return [*BUILT_INS[kind], *(name for name in _entry_points(kind) if name not in BUILT_INS[kind])]


def load_class(kind: Kind, name: str) -> Any:
    """The class or factory registered under a name; a built-in hides a plug-in of the same name.

    Raises PluginError if the name is unknown or the plug-in is broken.
    """
    if target := BUILT_INS[kind].get(name):
        module, _, attribute = target.partition(":")
        return getattr(importlib.import_module(module), attribute)
    point = _entry_points(kind).get(name)
    if point is None:
        near = difflib.get_close_matches(name, names(kind), n=1)
        raise PluginError(
            f"{kind.removesuffix('s')} {name!r}",
            expected=f"one of {', '.join(names(kind))}",
            seen="no such name",
            fix=f"use {near[0]!r}" if near else f"install a package with an entry point in group 'evalkit.{kind}'",
        )
    try:
        return point.load()
    except Exception as error:  # a plug-in may fail in any way; the message names the plug-in and its package
        origin = point.dist.name if point.dist else "unknown package"
        raise PluginError(
            f"{kind.removesuffix('s')} {name!r} of {origin}",
            expected=f"{point.value} to be importable",
            seen=f"{type(error).__name__}: {error}",
            fix=f"repair or uninstall the package {origin}",
        ) from error


def _takes(factory: Any) -> str:
    """The names of a class's options, for messages; without those that the run itself passes."""
    names = [name for name in inspect.signature(factory).parameters if name not in ("client", "sources")]
    return ", ".join(names) or "none"


def create(kind: Kind, name: str, **options: Any) -> Any:
    """An instance of a registered class. Raises PluginError if the class does not accept the options."""
    factory = load_class(kind, name)
    try:
        return factory(**options)
    except TypeError as error:
        raise PluginError(
            f"{kind.removesuffix('s')} {name!r}",
            expected="only options that it accepts",
            seen=str(error),
            fix=f"its options are: {_takes(factory)}",
        ) from error


def parse_option(text: str) -> tuple[str, Any]:
    """Parse ``key=value`` of the command line. A value that is not JSON is kept as text. Raises BadConfig."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise BadConfig("option", expected="KEY=VALUE", seen=repr(key), fix="write for example temperature=0.5")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def parse_part(kind: Kind, text: str) -> Part:
    """Parse ``NAME``, ``NAME:VALUE``, ``NAME:key=value,…`` or ``NAME:VALUE,key=value,…``.

    VALUE is passed as the option that the class names in ``main_option``. Raises PluginError for an unknown name or a class
    without a main option, BadConfig for a malformed option.
    """
    name, _, rest = text.strip().partition(":")
    if not rest:
        return Part(name, name, {})
    main = None
    pieces = re.split(r",(?=[A-Za-z_]\w*=)", rest)
    if not re.match(r"[A-Za-z_]\w*=", pieces[0]):
        main = pieces.pop(0)
    options = dict(parse_option(piece) for piece in pieces)
    label = ",".join([*([main] if main else []), *(f"{key}={options[key]}" for key in sorted(options))])
    if main is not None:
        option = main_option_of(load_class(kind, name), default="model" if kind == "clients" else None)
        if option is None:
            raise PluginError(
                f"{kind.removesuffix('s')} {name!r}",
                expected=f"options as {name}:key=value",
                seen=repr(main),
                fix="write the name of the option before its value",
            )
        options[option] = main
    return Part(name, f"{name}:{label}", options)


def list_plugins() -> list[Plugin]:
    """Everything registered, with its origin. Loads each class once; a plug-in that fails to load has an ``error``."""
    found = []
    for kind in KINDS:
        for name in names(kind):
            point = None if name in BUILT_INS[kind] else _entry_points(kind)[name]
            target = point.value if point else BUILT_INS[kind][name]
            origin = "built in" if point is None else (point.dist.name if point.dist else "unknown package")
            able: tuple[str, ...] = ()
            try:
                able = abilities_of(kind, load_class(kind, name))
                error = None
            except (EvalkitError, ImportError, AttributeError) as failure:
                error = str(failure)
            found.append(Plugin(kind, name, origin, target, error, able))
    return found
