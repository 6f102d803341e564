"""The mixture of a run while it trains: a controller, and the record of what it decided."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from data_handler.mixture import Controller, MixtureController, Observation

History = list[tuple[int, tuple[float, ...]]]
"""(step, weights [K]) at every change: rows of the steps after `step` follow them. The first is of step 0."""


@dataclass
class Mixture:
    """A controller that is told about a run, and the weights it gave.

    Attributes:
        controller: decides.
        history: what it decided so far.
    """

    controller: MixtureController
    history: History = field(default_factory=list)

    def observe(self, observation: Observation) -> tuple[float, ...] | None:
        """Tell the controller about a step; return the weights from the next step on where they are others, and at step 0."""
        answer = self.controller.observe(observation)
        if answer is None and self.history:
            return None
        weights = self.controller.weights
        self.history.append((observation.step, weights))
        return weights

    def state_dict(self) -> dict[str, Any]:
        """Return the controller's state and the history, as JSON has them."""
        return {"controller": self.controller.state_dict(), "history": [[step, *weights] for step, weights in self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit.

        Raises:
            UserError: if it is another method's, or of other domains.
        """
        self.controller.load_state_dict(state["controller"])
        self.history = [(int(step), tuple(weights)) for step, *weights in state["history"]]


class Replay(Controller):
    """Decides what another run decided, at the same steps and to the last bit: a run under it reads the same rows."""

    method = "replay"

    def __init__(self, domains: Sequence[str], history: History) -> None:
        """Prepare to repeat a history.

        Args:
            domains: their names.
            history: of `Mixture.history`; begins at step 0.
        """
        super().__init__(domains)
        self._history = dict(history)

    def observe(self, observation: Observation) -> tuple[float, ...] | None:
        """Return the weights of the history at this step, if it has any: as they are, where `Controller` would normalise them."""
        self.step = observation.step
        recorded = self._history.get(self.step)
        if recorded is not None:
            self._weights = np.array(recorded, np.float64)
        return recorded
