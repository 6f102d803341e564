"""The row stream of one split of a data configuration."""

import hashlib
from collections.abc import Iterator
from itertools import count, islice

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_handler.config import DataConfig, SourceConfig
from data_handler.corpus import Corpus, build_corpus, encode, endless_rows, heldout_rows
from data_handler.errors import UserError
from data_handler.mixing import interleave
from data_handler.packing import Row, best_fit, cut, row_tensors
from data_handler.sources import documents
from data_handler.split import content_digest, is_heldout

HELDOUT_POOL = 8
"""Held-out documents are tokenised until they hold this many times the tokens wanted: enough to hear many of them."""


class PackedStream:
    """Rows of packed documents, in an order that is a pure function of (seed, epoch, weights).

    A row holds documents of one source. Each document ends with the tokenizer's end-of-sequence token; one that is
    longer than a row is cut into row-sized pieces, each of which is a document of its own to attention and starts at
    position 0. Within an epoch of a source every token of every document occurs exactly once; epochs of different
    sources end at different times, as weights and sizes have it. Sources take turns so that their shares of the tokens
    follow the weights.

    Finite sources are read and tokenised once, at the first call of `rows`, and stay in memory (4 bytes a token). A
    `hub` source is streamed in its own order, unshuffled, and starting in its middle replays it up to there.

    Attributes:
        domains: the sources' names; a row's `domain` is an index into them.
        endless: whether the rows never end (split "train").
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
        self._corpora: dict[str, Corpus] = {}
        self._buffer = config.packing_buffer if config.packing else 0
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._padding = int(next(i for i in ids if i is not None))

    def rows(self, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield rows from number `start` on; row k is the same whatever the start.

        Yields:
            `input_ids`, `labels` (unshifted; -100 at each document's first token and on padding), `position_ids`,
            `document_ids` (1.. in a row, 0 = padding), int64 [T] each, and `domain`, int64 [].

        Raises:
            UserError: if a source cannot be read or has no document on this side of the split.
        """
        if start < 0:
            raise UserError(f"a stream starts at row 0 or later, not at {start}")
        for source in self.config.sources:
            if source.kind != "hub" or not self.endless:
                self._corpus(source)
        return self._tensors(start)

    def fingerprint(self) -> str:
        """Return a digest of what decides the rows: sources, weights, format, seed, and every token of the finite sources.

        Of a `hub` source only its configuration is in it: its text is not read ahead.

        Raises:
            UserError: if a source cannot be read or has no document on this side of the split.
        """
        vocabulary = self.tokenizer.get_vocab()
        digest = hashlib.sha256(repr((self.config, self.seed, self.split, sorted(vocabulary.items()))).encode())
        for source in self.config.sources:
            if source.kind != "hub":
                corpus = self._corpus(source)
                digest.update(corpus.offsets.tobytes())
                digest.update(corpus.tokens.tobytes())
        return digest.hexdigest()

    def _tensors(self, start: int) -> Iterator[dict[str, Tensor]]:
        merged = self._train_rows() if self.endless else self._heldout_rows()
        for domain, row in islice(merged, start, None):
            yield row_tensors(row.pieces, self.config.sequence_length, domain, self._padding)

    def _train_rows(self) -> Iterator[tuple[int, Row]]:
        length, sources = self.config.sequence_length, self.config.sources
        streams = [
            self._streamed_rows(s) if s.kind == "hub" else endless_rows(self._corpus(s), length, self._buffer, self.seed, s.name)
            for s in sources
        ]
        return interleave(streams, [source.weight for source in sources])

    def _heldout_rows(self) -> Iterator[tuple[int, Row]]:
        length = self.config.sequence_length
        for domain, source in enumerate(self.config.sources):
            for row in heldout_rows(self._corpus(source), length, self._buffer, self._heldout_limit(source)):
                yield domain, row

    def _streamed_rows(self, source: SourceConfig) -> Iterator[Row]:
        length = self.config.sequence_length
        for _epoch in count():
            documents = encode(self._texts(source), self.tokenizer)
            pieces = ((size, ids[at : at + size]) for ids in documents for at, size in cut(len(ids), length))
            empty = True
            for used, items in best_fit(pieces, length, self._buffer):
                empty = False
                yield Row(used, items)
            if empty:
                raise self._no_documents(source)

    def _corpus(self, source: SourceConfig) -> Corpus:
        if source.name not in self._corpora:
            enough = float("inf") if self.endless else HELDOUT_POOL * self._heldout_limit(source)
            corpus = build_corpus(self._texts(source), self.tokenizer, f"{source.name} ({self.split})", enough)
            if not len(corpus):
                raise self._no_documents(source)
            self._corpora[source.name] = corpus
        return self._corpora[source.name]

    def _texts(self, source: SourceConfig) -> Iterator[str]:
        share = self.config.heldout_share
        chosen = (text for text in documents(source) if is_heldout(text, share) != self.endless)
        if self.endless or source.kind == "hub":
            return chosen
        # By hash: a fixed sample, where the listing's order would prefer the first files. A streamed set is never listed.
        return iter(sorted(chosen, key=content_digest))

    def _heldout_limit(self, source: SourceConfig) -> int:
        total = sum(s.weight for s in self.config.sources)
        return max(2, int(self.config.heldout_tokens * source.weight / total))

    def _no_documents(self, source: SourceConfig) -> UserError:
        if next(documents(source), None) is None:
            return UserError(f"source {source.name} is empty: give it at least one document with text")
        change = "lower" if self.endless else "raise"
        part = "left for training" if self.endless else "held out"
        share = self.config.heldout_share
        return UserError(
            f"source {source.name} has no document {part} with heldout_share {share}: give it more documents or {change} the share"
        )
