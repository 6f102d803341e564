"""RegMix: many small runs on random mixtures, a regression from mixture to loss, and a search in it (arXiv 2407.01492)."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_handler.errors import UserError
from data_handler.mixture.simplex import Weights, normalised

Array = NDArray[np.float64]
Predictor = Callable[[Array], Array]

STRENGTHS = np.logspace(-1.0, np.log10(5.0), 15)
"""Concentrations of the Dirichlet, as in the authors' code: from nearly one-hot to nearly the prior."""

RIDGE = np.logspace(-6, 1, 15)
"""Penalties that leave-one-out chooses from."""

FOLDS = 8
"""Of the cross-validation that says how far a regression can be believed."""


def random_mixtures(count: int, prior: ArrayLike, seed: int, *, temperature: float = 0.5, minimum: float = 2e-4) -> Array:
    """Return mixtures to train proxies on, float64 [N, K].

    Each is Dirichlet(strength * prior^temperature), with a strength drawn from `STRENGTHS`; weights below `minimum` become 0.

    Deviations from the authors' code: drawn directly, not 100 times as many with duplicates dropped and then a choice; no
    rounding to multiples of `minimum`; no bound on repetitions (use caps on the result).

    Args:
        count: N.
        prior: [K], for example the tokens that each domain has.
        seed: of the draw.
        temperature: flattens the prior.
        minimum: the least weight.
    """
    base = normalised(normalised(prior, "prior") ** temperature)
    if not (base > 0).all():
        raise UserError("the prior must be above 0 for every domain: leave a domain out of the data instead")
    generator = np.random.default_rng([seed, count])
    strengths = generator.choice(STRENGTHS, count)
    # Gamma draws over their sum are a Dirichlet; the tiny addend keeps a row of underflows from 0 / 0.
    draws = generator.standard_gamma(strengths[:, None] * base) + 1e-300
    mixtures = draws / draws.sum(axis=1, keepdims=True)
    mixtures = np.where(mixtures < minimum, 0.0, mixtures)
    shares: Array = mixtures / mixtures.sum(axis=1, keepdims=True)
    return shares


@dataclass(frozen=True)
class Fit:
    """A regression from mixture to loss.

    Attributes:
        predict: [N, K] mixtures to [N] losses.
        error: root mean square error in cross-validation, in the losses' unit.
        rank_correlation: Spearman's, of cross-validated predictions with the losses: what RegMix lives on.
    """

    predict: Predictor
    error: float
    rank_correlation: float


def fit(mixtures: ArrayLike, losses: ArrayLike, kind: str = "quadratic") -> Fit:
    """Fit a regression from mixture to loss.

    Kinds:
    * `linear`: ridge on the weights.
    * `quadratic`: ridge on Scheffe's mixture polynomial (weights and their pairwise products), which can have an optimum
      inside the simplex, as a linear one cannot. An addition to the paper.
    * `trees`: gradient-boosted trees that grow leaf by leaf. The paper's is LightGBM (1,000 trees, rate 0.01, leaves of 20
      runs); this is scikit-learn's, with 200 trees at rate 0.05, which costs a fifth, and leaves of N/16 runs, as 20 would
      leave sweeps of a few dozen nearly without splits.

    Args:
        mixtures: [N, K].
        losses: [N], the target loss of each run.
        kind: a key of `KINDS`.

    Raises:
        UserError: for an unknown kind, too few runs, a loss that is not finite, or `trees` without scikit-learn.
    """
    x, y = np.asarray(mixtures, np.float64), np.asarray(losses, np.float64)
    if kind not in KINDS:
        raise UserError(f"the regression must be one of {', '.join(KINDS)}, not {kind!r}")
    if len(x) <= x.shape[1]:
        raise UserError(f"{len(x)} proxy runs are too few for a regression over {x.shape[1]} domains: run more")
    if not np.isfinite(y).all():
        raise UserError(f"{int((~np.isfinite(y)).sum())} of the proxy runs have no finite loss: lower the learning rate")
    folds = np.arange(len(x)) % min(FOLDS, len(x))
    held = np.empty(len(y))
    for fold in range(folds.max() + 1):
        held[folds == fold] = KINDS[kind](x[folds != fold], y[folds != fold])(x[folds == fold])
    return Fit(KINDS[kind](x, y), float(np.sqrt(np.mean((held - y) ** 2))), spearman(held, y))


def best_mixture(predict: Predictor, candidates: ArrayLike, top: int = 100) -> Weights:
    """Return the mean of the `top` candidates with the lowest predicted loss, float64 [K].

    Args:
        predict: [N, K] to [N].
        candidates: [N, K], as a rule 100,000 `random_mixtures`.
        top: how many are averaged (the paper's 100).
    """
    points = np.asarray(candidates, np.float64)
    order = np.argsort(predict(points), kind="stable")[: max(1, top)]
    return normalised(points[order].mean(axis=0))


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Return the correlation of ranks (ties share theirs); 0 where one side is constant."""
    ranks = []
    for values in (np.asarray(a, np.float64), np.asarray(b, np.float64)):
        _, index, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[index])
    first, second = (r - r.mean() for r in ranks)
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum() / scale) if scale else 0.0


def _ridge(features: Callable[[Array], Array]) -> Callable[[Array, Array], Predictor]:
    def train(x: Array, y: Array) -> Predictor:
        design = features(x)
        centre, mean = design.mean(axis=0), float(y.mean())
        left, singular, right = np.linalg.svd(design - centre, full_matrices=False)
        projected = left.T @ (y - mean)
        best: tuple[float, Any] = (np.inf, None)
        for penalty in RIDGE * len(y):
            shrink = singular**2 / (singular**2 + penalty)
            leverage = (left**2 * shrink).sum(axis=1) + 1.0 / len(y)
            residual = (y - mean) - left @ (shrink * projected)
            error = float(np.mean((residual / np.maximum(1.0 - leverage, 1e-9)) ** 2))  # leave-one-out, exactly
            if error < best[0]:
                best = (error, right.T @ (singular / (singular**2 + penalty) * projected))
        slope = best[1]
        return lambda points: (features(points) - centre) @ slope + mean

    return train


def _quadratic(x: Array) -> Array:
    pairs = [x[:, i] * x[:, j] for i, j in combinations(range(x.shape[1]), 2)]
    return np.column_stack([x, *pairs])


def _trees(x: Array, y: Array) -> Predictor:
    try:
        from sklearn.ensemble import GradientBoostingRegressor  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("the regression `trees` needs scikit-learn: install it, or use quadratic") from None
    leaf = max(2, min(20, len(x) // 16))
    model = GradientBoostingRegressor(
        n_estimators=200, learning_rate=0.05, max_leaf_nodes=31, max_depth=None, min_samples_leaf=leaf, random_state=0
    )
    model.fit(x, y)
    return lambda points: np.asarray(model.predict(points), np.float64)


KINDS: dict[str, Callable[[Array, Array], Predictor]] = {
    "linear": _ridge(lambda x: x),
    "quadratic": _ridge(_quadratic),
    "trees": _trees,
}
