"""Reads Neuronpedia's public exports from a local folder: ready examples instead of a dictionary and a forward pass.

Layout (bucket ``neuronpedia-datasets``, https://docs.neuronpedia.org/api-and-data/exports): ``v1/MODEL/SOURCE/`` with
``activations/``, ``features/`` and ``explanations/`` (or ``explanations-…/``), each a folder of ``batch-N.jsonl.gz`` (or
plain .jsonl), one JSON object per line. Keys that are read, besides ``modelId`` and ``layer`` (the source's id):
activations: ``index``, ``tokens``, ``values``; features: ``index``, ``frac_nonzero``; explanations: ``index``,
``description``, ``typeName``, ``explanationModelName``. Lines may be in any order.

Files are streamed, and memory is bounded whatever their size. An invalid line raises an error that names the file and the
line. Knows no corpus, no windows and no model; does not load torch; writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.corpus.token_strings import boundaries, text_pieces
from evalkit.errors import BadConfig, BadFile, MissingFile, UnknownFeature
from evalkit.protocols import ReadyExamples, ReadyText
from evalkit.records import Explanation, FeatureId, Site, SourceInfo
from evalkit.seeds import derive, hash_priorities
from evalkit.sources.dumps.neuronpedia_explanations import ExportedExplanations
from evalkit.sources.dumps.neuronpedia_files import (
    DEEPEST,
    MOST_FEATURES,
    Record,
    bad_line,
    batches,
    check_origin,
    index_of,
    origin_of,
    records,
)
from evalkit.sources.dumps.text_sample import SampledTexts
from evalkit.sources.formats.common import check_options
from evalkit.subject.sites import site_of_hook

__all__ = ["UNVERIFIED", "NeuronpediaReader", "NeuronpediaSource"]

UNVERIFIED = "texts of other features, not verified"
_LONGEST_TOKEN = 1024  # characters
_SHOWN_TEXTS, _SHOWN_BYTES = 2000, 16 << 20  # limits of the sample of each requested feature's texts
_OTHER_TEXTS, _OTHER_BYTES = 8192, 128 << 20  # limits of the sample of all texts, from which negatives are drawn


class NeuronpediaReader:
    """Opens the folder of one source (SAE, transcoder …) of an export, or all sources below a folder."""

    format = "neuronpedia"
    options = frozenset({"model", "site", "name", "subject"})

    def matches(self, path: Path) -> bool:
        """Whether there is a folder ``activations`` with batches at or below ``path``."""
        try:
            return any(True for _ in _find(path))
        except OSError:
            return False

    def read(self, path: Path, **options: Any) -> Sequence[NeuronpediaSource]:
        """Every source at or below ``path``; only one line of each is read.

        ``options``: ``model``, ``site`` and ``name`` override the export's values. ``subject`` is ignored, because an
        export names its model. Raises MissingFile, BadFile (naming file and line), BadConfig.
        """
        check_options(path, options, self.options)
        folders = sorted(set(_find(path)))
        if not folders:
            raise MissingFile(
                str(path),
                expected="a folder of an export with activations/batch-0.jsonl.gz, or a folder above several",
                seen="no such batch in this folder" if path.exists() else "no such file or folder",
                fix="download v1/MODEL/SOURCE/ of the bucket neuronpedia-datasets",
            )
        if len(folders) > 1 and options.get("name"):
            raise BadConfig(
                str(path),
                expected="one export, because the option name= is given",
                seen=f"{len(folders)} exports",
                fix="give the path of one export",
            )
        return [_open(folder, options) for folder in folders]


@dataclass(frozen=True, eq=False)
class NeuronpediaSource:
    """One source of an export. ``model_id`` and ``source_id``: the export's own names, which every line must repeat."""

    folder: Path
    model_id: str
    source_id: str
    site: Site
    label: str | None = None
    _known: list[FeatureId] = field(default_factory=list, repr=False)
    _explained: list[ExportedExplanations] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """Unique among exports: model, site, kind and the source's id."""
        return self.label or f"{self.site}/neuronpedia/{self.source_id}"

    @property
    def info(self) -> SourceInfo:
        """Metadata shown in tables. It has no width: exports leave out dead features, so they do not give the width."""
        return SourceInfo(self.name, "neuronpedia", self.site.path, declared={"negatives": UNVERIFIED})

    def features(self) -> Sequence[FeatureId]:
        """The features with an activating text, by index. Reads all of ``activations/``, once. Raises BadFile."""
        if not self._known:
            found: set[int] = set()
            for place, record in self._lines("activations"):
                if _values(place, record)[1].max() > 0:
                    found.add(int(index_of(place, record)))
                if len(found) > MOST_FEATURES:
                    raise bad_line(place, f"at most {MOST_FEATURES} features", "more")
            self._known.extend(str(index) for index in sorted(found))
        return self._known

    def examples(self, features: Sequence[FeatureId]) -> ReadyExamples:
        """Up to 2,000 activating texts per feature, and up to 8,192 texts of any feature; larger sets are sampled by hash.

        Raises UnknownFeature for a feature without an activating text, BadFile.
        """
        asked = set(features)
        shown = {feature: SampledTexts(_SHOWN_TEXTS, _SHOWN_BYTES) for feature in features}
        others = SampledTexts(_OTHER_TEXTS, _OTHER_BYTES)
        key = derive(0, "ready texts")
        for place, record in self._lines("activations"):
            feature = index_of(place, record)
            raw, values = _values(place, record)
            tokens = text_pieces(raw)
            text = derive(0, "text", *tokens)
            priority = int(hash_priorities(key, [text])[0])
            recorded = (feature, values) if feature in asked and values.max() > 0 else None
            valid = tuple(not boundary for boundary in boundaries(raw))
            others.offer(text, priority, tokens, valid, recorded)
            if recorded is not None:
                shown[feature].offer(text, priority, tokens, valid, recorded)
        for feature, sample in shown.items():
            if not sample.held:
                raise UnknownFeature(
                    f"feature {feature!r} of {self.name}",
                    expected="a feature with an activating text in the export",
                    seen="none",
                    fix="choose another feature, or download all batches of activations/",
                )
        said = self.densities()
        return ReadyExamples(
            _merged(shown, others), {feature: said[feature] for feature in features if feature in said}
        )

    def explanations(self, feature: FeatureId) -> Sequence[Explanation]:
        """The export's explanations of the feature, in file order. ``explainer``: the model; ``version``: its method.

        Reads all of ``explanations*/``, once. Raises BadFile.
        """
        if not self._explained:
            folders = sorted(self.folder.glob("explanations*"))
            self._explained.append(ExportedExplanations(folders, self.name, (self.model_id, self.source_id)))
        return self._explained[0].of(feature)

    def feature_files(self) -> list[Path]:
        """The files that ``densities`` reads; empty if the export has none."""
        return batches(self.folder / "features")

    def densities(self) -> dict[FeatureId, float]:
        """The share of tokens on which each feature fires, for features with a share in the export. Raises BadFile."""
        found = {}
        for place, record in self._lines("features"):
            feature = index_of(place, record)
            if (share := record.get("frac_nonzero")) is not None:
                if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                    raise bad_line(place, "frac_nonzero from 0 to 1", repr(share)[:40])
                found[feature] = float(share)
            if len(found) > MOST_FEATURES:
                raise bad_line(place, f"at most {MOST_FEATURES} features", "more")
        return found

    def _lines(self, part: str) -> Iterator[tuple[str, Record]]:
        """The records of all batches of a folder, each with its place (``FILE line N``)."""
        for file in batches(self.folder / part):
            for place, record in records(file):
                check_origin(place, record, (self.model_id, self.source_id))
                yield place, record


