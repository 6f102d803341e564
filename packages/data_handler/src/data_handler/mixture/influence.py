"""Weights from influence: a domain counts by how much its examples help the probes (AutoMixer, MobileLLM-R1)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_handler.errors import UserError
from data_handler.mixture.controller import INFLUENCE, Bound, Controller, Observation
from data_handler.mixture.simplex import Weights, normalised, per_domain


def mean_influence(scores: ArrayLike, domains: ArrayLike, count: int) -> NDArray[np.float64]:
    """Return each domain's mean over its examples, float64 [K, P]; 0 for a domain without examples.

    Args:
        scores: [N] or [N, P], an example's influence on each probe (positive = helps).
        domains: int [N], the domain of each example.
        count: K.
    """
    values = np.asarray(scores, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    owner = np.asarray(domains)
    means = [values[owner == k].mean(axis=0) if (owner == k).any() else np.zeros(values.shape[1]) for k in range(count)]
    return np.array(means)


def influence_mixture(influence: ArrayLike) -> Weights:
    """Return w_k proportional to sum over probes of max(0, mean influence of k), float64 [K]; equal shares where none helps.

    Args:
        influence: [K] or [K, P], mean influence of each domain on each probe (positive = helps).
    """
    values = np.asarray(influence, np.float64)
    helps = np.maximum(values.reshape(len(values), -1), 0.0).sum(axis=1)
    return normalised(helps if helps.sum() > 0 else np.ones(len(helps)))


def size_caps(sizes: ArrayLike, budget: float, epochs: float) -> NDArray[np.float64]:
    """Return the weight at which a domain would be repeated `epochs` times, at most 1, float64 [K].

    Args:
        sizes: [K], tokens that each domain has.
        budget: tokens of the run.
        epochs: how often a token may be seen (4 loses little: Muennighoff et al. 2023).
    """
    caps: NDArray[np.float64] = np.minimum(1.0, np.asarray(sizes, np.float64) * epochs / budget)
    return caps


class InfluenceWeighted(Controller):
    """Moves the mixture to what the measured influence says, every `every` steps.

    w <- average * w + (1 - average) * influence_mixture(influence), within floors and caps. The floor keeps a domain that
    helps nothing today in the run, so that it can be measured and return. The cost is the measuring: gradients of samples.

    Deviations: AutoMixer measures on a proxy's checkpoints and mixes once; this acts in the run, by a moving average.
    """

    method = "influence"

    def __init__(
        self,
        domains: Sequence[str],
        *,
        every: int = 100,
        average: float = 0.5,
        sizes: Bound | None = None,
        budget: float | None = None,
        epochs: float = 4.0,
        weights: Bound | None = None,
        floor: Bound = 0.0,
        cap: Bound = 1.0,
    ) -> None:
        """Prepare.

        Args:
            domains: their names.
            every: steps between measurements; the first is before training.
            average: share of the old weights in the moving average, in [0, 1).
            sizes: [K], tokens that each domain has; with `budget`, lowers caps to `epochs` repetitions.
            budget: tokens of the run.
            epochs: repetitions that `sizes` and `budget` allow.
            weights: the start; None is the same for all.
            floor: as for `Controller`.
            cap: as for `Controller`.

        Raises:
            UserError: if the numbers cannot be meant.
        """
        if every < 1 or not 0 <= average < 1:
            raise UserError(f"every must be at least 1 and average in [0, 1), not {every} and {average!r}")
        if (sizes is None) != (budget is None):
            raise UserError("sizes and budget cap weights together: give both or neither")
        if sizes is not None and budget is not None:
            named = {**dict.fromkeys(domains, 1.0), **cap} if isinstance(cap, Mapping) else cap
            caps = np.minimum(per_domain(named, domains, "cap"), size_caps(per_domain(sizes, domains, "sizes"), budget, epochs))
            cap = [float(value) for value in caps]
        super().__init__(domains, weights=weights, floor=floor, cap=cap)
        self.every, self.average = every, average

    def needs(self, step: int) -> frozenset[str]:
        """Return the influence, every `every` steps."""
        return frozenset() if step % self.every else frozenset({INFLUENCE})

    def _update(self, observation: Observation) -> Weights | None:
        if observation.step % self.every:
            return None
        assert observation.influence is not None
        measured = influence_mixture(observation.influence)
        mixed: Weights = self.average * self._weights + (1.0 - self.average) * measured
        return mixed


def influence_weights(influence: ArrayLike, domains: Sequence[str], **bounds: Any) -> tuple[float, ...]:
    """Return the mixture of one measurement, [K]: `InfluenceWeighted` without a past (`bounds` as there)."""
    controller = InfluenceWeighted(domains, every=1, average=0.0, **bounds)
    values = np.asarray(influence, np.float64)
    values = values.reshape(len(values), -1)
    silent = [float("nan")] * len(controller.domains)
    controller.observe(Observation(step=0, losses=silent, tokens=[0] * len(silent), influence=values.tolist()))
    return controller.weights
