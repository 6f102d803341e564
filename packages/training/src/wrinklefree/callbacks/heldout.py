"""Held-out loss during training."""

import time
from typing import Any

import pytorch_lightning as pl
from data_handler import PackedStream

from wrinklefree.evaluation import heldout_loss
from wrinklefree.module import TernaryModule


class Heldout(pl.Callback):
    """Measures the held-out loss every `every` steps (0: never) and leaves it in the module's `last` figures."""

    def __init__(self, stream: PackedStream, every: int) -> None:
        self.stream, self.every = stream, every

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Measure when it is time. Every process measures the same rows: none has to wait for another."""
        assert isinstance(module, TernaryModule)
        if self.every and trainer.global_step % self.every == 0:
            start = time.perf_counter()
            module.last["heldout_loss"] = heldout_loss(module.model, self.stream)
            module.aside += time.perf_counter() - start
