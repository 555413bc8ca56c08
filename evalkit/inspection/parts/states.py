"""The inputs of an inspection's measurements, computed on first use: subject model, contexts, hidden states, codes.

``States`` serves every kind of dictionary. ``RqaeStates`` adds one pass over the corpus that encodes all tokens and, if
there is an SAE to compare with, records where its latents fire. After an interruption the pass resumes, and results on disk
are reused. Hidden states are never stored: parts that need them compute them again. Reads and writes ``corpus/``,
``codes/``, ``latents/`` and ``norm_limit.json`` (for a transcoder also ``norm_limit_out.json``) in the inspection's folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray

from evalkit.collect.activations import Collection, SelectedFeatures, active_entries
from evalkit.corpus.contexts import Corpus
from evalkit.corpus.tokenisation import tokenize_corpus
from evalkit.errors import BadFile, CorpusError
from evalkit.inspection.parts.settings import Settings
from evalkit.protocols import Progress
from evalkit.records import Activations, Site, TokenBatch
from evalkit.seeds import derive, hash_priorities
from evalkit.sources.rqae.shared_encoder import rqae_errors
from evalkit.sources.rqae.source import RqaeSource
from evalkit.subject.attention_sinks import sink_limit, valid_tokens
from evalkit.subject.download import find_model
from evalkit.subject.final_norm import normalise
from evalkit.subject.language_model import LanguageModel
from evalkit.subject.model import Dtype, Subject
from evalkit.util.atomic_files import storage_errors
from evalkit.util.sealed_files import read_sealed_json, write_sealed
from rqae import RQAE
from rqae.searching.code_store import CodeStore

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RqaeStates", "States"]

Ints = NDArray[np.int64]
_FORWARD = 16  # contexts per forward pass
_LIMIT_CONTEXTS = 32  # contexts on which the norm limit of attention sinks is measured


class States:
    """The subject model, the corpus, and hidden states at a dictionary's site.

    ``whole``: whether to load the whole model, which measuring losses requires.
    """

    def __init__(
        self, settings: Settings, site: Site, folder: Path, progress: Progress, *, whole: bool = False
    ) -> None:
        self._settings, self._folder, self._progress = settings, folder, progress
        self._whole = whole
        self._model_name = site.model
        self.site = site.path
        self.out = site.out

    @cached_property
    def language(self) -> LanguageModel:
        """The whole subject model."""
        settings = self._settings
        return LanguageModel.load(
            self._model,
            sites=self._sites,
            dtype=cast("Dtype", settings.dtype),
            device=settings.device,
            revision=settings.revision,
        )

    @cached_property
    def subject(self) -> Subject:
        """The subject model, read at the dictionary's site and, for a transcoder, at the site it reconstructs."""
        settings = self._settings
        if self._whole:
            return self.language.subject
        return Subject.load(
            self._model,
            sites=self._sites,
            dtype=cast("Dtype", settings.dtype),
            device=settings.device,
            revision=settings.revision,
        )

    @property
    def _model(self) -> str:
        return find_model(self._settings.model or self._model_name)

    @property
    def _sites(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.site, self.out)))

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus, tokenised into contexts."""
        settings = self._settings
        return tokenize_corpus(
            settings.corpus,
            self.subject.tokenizer,
            self._folder / "corpus",
            context_length=settings.context_length,
            add_bos=settings.prepend_bos,
            text_field=settings.text_field,
            split=settings.split,
            max_tokens=settings.max_tokens,
            revision=settings.revision,
            progress=self._progress,
        )

    @cached_property
    def limit(self) -> float:
        """The norm above which a state counts as an attention sink, from the median norm of a sample of contexts."""
        return self._limit_at(self.site, "norm_limit.json")

    def _limit_at(self, site: str, file: str) -> float:
        path = self._folder / file
        if path.exists():
            fix = "delete the folder"
            try:
                return float(read_sealed_json(path, expected="a number", fix=fix))
            except (ValueError, TypeError) as error:
                raise BadFile(str(path), expected="a number", seen="something else", fix=fix) from error
        norms = []
        for batch in self._batches(self.sample("norm limit", _LIMIT_CONTEXTS * self.corpus.context_length)):
            states = self.subject.hidden(batch.token_ids)[site]
            norms.append(states[torch.from_numpy(batch.valid)].norm(dim=-1).cpu())
        found = torch.cat(norms)
        if not len(found):
            raise CorpusError(
                self._settings.corpus, expected="at least one valid token", seen="none", fix="use a longer corpus"
            )
        limit = sink_limit(found)
        write_sealed(path, json.dumps(limit).encode())
        return limit

    def sample(self, purpose: str, tokens: int, seed: int = 0) -> Ints:
        """Contexts drawn by hash, ascending, with at least ``tokens`` tokens in total; all if the corpus has fewer."""
        corpus = self.corpus
        order = np.argsort(hash_priorities(derive(seed, purpose), np.arange(corpus.n_contexts)), kind="stable")
        before = np.cumsum(corpus.lengths[order]) - corpus.lengths[order]
        return np.sort(order[before < tokens])

    def hidden(self, contexts: Ints) -> Iterator[Tensor]:
        """Raw hidden states (n, d_model) of the contexts' valid tokens, without attention sinks, batch by batch."""
        for batch in self._batches(contexts):
            states = self._hidden(batch)
            yield states[valid_tokens(states, batch, self.limit)]

    def pairs(self, contexts: Ints) -> Iterator[tuple[Tensor, Tensor]]:
        """States (n, d_in) at the site read and (n, d_out) at the site reconstructed, batch by batch.

        Covers the contexts' valid tokens, without those that are an attention sink at either site.
        """
        out_limit = self.limit if self.out == self.site else self._limit_at(self.out, "norm_limit_out.json")
        for batch in self._batches(contexts):
            states = self.subject.hidden(batch.token_ids)
            read, wanted = states[self.site], states[self.out]
            valid = valid_tokens(read, batch, self.limit) & valid_tokens(wanted, batch, out_limit)
            yield read[valid], wanted[valid]

    def _hidden(self, batch: TokenBatch) -> Tensor:
        return self.subject.hidden(batch.token_ids)[self.site]

    def _batches(self, contexts: Ints) -> Iterator[TokenBatch]:
        for start in range(0, len(contexts), _FORWARD):
            yield self.corpus.batch(contexts[start : start + _FORWARD])


