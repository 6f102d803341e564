"""Tokenised documents: lengths and addresses of many at once, and the held-out rows."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_handler.mixing import Index
from data_handler.packing import Piece, Row, Store, best_fit

Digests = NDArray[np.uint64]


class Part(NamedTuple):
    """Consecutive documents of a corpus.

    Attributes:
        store: their tokens, one document after the other.
        offsets: document d is `tokens[offsets[d] : offsets[d + 1]]`, int64 [D + 1].
        digests: of each document's text (`content_digest`), uint64 [D].
    """

    store: Store
    offsets: Index
    digests: Digests


class Corpus:
    """A finite source's documents, in parts that may be mapped from files; documents are numbered through."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Join parts; ones without documents are dropped."""
        self.parts = [part for part in parts if len(part.digests)]
        self._firsts = np.cumsum([0, *(len(part.digests) for part in self.parts)])
        self.tokens = sum(int(part.offsets[-1]) for part in self.parts)

    def __len__(self) -> int:
        """Return the number of documents."""
        return int(self._firsts[-1])

    def digests(self, documents: Index) -> Digests:
        """Return the content digests of some documents, uint64 [N]."""
        result = np.empty(len(documents), np.uint64)
        for part, at, local in self._by_part(documents):
            result[at] = part.digests[local]
        return result

    def spans(self, documents: Index) -> tuple[Index, Index, Index]:
        """Return (part, start in it, length) of some documents, int64 [N] each."""
        result = np.empty((3, len(documents)), np.int64)
        for number, (part, at, local) in enumerate(self._by_part(documents)):
            start = part.offsets[local]
            result[:, at] = np.broadcast_to(number, len(local)), start, part.offsets[local + 1] - start
        return result[0], result[1], result[2]

    def pieces(self, documents: Index, capacity: int) -> Iterator[tuple[int, Piece]]:
        """Yield (size, piece) of the documents in order, each cut into pieces of `capacity` tokens and a rest."""
        part, start, length = self.spans(documents)
        counts = -(-length // capacity)
        which = np.repeat(np.arange(len(documents)), counts)
        depth = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        sizes = np.minimum(capacity, length[which] - depth * capacity)
        starts = start[which] + depth * capacity
        stores = [p.store for p in self.parts]
        for size, number, at in zip(sizes.tolist(), part[which].tolist(), starts.tolist(), strict=True):
            yield size, Piece(stores[number], at, size)

    def heldout(self, share: float) -> Index:
        """Return the documents on the held-out side, by digest: a fixed sample, where file order would prefer the first files."""
        limit = heldout_limit(share)
        found = [np.flatnonzero(part.digests < limit) + first for part, first in zip(self.parts, self._firsts, strict=False)]
        chosen = np.concatenate([np.empty(0, np.int64), *found])
        by_digest: Index = chosen[np.argsort(self.digests(chosen), kind="stable")]
        return by_digest

    def holds_training(self, share: float) -> bool:
        """Say whether any document is left for training."""
        return any((part.digests >= heldout_limit(share)).any() for part in self.parts)

    def _by_part(self, documents: Index) -> Iterator[tuple[Part, Index, Index]]:
        """Yield each part with where its documents are among those asked for, and their numbers in it."""
        where = np.searchsorted(self._firsts, documents, side="right") - 1
        for number, part in enumerate(self.parts):
            at = np.flatnonzero(where == number)
            yield part, at, documents[at] - self._firsts[number]


def heldout_limit(share: float) -> np.uint64:
    """Return the digest below which a document is held out, exactly as `is_heldout` decides."""
    return np.uint64(math.ceil(share * 2.0**64))


def corpus_of(stores: Sequence[Store]) -> Corpus:
    """Return documents in memory as a corpus, in this order; their digests are not known and 0."""
    parts = [Part(store, np.array([0, len(store.tokens)]), np.zeros(1, np.uint64)) for store in stores]
    return Corpus(parts)


def heldout_rows(corpus: Corpus, documents: Index, capacity: int, buffer: int, limit: int) -> Iterator[Row]:
    """Yield rows of at most `limit` tokens: the first piece of every document, then the second, and so on.

    Taking pieces by depth lets many documents be heard, where one long document would otherwise fill the limit. The
    piece that passes the limit is shortened.
    """

    def pieces() -> Iterator[tuple[int, Piece]]:
        left = limit
        part, start, length = (values.tolist() for values in corpus.spans(documents))
        for depth in range(0, max(length, default=0), capacity):
            for number, first, size in zip(part, start, length, strict=True):
                if depth < size and left:
                    taken = min(capacity, size - depth, left)
                    yield taken, Piece(corpus.parts[number].store, first + depth, taken)
                    left -= taken
            if not left:
                return

    for used, items in best_fit(pieces(), capacity, buffer):
        yield Row(used, items)
