"""Online Data Mixing: a bandit whose reward is a domain's training loss (Albalak et al., arXiv 2312.02406)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.errors import UserError
from data_handler.mixture.controller import Bound, Controller, Observation
from data_handler.mixture.simplex import Weights, per_domain

VARIANTS = ("group", "smoothed", "exp3")

REWARD_SCALE = 0.1
"""Plain Exp3 wants rewards of at most 1; the authors' code divides losses by 10."""


def exploration(domains: int, update: int) -> float:
    """Return eps_t = min(1/K, sqrt(ln K / (K t))), the least share of a domain at update t (from 1); eps_0 is 1/K."""
    if update < 1:
        return 1.0 / domains
    return min(1.0 / domains, math.sqrt(math.log(domains) / (domains * update)))


def policy(rewards: NDArray[np.float64], update: int, linear: bool) -> Weights:
    """Return pi_k = (1 - K eps_t) f(eps_{t-1} R_k) / sum_j f(eps_{t-1} R_j) + eps_t, float64 [K].

    Args:
        rewards: R, [K], estimated rewards.
        update: t, from 1.
        linear: f is the identity (the authors' code for batches of several domains) instead of exp (the paper). Rewards of 0
            throughout then give equal shares.
    """
    domains = len(rewards)
    now, before = exploration(domains, update), exploration(domains, update - 1)
    scores = before * rewards if linear else np.exp(before * (rewards - rewards.max()))
    total = scores.sum()
    shares = scores / total if total > 0 else np.full(domains, 1.0 / domains)
    mixture: Weights = (1.0 - domains * now) * shares + now
    return mixture


class OnlineDataMixing(Controller):
    """ODM, and the plain Exp3 that it comes from. It costs nothing but the losses of the training batches.

    Variants, with r_k the mean loss of domain k's tokens since the last update:
    * `group` (default): R_k <- a R_k + (1 - a) exp(r_k) and a linear policy, as the authors' code (`SmoothedMean`,
      `group_update`) does where a step holds several domains.
    * `smoothed`: the same average with the paper's exponential policy, as their code does for a batch of one domain.
    * `exp3`: R_k <- R_k + (r_k / 10) / pi_k, exponential policy (Auer et al. 2002).

    The reward is the loss itself, so a domain of high irreducible entropy looks like one with much to learn. `reference`
    is the guard: losses of a model that has learned what there is, taken off the reward. `cap` is a blunter one.

    Deviations from the paper: t counts updates, not steps; with `every` above 1 an update sees the token-weighted mean of
    the steps since the last; in `exp3` a domain's reward counts in proportion to its share of those tokens, which for a
    batch of one domain is the original and in expectation leaves its importance weight right; `reference`, `floor`
    and `cap` are additions.
    """

    method = "odm"

    def __init__(
        self,
        domains: Sequence[str],
        *,
        variant: str = "group",
        smoothing: float = 0.9,
        every: int = 1,
        warmup: int = 0,
        reference: Bound | None = None,
        weights: Bound | None = None,
        floor: Bound = 0.0,
        cap: Bound = 1.0,
    ) -> None:
        """Prepare the bandit.

        Args:
            domains: their names.
            variant: "group", "smoothed" or "exp3".
            smoothing: a, of the moving average (0.9 in the paper); `exp3` has none.
            every: steps between updates.
            warmup: steps in which the weights stay and nothing is learned.
            reference: [K] losses (nats a token) taken off the reward, which then is at least 0; None takes nothing off.
            weights: the start; None is the same for all.
            floor: as for `Controller`.
            cap: as for `Controller`.

        Raises:
            UserError: if the numbers cannot be meant.
        """
        super().__init__(domains, weights=weights, floor=floor, cap=cap)
        if variant not in VARIANTS:
            raise UserError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}")
        if not 0 <= smoothing < 1:
            raise UserError(f"smoothing must be at least 0 and below 1, not {smoothing!r}")
        if every < 1 or warmup < 0:
            raise UserError(f"every must be at least 1 and warmup at least 0, not {every} and {warmup}")
        self.variant, self.smoothing, self.every, self.warmup = variant, smoothing, every, warmup
        self.reference = None if reference is None else per_domain(reference, self.domains, "reference")
        size = len(self.domains)
        self._rewards, self._updates = np.zeros(size), 0
        self._sums, self._tokens = np.zeros(size), np.zeros(size)

    def _update(self, observation: Observation) -> Weights | None:
        if observation.step <= self.warmup:
            return None
        tokens = np.asarray(observation.tokens, np.float64)
        self._sums += np.where(tokens > 0, np.nan_to_num(np.asarray(observation.losses, np.float64)) * tokens, 0.0)
        self._tokens += tokens
        if observation.step % self.every or not self._tokens.sum():
            return None
        seen = self._tokens > 0
        reward = self._sums / np.where(seen, self._tokens, 1.0)
        if self.reference is not None:
            reward = np.maximum(reward - self.reference, 0.0)
        if self.variant == "exp3":
            share = self._tokens / self._tokens.sum()
            self._rewards += np.where(seen, REWARD_SCALE * share * reward / np.maximum(self._weights, 1e-12), 0.0)
        else:
            average = self.smoothing * self._rewards + (1.0 - self.smoothing) * np.exp(reward)
            self._rewards = np.where(seen, average, self._rewards)
        self._updates += 1
        self._sums, self._tokens = np.zeros_like(self._sums), np.zeros_like(self._tokens)
        return policy(self._rewards, self._updates, linear=self.variant == "group")

    def _state(self) -> dict[str, Any]:
        return {
            "rewards": self._rewards.tolist(),
            "updates": self._updates,
            "sums": self._sums.tolist(),
            "tokens": self._tokens.tolist(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._rewards, self._updates = np.array(state["rewards"], np.float64), int(state["updates"])
        self._sums, self._tokens = np.array(state["sums"], np.float64), np.array(state["tokens"], np.float64)
