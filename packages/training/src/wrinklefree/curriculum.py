"""Phases of a run, in which weights of objectives, the learning rate and lambda move: pure functions of the run's progress."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from wrinklefree.mapping import require

WAYS: dict[str, Callable[[float], float]] = {
    "step": lambda share: 1.0,
    "linear": lambda share: share,
    "cosine": lambda share: 0.5 * (1.0 - math.cos(math.pi * share)),
}
"""How far a phase has gone from the values before it to its own, at a share in [0, 1) of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseConfig:
    """A part of a run. What it leaves out stays as the phase before left it.

    Attributes:
        until: where it ends, as a share of the run or in tokens, see `CurriculumConfig.by`.
        interpolation: "step" has its values from its beginning on; "linear" and "cosine" reach them at its end, from those of the
            phase before (of the first, those of the run).
        objectives: name to what the objective's weight is multiplied by.
        learning_rate: what the schedule's rate is multiplied by.
        lambda_value: the quantisation strength, in place of `training.lambda_schedule`'s.
        data: source to its share of the tokens, from the phase's beginning on; shares are not interpolated.
    """

    until: float
    interpolation: Literal["step", "linear", "cosine"] = "step"
    objectives: dict[str, float] = field(default_factory=dict)
    learning_rate: float | None = None
    lambda_value: float | None = None
    data: dict[str, float] | None = None

    def repeats_the_run(self, *, lambda_stays: bool) -> bool:
        """Whether it says what holds without any phase; `lambda_stays` if lambda is 1 throughout without one."""
        factors = (*self.objectives.values(), 1.0 if self.learning_rate is None else self.learning_rate)
        strength = self.lambda_value is None or (lambda_stays and self.lambda_value == 1.0)
        return all(factor == 1.0 for factor in factors) and strength and self.data is None


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumConfig:
    """The phases of a run, in order; none leaves everything as it is.

    Attributes:
        by: what `until` counts: "ratio" of the run's steps, or "tokens", padding included.
        phases: the last one's values hold to the end of the run.
    """

    by: Literal["ratio", "tokens"] = "ratio"
    phases: tuple[PhaseConfig, ...] = ()

    def __post_init__(self) -> None:
        ends = [0.0, *(phase.until for phase in self.phases)]
        for i, phase in enumerate(self.phases):
            where = f"curriculum.phases.{i}"
            require(ends[i] < ends[i + 1], f"{where}.until must lie after {ends[i]:g}, where the phase begins, not {phase.until:g}")
            require(self.by == "tokens" or phase.until <= 1, f"{where}.until is a share of the run, at most 1, not {phase.until:g}")
            for name, value in phase.objectives.items():
                require(0 <= value < math.inf, f"{where}.objectives.{name} must be a number of at least 0, not {value}")
            rate, strength = phase.learning_rate, phase.lambda_value
            require(rate is None or 0 <= rate < math.inf, f"{where}.learning_rate must be a number of at least 0, not {rate}")
            require(strength is None or 0 <= strength <= 1, f"{where}.lambda_value must lie in [0, 1], not {strength}")
            acts = phase.objectives or rate is not None or strength is not None or phase.data is not None
            require(
                bool(acts), f"{where} changes nothing: give it objectives, learning_rate, lambda_value or data, or leave it out"
            )


@dataclass(frozen=True, slots=True)
class Point:
    """What holds at a step.

    Attributes:
        objectives: name to a factor of its weight; 1 where none is named.
        learning_rate: a factor of the schedule's rate.
        lambda_value: the quantisation strength; None leaves it to its schedule.
    """

    objectives: Mapping[str, float]
    learning_rate: float
    lambda_value: float | None


