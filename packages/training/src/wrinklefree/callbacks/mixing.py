"""A mixture that moves while the run trains."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
from data_handler import PackedStream
from data_handler.mixture import Observation
from data_handler.mixture.controller import INFLUENCE, VALIDATION

from wrinklefree.evaluation import INFLUENCE_ROWS, first_order_influence, mean_loss, rows_by_domain
from wrinklefree.module import TernaryModule
from wrinklefree.objective import domain_means


class Mixing(pl.Callback):
    """Tells the module's controller about every step, and the loader about the weights that it answers with.

    As `data_handler.mixture.drive` does: step 0 is told before training, unless a run is resumed; weights apply from the next
    step on (Lightning reads no batch ahead, see `module._Batches`); held-out losses and influence are measured where the
    controller needs them, and not after the last step.

    The first process measures, and its figures go to all: on GPUs, the last bit could differ between processes. Training losses
    are summed over the processes, which gives all of them the same sums. So every process decides the same.

    It leaves `weight/SOURCE` (in force in this step), `loss/SOURCE` (of this step's tokens, where it had any) and, where they were
    measured, `heldout_loss/SOURCE` in the module's `last` figures.
    """

    def __init__(self, heldout: PackedStream, probes: Sequence[str] | None, title: str, every: int | None) -> None:
        """Prepare.

        Args:
            heldout: rows whose losses and gradients are measured.
            probes: sources whose held-out rows influence is to help; None takes all.
            title: the arm's, for the lines that people read.
            every: a line at these steps and the last, if the weights have changed since; 0 for the last only, None for none.
        """
        self.heldout, self.probes, self.title, self.every = heldout, probes, title, every
        self._said = 1  # changes that people know of; the start is none

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Tell about step 0, and let the run begin with the controller's weights."""
        assert isinstance(module, TernaryModule)
        assert module.mixture is not None
        if trainer.global_step == 0:
            silent = len(self.heldout.domains)
            self._tell(trainer, module, [float("nan")] * silent, [0] * silent)
        self._said = len(module.mixture.history)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        """Log the step's mixture, tell about the step, and say now and then what has changed."""
        assert isinstance(module, TernaryModule)
        assert module.loader is not None
        assert module.mixture is not None
        assert module.domain_losses is not None
        names = module.stream.domains
        sums, counts = module.domain_losses
        losses = domain_means(sums, counts)
        # What the loader followed, not what the controller meant.
        _, weights = module.loader.weights.at(module.rows_seen - 1)
        module.last |= {f"weight/{name}": weight for name, weight in zip(names, weights, strict=True)}
        module.last |= {f"loss/{name}": loss for name, loss, n in zip(names, losses, counts, strict=True) if n}
        start = time.perf_counter()
        self._tell(trainer, module, losses, [int(n) for n in counts])
        module.aside += time.perf_counter() - start
        self._say(trainer, module)

    def _tell(self, trainer: pl.Trainer, module: TernaryModule, losses: list[float], tokens: list[int]) -> None:
        assert module.loader is not None
        assert module.mixture is not None
        step = trainer.global_step
        needs = module.mixture.controller.needs(step)
        if needs and step == trainer.max_steps:
            return  # nothing is left to change
        validation: list[float] | None = None
        influence: list[list[float]] | None = None
        if needs:
            if trainer.is_global_zero:
                rows = rows_by_domain(self.heldout)
                if VALIDATION in needs:
                    validation = [mean_loss(module.model, part) for part in rows]
                if INFLUENCE in needs:
                    wanted = [self.heldout.domains.index(name) for name in self.probes or self.heldout.domains]
                    coming = [module.loader.upcoming(k, INFLUENCE_ROWS) for k in range(len(rows))]
                    influence = first_order_influence(module.model, coming, [rows[k] for k in wanted])
            validation, influence = trainer.strategy.broadcast((validation, influence), src=0)
        if validation is not None:
            module.last |= {f"heldout_loss/{name}": loss for name, loss in zip(self.heldout.domains, validation, strict=True)}
        observation = Observation(step=step, losses=losses, tokens=tokens, validation=validation, influence=influence)
        weights = module.mixture.observe(observation)
        if weights is not None:
            assert module.loader.next_step == step, "weights apply from the next step on, and its batch was read ahead"
            module.loader.set_weights(dict(zip(self.heldout.domains, weights, strict=True)), step)

    def _say(self, trainer: pl.Trainer, module: TernaryModule) -> None:
        assert module.mixture is not None
        step, changes = trainer.global_step, len(module.mixture.history)
        due = self.every is not None and (step == trainer.max_steps or (self.every and step % self.every == 0))
        if not due or changes == self._said or not trainer.is_global_zero:
            return
        self._said = changes
        shares = ", ".join(
            f"{name} {weight:.3f}" for name, weight in zip(module.stream.domains, module.mixture.controller.weights, strict=True)
        )
        print(f"{self.title}: mixture after step {step}: {shares}", file=sys.stderr, flush=True)
