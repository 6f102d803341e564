"""The Lightning shell around one arm of a run: a model, its step, and what a checkpoint must hold."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from bitnet_arch import UserError, lambda_schedule, set_lambda
from data_handler import BatchLoader, PackedStream, document_attention_mask, merge_states
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.config import RunConfig
from wrinklefree.mixing import Mixture
from wrinklefree.objective import domain_sums, row_losses, scored_tokens, token_loss_sum
from wrinklefree.optim import build_optimizer, parameter_groups
from wrinklefree.resume import KEY, Identity
from wrinklefree.schedules import learning_rate_share

Batch = dict[str, Tensor]


def model_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return logits `[B, T, V]`; attention and positions stay inside each document."""
    mask = document_attention_mask(batch["document_ids"])
    logits: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"], use_cache=False
    ).logits
    return logits


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
    """Trains one model on packed rows with the next-token loss.

    Optimisation is manual, so that the loss of a step is exactly the mean over its tokens, however the step is cut into
    micro-batches and processes.

    Attributes:
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
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.stream = stream
        self.run_config = config
        self.identity = identity
        self.quantized = quantized
        self.mixture = mixture
        self.domain_losses: tuple[Tensor, Tensor] | None = None
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
        training = self.run_config.training
        return lambda_schedule(training.lambda_schedule, step, training.lambda_warmup_steps) if self.quantized else 0.0

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
        share = learning_rate_share(training.schedule, step, training.max_steps, training.warmup_steps)
        for group in optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = self.peak_rate * share * group["rate_share"]
        loss = self._accumulate(batch)
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
            "learning_rate": self.peak_rate * share,
            "lambda": self.lambda_at(step),
            "grad_norm": float(norm),
            **{f"tokens/{name}": int(count) for name, count in zip(self.stream.domains, self.domain_tokens, strict=True)},
        }

    def _accumulate(self, batch: Batch) -> Tensor:
        """Fill the gradients with those of the mean loss over the step's tokens on all processes; return that loss."""
        world = self.trainer.world_size
        count = self._sum(scored_tokens(batch["labels"])).clamp(min=1)
        size = self.run_config.training.micro_batch_rows or len(batch["input_ids"])
        parts = [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, len(batch["input_ids"]), size)]
        total = torch.zeros((), device=self.device)
        rows = []
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            wait = nullcontext() if last or world == 1 else self.trainer.strategy.model.no_sync()  # type: ignore[union-attr,operator]
            with wait:
                logits = self(part)
                loss, _ = token_loss_sum(logits, part["labels"])
                if self.mixture is not None:
                    rows.append(row_losses(logits, part["labels"]))
                del logits  # not longer than the loss needs them
                # DDP averages gradients over processes; the step's mean is over all their tokens together.
                self.manual_backward(loss * (world / count))
            total += loss.detach()
        if self.mixture is not None:
            losses, counts = (torch.cat(parts) for parts in zip(*rows, strict=True))
            sums, tokens = (domain_sums(values, batch["domain"], len(self.stream.domains)) for values in (losses, counts))
            self.domain_losses = self._sum(sums).cpu(), self._sum(tokens).cpu()
        return self._sum(total) / count

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
