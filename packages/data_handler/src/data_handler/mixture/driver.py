"""Drive a learner by a controller: the loop that proxies and benchmarks share, without any trainer's machinery."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from data_handler.mixture.controller import EXCESS, INFLUENCE, VALIDATION, MixtureController, Observation
from data_handler.mixture.simplex import Weights


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimiser step: what `Observation` wants to know about it."""

    losses: Sequence[float]
    tokens: Sequence[int]
    excess: Sequence[float] | None = None


class Learner(Protocol):
    """A model with its data, one domain beside the other.

    Attributes:
        domains: their names.
        trained_tokens: tokens that went forward and backward to train.
        measured_tokens: tokens that went through for anything else: held-out losses, a reference, influence.
    """

    domains: tuple[str, ...]
    trained_tokens: int
    measured_tokens: int

    def step(self, rows: Sequence[int], token_weights: Sequence[float] | None, *, excess: bool) -> StepResult:
        """Take one optimiser step on the next rows of each domain.

        Args:
            rows: [K], how many rows of each domain.
            token_weights: [K], weight of each domain's tokens in the loss, which is divided by their sum; None is 1 each.
            excess: also return the excess loss over the learner's reference.
        """
        ...

    def validate(self) -> list[float]:
        """Return the mean held-out loss of each domain, nats a token, [K]."""
        ...

    def influence(self) -> list[list[float]]:
        """Return how much each domain helps each probe now (positive = helps), [K][P]."""
        ...


@dataclass
class Run:
    """What a driven run leaves.

    Attributes:
        history: (step, weights) at every change, the first at step 0.
        rows: rows trained on of each domain, [K].
        average: the mixture's mean over the steps, [K].
    """

    history: list[tuple[int, tuple[float, ...]]]
    rows: list[int] = field(default_factory=list)
    average: list[float] = field(default_factory=list)


class Apportioner:
    """Turns shares into whole rows: each row goes to the domain that is owed most, so counts are never off by much.

    Credits carry over from step to step and follow the weights of their time: a change makes up for nothing.
    """

    def __init__(self, domains: int) -> None:
        self.credit = np.zeros(domains)

    def rows(self, weights: Sequence[float] | Weights, count: int) -> list[int]:
        """Return how many of `count` rows each domain gets, [K]."""
        self.credit += np.asarray(weights, np.float64) * count
        taken = np.zeros(len(self.credit), np.int64)
        for _ in range(count):
            owed = int(np.argmax(self.credit))
            self.credit[owed] -= 1.0
            taken[owed] += 1
        return [int(n) for n in taken]


def drive(
    learner: Learner,
    controller: MixtureController,
    steps: int,
    rows_per_step: int,
    on_step: Callable[[int], None] | None = None,
) -> Run:
    """Train a learner for `steps` steps on the mixture that a controller decides.

    Args:
        learner: trained in place.
        controller: told about step 0 and every step after it.
        steps: optimiser steps.
        rows_per_step: rows of each, over all domains.
        on_step: called with each step's number, from 1.
    """
    size = len(learner.domains)
    apportioner = Apportioner(size)
    run = Run([(0, controller.weights)], [0] * size)
    total = np.zeros(size)

    def tell(step: int, result: StepResult) -> None:
        needs = controller.needs(step)
        answer = controller.observe(
            Observation(
                step=step,
                losses=result.losses,
                tokens=result.tokens,
                excess=result.excess,
                validation=learner.validate() if VALIDATION in needs else None,
                influence=learner.influence() if INFLUENCE in needs else None,
            )
        )
        if answer is not None:
            run.history.append((step, answer))

    tell(0, StepResult(losses=[float("nan")] * size, tokens=[0] * size))
    for step in range(1, steps + 1):
        weights, domain_weights = run.history[-1][1], controller.loss_weights
        token_weights = (
            None if domain_weights is None else [a / p if p else 0.0 for a, p in zip(domain_weights, weights, strict=True)]
        )
        rows = apportioner.rows(weights, rows_per_step)
        result = learner.step(rows, token_weights, excess=EXCESS in controller.needs(step))
        run.rows = [a + b for a, b in zip(run.rows, rows, strict=True)]
        total += weights
        if on_step is not None:
            on_step(step)
        # After the last step there is nothing left to change: nothing is measured for it.
        if step < steps or controller.needs(step) <= {EXCESS}:
            tell(step, result)
    run.average = (total / max(1, steps)).tolist()
    return run
