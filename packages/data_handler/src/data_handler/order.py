"""Rows in order: the epochs of one source, and the lane that lets sources take turns.

A source's epoch is a sequence of blocks. A block is a pure function of (seed, epoch, source, number): its documents are
shuffled, cut, packed best-fit and the rows shuffled. So a half-packed row needs no state: a position is the block and the row in
it, and resuming makes one block anew. Of a finite source a block is a stretch of a permutation of all its documents; of a streamed
one it is the shuffle buffer: consecutive documents from a (shard, offset) on, which is what the state stores.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_handler.config import SHUFFLE_BUFFER, SourceConfig
from data_handler.corpus import Corpus, heldout_limit
from data_handler.encoding import BATCH_CHARACTERS, Encoder
from data_handler.errors import UserError
from data_handler.mixing import Weights, permutation, permuted, whose_turn
from data_handler.packing import Piece, Row, Store, best_fit, cut
from data_handler.sources import Reader, Record
from data_handler.split import is_heldout

BLOCK_ROWS = 1024
"""Rows in a block of a finite source, about."""
BLOCK_DOCUMENTS = 1 << 16
STREAM_ROWS = 128
"""A shuffle buffer is filled until it holds this many rows: fewer would be packed worse."""
STREAM_DOCUMENTS = 128


class Format(NamedTuple):
    """How rows are made, and which part of the sources they are made from.

    Attributes:
        capacity: tokens a row.
        buffer: rows open at a time; 0 gives each piece its own row.
        seed: of the order.
        share: held-out share; these documents are left out.
        lane: which of the lanes, from 0.
        lanes: how many there are.
    """

    capacity: int
    buffer: int
    seed: int
    share: float
    lane: int
    lanes: int


class RowSource(Protocol):
    """The endless rows of one source in one lane."""

    def next(self) -> Row:
        """Return the next row; after an error, the same again."""
        ...

    def state(self) -> dict[str, int]:
        """Return the position of the next row."""
        ...


class IndexedRows:
    """Rows of a finite source: every token of every document exactly once an epoch, over all lanes together."""

    def __init__(self, corpus: Corpus, name: str, form: Format, state: Mapping[str, int] | None = None) -> None:
        """Prepare at the state's position, or the beginning.

        Raises:
            UserError: if there are fewer documents than lanes.
        """
        if len(corpus) < form.lanes:
            raise too_few(name, form)
        self.corpus, self.name, self.form = corpus, name, form
        self._documents = block_documents(corpus, form)
        self._epoch, self._block, self._row = (state[key] for key in ("epoch", "block", "row")) if state else (0, 0, 0)
        self._rows: list[Row] | None = None

    def next(self) -> Row:
        """Return the next row."""
        rows = self._rows if self._rows is not None else self._plan()
        while self._row >= len(rows):
            self._block, self._row = self._block + 1, 0
            rows = self._plan()
        self._row += 1
        return rows[self._row - 1]

    def state(self) -> dict[str, int]:
        """Return epoch, block in this lane's share of it, and row in the block."""
        return {"epoch": self._epoch, "block": self._block, "row": self._row}

    def _plan(self) -> list[Row]:
        """Make the block; past the last of an epoch, the first of the next."""
        first = (self._block * self.form.lanes + self.form.lane) * self._documents
        if first >= len(self.corpus):
            self._epoch, self._block = self._epoch + 1, 0
            first = self.form.lane * self._documents
        form, key = self.form, (self.form.seed, self._epoch, self.name)
        positions = np.arange(first, min(first + self._documents, len(self.corpus)))
        documents = permuted(positions, len(self.corpus), "documents", *key)
        if form.share:
            documents = documents[self.corpus.digests(documents) >= heldout_limit(form.share)]
        pieces = self.corpus.pieces(documents, form.capacity)
        packed = [Row(used, items) for used, items in best_fit(pieces, form.capacity, form.buffer)]
        self._rows = [packed[i] for i in permutation(len(packed), "rows", *key, self._block, form.lane)]
        return self._rows


