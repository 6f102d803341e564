"""Methods that look for a mixture before the run: each trains proxies and ends with one set of weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from data_handler.mixture.controller import Controller, Static, Stratified
from data_handler.mixture.doremi import DoReMi
from data_handler.mixture.driver import Learner, drive
from data_handler.mixture.journal import Journal
from data_handler.mixture.regmix import best_mixture, fit, random_mixtures
from data_handler.mixture.simplex import bounded

CANDIDATES = 100_000
"""Mixtures that RegMix looks among."""

L = TypeVar("L", bound=Learner)


class MakeLearner(Protocol[L]):
    """Makes an untrained learner: the same for the same seed. `reference` is what its excess loss is measured against."""

    def __call__(self, seed: int, *, reference: L | None = None) -> L:
        """Return a learner."""
        ...


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Length of a proxy run."""

    steps: int
    rows_per_step: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """A mixture and what finding it cost.

    Attributes:
        weights: shares of the tokens, [K].
        trained_tokens: tokens that proxies and references were trained on.
        measured_tokens: tokens that went through models for measuring alone.
        detail: what else a method has to say (JSON).
    """

    weights: tuple[float, ...]
    trained_tokens: int
    measured_tokens: int
    detail: dict[str, Any] = field(default_factory=dict)


def proxy_run(make: MakeLearner[L], controller: Controller, budget: Budget, seed: int, on_step: Callable[[int], None]) -> Found:
    """Run an online controller on one proxy; the mixture is its `recommended` one, or the mean over the run where it moved.

    Args:
        make: makes the proxy.
        controller: any that needs no reference.
        budget: the proxy's length.
        seed: the proxy's.
        on_step: called after each step.
    """
    learner = make(seed)
    run = drive(learner, controller, budget.steps, budget.rows_per_step, on_step)
    return Found(
        weights=tuple(float(w) for w in bounded(run.average, controller.floor, controller.cap)),
        trained_tokens=learner.trained_tokens,
        measured_tokens=learner.measured_tokens,
        detail={"last": list(controller.recommended)},
    )


def doremi(
    make: MakeLearner[L], domains: Sequence[str], budget: Budget, seed: int, on_step: Callable[[int], None], **options: Any
) -> Found:
    """Train a reference on the first weights, then the proxy against it; return the proxy's average domain weights.

    Args:
        make: makes reference and proxy; both start from the same seed.
        domains: their names.
        budget: length of each of the two runs.
        seed: of both.
        on_step: called after each step of either.
        **options: of `DoReMi`.
    """
    controller = DoReMi(domains, **options)
    reference = make(seed)
    start = Static(domains, weights=controller.weights)
    drive(reference, start, budget.steps, budget.rows_per_step, on_step)
    proxy = make(seed, reference=reference)
    drive(proxy, controller, budget.steps, budget.rows_per_step, on_step)
    return Found(
        weights=tuple(float(w) for w in bounded(controller.recommended, controller.floor, controller.cap)),
        trained_tokens=reference.trained_tokens + proxy.trained_tokens,
        measured_tokens=reference.measured_tokens + proxy.measured_tokens,
    )


def regmix(
    make: MakeLearner[L],
    domains: Sequence[str],
    budget: Budget,
    seed: int,
    on_step: Callable[[int], None],
    *,
    proxies: int,
    target: Sequence[float],
    prior: Sequence[float] | None = None,
    kind: str = "quadratic",
    top: int = 100,
    floor: Any = 0.0,
    cap: Any = 1.0,
    journal: Journal | None = None,
) -> Found:
    """Train proxies on random mixtures, fit mixture to target loss, and return the best of `CANDIDATES` by the fit.

    Args:
        make: makes each proxy, all from the same seed: they differ in the mixture alone.
        domains: their names.
        budget: length of each proxy run.
        seed: of the proxies, the sweep and the search.
        on_step: called after each step.
        proxies: how many runs (the paper's 512 for 17 domains).
        target: [K], weights of the held-out losses in the target.
        prior: [K], centre of the random mixtures; None is the same for all.
        kind: of regression, a key of `regmix.KINDS`.
        top: how many of the best candidates are averaged.
        floor: of the result.
        cap: of the result.
        journal: keeps finished runs.
    """
    bounds = Controller(domains, floor=floor, cap=cap)  # so that a wrong bound fails before the sweep
    journal = journal or Journal(None, {})
    centre = [1.0] * len(domains) if prior is None else list(prior)
    mixtures = random_mixtures(proxies, centre, seed)

    def train(mixture: list[float]) -> dict[str, Any]:
        learner = make(seed)
        drive(learner, Static(domains, weights=mixture), budget.steps, budget.rows_per_step, on_step)
        losses = learner.validate()
        return {"losses": losses, "trained": learner.trained_tokens, "measured": learner.measured_tokens}

    runs = []
    for i, mixture in enumerate(mixtures.tolist()):
        if f"proxy {i}" in journal:
            for step in range(budget.steps):
                on_step(step + 1)  # so that a progress bar counts what was done before
        runs.append(journal.get(f"proxy {i}", partial(train, mixture)))
    wanted = np.asarray(target, np.float64) / np.sum(target)
    losses = np.array([run["losses"] for run in runs]) @ wanted
    model = fit(mixtures, losses, kind)
    weights = best_mixture(model.predict, random_mixtures(CANDIDATES, centre, seed + 1), top)
    return Found(
        weights=tuple(float(w) for w in bounded(weights, bounds.floor, bounds.cap)),
        trained_tokens=sum(run["trained"] for run in runs),
        measured_tokens=sum(run["measured"] for run in runs),
        detail={
            "proxies": proxies,
            "regression": kind,
            "error": model.error,
            "rank_correlation": model.rank_correlation,
            "predicted": float(model.predict(np.array([weights]))[0]),
            "best_proxy": float(losses.min()),
        },
    )


def baseline(domains: Sequence[str]) -> Found:
    """Return the stratified mixture, which costs nothing."""
    return Found(weights=Stratified(domains).weights, trained_tokens=0, measured_tokens=0)
