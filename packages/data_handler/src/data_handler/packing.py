"""Documents into rows: cutting, best-fit packing, and the tensors of rows. Pure functions."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
FIELDS = ("input_ids", "labels", "position_ids", "document_ids")
Item = TypeVar("Item")


class Store(NamedTuple):
    """Where tokens lie.

    Attributes:
        tokens: any integer type, [N]; in memory or mapped from a file.
        loss: bool [N], which tokens are learnt; None where all are.
    """

    tokens: NDArray[Any]
    loss: NDArray[np.bool_] | None = None


class Piece(NamedTuple):
    """A document, or a piece of one: `store.tokens[start : start + size]`."""

    store: Store
    start: int
    size: int


class Row(NamedTuple):
    """One row before it is a tensor: how many positions hold tokens, and the pieces in order."""

    used: int
    pieces: list[Piece]


def cut(length: int, capacity: int) -> Iterator[tuple[int, int]]:
    """Yield (start, size) of a document's pieces: all of `capacity` but the last."""
    for start in range(0, length, capacity):
        yield start, min(capacity, length - start)


def best_fit(pieces: Iterable[tuple[int, Item]], capacity: int, buffer: int) -> Iterator[tuple[int, list[Item]]]:
    """Pack pieces into rows, online best-fit with a bounded number of open rows.

    A piece goes into the open row with the least room that still takes it. If none does, a row is opened; if `buffer`
    rows are open already, the fullest is closed first. A full row is closed at once, the others at the end, oldest
    first. No piece is divided, lost or repeated.

    Args:
        pieces: (size, item), 1 <= size <= capacity.
        capacity: positions a row.
        buffer: rows open at a time; 0 gives each piece its own row.

    Yields:
        (positions used, items in order of arrival).
    """
    if buffer == 0:
        yield from ((size, [item]) for size, item in pieces)
        return
    rows: dict[int, list[Item]] = {}
    room: list[tuple[int, int]] = []  # (positions left, row number), sorted
    opened = 0
    for size, item in pieces:
        if size == capacity:
            yield capacity, [item]
            continue
        at = bisect_left(room, (size, -1))
        if at < len(room):
            left, number = room.pop(at)
        else:
            if len(room) == buffer:
                left, number = room.pop(0)
                yield capacity - left, rows.pop(number)
            left, number, opened = capacity, opened, opened + 1
            rows[number] = []
        rows[number].append(item)
        if left == size:
            yield capacity, rows.pop(number)
        else:
            insort(room, (left - size, number))
    spare = {number: left for left, number in room}
    for number, items in rows.items():
        yield capacity - spare[number], items


class Gathered(NamedTuple):
    """The least that says what rows hold: a third of the bytes of `fill`'s result, for the way between processes.

    Attributes:
        ids: int32 [B, T].
        sizes: of every piece and every stretch of padding, in order, int32 [P].
        numbers: of each, from 1 in a row, 0 for padding, int32 [P].
        unlearnt: bool [B, T], what no loss is taken of beyond first tokens and padding; None if nothing.
    """

    ids: NDArray[np.int32]
    sizes: NDArray[np.int32]
    numbers: NDArray[np.int32]
    unlearnt: NDArray[np.bool_] | None


def gather(rows: Sequence[Row], length: int, padding: int) -> Gathered:
    """Copy the tokens of rows of `length` positions from where they lie; unused positions get `padding`."""
    ids = np.full((len(rows), length), padding, np.int32)
    unlearnt: NDArray[np.bool_] | None = None
    sizes: list[int] = []
    numbers: list[int] = []
    for i, row in enumerate(rows):
        line, at = ids[i], 0
        for number, (store, start, size) in enumerate(row.pieces, 1):
            line[at : at + size] = store.tokens[start : start + size]
            if store.loss is not None:
                unlearnt = np.zeros(ids.shape, bool) if unlearnt is None else unlearnt
                np.logical_not(store.loss[start : start + size], out=unlearnt[i, at : at + size])
            sizes.append(size)
            numbers.append(number)
            at += size
        if at < length:
            sizes.append(length - at)
            numbers.append(0)
    return Gathered(ids, np.array(sizes, np.int32), np.array(numbers, np.int32), unlearnt)


def expand(gathered: Gathered) -> NDArray[np.int64]:
    """Lay gathered rows out as the arrays of a batch (ARCHITECTURE.md, "Batch").

    Each piece attends to itself alone and starts at position 0; its first token is no label, nor is what `Store.loss` leaves out.

    Returns:
        int64 [4, B, T]: `input_ids`, `labels`, `position_ids`, `document_ids` (0 = padding, 1.. in a row).
    """
    ids, sizes, numbers, unlearnt = gathered
    out = np.empty((4, *ids.shape), np.int64)
    labels, positions, documents = out[1], out[2], out[3]
    starts = np.cumsum(sizes, dtype=np.int64) - sizes
    out[0] = ids
    labels[:] = ids
    documents[:] = np.repeat(numbers, sizes).reshape(ids.shape)
    positions[:] = (np.arange(ids.size) - np.repeat(starts, sizes)).reshape(ids.shape)
    labels.reshape(-1)[starts] = IGNORED
    unused = documents == 0
    labels[unused] = IGNORED
    positions[unused] = 0
    if unlearnt is not None:
        labels[unlearnt] = IGNORED
    return out


def fill(rows: Sequence[Row], length: int, padding: int) -> NDArray[np.int64]:
    """Return rows as the arrays of a batch (see `expand`).

    Args:
        rows: B rows of pieces.
        length: T.
        padding: token id of unused positions (never attended to by a document, never a label).
    """
    return expand(gather(rows, length, padding))


def tensors(filled: NDArray[np.int64], domains: Sequence[int]) -> dict[str, Tensor]:
    """Return filled rows as a batch: `input_ids`, `labels`, `position_ids`, `document_ids` [B, T], and `domain` [B], all int64."""
    batch = dict(zip(FIELDS, torch.from_numpy(filled), strict=True))
    return {**batch, "domain": torch.tensor(domains, dtype=torch.int64)}


def row_tensors(row: Row, length: int, domain: int, padding: int) -> dict[str, Tensor]:
    """Return one row as tensors: the fields of `tensors` without the first dimension."""
    return {name: value[0] for name, value in tensors(fill([row], length, padding), [domain]).items()}
