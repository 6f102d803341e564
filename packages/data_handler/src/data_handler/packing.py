"""Documents into rows: cutting, best-fit packing, and the tensors of one row. Pure functions."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
Tokens = NDArray[np.int32]
Item = TypeVar("Item")


class Row(NamedTuple):
    """One row before it is a tensor: how many positions hold tokens, and the pieces in order."""

    used: int
    pieces: list[Tokens]


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


def row_tensors(pieces: Sequence[Tokens], length: int, domain: int, padding: int) -> dict[str, Tensor]:
    """Return one row as tensors (ARCHITECTURE.md, "Batch").

    Args:
        pieces: the token ids of each document or piece of one; each attends to itself alone and starts at position 0.
        length: T.
        domain: index of the source.
        padding: token id of unused positions (never attended to by a document, never a label).

    Returns:
        `input_ids`, `labels`, `position_ids`, `document_ids`, int64 [T] each, and `domain`, int64 [].
    """
    input_ids = np.full(length, padding, np.int64)
    labels = np.full(length, IGNORED, np.int64)
    position_ids = np.zeros(length, np.int64)
    document_ids = np.zeros(length, np.int64)
    start = 0
    for number, piece in enumerate(pieces, 1):
        end = start + len(piece)
        input_ids[start:end] = piece
        labels[start + 1 : end] = piece[1:]
        position_ids[start:end] = np.arange(len(piece))
        document_ids[start:end] = number
        start = end
    row = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "document_ids": document_ids}
    return {**{name: torch.from_numpy(value) for name, value in row.items()}, "domain": torch.tensor(domain)}
