"""One arm of a run: training one model, with its callbacks, from wherever it was left."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from bitnet_arch import UserError, set_lambda
from data_handler import PackedStream
from pytorch_lightning.loggers import Logger
from transformers import PreTrainedModel

from wrinklefree.callbacks import Checkpoints, Heldout, Interruption, Metrics, Mixing, Progress, Shares, newest_checkpoint
from wrinklefree.config import RunConfig
from wrinklefree.evaluation import heldout_loss
from wrinklefree.files import writing
from wrinklefree.mixing import History, Mixture, Replay
from wrinklefree.module import TernaryModule
from wrinklefree.resume import Identity, check_config, check_fits, check_teacher, plain, read_checkpoint
from wrinklefree.teachers.base import Teacher
from wrinklefree.teachers.tops import TopTeacher


@dataclass(frozen=True)
class ArmResult:
    """What an arm ended with: the trained model, its held-out loss (nats a token) and its costs, or that it was interrupted.

    `history` is that of its mixture: empty where nothing steered it.
    """

    model: PreTrainedModel
    heldout_loss: float
    tokens: int
    seconds: float
    interrupted: bool
    checkpoint: Path | None
    history: History


def train_arm(
    title: str,
    model: PreTrainedModel,
    train: PackedStream,
    heldout: PackedStream,
    directory: Path,
    *,
    config: RunConfig,
    quantized: bool,
    resume: Path | None,
    logger: Logger | None,
    tokenizer: str | None,
    steering: PackedStream | None = None,
    replay: History | None = None,
    teacher: Teacher | None = None,
) -> ArmResult:
    """Train `model` for `config.training.max_steps` steps.

    Args:
        title: "ternary" or "unquantised": for the progress bar, the logger and the checkpoints.
        model: with `BitLinear` layers; trained in place.
        train: training rows.
        heldout: rows that are never trained on, as evaluations look at them.
        directory: receives `metrics.jsonl` and `checkpoints/`.
        config: the run.
        quantized: whether lambda follows its schedule or stays 0.
        resume: the checkpoint to continue from.
        logger: where figures go beside `metrics.jsonl`.
        tokenizer: JSON of a tokenizer that the run has trained, kept in the checkpoints.
        steering: held-out rows that a mixture is steered by; None takes those of evaluations.
        teacher: what objectives compare with; None where none does.
        replay: the mixture of another arm, to train on the same rows; None asks the configured controller.

    Raises:
        UserError: if the checkpoint cannot be continued, or a file cannot be written.
    """
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    identity = Identity(title, plain(config), train.fingerprint(), tokenizer)
    mixture = _mixture(config, replay)
    if config.training.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = TernaryModule(model.train(), train, config, identity, quantized=quantized, mixture=mixture, teacher=teacher)
    if resume is not None:
        _check_checkpoint(resume, module, identity, config, teacher)
    # What a replayed mixture decides is known: only the arm that it is of measures for it.
    mixing = Mixing(steering or heldout, config.mixture.probes, title, config.training.eval_every if replay is None else None)
    interruption = Interruption()
    callbacks = _callbacks(title, directory, heldout, config, mixing if module.mixture is not None else None)
    with interruption, _quiet_lightning():
        trainer = build_trainer(config, [interruption, *callbacks], logger)
        try:
            trainer.fit(module, ckpt_path=resume, weights_only=True)
        except SystemExit:  # Lightning's answer to a second Ctrl-C
            raise KeyboardInterrupt from None
        finally:
            if isinstance(teacher, TopTeacher):
                teacher.close()
    model.gradient_checkpointing_disable()
    model.eval()
    stopped = interruption.interrupted
    if quantized and not stopped:
        set_lambda(model, 1.0)  # a curriculum may end below, and what is saved is ternary
    return ArmResult(
        model,
        float("nan") if stopped else heldout_loss(model, heldout),
        module.tokens_seen,
        module.elapsed,
        stopped,
        newest_checkpoint(directory / "checkpoints"),
        [] if module.mixture is None else module.mixture.history,
    )


def _check_checkpoint(path: Path, module: TernaryModule, identity: Identity, config: RunConfig, teacher: Teacher | None) -> None:
    """Refuse a checkpoint that this arm cannot continue; what was read of it is given back."""
    content = read_checkpoint(path)
    check_config(path, content, config)
    check_fits(path, content, identity, module, module.groups)
    check_teacher(path, content, teacher.digest if teacher is not None else None)


def _callbacks(title: str, directory: Path, heldout: PackedStream, config: RunConfig, mixing: Mixing | None) -> list[pl.Callback]:
    """Return what accompanies an arm, in the order in which it acts."""
    training = config.training
    return [
        Heldout(heldout, training.eval_every),
        *([mixing] if mixing is not None else []),  # before those that log and save what it decides
        *([Shares()] if any(phase.data for phase in config.curriculum.phases) else []),
        Metrics(directory / "metrics.jsonl", title),
        Progress(title),
        Checkpoints(directory / "checkpoints", training.checkpoint_every, training.keep_checkpoints),
    ]


def _mixture(config: RunConfig, replay: History | None) -> Mixture | None:
    if config.mixture.method == "none":
        return None
    if replay is not None:
        return Mixture(Replay([source.name for source in config.data.sources], replay))
    return Mixture(config.mixture.controller(config.data))


def build_trainer(config: RunConfig, callbacks: list[pl.Callback], logger: Logger | None) -> pl.Trainer:
    """Return the Lightning trainer of a run: our callbacks instead of its own bars, checkpoints and validation."""
    distributed = config.distributed
    if distributed.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("distributed.accelerator=cuda, but PyTorch sees no CUDA device: use distributed.accelerator=cpu")
    return pl.Trainer(
        accelerator=distributed.accelerator,
        devices=distributed.devices,
        strategy=_strategy(config),
        precision=config.training.precision,
        max_steps=config.training.max_steps,
        max_epochs=-1,
        limit_val_batches=0,
        logger=logger or False,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _strategy(config: RunConfig) -> str:
    if config.distributed.strategy != "ddp":
        return "auto"
    # Without the cross-entropy in every step, some parameters get no gradient: the head's, or those of later blocks.
    every_step = [name for name in config.objective_settings() if all(name not in p.objectives for p in config.curriculum.phases)]
    reached = any(config.objective_settings()[name].objective.way == "rows" for name in every_step)
    return "ddp" if reached else "ddp_find_unused_parameters_true"


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence Lightning's hints about what this trainer does on purpose."""
    logs = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning.*")
        warnings.filterwarnings("ignore", module="lightning_fabric.*")
        try:
            yield
        finally:
            for log, level in zip(logs, levels, strict=True):
                log.setLevel(level)
