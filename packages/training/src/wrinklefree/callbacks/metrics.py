"""`metrics.jsonl`: one line a step, cut back to the checkpoint's step on resume."""

import json
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from wrinklefree.files import write_text, writing
from wrinklefree.module import TernaryModule


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the complete lines of a metrics file; a line cut off by a crash is dropped."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


class Metrics(pl.Callback):
    """Writes step, tokens, loss, tokens_per_s, learning_rate, lambda, grad_norm and, when measured, heldout_loss.

    The figures also go to the trainer's logger, if it has one, under `prefix`.
    """

    def __init__(self, path: Path, prefix: str) -> None:
        self.path, self.prefix = path, prefix
        self._since = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Drop the lines after the step that training continues from."""
        if trainer.is_global_zero:
            kept = [line for line in read_metrics(self.path) if line["step"] <= trainer.global_step]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Append the step's line."""
        assert isinstance(module, TernaryModule)
        now = time.perf_counter()
        seconds, self._since = now - self._since - module.aside, now
        module.aside = 0.0
        module.elapsed += seconds
        training, data = module.run_config.training, module.run_config.data
        line = {
            "step": trainer.global_step,
            "tokens": module.tokens_seen,
            "tokens_per_s": training.rows_per_step * data.sequence_length / seconds,
            **module.last,
        }
        module.last["tokens_per_s"] = line["tokens_per_s"]
        if trainer.is_global_zero:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if trainer.logger is not None:
                figures = {f"{self.prefix}/{key}": value for key, value in line.items()}
                trainer.logger.log_metrics(figures, step=trainer.global_step)
