"""Reads latent caches of eai-delphi (formerly sae-auto-interp): ready examples instead of a dictionary and a forward pass.

Layout: ``latents/HOOKPOINT/`` with ``config.json`` (``model_name``: the model whose tokens are cached) and the splits that
``delphi_cache`` reads. A text is a cached sequence. A cache holds every activation, so a token without one was not active,
and negatives are verified window by window, even for dense features. Sequences are sampled by a hash of their tokens, the
same ones for every feature; memory is bounded whatever the size of the cache. To turn tokens into text, the model's
tokenizer is loaded when examples are requested. Knows no corpus, no windows and no model; writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from evalkit.corpus.token_text import token_pieces
from evalkit.errors import BadConfig, BadFile, CorpusError, MissingFile, UnknownFeature, require
from evalkit.protocols import ReadyExamples, ReadyText
from evalkit.records import FeatureId, Site, SourceInfo
from evalkit.seeds import derive, hash_priorities
from evalkit.sources.dumps.delphi_cache import Entries, LatentCache, split_files
from evalkit.sources.formats.common import bad_key, check_options, read_json
from evalkit.subject.download import KNOWN, MODELS, find_model
from evalkit.subject.sites import site_of_hook

__all__ = ["VERIFIED", "DelphiReader", "DelphiSource"]

VERIFIED = "verified: every activation is cached"
_SHOWN = 1000  # sequences per requested feature
_OTHERS, _OTHER_TOKENS = 8192, 1 << 21  # limits of the sample of all sequences, from which negatives are drawn
_MOST_ENTRIES = 1 << 25  # activations of all requested features in those sequences
_DEEPEST = 4  # levels of subfolders that are searched


class DelphiReader:
    """Opens the folder of one hook point of a cache, or all hook points below a folder."""

    format = "delphi"
    options = frozenset({"model", "site", "name", "subject", "tokenizer"})

    def matches(self, path: Path) -> bool:
        """Whether there is a folder with a config and splits at or below ``path``."""
        try:
            return any(True for _ in _find(path))
        except OSError:
            return False

    def read(self, path: Path, **options: Any) -> Sequence[DelphiSource]:
        """Every hook point at or below ``path``; only configs and headers are read.

        ``options``: ``tokenizer`` (a folder or hub id), ``model``, ``site`` and ``name`` override the values from the
        config and the folder. ``subject`` is ignored. Raises MissingFile, BadFile (naming file and tensor), BadConfig.
        """
        check_options(path, options, self.options)
        folders = sorted(set(_find(path)))
        if not folders:
            raise MissingFile(
                str(path),
                expected="a cache of latents: a folder with config.json and splits such as 0_4095.safetensors",
                seen="no such folder at or below it" if path.exists() else "no such file or folder",
                fix="give the folder latents/ of a run of eai-delphi, or the folder of one hook point in it",
            )
        if len(folders) > 1 and options.get("name"):
            raise BadConfig(
                str(path),
                expected="one hook point, because the option name= is given",
                seen=f"{len(folders)} hook points",
                fix="give the folder of one hook point",
            )
        return [_open(folder, options) for folder in folders]


@dataclass(frozen=True, eq=False)
class DelphiSource:
    """The latents of one hook point. ``tokenizer`` is a folder or a hub id."""

    cache: LatentCache
    site: Site
    tokenizer: str
    label: str | None = None
    verifies_negatives: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """Unique among caches: model, site and kind."""
        return self.label or f"{self.site}/delphi"

    @property
    def info(self) -> SourceInfo:
        """Metadata shown in tables."""
        return SourceInfo(self.name, "delphi", self.site.path, self.cache.width, declared={"negatives": VERIFIED})

    def features(self) -> Sequence[FeatureId]:
        """The latents that fire, by index. Reads the whole cache, once. Raises BadFile."""
        return [str(latent) for latent in np.flatnonzero(self.cache.counts).tolist()]

    def examples(self, features: Sequence[FeatureId]) -> ReadyExamples:
        """Up to 1,000 sequences per feature, and a sample of all sequences: up to 8,192, with at most two million tokens.

        Raises UnknownFeature for a feature that never fires, CorpusError (more activations than fit in memory), BadFile,
        MissingFile.
        """
        latents = [self._latent(feature) for feature in features]
        order = _order(self.cache)
        sequences, length = self.cache.shape
        others = order[: min(_OTHERS, max(1, _OTHER_TOKENS // length))]
        rank = np.full(sequences, sequences, dtype=np.int64)  # a duplicate keeps rank ``sequences``: it is not used
        rank[order] = np.arange(len(order))
        shown = _first_of_each(self.cache, latents, rank)
        held = self._held(latents, shown, rank, len(others))
        texts = self._texts(features, latents, held, np.union1d(others, shown % sequences), set(others.tolist()))
        shares = self.cache.counts[latents] / (sequences * length)
        return ReadyExamples(texts, dict(zip(features, shares.tolist(), strict=True)))

    def _latent(self, feature: FeatureId) -> int:
        known = feature.isascii() and feature.isdecimal() and int(feature) < self.cache.width
        if not known or not self.cache.counts[int(feature)]:
            raise UnknownFeature(
                f"feature {feature!r} of {self.name}",
                expected="a latent that fires in the cached sequences",
                seen="no activation in the cache",
                fix="choose another, or cache more tokens",
            )
        return int(feature)

    def _held(
        self, latents: Sequence[int], shown: NDArray[np.int64], rank: NDArray[np.int64], n_others: int
    ) -> Entries:
        """The activations of the requested latents in the selected sequences. Raises CorpusError."""
        nothing = np.zeros(0, dtype=np.int64)
        parts, count = [Entries(nothing, nothing, nothing, np.zeros(0, dtype=np.float32))], 0
        for entries in self.cache.entries(latents):
            rows = entries.sequences
            kept = (rank[rows] < n_others) | _among(entries.latents * len(rank) + rows, shown)
            kept &= rank[rows] < len(rank)
            parts.append(entries.where(kept))
            count += int(kept.sum())
            if count > _MOST_ENTRIES:
                raise CorpusError(
                    self.name,
                    expected=f"at most {_MOST_ENTRIES} activations of the selected features in the selected sequences",
                    seen=f"more, for {len(latents)} features",
                    fix="select fewer features",
                )
        arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in Entries.__slots__]
        return Entries(*arrays)

    def _texts(
        self,
        features: Sequence[FeatureId],
        latents: Sequence[int],
        held: Entries,
        sequences: NDArray[np.int64],
        others: set[int],
    ) -> list[ReadyText]:
        """Each sequence as a text, sorted by the hash of its tokens."""
        by_latent = dict(zip(latents, features, strict=True))
        order = np.lexsort((held.positions, held.latents, held.sequences))
        held = Entries(*(getattr(held, name)[order] for name in Entries.__slots__))
        bounds = np.searchsorted(held.sequences, np.stack((sequences, sequences + 1)))
        tokenizer = _load_tokenizer(self.tokenizer, self.cache.folder)
        plain = np.ones(len(tokenizer), dtype=bool)
        plain[_special_ids(tokenizer)] = False
        texts: dict[int, ReadyText] = {}
        for place, (sequence, ids) in enumerate(_rows(self.cache, sequences, len(tokenizer), self.tokenizer)):
            tokens = tuple(map(sys.intern, token_pieces(tokenizer, ids.tolist())))  # interned: token strings repeat
            start, stop = bounds[:, place]
            text = derive(0, "text", *tokens)
            activations = _Sparse(held.where(slice(start, stop)), by_latent, len(ids))
            texts[text] = ReadyText(text, tokens, plain[ids], activations, sequence in others)
        return [texts[text] for text in sorted(texts)]


class _Sparse(Mapping[FeatureId, NDArray[np.float32]]):
    """The activations in one sequence by feature; the dense array of a feature is built on access."""

    __slots__ = ("_held", "_length", "_spans")

    def __init__(self, held: Entries, names: Mapping[int, FeatureId], length: int) -> None:
        self._held, self._length = held, length
        latents, starts, counts = np.unique(held.latents, return_index=True, return_counts=True)
        found = zip(latents.tolist(), starts.tolist(), counts.tolist(), strict=True)
        self._spans = {names[latent]: (start, start + count) for latent, start, count in found}

    def __getitem__(self, feature: FeatureId) -> NDArray[np.float32]:
        start, stop = self._spans[feature]
        values = np.zeros(self._length, dtype=np.float32)
        np.maximum.at(values, self._held.positions[start:stop], self._held.values[start:stop])
        return values

    def __iter__(self) -> Iterator[FeatureId]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)


def _order(cache: LatentCache) -> NDArray[np.int64]:
    """Indices of the sequences in the order of a hash of their tokens, without duplicates (the first one is kept)."""
    hashes = np.zeros(cache.shape[0], dtype=np.uint64)
    for first, rows in cache.token_blocks():
        value = np.zeros(len(rows), dtype=np.uint64)
        for column in rows.T:
            value = hash_priorities(derive(0, "cached sequence"), value ^ column.astype(np.uint64))
        hashes[first : first + len(rows)] = value
    distinct, firsts = np.unique(hashes, return_index=True)
    return firsts[np.argsort(hash_priorities(derive(0, "ready texts"), distinct))]


def _first_of_each(cache: LatentCache, latents: Sequence[int], rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every latent, the ``_SHOWN`` sequences of the lowest rank in which it fires, sorted.

    Pairs are encoded as latent × (number of sequences) + sequence.
    """
    sequences = len(rank)

    def cut(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        owner, order = pairs // sequences, rank[pairs % sequences]
        ordered = np.lexsort((order, owner))
        ranks = np.arange(len(pairs)) - np.searchsorted(owner[ordered], owner[ordered])
        return np.sort(pairs[ordered][ranks < _SHOWN])

    waiting, room = [np.zeros(0, dtype=np.int64)], 4 * _SHOWN * len(latents)
    for entries in cache.entries(latents):
        pairs = entries.latents * sequences + entries.sequences
        waiting.append(_distinct(pairs[rank[entries.sequences] < sequences]))
        room -= len(waiting[-1])
        if room < 0:
            waiting, room = [cut(_distinct(np.concatenate(waiting)))], 4 * _SHOWN * len(latents)
    return cut(_distinct(np.concatenate(waiting)))


def _distinct(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """The distinct values, sorted."""
    ordered = np.sort(values)
    kept = np.ones(len(ordered), dtype=bool)
    kept[1:] = ordered[1:] != ordered[:-1]
    distinct: NDArray[np.int64] = ordered[kept]
    return distinct


def _among(values: NDArray[np.int64], known: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each value is in ``known``, which is sorted."""
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    found: NDArray[np.bool_] = known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values
    return found


def _rows(
    cache: LatentCache, sequences: NDArray[np.int64], vocabulary: int, tokenizer: str
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """The token ids of ``sequences`` (sorted). Raises BadFile for an id outside the tokenizer's vocabulary."""
    for first, rows in cache.token_blocks():
        for sequence in sequences[(sequences >= first) & (sequences < first + len(rows))].tolist():
            ids = rows[sequence - first]
            if ids.max() >= vocabulary:
                raise BadFile(
                    f"{cache.folder}: tokens",
                    expected=f"ids of the tokenizer {tokenizer}, all below {vocabulary}",
                    seen=f"{ids.max()} in sequence {sequence}",
                    fix="set the dictionary's option tokenizer to the tokenizer of the cached model",
                )
            yield sequence, ids


def _open(folder: Path, options: Mapping[str, Any]) -> DelphiSource:
    config = read_json(folder / "config.json")
    model = config.get("model_name")
    if not isinstance(model, str) or not model.strip():
        raise bad_key(folder / "config.json", "model_name", "the name of the cached model", model)
    owner = str(options.get("model") or PurePosixPath(model).name)
    given = str(options.get("site") or folder.name)
    site = Site(owner, site_of_hook(given) or given)
    return DelphiSource(LatentCache(folder), site, str(options.get("tokenizer") or model), options.get("name"))


def _find(path: Path) -> Iterator[Path]:
    """Folders of hook points at or below ``path``."""
    for depth in range(_DEEPEST + 1):
        for config in path.glob("/".join([*"*" * depth, "config.json"])):
            if split_files(config.parent):
                yield config.parent


def _load_tokenizer(name: str, folder: Path) -> Any:
    """The tokenizer of a local model, of a model downloaded before, or from the hub. Raises MissingFile, BadFile."""
    transformers: Any = require("transformers", "model")
    pulled = next((MODELS / known for known, model in KNOWN.items() if model.hub == name), None)
    place = str(pulled) if pulled is not None and pulled.is_dir() else find_model(name)
    try:
        return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except ImportError:
        raise
    except Exception as error:  # transformers raises many kinds if it cannot find or load a tokenizer
        seen = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise MissingFile(
            f"tokenizer {name} of {folder}",
            expected="the tokenizer of the cached model",
            seen=seen,
            fix="set the dictionary's option tokenizer to a folder with it, or check the network",
        ) from error


def _special_ids(tokenizer: Any) -> list[int]:
    """The ids of BOS, EOS, padding and other control tokens, which windows leave out."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return sorted({*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)})