def _merged(shown: dict[FeatureId, SampledTexts], others: SampledTexts) -> list[ReadyText]:
    """Every sampled text once, sorted by hash, with the activations of all samples."""
    merged: dict[int, dict[FeatureId, NDArray[np.float32]]] = {}
    texts = {}
    for sample in (*shown.values(), others):
        for text, held in sample.held.items():
            texts[text] = held
            merged.setdefault(text, {}).update(held.activations)
    return [
        ReadyText(text, texts[text].tokens, np.array(texts[text].valid), merged[text], text in others.held)
        for text in sorted(texts)
    ]


def _open(folder: Path, options: dict[str, Any]) -> NeuronpediaSource:
    for file in batches(folder / "activations"):
        for place, record in records(file):
            model, source = origin_of(place, record)
            given = options.get("site")
            path = _site_of(source) if given is None else site_of_hook(str(given)) or str(given)
            site = Site(str(options.get("model") or model), path)
            return NeuronpediaSource(folder, model, source, site, options.get("name"))
    raise BadFile(
        str(folder / "activations"),
        expected="at least one line in a batch",
        seen="only empty batches",
        fix="download all batches of activations/ again",
    )


def _site_of(source: str) -> str:
    """``20-gemmascope-res-16k`` → layers.20. The site is only a label: no hidden state is read."""
    found = re.fullmatch(r"(\d{1,4})-(.+)", source)
    if found is None:
        return source
    words = set(re.split(r"[-_]", found[2].lower()))
    if words & {"mlp", "transcoder", "transcoders", "plt", "clt"}:
        return f"layers.{int(found[1])}.mlp"
    return f"layers.{int(found[1])}.self_attn" if words & {"att", "attn"} else f"layers.{int(found[1])}"


def _find(path: Path) -> Iterator[Path]:
    """Folders of sources at or below ``path``."""
    for depth in range(DEEPEST + 1):
        for folder in path.glob("/".join([*"*" * depth, "activations"])):
            if folder.is_dir() and batches(folder):
                yield folder.parent


def _values(place: str, record: Record) -> tuple[list[str], NDArray[np.float32]]:
    """The tokens as the export has them, and their activations: as many finite numbers as tokens."""
    tokens, values = record.get("tokens"), record.get("values")
    if not isinstance(tokens, list) or set(map(type, tokens)) != {str}:
        raise bad_line(place, "tokens, a list of strings", repr(tokens)[:60])
    if (longest := max(map(len, tokens))) > _LONGEST_TOKEN:
        raise bad_line(place, f"tokens of at most {_LONGEST_TOKEN} characters", str(longest))
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        raise bad_line(place, "values, a list of numbers", repr(values)[:60])
    if len(values) != len(tokens):
        raise bad_line(place, "as many values as tokens", f"{len(values)} values and {len(tokens)} tokens")
    try:
        with np.errstate(over="ignore"):
            numbers = np.array(values, np.float64).astype(np.float32)
    except OverflowError as error:
        raise bad_line(place, "finite values", "a number of more than 300 digits") from error
    if not np.isfinite(numbers).all():
        raise bad_line(place, "finite values", repr(values[int(np.isfinite(numbers).argmin())])[:40])
    return tokens, numbers
