"""DoReMi: group distributionally robust optimisation of a proxy against a reference (Xie et al., arXiv 2305.10429)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.errors import UserError
from data_handler.mixture.controller import EXCESS, Bound, Controller, Observation, listed, unlisted
from data_handler.mixture.simplex import Weights, normalised


def doremi_step(weights: Weights, excess: NDArray[np.float64], step_size: float = 1.0, smoothing: float = 1e-3) -> Weights:
    """Return the next domain weights: w exp(eta e), normalised, then (1 - c) w + c / K (Algorithm 1).

    Args:
        weights: w, [K].
        excess: e, [K], mean over a domain's tokens of max(loss - reference loss, 0), nats.
        step_size: eta, 1 in the paper.
        smoothing: c, 1e-3 in the paper (the authors' code defaults to 1e-4).
    """
    logits = np.log(weights) + step_size * excess
    updated = np.exp(logits - logits.max())
    return (1.0 - smoothing) * normalised(updated) + smoothing / len(weights)


class DoReMi(Controller):
    """The proxy run of DoReMi. `recommended` is the average of the domain weights over the steps: the method's result.

    A run costs a reference (trained on the reference weights, as a rule stratified) and this proxy.

    With `apply="loss"`, as published, the mixture stays as it is and `loss_weights` carries the domain weights: a trainer
    weighs domain k's tokens by loss_weights[k] / weights[k] and divides by the sum of those token weights. With
    `apply="sampling"`, for trainers that only take a mixture, the domain weights are the mixture itself.

    Deviations from the paper: a domain not heard of yet counts with the mean excess of the others (the authors' code
    starts every domain at ln V); `apply="sampling"`; floors and caps act on what is sampled, not on the domain weights.
    """

    method = "doremi"

    def __init__(
        self,
        domains: Sequence[str],
        *,
        step_size: float = 1.0,
        smoothing: float = 1e-3,
        apply: str = "loss",
        weights: Bound | None = None,
        floor: Bound = 0.0,
        cap: Bound = 1.0,
    ) -> None:
        """Prepare the proxy run.

        Args:
            domains: their names.
            step_size: eta.
            smoothing: c, in (0, 1].
            apply: "loss" or "sampling".
            weights: the mixture that is sampled, and the first domain weights; None is the same for all.
            floor: as for `Controller`.
            cap: as for `Controller`.

        Raises:
            UserError: if the numbers cannot be meant.
        """
        super().__init__(domains, weights=weights, floor=floor, cap=cap)
        if apply not in ("loss", "sampling"):
            raise UserError(f"apply must be loss or sampling, not {apply!r}")
        if not step_size > 0 or not 0 < smoothing <= 1:
            raise UserError(f"step_size must be above 0 and smoothing in (0, 1], not {step_size!r} and {smoothing!r}")
        if not (self._weights > 0).all():
            raise UserError("DoReMi starts from weights above 0, as its step multiplies them: change weights")
        self.step_size, self.smoothing, self.apply = step_size, smoothing, apply
        self._domain_weights: Weights = self._weights.copy()
        self._average: Weights = self._weights.copy()
        self._excess = np.full(len(self.domains), np.nan)
        self._updates = 0

    @property
    def loss_weights(self) -> tuple[float, ...] | None:
        """The domain weights, if they act on the loss."""
        return tuple(self._domain_weights.tolist()) if self.apply == "loss" else None

    @property
    def recommended(self) -> tuple[float, ...]:
        """The average of the domain weights over the steps so far (the first weights before any)."""
        return tuple(self._average.tolist())

    def needs(self, step: int) -> frozenset[str]:
        """Return the excess loss, at every step but step 0."""
        return frozenset({EXCESS}) if step else frozenset()

    def _update(self, observation: Observation) -> Weights | None:
        if observation.excess is None:
            return None
        tokens = np.asarray(observation.tokens)
        self._excess = np.where(tokens > 0, np.asarray(observation.excess, np.float64), self._excess)
        known = ~np.isnan(self._excess)
        if not known.any():
            return None
        excess = np.where(known, self._excess, self._excess[known].mean())
        self._domain_weights = doremi_step(self._domain_weights, excess, self.step_size, self.smoothing)
        self._updates += 1
        self._average = self._average + (self._domain_weights - self._average) / self._updates
        return self._domain_weights if self.apply == "sampling" else None

    def _state(self) -> dict[str, Any]:
        return {
            "domain_weights": self._domain_weights.tolist(),
            "average": self._average.tolist(),
            "excess": listed(self._excess),
            "updates": self._updates,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._domain_weights, self._average = np.array(state["domain_weights"]), np.array(state["average"])
        self._excess, self._updates = unlisted(state["excess"]), int(state["updates"])
