"""Aioli: a linear law of how the mixture moves the losses, estimated while training (Chen et al., arXiv 2411.05735)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_handler.errors import UserError
from data_handler.mixing import permutation
from data_handler.mixture.controller import VALIDATION, Bound, Controller, Observation
from data_handler.mixture.simplex import Weights, bounded, normalised, per_domain, smoothed_one_hot

Matrix = NDArray[np.float64]


def recover_law(drops: Matrix, factor: float) -> Matrix:
    """Return A of the law drop_i = sum_j A_ij p_j from the drops that smoothed one-hot mixtures gave.

    Args:
        drops: [M, K], how far loss i fell while training on the j-th smoothed one-hot, nats.
        factor: weight of the one-hot's own domain; must not be 1/K, where all K mixtures are the same.

    Returns:
        [M, K]: how far loss i would fall while training on domain j alone.
    """
    domains = drops.shape[1]
    mixtures = np.stack([smoothed_one_hot(domains, j, factor) for j in range(domains)])
    law = np.linalg.solve(mixtures, drops.T).T
    return np.asarray(law, np.float64)


def normalised_law(law: Matrix) -> Matrix:
    """Return the law shifted so that no entry is negative, over its sum; all equal where it is 0 throughout."""
    shifted: Matrix = law - min(0.0, float(law.min()))
    total = float(shifted.sum())
    shares: Matrix = shifted / total if total > 0 else np.full(law.shape, 1.0 / law.size)
    return shares


def aioli_step(weights: Weights, law: Matrix, step_size: float) -> Weights:
    """Return weights p_j exp(eta sum_i A_ij), normalised (exponentiated gradient descent on the summed loss)."""
    gain = step_size * law.sum(axis=0)
    return normalised(weights * np.exp(gain - gain.max()))


class Aioli(Controller):
    """Learns, in every round, what each domain does to each held-out loss, and moves the weights by it.

    A round is `every` steps long. It begins with `sweeps` passes over the domains in random order, `probe_steps` steps on
    each one's smoothed one-hot mixture, and the held-out losses between them; the law follows, the weights move, and the
    rest of the round is trained on them. There is no cost beside these measurements, but the probing is training on
    mixtures that are not the best.

    Deviations from the paper: `target` weighs the losses that are to fall (the paper sums over all, or over the domains of
    a downstream task, which is a target of zeros and ones); the order of a sweep comes from our own permutation.
    """

    method = "aioli"

    def __init__(
        self,
        domains: Sequence[str],
        *,
        every: int,
        probe_steps: int = 4,
        sweeps: int = 1,
        one_hot: float = 0.75,
        step_size: float = 0.2,
        average: float | None = None,
        target: Bound | None = None,
        weights: Bound | None = None,
        floor: Bound = 0.0,
        cap: Bound = 1.0,
        seed: int = 0,
    ) -> None:
        """Prepare the first round.

        Args:
            domains: their names.
            every: steps of a round (the paper's T / number of rounds).
            probe_steps: steps on each smoothed one-hot (`lp_steps`, 4).
            sweeps: passes over the domains in a round (`lp_rounds`).
            one_hot: the probed domain's weight (`one_hot_factor`); 1 leaves the law as measured.
            step_size: eta, 0.1 to 0.5 in the paper.
            average: share of the older laws in a moving average; the weights are then p_0 exp(eta sum A) of the averaged law,
                not accumulated over the rounds (as the authors' code has it). None accumulates.
            target: [K] weights of the held-out losses that are to fall; None is the same for all.
            weights: p_0; None is the same for all.
            floor: as for `Controller`; probing is within the bounds, too.
            cap: as for `Controller`.
            seed: of the order of the sweeps.

        Raises:
            UserError: if the numbers cannot be meant.
        """
        super().__init__(domains, weights=weights, floor=floor, cap=cap)
        size = len(self.domains)
        if size < 2:
            raise UserError("Aioli compares domains: give at least two")
        if probe_steps < 1 or sweeps < 1 or every <= probe_steps * sweeps * size:
            raise UserError(
                f"every={every} must be more than the {probe_steps * sweeps * size} steps of probing (probe_steps x sweeps x "
                "domains), each at least 1: raise every or lower the others"
            )
        if not 1.0 / size < one_hot <= 1.0:
            raise UserError(f"one_hot must be above 1/{size} and at most 1, not {one_hot!r}")
        if not step_size > 0 or (average is not None and not 0 <= average < 1):
            raise UserError(f"step_size must be above 0 and average in [0, 1) or None, not {step_size!r} and {average!r}")
        if self.floor.any() or (self.cap < 1).any():
            low, high = self.floor.max(), self.cap.min()
            if (1.0 - one_hot) / (size - 1) < low or one_hot > high:
                raise UserError(f"one_hot={one_hot} probes outside the floor {low} or the cap {high}: lower it")
        self.every, self.probe_steps, self.sweeps, self.one_hot = every, probe_steps, sweeps, one_hot
        self.step_size, self.average, self.seed = step_size, average, seed
        self.target = normalised(per_domain(1.0 if target is None else target, self.domains, "target"), "target")
        self._start: Weights = self._weights.copy()
        self._mixture: Weights = self._weights.copy()  # p, while probing samples something else
        self._previous: list[float] = []
        self._drops = np.zeros((size, size))
        self._averaged: Matrix | None = None

    @property
    def recommended(self) -> tuple[float, ...]:
        """The mixture p, also while probing."""
        return tuple(self._mixture.tolist())

    def needs(self, step: int) -> frozenset[str]:
        """Return the held-out losses, at the start of a round and at the end of each probe."""
        return frozenset() if self._probe(step) is None else frozenset({VALIDATION})

    def order(self, round_number: int) -> list[int]:
        """Return the domains in the order in which a round probes them, [sweeps * K]."""
        size = len(self.domains)
        return [int(k) for sweep in range(self.sweeps) for k in permutation(size, "aioli", self.seed, round_number, sweep)]

    def _probe(self, step: int) -> int | None:
        """Return how many probes of the round end with this step (0: it starts), or None in between."""
        done, rest = divmod(step % self.every, self.probe_steps)
        return done if not rest and done <= self.sweeps * len(self.domains) else None

    def _update(self, observation: Observation) -> Weights | None:
        done = self._probe(observation.step)
        if done is None:
            return None
        assert observation.validation is not None
        losses = np.asarray(observation.validation, np.float64)
        order = self.order(observation.step // self.every)
        if done == 0:
            self._drops = np.zeros_like(self._drops)
        elif self._previous:
            self._drops[:, order[done - 1]] += np.array(self._previous) - losses
        self._previous = losses.tolist()
        if done < len(order):
            return smoothed_one_hot(len(self.domains), order[done], self.one_hot)
        self._move()
        return self._mixture

    def _move(self) -> None:
        wanted = self.target > 0
        law = recover_law(self._drops / self.sweeps, self.one_hot)[wanted] * self.target[wanted, None]
        law = normalised_law(law)
        if self.average is None:
            moved = aioli_step(self._mixture, law, self.step_size)
        else:
            self._averaged = law if self._averaged is None else (1 - self.average) * law + self.average * self._averaged
            moved = aioli_step(self._start, self._averaged, self.step_size)
        self._mixture = bounded(moved, self.floor, self.cap)

    def _state(self) -> dict[str, Any]:
        return {
            "mixture": self._mixture.tolist(),
            "previous": list(self._previous),
            "drops": self._drops.tolist(),
            "averaged": None if self._averaged is None else self._averaged.tolist(),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._mixture, self._previous = np.array(state["mixture"], np.float64), list(state["previous"])
        self._drops = np.array(state["drops"], np.float64)
        self._averaged = None if state["averaged"] is None else np.array(state["averaged"], np.float64)
