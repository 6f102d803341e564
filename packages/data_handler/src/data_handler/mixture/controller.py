"""What every mixture method is to a training run: it sees losses, and now and then answers with new weights."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import ArrayLike

from data_handler.errors import UserError
from data_handler.mixture.simplex import Weights, bounded, check_bounds, normalised, per_domain

Bound = float | Mapping[str, float] | Sequence[float]
"""One number for all domains, one each in order, or a mapping by name."""

VALIDATION, EXCESS, INFLUENCE = "validation", "excess", "influence"
"""What a controller may need beside training losses and token counts."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a training run tells a controller after an optimiser step. All losses are in nats a token.

    Attributes:
        step: optimiser steps done; 0 is told once, before training, with no tokens.
        losses: [K], mean training loss of each domain's tokens in this step; not a number where it had none.
        tokens: [K], how many scored tokens those were, over all processes.
        validation: [K], mean held-out loss of each domain, where it was measured.
        excess: [K], mean over each domain's tokens of max(loss - the reference model's loss, 0); not a number where it had none.
        influence: [K][P], how much each domain helps each of P probes (positive = helps).
    """

    step: int
    losses: Sequence[float]
    tokens: Sequence[int]
    validation: Sequence[float] | None = None
    excess: Sequence[float] | None = None
    influence: Sequence[Sequence[float]] | None = None


class MixtureController(Protocol):
    """Decides the mixture of a run. Weights are shares of the tokens; they apply from the next step on.

    A trainer calls, before the first step (unless it resumes) and after every step, `needs(step)`, measures that, and
    then `observe(...)`; what it returns goes to the loader. The state is plain JSON, and a controller that loads it
    goes on bit for bit.
    """

    domains: tuple[str, ...]

    @property
    def weights(self) -> tuple[float, ...]:
        """The shares of the tokens that apply now, [K]."""
        ...

    @property
    def loss_weights(self) -> tuple[float, ...] | None:
        """Weights [K] of the domains in the training loss, where the method acts on the loss; else None."""
        ...

    @property
    def recommended(self) -> tuple[float, ...]:
        """The mixture that a method on a proxy run hands to the final run, [K]."""
        ...

    def needs(self, step: int) -> frozenset[str]:
        """Return which of `validation`, `excess` and `influence` the observation of this step must hold."""
        ...

    def observe(self, observation: Observation) -> tuple[float, ...] | None:
        """Take in a step; return the new weights, or None if they stay."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that decides what comes, as JSON has it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same method and domains."""
        ...


class Controller:
    """The part that all methods share: weights that stay. A method overrides `_update`, and `_state`/`_restore` for what it keeps.

    Attributes:
        domains: their names, in the order of every array.
        step: the last step that was observed, -1 before the first.
    """

    method: ClassVar[str]

    def __init__(self, domains: Sequence[str], *, weights: Bound | None = None, floor: Bound = 0.0, cap: Bound = 1.0) -> None:
        """Start from weights within bounds.

        Args:
            domains: their names.
            weights: what the run starts with; None is the same for all.
            floor: the least weight of a domain.
            cap: the largest weight; a mapping leaves unnamed domains at 1.

        Raises:
            UserError: if the numbers cannot be meant.
        """
        if not domains:
            raise UserError("a mixture needs at least one domain: name its sources")
        self.domains = tuple(domains)
        self.floor = per_domain(floor, self.domains, "floor")
        caps = {**dict.fromkeys(self.domains, 1.0), **cap} if isinstance(cap, Mapping) else cap
        self.cap = per_domain(caps, self.domains, "cap")
        check_bounds(self.floor, self.cap, len(self.domains))
        start = normalised(per_domain(1.0 if weights is None else weights, self.domains, "weights"))
        self._weights: Weights = bounded(start, self.floor, self.cap)
        self.step = -1

    @property
    def weights(self) -> tuple[float, ...]:
        """The shares of the tokens that apply now, [K]."""
        return tuple(self._weights.tolist())

    @property
    def loss_weights(self) -> tuple[float, ...] | None:
        """None: the method acts on what is sampled."""
        return None

    @property
    def recommended(self) -> tuple[float, ...]:
        """The weights that apply now."""
        return self.weights

    def needs(self, step: int) -> frozenset[str]:
        """Return nothing: training losses and token counts are enough."""
        return frozenset()

    def observe(self, observation: Observation) -> tuple[float, ...] | None:
        """Take in a step; return the new weights, or None if they stay.

        Raises:
            ValueError: if the observation lacks what `needs` names, is not of K domains, or its step is no later than the last.
        """
        if observation.step <= self.step:
            raise ValueError(f"step {observation.step} was observed after step {self.step}")
        for name in ("losses", "tokens", *self.needs(observation.step)):
            values = getattr(observation, name)
            if values is None or len(values) != len(self.domains):
                raise ValueError(f"the observation of step {observation.step} needs {name} of {len(self.domains)} domains")
        self.step = observation.step
        updated = self._update(observation)
        if updated is None:
            return None
        updated = bounded(updated, self.floor, self.cap)
        if np.array_equal(updated, self._weights):
            return None
        self._weights = updated
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """Return all that decides what comes, as JSON has it (numbers that are not known yet are null)."""
        common = {"method": self.method, "domains": list(self.domains), "step": self.step, "weights": self._weights.tolist()}
        return {**common, **self._state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same method and domains.

        Raises:
            UserError: if it is another method's, or of other domains.
        """
        own = (self.method, list(self.domains))
        if (state.get("method"), state.get("domains")) != own:
            raise UserError(
                f"the mixture's state is of {state.get('method')} over {state.get('domains')}, and this run has {own[0]} over "
                f"{own[1]}: resume with the mixture that the run was started with"
            )
        self.step = int(state["step"])
        self._weights = np.array(state["weights"], np.float64)
        self._restore(state)

    def _update(self, observation: Observation) -> Weights | None:
        """Return what the weights become, which bounds then apply to; None: they stay."""
        return None

    def _state(self) -> dict[str, Any]:
        """Return what the method remembers beside the weights, as JSON has it."""
        return {}

    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `_state` returned, among the rest of a state."""


class Static(Controller):
    """Fixed weights: what offline methods end with, and what a person writes."""

    method = "static"

    def __init__(self, domains: Sequence[str], *, weights: Bound) -> None:
        """Keep these weights (shares, or numbers in their ratio)."""
        super().__init__(domains, weights=weights)


class Stratified(Controller):
    """The same share for every domain: the baseline that no published method beats everywhere (Aioli, arXiv 2411.05735)."""

    method = "stratified"

    def __init__(self, domains: Sequence[str]) -> None:
        """Give every domain 1 / K."""
        super().__init__(domains)


def listed(values: ArrayLike) -> list[Any]:
    """Return an array as nested lists that JSON can hold: what is not a number becomes null."""
    result = np.asarray(values, np.float64).tolist()
    return [listed(v) if isinstance(v, list) else None if math.isnan(v) else v for v in result]


def unlisted(values: Sequence[Any]) -> Weights:
    """Return the array that `listed` wrote, float64."""
    return np.array(values, np.float64)
