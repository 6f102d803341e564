"""The row stream of one split of a data configuration."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_handler.cache import cache_directory, tokenised
from data_handler.config import DataConfig, SourceConfig
from data_handler.corpus import Corpus, corpus_of, heldout_rows
from data_handler.encoding import Encoder, batches
from data_handler.errors import UserError
from data_handler.mixing import Weights
from data_handler.order import Format, IndexedRows, Lane, RowSource, StreamedRows
from data_handler.packing import Row, Store, row_tensors
from data_handler.sources import Reader, Record, open_source, records
from data_handler.split import is_heldout

ORDER = 2
"""Changes with the order of rows: part of the fingerprint, so that a run never goes on in another order."""
HELDOUT_POOL = 8
"""Of held-out documents so many times the tokens wanted are looked at: enough to hear many of them."""


class PackedStream:
    """Rows of packed documents, in an order that is a pure function of (seed, epoch, weights over time, rows before).

    A row holds documents of one source. Each document ends with the tokenizer's end-of-sequence token; one that is
    longer than a row is cut into row-sized pieces, each of which is a document of its own to attention and starts at
    position 0. Within an epoch of a source every token of every document occurs exactly once; epochs of different
    sources end at different times, as weights and sizes have it. Sources take turns so that their shares of the tokens
    follow the weights.

    Finite sources are read and tokenised once, at the first call of `rows`, and mapped from the cache. Streamed ones (`hub`, or
    `streaming: true`) are read while rows are drawn.

    Attributes:
        domains: the sources' names; a row's `domain` is an index into them.
        endless: whether the rows never end (split "train").
        padding: token id of unused positions.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, split: str = "train") -> None:
        """Prepare a stream; nothing is read yet.

        Args:
            config: sources, weights and row format.
            tokenizer: any Hugging Face tokenizer with a fast backend.
            seed: of the order of training; held-out rows do not depend on it.
            split: "train", endless, or "heldout", which ends.

        Raises:
            UserError: for an unknown split, or held-out rows of a configuration that holds out nothing.
        """
        if split not in ("train", "heldout"):
            raise UserError(f"split must be train or heldout, not {split!r}")
        if split == "heldout" and config.heldout_share == 0:
            raise UserError("nothing is held out because heldout_share is 0: set it above 0, for example 0.05")
        self.config = config
        self.tokenizer = tokenizer
        self.seed = seed
        self.split = split
        self.domains = tuple(source.name for source in config.sources)
        self.endless = split == "train"
        self._encoder = Encoder(tokenizer)
        self._corpora: dict[str, tuple[Corpus, str]] = {}
        self._readers: dict[str, Reader] = {}
        self._heldout: list[tuple[int, Row]] | None = None
        self._buffer = config.packing_buffer if config.packing else 0
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.padding = int(next(i for i in ids if i is not None))

    def rows(self, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield rows from number `start` on, with the configured weights; row k is the same whatever the start.

        Rows before `start` are laid out, not filled in (streamed sources are read, though); `BatchLoader` goes on from a state
        instead.

        Yields:
            `input_ids`, `labels` (unshifted; -100 at each document's first token, on padding, and on what is not to be learnt),
            `position_ids`, `document_ids` (1.. in a row, 0 = padding), int64 [T] each, and `domain`, int64 [].

        Raises:
            UserError: if a source cannot be read or has no document on this side of the split.
        """
        if start < 0:
            raise UserError(f"a stream starts at row 0 or later, not at {start}")
        self.open()
        return self._tensors(start)

    def open(self) -> None:
        """Read and tokenise what is needed before the first row.

        Raises:
            UserError: if a source cannot be read or has no document on this side of the split.
        """
        if not self.endless:
            self.heldout_rows()
            return
        for source in self.config.sources:
            if source.streamed:
                self._reader(source).shards()
            elif not self._corpus(source)[0].holds_training(self.config.heldout_share):
                raise self._no_documents(source)

    def weights(self) -> Weights:
        """Return the configured weights as a history without changes."""
        return Weights.constant(self.domains, [source.weight for source in self.config.sources])

    def lane(self, lane: int, weights: Weights, state: Mapping[str, Any] | None = None) -> Lane:
        """Return a lane at a state's position, or at its beginning.

        Args:
            lane: from 0 to `config.lanes` - 1.
            weights: the history that it follows; changes to it are followed, too.
            state: of `Lane.state`.
        """
        config = self.config
        form = Format(config.sequence_length, self._buffer, self.seed, config.heldout_share, lane, config.lanes)
        states = state["sources"] if state else [None] * len(config.sources)
        sources = [self._rows_of(source, form, at) for source, at in zip(config.sources, states, strict=True)]
        return Lane(sources, weights, form, state)

    def heldout_rows(self) -> list[tuple[int, Row]]:
        """Return (domain, row) of the held-out split."""
        if self._heldout is None:
            self._heldout = [(d, row) for d, source in enumerate(self.config.sources) for row in self._heldout_of(source)]
        return self._heldout

    def fingerprint(self) -> str:
        """Return a digest of what decides the rows: sources, weights, format, seed, and every token of the finite sources.

        Of a streamed source only its configuration is in it: its text is not read ahead.

        Raises:
            UserError: if a source cannot be read or has no document on this side of the split.
        """
        self.open()
        config = replace(self.config, cache_dir=None)
        digest = hashlib.sha256(repr((ORDER, config, self.seed, self.split, self._encoder.digest)).encode())
        for source in self.config.sources:
            if not source.streamed:
                digest.update(self._corpus(source)[1].encode())
        return digest.hexdigest()

    def _tensors(self, start: int) -> Iterator[dict[str, Tensor]]:
        length = self.config.sequence_length
        if not self.endless:
            for domain, row in self.heldout_rows()[start:]:
                yield row_tensors(row, length, domain, self.padding)
            return
        weights = self.weights()
        lanes = [self.lane(number, weights) for number in range(self.config.lanes)]
        number = 0
        while True:
            domain, row = lanes[number % len(lanes)].next()
            if number >= start:
                yield row_tensors(row, length, domain, self.padding)
            number += 1

    def _rows_of(self, source: SourceConfig, form: Format, state: Mapping[str, int] | None) -> RowSource:
        if source.streamed:
            return StreamedRows(source, self._reader(source), self._encoder, form, state)
        return IndexedRows(self._corpus(source)[0], source.name, form, state)

    def _heldout_of(self, source: SourceConfig) -> Iterator[Row]:
        total = sum(s.weight for s in self.config.sources)
        limit = max(2, int(self.config.heldout_tokens * source.weight / total))
        if source.streamed:
            corpus = corpus_of(self._first_heldout(source, HELDOUT_POOL * limit))
            documents = np.arange(len(corpus))
        else:
            corpus = self._corpus(source)[0]
            documents = corpus.heldout(self.config.heldout_share)
            ends = np.cumsum(corpus.spans(documents)[2])
            documents = documents[: int(np.searchsorted(ends, HELDOUT_POOL * limit)) + 1]
        if not len(documents):
            raise self._no_documents(source)
        return heldout_rows(corpus, documents, self.config.sequence_length, self._buffer, limit)

    def _first_heldout(self, source: SourceConfig, enough: int) -> list[Store]:
        """Return the first held-out documents of a streamed source, until they hold enough tokens."""
        found: list[Store] = []
        chosen: Iterator[Record] = (record for record in records(source) if is_heldout(record.text, self.config.heldout_share))
        for batch in batches(chosen):
            for store in self._encoder.encode(batch, f"source {source.name}"):
                found.append(store)
                enough -= len(store.tokens)
                if enough <= 0:
                    return found
        return found

    def _corpus(self, source: SourceConfig) -> tuple[Corpus, str]:
        if source.name not in self._corpora:
            self._corpora[source.name] = tokenised(source, self._encoder, cache_directory(self.config.cache_dir))
        return self._corpora[source.name]

    def _reader(self, source: SourceConfig) -> Reader:
        if source.name not in self._readers:
            self._readers[source.name] = open_source(source)
        return self._readers[source.name]

    def _no_documents(self, source: SourceConfig) -> UserError:
        if next(records(source), None) is None:
            return UserError(f"source {source.name} is empty: give it at least one document with text")
        change = "lower" if self.endless else "raise"
        part = "left for training" if self.endless else "held out"
        share = self.config.heldout_share
        return UserError(
            f"source {source.name} has no document {part} with heldout_share {share}: give it more documents or {change} the share"
        )
