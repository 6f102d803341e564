"""Ctrl-C and SIGTERM end a run at the next step, with a checkpoint."""

import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl


class Interruption(pl.Callback):
    """Turns the first SIGINT or SIGTERM into an orderly stop; a second one ends at once.

    Attributes:
        interrupted: whether the run was stopped.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take the signals back: Lightning has just put its own SIGTERM handler in place, which ends without a checkpoint."""
        for number in self._previous:
            signal.signal(number, self._receive)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Stop at this step if any process was asked to: all of them must leave the loop together."""
        if trainer.strategy.reduce_boolean_decision(self.interrupted, all=False):
            self.interrupted = True
            trainer.should_stop = True
