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
        config, step = module.run_config, trainer.global_step
        last = None if step == 0 else shares_at(config.curriculum, (step - 1) / config.training.max_steps, config.curriculum_total)
        now = shares_at(config.curriculum, step / config.training.max_steps, config.curriculum_total)
        if now is not None and now != last and step < config.training.max_steps:
            module.loader.set_weights(now[1], step)