class StreamedRows:
    """Rows of a source that is read and tokenised as it goes.

    The shards take another order every epoch and are dealt to the lanes; if there are fewer shards than lanes, every lane reads
    all of them and takes each so many-th document. Documents are shuffled within the buffer. An epoch ends where the shards do.
    """

    def __init__(
        self, source: SourceConfig, reader: Reader, encoder: Encoder, form: Format, state: Mapping[str, int] | None = None
    ) -> None:
        """Prepare at the state's position, or the beginning; nothing is read yet."""
        self.source, self.reader, self.encoder, self.form = source, reader, encoder, form
        self.wanted = SHUFFLE_BUFFER if source.shuffle_buffer is None else source.shuffle_buffer
        self._cursor = _Cursor(*(state[key] for key in _Cursor._fields)) if state else _Cursor(0, 0, 0, 0, 0)
        self._row = state["row"] if state else 0
        self._rows: list[Row] | None = None
        self._behind = self._cursor
        self._records: Iterator[tuple[_Cursor, Record]] | None = None

    def next(self) -> Row:
        """Return the next row.

        Raises:
            UserError: if the source cannot be read, or has no document for this lane.
        """
        if self._rows is None:
            self._load(self._cursor, self._row)
        while self._row >= len(self._rows or ()):
            self._load(self._behind, 0)
        self._row += 1
        assert self._rows is not None
        return self._rows[self._row - 1]

    def state(self) -> dict[str, int]:
        """Return where the buffer begins (see `_Cursor`), and the row in it."""
        return {**self._cursor._asdict(), "row": self._row}

    def _load(self, start: "_Cursor", row: int) -> None:
        """Fill the buffer from a cursor on and make its rows; nothing changes if that fails."""
        stores, behind = self._fill(start)
        while not stores:
            if (start.shard, start.offset) == (0, 0):
                raise too_few(self.source.name, self.form)
            start = _Cursor(start.epoch + 1, 0, 0, 0, 0)
            stores, behind = self._fill(start)
        key = (self.form.seed, start.epoch, self.source.name, self.form.lane, start.buffer)
        shuffled = [stores[i] for i in permutation(len(stores), "documents", *key)] if self.wanted > 1 else stores
        capacity = self.form.capacity
        pieces = ((size, Piece(store, at, size)) for store in shuffled for at, size in cut(len(store.tokens), capacity))
        packed = [Row(used, items) for used, items in best_fit(pieces, capacity, self.form.buffer)]
        self._rows = [packed[i] for i in permutation(len(packed), "rows", *key)] if self.wanted > 1 else packed
        self._cursor, self._behind, self._row = start, behind, row

    def _fill(self, start: "_Cursor") -> tuple[list[Store], "_Cursor"]:
        """Return the documents of the buffer that begins at `start`, and the cursor behind them; none at the end of an epoch."""
        if self._records is None or self._behind != start:
            self._records = self._from(start)
        stores: list[Store] = []
        tokens, behind = 0, start
        try:
            while len(stores) < self.wanted or tokens < STREAM_ROWS * self.form.capacity:
                group, behind = _take(self._records, min(STREAM_DOCUMENTS, max(1, self.wanted - len(stores))), behind)
                if not group:
                    break
                found = self.encoder.encode(group, f"source {self.source.name}")
                stores += [store for store in found if len(store.tokens)]
                tokens += sum(len(store.tokens) for store in found)
        except UserError:
            self._records = None
            raise
        return stores, behind._replace(buffer=start.buffer + 1)

    def _from(self, start: "_Cursor") -> "Iterator[tuple[_Cursor, Record]]":
        """Yield this lane's training documents from a cursor to the end of its epoch, each with the cursor behind it."""
        form, count = self.form, len(self.reader.shards())
        order = permutation(count, "shards", form.seed, start.epoch, self.source.name) if self.wanted > 1 else np.arange(count)
        dealt = count >= form.lanes
        mine = order[form.lane :: form.lanes] if dealt else order
        offset, seen = start.offset, start.seen
        for number in range(start.shard, len(mine)):
            for at, record in self.reader.read(int(mine[number]), offset):
                seen += 1
                if (dealt or (seen - 1) % form.lanes == form.lane) and not is_heldout(record.text, form.share):
                    yield _Cursor(start.epoch, number, at, seen, start.buffer), record
            offset, seen = 0, 0