def point_at(config: CurriculumConfig, progress: float, total: float = 1.0) -> Point:
    """Return what holds at a share of the run.

    Args:
        config: the phases.
        progress: the share that lies behind, in [0, 1).
        total: what a run is as a whole in the unit of `until`: 1 by ratio, else its tokens.
    """
    names = {name for phase in config.phases for name in phase.objectives}
    sets_lambda = any(phase.lambda_value is not None for phase in config.phases)
    values = {**{f"objectives.{name}": 1.0 for name in names}, "learning_rate": 1.0, **({"lambda": 1.0} if sets_lambda else {})}
    begin = 0.0
    for phase in config.phases:
        end = phase.until / total
        targets = values | {f"objectives.{name}": value for name, value in phase.objectives.items()}
        targets |= {} if phase.learning_rate is None else {"learning_rate": phase.learning_rate}
        targets |= {} if phase.lambda_value is None else {"lambda": phase.lambda_value}
        if progress >= end:
            values, begin = targets, end
            continue
        share = WAYS[phase.interpolation]((progress - begin) / (end - begin))
        # Not a + (b - a) * share: a phase that has arrived, or stands still, is exact.
        values = {key: targets[key] if share == 1.0 else values[key] * (1 - share) + targets[key] * share for key in values}
        break
    factors = {name: values[f"objectives.{name}"] for name in names}
    return Point(factors, values["learning_rate"], values.get("lambda"))


def steps_before(until: float, total: float, steps: int) -> int:
    """Return how many of a run's steps begin before a place in it, compared as `point_at` compares them."""
    return bisect_left(range(steps), until / total, key=lambda step: step / steps)


def phase_steps(config: CurriculumConfig, total: float, steps: int) -> list[int]:
    """Return how many of a run's steps each phase has, and last how many follow them.

    A step belongs to the phase in which it begins. A phase in which none would begin gets one all the same, from the phase that
    then has the most above its share of the run (of equal ones the first); no phase gives its only one.

    Args:
        config: the phases, no more of them than `steps`.
        total: as in `point_at`.
        steps: of the run.
    """
    ends = [min(phase.until / total, 1.0) for phase in config.phases]
    edges = [0, *(steps_before(end, 1.0, steps) for end in ends), steps]
    found = [end - begin for begin, end in pairwise(edges)]
    above = [count - steps * (end - begin) for count, (begin, end) in zip(found, pairwise([0.0, *ends, 1.0]), strict=True)]
    least = [1] * len(ends) + [0]
    for phase in range(len(ends)):
        if found[phase] == 0:
            giver = max((i for i, count in enumerate(found) if count > least[i]), key=above.__getitem__)
            for place, change in ((giver, -1), (phase, 1)):
                found[place] += change
                above[place] += change
    return found


def fitted(config: CurriculumConfig, total: float, steps: int) -> CurriculumConfig:
    """Return the phases with ends that give each the steps of `phase_steps`; ends that do so already stay.

    An end that moves lies half a step before the next phase's first step, so that a phase of one step is on its way to its values.
    """
    phases, done = [], 0
    for phase, count in zip(config.phases, phase_steps(config, total, steps)[:-1], strict=True):
        done += count
        stays = steps_before(phase.until, total, steps) == done
        phases.append(phase if stays else replace(phase, until=(done - 0.5) / steps * total))
    return replace(config, phases=tuple(phases))


def shares_at(config: CurriculumConfig, progress: float, total: float = 1.0) -> tuple[int, Mapping[str, float]] | None:
    """Return the index of the phase that last set the sources' shares, and these; None where none has yet."""
    found, begin = None, 0.0
    for i, phase in enumerate(config.phases):
        if progress < begin:
            break
        if phase.data is not None:
            found = i, phase.data
        begin = phase.until / total
    return found


def ever_above_zero(config: CurriculumConfig, name: str) -> bool:
    """Whether an objective's factor is above 0 at any time: at the start, or as some phase leaves it."""
    first = next((phase for phase in config.phases if name in phase.objectives), None)
    if first is None:
        return True
    starts_at_one = first is not config.phases[0] or first.interpolation != "step"
    return starts_at_one or any(phase.objectives.get(name, 0.0) > 0 for phase in config.phases)
