"""Group `training`: steps, rates, schedules and what is kept."""

from dataclasses import dataclass
from typing import Literal

from bitnet_arch.bitlinear import LAMBDA_SCHEDULES

from wrinklefree.mapping import require
from wrinklefree.schedules import LEARNING_RATE_SCHEDULES


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How it is trained.

    Attributes:
        max_steps: optimiser steps.
        rows_per_step: rows of `data.sequence_length` tokens in one optimiser step, over all processes.
        micro_batch_rows: rows in one forward and backward; smaller needs less memory and changes no result. None: all at once.
        learning_rate: peak rate of the ternary arm.
        learning_rate_fp: peak rate of the unquantised arm; None takes `learning_rate`.
        relative_learning_rate: scale a ternary matrix's rate by its mean |W| over the median matrix's, at most 1. A ternary layer
            sees W only through W / mean |W|, and softened SubLN makes some producers a hundred times smaller than others.
        weight_decay: of matrices; norms, biases and embeddings have none.
        betas: of AdamW.
        warmup_share: share of the run in which the rate rises linearly.
        schedule: "cosine", "linear", "wsd" (constant, then a linear decay over the last fifth) or "constant".
        grad_clip: largest norm of the gradient; 0 clips nothing.
        lambda_schedule: how the quantisation strength rises to 1: "linear", "cosine" or "sigmoid"; "constant" is 1 from the start.
        lambda_warmup_share: share of the run in which it rises.
        seed: of weights, data order and sampling.
        precision: "32-true" or "bf16-mixed".
        eval_every: steps between held-out evaluations; 0 evaluates at the end only.
        eval_share: an evaluation looks at no more held-out tokens than this share of those that the whole run trains on, however
            many `data.heldout_tokens` are: a run of a few steps is not mostly evaluation. None: at all of them. A mixture that is
            steered by held-out rows looks at all of them whatever this is, so that it changes no step.
        checkpoint_every: steps between checkpoints; one is also written at the end and when interrupted.
        keep_checkpoints: how many of the newest are kept.
        compare_fp: measure the unquantised model too: as it is when a float model was converted, otherwise (random or ternary
            weights) trained on the same tokens.
        trainable: "all", or "gains": those of norms alone (stage 1 of BitDistill, before the weights are ternary).
        gradient_norms_every: steps between measurements of each objective's gradient norm, the first step included; 0 measures
            none. One costs a forward and a backward pass for every objective, and changes no result but that of weights that
            are `auto`, which follow it.
        activation_checkpointing: keep each block's input alone for the backward pass, and compute the block once more there: less
            memory, more time, the same bits.
        wandb: "auto" (online with a key, else offline), "offline" or "off".
        data_workers: processes that make a process's batches ahead; 0 makes them between steps. Changes no batch.
        threads: CPU threads; None leaves PyTorch's choice. Recorded, and restored on resume.
    """

    max_steps: int
    rows_per_step: int
    learning_rate: float
    micro_batch_rows: int | None = None
    learning_rate_fp: float | None = None
    relative_learning_rate: bool = False
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_share: float = 0.0
    schedule: str = "cosine"
    grad_clip: float = 1.0
    lambda_schedule: str = "constant"
    lambda_warmup_share: float = 0.0
    seed: int = 0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    eval_every: int = 0
    eval_share: float | None = None
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    compare_fp: bool = True
    trainable: Literal["all", "gains"] = "all"
    gradient_norms_every: int = 0
    activation_checkpointing: bool = False
    wandb: Literal["auto", "offline", "off"] = "auto"
    data_workers: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_steps", "rows_per_step", "checkpoint_every", "keep_checkpoints", "learning_rate"):
            require(0 < getattr(self, name) < float("inf"), f"training.{name} must be positive, not {getattr(self, name)}")
        for name in ("micro_batch_rows", "learning_rate_fp", "threads", "eval_share"):
            value = getattr(self, name)
            require(value is None or 0 < value < float("inf"), f"training.{name} must be positive or null, not {value}")
        for name in ("weight_decay", "grad_clip", "eval_every", "data_workers", "seed", "gradient_norms_every"):
            require(getattr(self, name) >= 0, f"training.{name} must not be negative, and is {getattr(self, name)}")
        for name in ("warmup_share", "lambda_warmup_share"):
            require(0 <= getattr(self, name) < 1, f"training.{name} must lie in [0, 1), not {getattr(self, name)}")
        for name, known in (("schedule", LEARNING_RATE_SCHEDULES), ("lambda_schedule", LAMBDA_SCHEDULES)):
            require(getattr(self, name) in known, f"training.{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        require(all(0 <= beta < 1 for beta in self.betas), f"training.betas must lie in [0, 1), not {list(self.betas)}")
        share = self.lambda_warmup_share
        require(
            (self.lambda_schedule == "constant") == (share == 0),
            f"training.lambda_schedule={self.lambda_schedule} with lambda_warmup_share={share} has no effect: "
            "give a rising schedule its share, or a constant one none",
        )
        require(self.learning_rate_fp is None or self.compare_fp, "training.learning_rate_fp has no effect without compare_fp")
        require(self.seed < 2**63, f"training.seed must be below 2**63, and is {self.seed}")
        require(
            share == 0 or 1 <= self.lambda_warmup_steps < self.max_steps,
            f"training.lambda_warmup_share={share} is {self.lambda_warmup_steps} of {self.max_steps} steps: lambda must rise, and "
            "reach 1 before the last step",
        )

    @property
    def warmup_steps(self) -> int:
        """Steps of the learning rate's warm-up."""
        return round(self.warmup_share * self.max_steps)

    @property
    def lambda_warmup_steps(self) -> int:
        """Steps of lambda's warm-up."""
        return round(self.lambda_warmup_share * self.max_steps)
