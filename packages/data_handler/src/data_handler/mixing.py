"""The order of things: permutations, weights over time, and whose turn it is. Pure functions of seed, epoch and weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.errors import UserError

Index = NDArray[np.int64]
SORTED_UP_TO = 1 << 16
FEISTEL_ROUNDS = 6


def permutation(count: int, *key: object) -> Index:
    """Return a permutation of `range(count)`, int64 [count], that is a function of the key alone.

    It sorts the raw output of PCG64, whose stream NumPy keeps from version to version.
    """
    return np.argsort(np.random.PCG64(_number(key)).random_raw(count), kind="stable")


def permuted(positions: Index, count: int, *key: object) -> Index:
    """Return what stands at some positions of a permutation of `range(count)`, without computing the others.

    Small ranges are sorted (`permutation`). Larger ones go through a Feistel network of six rounds on the next even power of two,
    walked until the result lies in the range (Black and Rogaway, "Ciphers with arbitrary finite domains", method 2), so that
    the cost does not depend on `count`.

    Args:
        positions: int64 [N], each in [0, count).
        count: size of the range.
        key: what decides the permutation.

    Returns:
        int64 [N].
    """
    if count <= SORTED_UP_TO:
        return permutation(count, *key)[positions]
    half = ((count - 1).bit_length() + 1) // 2
    keys = np.random.PCG64(_number(key)).random_raw(FEISTEL_ROUNDS)
    result = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := np.flatnonzero(result >= count)).size:
        result[outside] = _feistel(result[outside], half, keys)
    return result.astype(np.int64)


@dataclass
class Weights:
    """The shares of the sources over time: entry (row, shares) holds from that row of the stream on, until the next entry.

    Attributes:
        names: the sources.
        entries: rising in row; the first is for row 0, or for where a state was loaded.
        changes: how many entries there have been before the first of `entries`.
        digest: of those, chained, so that two histories can be compared though a state keeps only what is still to come.
    """

    names: tuple[str, ...]
    entries: list[tuple[int, tuple[float, ...]]]
    changes: int = 0
    digest: str = ""
    _at: int = field(default=0, repr=False)

    @classmethod
    def constant(cls, names: Sequence[str], weights: Sequence[float]) -> "Weights":
        """Return the history that starts with relative weights."""
        total = math.fsum(weights)
        return cls(tuple(names), [(0, tuple(weight / total for weight in weights))])

    def set(self, row: int, shares: Mapping[str, float]) -> None:
        """Let other shares hold from a row on; entries for later rows are replaced.

        Raises:
            UserError: if the shares do not name every source, are no shares, or do not sum to 1.
        """
        for name in shares:
            if name not in self.names:
                raise UserError(f"the weights name an unknown source {name}: the sources are {', '.join(self.names)}")
        for name in self.names:
            if name not in shares:
                raise UserError(f"the weights lack the source {name}: give every source a share, 0 to leave it out")
            value = shares[name]
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise UserError(f"the weight of source {name} must be a share of at least 0, not {value!r}")
        total = math.fsum(shares.values())
        if abs(total - 1) > 1e-6:
            raise UserError(f"the weights of {', '.join(self.names)} sum to {total:g}: divide them by that, shares sum to 1")
        kept = [entry for entry in self.entries if entry[0] < row]
        self.entries[:] = [*kept, (row, tuple(float(shares[name]) for name in self.names))]
        self._at = 0

    def at(self, row: int) -> tuple[int, tuple[float, ...]]:
        """Return the entry (since which row, shares) that holds for a row; quick where rows are asked for in order."""
        entries = self.entries
        if self._at >= len(entries) or entries[self._at][0] > row:
            self._at = 0
        while self._at + 1 < len(entries) and entries[self._at + 1][0] <= row:
            self._at += 1
        return entries[self._at]

    def state(self, row: int) -> dict[str, Any]:
        """Return what a stream needs from `row` on: the entry in force and those to come, as plain values."""
        current = self.entries.index(self.at(row))
        changes, digest = self.changes, self.digest
        for entry in self.entries[:current]:
            changes, digest = changes + 1, blake2b(repr((digest, entry)).encode(), digest_size=8).hexdigest()
        later = [[at, *shares] for at, shares in self.entries[current:]]
        return {"entries": later, "changes": changes, "digest": digest}

    @classmethod
    def from_state(cls, names: Sequence[str], state: Mapping[str, Any]) -> "Weights":
        """Return the history of a state (of `Weights.state`)."""
        entries = [(int(entry[0]), tuple(map(float, entry[1:]))) for entry in state["entries"]]
        if not entries or any(len(shares) != len(names) for _, shares in entries):
            raise UserError(f"the state's weights are not those of the sources {', '.join(names)}: resume from another state")
        return cls(tuple(names), entries, int(state["changes"]), str(state["digest"]))


def whose_turn(shares: Sequence[float], drawn: Sequence[int], owed: Sequence[float] | None = None) -> int:
    """Return the source whose tokens so far lag furthest behind its share of all tokens so far; the first on a tie.

    No chance is involved. A source without a share has no turn. So no lag grows beyond a row a source, however shares change, if
    `owed` carries it on.

    Args:
        shares: of the tokens, [K].
        drawn: tokens under these shares so far, [K].
        owed: tokens that each lagged behind before that, [K]; None is none.
    """
    total = sum(drawn)
    best, lag = -1, -math.inf
    for index, share in enumerate(shares):
        behind = share * total - drawn[index] + (owed[index] if owed else 0.0)
        if share > 0 and behind > lag:
            best, lag = index, behind
    return best


def _number(key: tuple[object, ...]) -> int:
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=16).digest(), "big")


def _feistel(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permute numbers of 2 * half bits, uint64 [N]."""
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> shift, values & mask
    for key in keys:
        mixed = (right + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) ^ key  # splitmix64's finaliser, wrapping around
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << shift) | right