class _Cursor(NamedTuple):
    """A place in a streamed source: epoch, shard in the lane's order, offset in it, documents before that, buffers before that."""

    epoch: int
    shard: int
    offset: int
    seen: int
    buffer: int


class Lane:
    """One lane of the stream: its sources take turns so that their shares of its tokens follow the weights."""

    def __init__(
        self, sources: Sequence[RowSource], weights: Weights, form: Format, state: Mapping[str, Any] | None = None
    ) -> None:
        """Prepare at the state's position, or the beginning."""
        self.sources, self.weights, self.form = sources, weights, form
        self.rows = 0
        self.tokens = [0] * len(sources)
        self._since, self._drawn = 0, [0] * len(sources)
        self._shares, self._owed = [0.0] * len(sources), [0.0] * len(sources)
        if state:
            self.rows, self.tokens = state["rows"], list(state["tokens"])
            self._since, self._drawn = state["since"], list(state["drawn"])
            # A state from before shares could change has neither.
            self._shares = list(state.get("shares", weights.at(self.rows * form.lanes + form.lane)[1]))
            self._owed = list(state.get("owed", self._owed))

    def next(self) -> tuple[int, Row]:
        """Return (index of the source, row) of the lane's next row; after an error, the same again."""
        since, shares = self.weights.at(self.rows * self.form.lanes + self.form.lane)
        if since != self._since:
            # What was drawn under other weights is no debt, but for the rest of a row: without it, weights that change at every
            # step would be rounded to whole rows a step, always in the same way.
            total, before = sum(self._drawn), zip(self._owed, self._shares, self._drawn, strict=True)
            self._owed = [owed + share * total - drawn for owed, share, drawn in before]
            self._since, self._drawn = since, [0] * len(self.sources)
        self._shares = list(shares)
        index = whose_turn(shares, self._drawn, self._owed)
        row = self.sources[index].next()
        self.rows += 1
        self._drawn[index] += row.used
        self.tokens[index] += row.used
        return index, row

    def state(self) -> dict[str, Any]:
        """Return the position as plain values: rows and tokens of each source so far, and where each source is."""
        drawn = {"rows": self.rows, "tokens": [*self.tokens], "since": self._since, "drawn": [*self._drawn]}
        drawn |= {"shares": [*self._shares], "owed": [*self._owed]}
        return {**drawn, "sources": [source.state() for source in self.sources]}


def block_documents(corpus: Corpus, form: Format) -> int:
    """Return how many documents a block has: about `BLOCK_ROWS` rows of them, but at least one block a lane."""
    wanted = -(-BLOCK_ROWS * form.capacity * len(corpus) // max(1, corpus.tokens))
    return max(1, min(wanted, BLOCK_DOCUMENTS, len(corpus) // form.lanes))


def too_few(name: str, form: Format) -> UserError:
    """Return the error for a source that leaves a lane without a document."""
    if form.lanes == 1:
        return UserError(f"source {name} has no document for training: give it at least one document with text")
    return UserError(
        f"source {name} has too few documents for {form.lanes} lanes (lane {form.lane} has none): lower lanes, or give it more"
    )


def _take(records: Iterable[tuple[_Cursor, Record]], count: int, behind: _Cursor) -> tuple[list[Record], _Cursor]:
    """Return up to `count` records, or about `BATCH_CHARACTERS` of them, and the cursor behind the last."""
    group: list[Record] = []
    characters = 0
    for cursor, record in records:
        group.append(record)
        behind, characters = cursor, characters + len(record.text)
        if len(group) == count or characters >= BATCH_CHARACTERS:
            break
    return group, behind
