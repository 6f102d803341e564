"""The sources' shares that a curriculum sets."""

from typing import Any

import pytorch_lightning as pl

from wrinklefree.curriculum import shares_at
from wrinklefree.module import TernaryModule


class Shares(pl.Callback):
    """Gives the loader a phase's shares for the phase's first step; what it has been given is part of its state."""

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Set the shares of the first step."""
        if trainer.global_step == 0:
            self._set(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Set the shares of the next step, if its phase is another."""
        self._set(trainer, module)

    def _set(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, TernaryModule)
        assert module.loader is not None
        step, steps, total = trainer.global_step, module.run_config.training.max_steps, module.run_config.curriculum_total
        last = None if step == 0 else shares_at(module.curriculum, (step - 1) / steps, total)
        now = shares_at(module.curriculum, step / steps, total)
        if now is not None and now != last and step < steps:
            module.loader.set_weights(now[1], step)
