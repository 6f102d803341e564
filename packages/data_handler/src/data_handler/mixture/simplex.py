"""Mixtures as points of the simplex: normalising, bounding, smoothed one-hots and grids. Pure functions of float64 arrays."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_handler.errors import UserError

Weights = NDArray[np.float64]
"""Shares of the training tokens, float64 [K]: at least 0, sum 1."""

TINY = 1e-12
"""A smaller share counts as 0; and what a weight of 0 counts as where the caps of the others force tokens onto it."""


def normalised(weights: ArrayLike, name: str = "weights") -> Weights:
    """Return weights divided by their sum, float64 [K].

    Raises:
        UserError: if there is none, one is negative or not finite, or all are 0.
    """
    values = np.asarray(weights, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all() or (values < 0).any() or not values.sum() > 0:
        raise UserError(f"{name} must be numbers of at least 0, not all 0, and were {values.tolist()}: change them")
    shares: Weights = values / values.sum()
    return shares


def bounded(weights: ArrayLike, floor: ArrayLike = 0.0, cap: ArrayLike = 1.0) -> Weights:
    """Return the mixture clip(s * w, floor, cap) whose sum is 1; weights that keep to the bounds are returned as they are.

    All weights that meet no bound keep their ratios, which projecting onto the polytope would not do.

    Args:
        weights: float [K], at least 0; need not sum to 1.
        floor: a number, or one a domain [K].
        cap: likewise.

    Raises:
        UserError: if no mixture keeps to the bounds.
    """
    shares = normalised(weights)
    low, high = np.broadcast_to(np.asarray(floor, np.float64), shares.shape), np.broadcast_to(np.asarray(cap, float), shares.shape)
    check_bounds(low, high, len(shares))
    if (shares >= low).all() and (shares <= high).all():
        return shares
    shares = np.where(shares < TINY, 0.0, shares)  # their scales would overflow
    if np.where(shares > 0, high, low).sum() < 1:  # what may hold tokens cannot hold all of them
        shares = np.maximum(shares, TINY)
    held = shares > 0
    scales = np.unique(np.concatenate([low[held] / shares[held], high[held] / shares[held]]))
    sums = np.array([np.clip(scale * shares, low, high).sum() for scale in scales])
    scale = np.interp(1.0, sums, scales)
    return normalised(np.clip(scale * shares, low, high))


def check_bounds(floor: ArrayLike, cap: ArrayLike, domains: int) -> None:
    """Check that some mixture keeps to the bounds.

    Raises:
        UserError: if none does.
    """
    low = np.broadcast_to(np.asarray(floor, np.float64), domains)
    high = np.broadcast_to(np.asarray(cap, np.float64), domains)
    if not ((low >= 0).all() and (low <= high).all() and low.sum() <= 1 + TINY and high.sum() >= 1 - TINY):
        raise UserError(
            f"no mixture of {domains} domains has weights from the floor {low.tolist()} to the cap {high.tolist()}: floors must "
            "sum to at most 1 and caps to at least 1"
        )


def smoothed_one_hot(domains: int, domain: int, factor: float) -> Weights:
    """Return `factor` on one domain and the rest spread evenly over the others, float64 [K]."""
    weights = np.full(domains, (1.0 - factor) / max(1, domains - 1))
    weights[domain] = factor
    return normalised(weights)


def simplex_grid(domains: int, parts: int) -> NDArray[np.float64]:
    """Return every mixture whose weights are multiples of 1 / parts, float64 [N, K], N = C(parts + K - 1, K - 1).

    4 domains at 10 parts give 286 points, at 4 parts 35.
    """
    points = [
        np.diff([-1, *bars, parts + domains - 1]) - 1  # stars and bars
        for bars in combinations(range(parts + domains - 1), domains - 1)
    ]
    return np.array(points, np.float64) / parts


def per_domain(value: float | Mapping[str, float] | Sequence[float], domains: Sequence[str], name: str) -> NDArray[np.float64]:
    """Return one number a domain, float64 [K], from one for all, one each in order, or a mapping by name.

    A domain that a mapping leaves out gets 0.

    Raises:
        UserError: for a name that is no domain, or the wrong number of values.
    """
    if isinstance(value, Mapping):
        if unknown := [key for key in value if key not in domains]:
            raise UserError(f"{name} names {unknown[0]!r}, which is no domain: use {', '.join(domains)}")
        return np.array([value.get(domain, 0.0) for domain in domains], np.float64)
    values = np.asarray(value, np.float64)
    if values.ndim and values.shape != (len(domains),):
        raise UserError(f"{name} has {values.size} values for {len(domains)} domains: give one each ({', '.join(domains)})")
    return np.broadcast_to(values, len(domains)).astype(np.float64)
