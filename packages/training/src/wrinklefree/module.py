"""The Lightning shell around one arm of a run: a model, its step, and what a checkpoint must hold."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from bitnet_arch import UserError, lambda_schedule, set_lambda
from data_handler import BatchLoader, PackedStream, merge_states
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.config import RunConfig
from wrinklefree.curriculum import Point, point_at
from wrinklefree.mixing import Mixture
from wrinklefree.objective import IGNORED, domain_sums
from wrinklefree.objectives import Objectives
from wrinklefree.objectives.norms import gradient_norm
from wrinklefree.objectives.settings import AUTO, reference_of
from wrinklefree.optim import build_optimizer, parameter_groups
from wrinklefree.resume import KEY, Identity
from wrinklefree.schedules import learning_rate_share
from wrinklefree.teachers.base import Shape, Teacher
from wrinklefree.views import Batch, model_logits

__all__ = ["Batch", "TernaryModule", "model_logits"]

NOISE = 1e-5
"""Share of the reference's gradient norm below which an objective's measures nothing: rounding leaves 1e-8 in float32 where the
student still is its teacher, and the first steps of a lambda warm-up have 1e-4 and more."""


class _Batches:
    """An iterable of batches that shows Lightning no state: the module keeps the position.

    It has a length, since Lightning reads a batch ahead of what has none: the mixture could then not change from the next step on.
    """

    def __init__(self, loader: BatchLoader, steps: int) -> None:
        self._loader, self._steps = loader, steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Any:
        return iter(self._loader)


class TernaryModule(pl.LightningModule):
    """Trains one model on packed rows with a run's objectives.

    Optimisation is manual, so that the loss of a step is exactly the mean over its tokens, however the step is cut into
    micro-batches and processes.

    Attributes:
        objectives: what is minimised.
        auto: the weights of objectives that have weight `auto`, as last measured.
        rows_seen: rows trained on, over all processes: the position in the data.
        domain_tokens: tokens trained on of each source, over all processes, padding excluded: recounted from the batches.
        loader: the batches; None before training starts.
        mixture: decides the sources' shares while training; None leaves them as the data has them.
        domain_losses: of the last step, where there is a mixture: each source's summed loss (nats, float32 [K]) and scored tokens
            (int64 [K]), over all processes.
        tokens_seen: tokens in those rows, padding included.
        elapsed: seconds spent on steps, earlier runs that this one continues included.
        aside: seconds since the last step that were not spent on training (evaluations).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stream: PackedStream,
        config: RunConfig,
        identity: Identity,
        *,
        quantized: bool,
        mixture: Mixture | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.stream = stream
        self.run_config = config
        self.curriculum = config.fitted_curriculum
        self.identity = identity
        self.quantized = quantized
        self.mixture = mixture
        self.domain_losses: tuple[Tensor, Tensor] | None = None
        self.settings = config.objective_settings()
        found = {name: settings.objective for name, settings in self.settings.items()}
        self.objectives = Objectives(found, Shape.of(model), teacher)
        self.auto: dict[str, float] = {}
        # Now: when the optimiser is built, a checkpoint's weights may be in the model, whose groups would be others.
        self.groups = parameter_groups(model, config.training)
        self.peak_rate = config.training.learning_rate
        if not quantized and config.training.learning_rate_fp is not None:
            self.peak_rate = config.training.learning_rate_fp
        self.rows_seen = 0
        self.domain_tokens = torch.zeros(len(stream.domains), dtype=torch.int64)
        self.loader: BatchLoader | None = None
        self._loader_state: dict[str, Any] = {"rows": 0}
        self.tokens_seen = 0
        self.elapsed = 0.0
        self.aside = 0.0
        self.last: dict[str, float] = {}

    def lambda_at(self, step: int) -> float:
        """Return the quantisation strength at a step (0-based); always 0 in the unquantised arm."""
        if not self.quantized:
            return 0.0
        training, given = self.run_config.training, self.point_at(step).lambda_value
        if self.run_config.own_lambda:
            return 1.0 if given is None else given
        return lambda_schedule(training.lambda_schedule, step, training.lambda_warmup_steps)

    def point_at(self, step: int) -> Point:
        """Return what the curriculum says of a step (0-based)."""
        return point_at(self.curriculum, step / self.run_config.training.max_steps, self.run_config.curriculum_total)

    def rate_at(self, step: int) -> float:
        """Return the learning rate at a step (0-based)."""
        training = self.run_config.training
        share = learning_rate_share(training.schedule, step, training.max_steps, training.warmup_steps)
        return self.peak_rate * share * self.point_at(step).learning_rate

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weights of the objectives that count at a step (0-based), those of weight `auto` as last measured.

        One that no step could measure yet does not count, unless there is nothing else to learn from.
        """
        factors = self._factors_at(step)
        known = dict(self.auto) | {name: float(s.weight) for name, s in self.settings.items() if s.weight != AUTO}
        known = {name: known[name] for name in factors if name in known} or dict.fromkeys(factors, self._reference_weight)
        return {name: weight * factors[name] for name, weight in known.items()}

    def _factors_at(self, step: int) -> dict[str, float]:
        """Return the curriculum's factors of the objectives at a step, those of 0 left out."""
        factors = self.point_at(step).objectives
        return {name: factors.get(name, 1.0) for name in self.settings if factors.get(name, 1.0)}

    @property
    def _reference_weight(self) -> float:
        reference = reference_of(self.settings)
        return float(self.settings[reference].weight) if reference else 1.0

    def train_dataloader(self) -> _Batches:
        """Return the batches that follow `rows_seen`."""
        training = self.run_config.training
        self.loader = BatchLoader(
            self.stream,
            rows_per_step=training.rows_per_step,
            rank=self.global_rank,
            world_size=self.trainer.world_size,
            num_workers=training.data_workers,
        )
        self.loader.load_state_dict(self._loader_state)
        return _Batches(self.loader, training.max_steps)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW; its rates are set at every step from the step's number."""
        return build_optimizer(self.groups, self.run_config.training)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one optimiser step on this process's rows of the step's batch."""
        training = self.run_config.training
        step = self.trainer.global_step
        set_lambda(self.model, self.lambda_at(step))
        optimizer = self.optimizers()
        rate = self.rate_at(step)
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = rate * group["rate_share"]
        rows = len(batch["input_ids"])
        first = self.rows_seen + self.global_rank * rows
        batch = batch | {"sample_index": torch.arange(first, first + rows, device=batch["input_ids"].device)}
        norms = self._gradient_norms(batch, step)
        weights = self.weights_at(step)
        loss, means = self._accumulate(batch, weights)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip or float("inf"))
        if not torch.isfinite(norm) or not torch.isfinite(loss):
            raise UserError(
                f"the loss or its gradient is not finite at step {step + 1}: lower training.learning_rate "
                f"({training.learning_rate:g}) and start again in another output_dir"
            )
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        self.rows_seen += training.rows_per_step
        self.tokens_seen += training.rows_per_step * batch["input_ids"].shape[1]
        self.domain_tokens += self._sum(self._domain_counts(batch)).cpu()
        self.last = {
            "loss": float(loss),
            "learning_rate": rate,
            "lambda": self.lambda_at(step),
            "grad_norm": float(norm),
            **{f"tokens/{name}": int(count) for name, count in zip(self.stream.domains, self.domain_tokens, strict=True)},
        }
        if list(self.settings) != ["ce"] or norms:
            self.last |= {f"objective/{name}": float(mean) for name, mean in means.items()}
            self.last |= {f"objective_weight/{name}": weight for name, weight in weights.items()}
            self.last |= {f"objective_gradient/{name}": norm for name, norm in norms.items()}

    def _accumulate(self, batch: Batch, weights: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Fill the gradients with those of the step's loss over all processes; return that loss, and every objective's mean.

        An objective is the mean over its tokens of the whole step, however these lie in micro-batches and processes.
        """
        world = self.trainer.world_size
        counts = {name: self._sum(count).clamp(min=1) for name, count in self.objectives.counts(batch, weights).items()}
        # DDP averages gradients over processes; the step's mean is over all their tokens together.
        coefficients = {name: weight * (world / counts[name]) for name, weight in weights.items()}
        parts = self._micro_batches(batch)
        sums: dict[str, Tensor] = {}
        token_losses = []
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            wait = nullcontext() if last or world == 1 else self.trainer.strategy.model.no_sync()  # type: ignore[union-attr,operator]
            with wait:
                found = self.objectives(self.model, part, coefficients)
                self.manual_backward(found.total)
            for name, value in found.sums.items():
                sums[name] = sums[name] + value if name in sums else value
            token_losses.append(found.token_losses)
            del found
        if self.mixture is not None:
            losses = torch.cat([values.sum(1) for values in token_losses if values is not None])
            scored = (batch["labels"][:, 1:] != IGNORED).sum(1)
            totals, tokens = (domain_sums(values, batch["domain"], len(self.stream.domains)) for values in (losses, scored))
            self.domain_losses = self._sum(totals).cpu(), self._sum(tokens).cpu()
        means = {name: self._sum(value) / counts[name.partition("/")[0]] for name, value in sums.items()}
        return torch.stack([weight * means[name] for name, weight in weights.items()]).sum(), means

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        size = self.run_config.training.micro_batch_rows or len(batch["input_ids"])
        return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, len(batch["input_ids"]), size)]

    def _gradient_norms(self, batch: Batch, step: int) -> dict[str, float]:
        """Measure the norm of each objective's gradient, without its weight, when it is time, and set the weights that are `auto`.

        It is that of the mean over the whole step, however this is cut. A norm that is rounding noise (`NOISE`) measures nothing: a
        weight stays what it was, and one that was not measured yet is asked for again in the next step.
        """
        every = self.run_config.training.gradient_norms_every
        active = list(self._factors_at(step))
        unknown = [name for name in active if self.settings[name].weight == AUTO and name not in self.auto]
        if not unknown and not (every and step % every == 0):
            return {}
        reference = reference_of(self.settings)
        if reference is not None and reference not in active and any(self.settings[name].weight == AUTO for name in active):
            active.append(reference)
        parts = self._micro_batches(batch)
        counts = {name: self._sum(count).clamp(min=1) for name, count in self.objectives.counts(batch, active).items()}
        norms = {
            name: gradient_norm(self.objectives, self.model, parts, name, 1.0 / count, self._sum) for name, count in counts.items()
        }
        for name, norm in norms.items():
            if self.settings[name].weight != AUTO:
                continue
            assert reference is not None
            if norms[reference] and not norm <= NOISE * norms[reference]:  # what is no number ends the step, see there
                self.auto[name] = self._reference_weight * norms[reference] / norm
        return norms

    def _domain_counts(self, batch: Batch) -> Tensor:
        """Return how many tokens of each source a batch holds, int64 [sources]."""
        counts = torch.zeros(len(self.stream.domains), dtype=torch.int64, device=batch["domain"].device)
        return counts.index_add_(0, batch["domain"], (batch["document_ids"] > 0).sum(1))

    def forward(self, batch: Batch) -> Tensor:
        """Return logits `[B, T, V]`."""
        return model_logits(self.model, batch)

    def _sum(self, value: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return value
        reduced: Tensor = self.trainer.strategy.reduce(value, reduce_op="sum")  # type: ignore[assignment]
        return reduced

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the run's identity, the position in the data, every process's random state (as tensors) and the thread count."""
        states = torch.stack(self._gather(torch.get_rng_state()))
        assert self.loader is not None
        checkpoint[KEY] = asdict(self.identity) | {
            "rows_seen": self.rows_seen,
            "domain_tokens": self.domain_tokens.tolist(),
            "loader": json.dumps(self._joined(self.loader.state_dict(self.rows_seen))),
            "mixture": None if self.mixture is None else json.dumps(self.mixture.state_dict()),
            "auto_weights": dict(self.auto),
            "teacher": self.objectives.teacher.digest if self.objectives.teacher is not None else None,
            "tokens_seen": self.tokens_seen,
            "elapsed": self.elapsed,
            "threads": torch.get_num_threads(),
            "rng": states,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` added."""
        state = checkpoint[KEY]
        self.rows_seen, self.tokens_seen = state["rows_seen"], state["tokens_seen"]
        self.domain_tokens = torch.tensor(state["domain_tokens"], dtype=torch.int64)
        self._loader_state = json.loads(state["loader"])
        self.auto = dict(state.get("auto_weights", {}))
        if self.mixture is not None:
            self.mixture.load_state_dict(json.loads(state["mixture"]))
        self.elapsed = state["elapsed"]
        torch.set_num_threads(state["threads"])
        if self.global_rank < len(state["rng"]):
            torch.set_rng_state(state["rng"][self.global_rank])

    def _joined(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of the loaders of all processes together."""
        if self.trainer.world_size == 1:
            return state
        states: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(states, state)
        return merge_states(states)

    def _gather(self, value: Tensor) -> list[Tensor]:
        if self.trainer.world_size == 1:
            return [value]
        value = value.to(self.device)  # NCCL gathers nothing else
        parts = [torch.empty_like(value) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(parts, value)
        return [part.cpu() for part in parts]
