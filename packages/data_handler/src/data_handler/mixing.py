"""The order of things: permutations and the interleaving of sources, pure functions of seed, epoch and weights."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from data_handler.packing import Row


def permutation(count: int, *key: object) -> NDArray[np.int64]:
    """Return a permutation of `range(count)`, int64 [count], that is a function of the key alone.

    It sorts the raw output of PCG64, whose stream NumPy keeps from version to version.
    """
    digest = blake2b(repr(key).encode(), digest_size=16).digest()
    return np.argsort(np.random.PCG64(int.from_bytes(digest, "big")).random_raw(count), kind="stable")


def interleave(sources: Sequence[Iterator[Row]], weights: Sequence[float]) -> Iterator[tuple[int, Row]]:
    """Merge endless row streams so that their shares of the tokens follow the weights.

    The next row always comes from the source whose tokens so far lag furthest behind its share of all tokens so far
    (the first such source on a tie). No chance is involved.

    Yields:
        (index of the source, row).
    """
    total = sum(weights)
    shares = [weight / total for weight in weights]
    drawn, tokens = [0] * len(sources), 0
    while True:
        index = max(range(len(sources)), key=lambda i: shares[i] * tokens - drawn[i])
        row = next(sources[index], None)
        if row is None:
            return
        drawn[index] += row.used
        tokens += row.used
        yield index, row
