"""Checkpoints: whole under their final name or not there, the newest few kept."""

import os
import re
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from bitnet_arch import UserError

from wrinklefree.files import writing
from wrinklefree.module import TernaryModule

_NAME = re.compile(r"step-(\d+)\.ckpt")
_WRITER = re.compile("PytorchStreamWriter|inline_container|file write failed")
"""In the RuntimeError that torch's zip writer raises when the disk is full."""


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the checkpoint with the most steps in a directory, if there is one."""
    return max(_checkpoints(directory), key=_step, default=None)


def _checkpoints(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step-*.ckpt") if _NAME.fullmatch(path.name)]


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match[1])


class Checkpoints(pl.Callback):
    """Writes `step-N.ckpt` every `every` steps and at the end, and keeps the newest `keep`.

    Checkpoints of later steps than the one that training starts from are moved to a folder `superseded-N`: they are neither
    continued by mistake nor lost.
    """

    def __init__(self, directory: Path, every: int, keep: int) -> None:
        self.directory, self.every, self.keep = directory, every, keep

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Set aside what lies ahead of the step that training starts from."""
        if not trainer.is_global_zero:
            return
        if ahead := [path for path in _checkpoints(self.directory) if _step(path) > trainer.global_step]:
            with writing(self.directory):
                number = 1 + len(list(self.directory.glob("superseded-*")))
                aside = self.directory / f"superseded-{number}"
                aside.mkdir()
                for path in ahead:
                    os.replace(path, aside / path.name)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Save when it is time; the time it takes is not that of the next step."""
        step = trainer.global_step
        if step % self.every == 0 or step == trainer.max_steps or trainer.should_stop:
            assert isinstance(module, TernaryModule)
            start = time.perf_counter()
            self.save(trainer)
            module.aside += time.perf_counter() - start

    def save(self, trainer: pl.Trainer) -> Path:
        """Write a checkpoint of the current step.

        Raises:
            UserError: if writing fails; earlier checkpoints are still there.
        """
        final = self.directory / f"step-{trainer.global_step}.ckpt"
        temporary = final.with_suffix(".partial")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, final)
                for old in sorted(_checkpoints(self.directory), key=_step)[: -self.keep]:
                    if old != final:
                        old.unlink()
        except (OSError, RuntimeError) as error:
            if trainer.is_global_zero:
                temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError) and not _WRITER.search(str(error)):
                raise
            newest = newest_checkpoint(self.directory)
            raise UserError(
                f"writing {final} failed ({str(error).splitlines()[0]}): free some space and resume"
                + (f" from {newest.name}" if newest else "")
            ) from None
        return final
