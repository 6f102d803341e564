"""A progress bar with loss, speed and the time left."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from wrinklefree.module import TernaryModule

LINES, SILENCE = 10, 60.0


class Progress(pl.Callback):
    """Draws a bar on a terminal; elsewhere prints about ten lines a run, and one a minute if it is slow."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._console = Console(stderr=True)
        self._bar: Bar | None = None
        self._smoothed: float | None = None
        self._heldout: float | None = None
        self._printed = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open the bar."""
        self._printed = time.monotonic()
        if not trainer.is_global_zero or not self._console.is_terminal:
            return
        columns = (TextColumn(self.title), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
        self._bar = Bar(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self._console)
        self._bar.start()
        self._bar.add_task(self.title, total=trainer.max_steps, completed=trainer.global_step, figures="")

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Show the step's figures."""
        assert isinstance(module, TernaryModule)
        if not trainer.is_global_zero:
            return
        step, speed = trainer.global_step, module.last["tokens_per_s"]
        self._smoothed = speed if self._smoothed is None else 0.9 * self._smoothed + 0.1 * speed
        figures = f"loss {module.last['loss']:.3f}  {self._smoothed:,.0f} tokens/s"
        self._heldout = module.last.get("heldout_loss", self._heldout)
        if self._heldout is not None:
            figures += f"  held-out {self._heldout:.3f}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=figures)
        elif (
            step % max(1, trainer.max_steps // LINES) == 0
            or step == trainer.max_steps
            or time.monotonic() - self._printed > SILENCE
        ):
            self._printed = time.monotonic()
            rows = module.run_config.training.rows_per_step * module.run_config.data.sequence_length
            left = (trainer.max_steps - step) * rows / self._smoothed
            print(f"{self.title}: step {step}/{trainer.max_steps}  {figures}  {left:.0f} s left", file=sys.stderr, flush=True)
            self._heldout = None  # a later line would look as if it had been measured again

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the message is not drawn over."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
