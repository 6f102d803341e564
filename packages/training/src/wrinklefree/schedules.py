"""Learning-rate schedules as pure functions of the step, so that resuming needs no state."""

import math
from collections.abc import Callable

WSD_DECAY_SHARE = 0.2
"""The share of a run in which "wsd" decays (warm-up, stable, decay)."""


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _wsd(progress: float) -> float:
    return min(1.0, (1.0 - progress) / WSD_DECAY_SHARE)


LEARNING_RATE_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": _cosine,
    "linear": lambda progress: 1.0 - progress,
    "wsd": _wsd,
}
"""Maps progress after the warm-up, in [0, 1), to a share of the peak rate."""


def learning_rate_share(kind: str, step: int, max_steps: int, warmup_steps: int) -> float:
    """Return the share of the peak learning rate at `step` (0-based) of `max_steps`; never 0 within the run."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return LEARNING_RATE_SCHEDULES[kind]((step - warmup_steps) / max(1, max_steps - warmup_steps))