class RqaeStates(States):
    """The inputs of an RQAE's measurements.

    ``source``: the RQAE at full depth.
    ``latents``: the SAE latents to record, with a name for the folder of the record; None to record none.
    """

    def __init__(
        self,
        settings: Settings,
        source: RqaeSource,
        folder: Path,
        progress: Progress,
        *,
        whole: bool,
        latents: tuple[str, SelectedFeatures] | None = None,
    ) -> None:
        super().__init__(settings, source.site, folder, progress, whole=whole)
        self._source = source
        self._latents = latents

    @cached_property
    def source(self) -> RqaeSource:
        """The RQAE bound to the subject model, on its device. Raises SiteMismatch, BadConfig."""
        self._source.encoder.model.to(self.subject.device)
        return self._source.bind(self.subject.info)

    @property
    def rqae(self) -> RQAE:
        """The RQAE's model."""
        return self.source.encoder.model

    @cached_property
    def codes(self) -> CodeStore:
        """The codes of all valid tokens of the corpus except attention sinks."""
        source, corpus, limit = self.source, self.corpus, self.limit
        name = f"{source.label} of {corpus.settings.digest}, {corpus.n_tokens} tokens"
        shards = range(self._shards.n_shards)
        with storage_errors(self._folder / "codes"), rqae_errors(BadFile):
            return CodeStore.build(
                self._folder / "codes",
                self.rqae,
                shards,
                lambda shard: self._read_shard(shard, limit),
                identity=name,
                total=corpus.n_tokens,
                progress=self._progress,
            )

    @cached_property
    def tokens(self) -> Ints:
        """The number of each token of the code store, context × context length + position, ascending."""
        places = self.codes.places.astype(np.int64)
        return places[:, 0] * self.corpus.context_length + places[:, 1]

    @cached_property
    def activations(self) -> Activations:
        """Where the recorded latents fire. Raises BadFile if the record is damaged."""
        _ = self.codes  # runs the pass that records them, unless it has already run
        if missing := self._shards.missing():
            task = self._progress.start("record latents", len(missing), "shards")
            for shard in missing:
                self._read_shard(shard, self.limit)
                self._progress.advance(task)
            self._progress.finish(task)
        return self._shards.read(0)

    def normed(self, rows: Ints) -> Iterator[tuple[Ints, Tensor]]:
        """Final-normed states (n, d_model) for rows of the code store, batch by batch, with their indices into ``rows``.

        ``rows``: ascending.
        """
        places = self.codes.places[rows].astype(np.int64)
        task = self._progress.start("hidden states", len(rows), "tokens")
        for batch in self._batches(np.unique(places[:, 0])):
            low, high = np.searchsorted(places[:, 0], [batch.contexts[0], batch.contexts[-1] + 1])
            states = self._hidden(batch)[np.searchsorted(batch.contexts, places[low:high, 0]), places[low:high, 1]]
            yield np.arange(low, high), normalise(states, self.subject.info)
            self._progress.advance(task, int(high - low))
        self._progress.finish(task)

    @cached_property
    def _shards(self) -> Collection:
        name = self._latents[0] if self._latents else "none"
        return Collection(self._folder / "latents" / name, self.corpus.n_contexts, self.corpus.context_length)

    def _read_shard(self, shard: int, limit: float) -> tuple[Tensor, Ints]:
        """Final-normed states of a shard's valid tokens, with their (context, position); also records the latents."""
        normed, places, entries, count = [], [], [], 0
        record = self._latents is not None and not self._shards.path(shard).exists()
        for start, batch in enumerate(self._batches(self._shards.rows(shard))):
            states = self._hidden(batch)
            valid = valid_tokens(states, batch, limit)
            row, position = (index.cpu().numpy() for index in valid.nonzero(as_tuple=True))
            normed.append(normalise(states[valid], self.subject.info))
            places.append(np.stack([batch.contexts[row], position], axis=1))
            count += len(row)
            if record and self._latents is not None:
                tokens, features, values = active_entries(self._latents[1], states, batch, valid)
                entries.append((tokens + start * _FORWARD * self.corpus.context_length, features, values))
        if record:
            self._write_entries(shard, entries, count)
        return torch.cat(normed), np.concatenate(places)

    def _write_entries(self, shard: int, entries: list[tuple[Ints, Ints, NDArray[np.float32]]], count: int) -> None:
        tokens, features, values = (np.concatenate([entry[place] for entry in entries]) for place in range(3))
        arrays = {"0.token": tokens, "0.feature": features.astype(np.uint32), "0.value": values}
        self._shards.write(shard, {"n_tokens": np.array([count], np.int64), **arrays})
