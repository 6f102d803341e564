"""A whole run: both arms, then the model directory, its proven GGUF, the plot, a sample and the summary."""

import copy
import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from bitnet_arch import UserError, load_float_model, save_master
from bitnet_arch.diffusion import add_mask_token, diffusion_of
from bitnet_arch.directories import check_replaceable
from bitnet_arch.pretrained import Pretrained
from data_handler import PackedStream
from pytorch_lightning.loggers import Logger, WandbLogger
from transformers import PreTrainedModel

from wrinklefree.arm import ArmResult, train_arm
from wrinklefree.artifacts import finite, plot_losses, sample
from wrinklefree.callbacks import newest_checkpoint
from wrinklefree.config import RunConfig
from wrinklefree.curriculum import phase_steps
from wrinklefree.evaluation import heldout_loss, perplexity
from wrinklefree.exporting import Exporter
from wrinklefree.files import write_json, write_text, writing
from wrinklefree.models import Start, build_start
from wrinklefree.optim import train_gains_only
from wrinklefree.processes import is_first
from wrinklefree.resume import KEY, check_config, plain, read_checkpoint
from wrinklefree.teachers.base import Teacher
from wrinklefree.teachers.load import load_teacher


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its summary (None in processes other than the first), and the checkpoint if it was interrupted."""

    summary: dict[str, Any] | None
    interrupted: Path | None = None


def train(config: RunConfig, exporter: Exporter | None = None) -> Outcome:
    """Train, and write the run directory.

    Args:
        config: the run.
        exporter: what writes `model.gguf`; None starts a process for it when it is time.

    Raises:
        UserError: for whatever the user can mend; nothing that was saved is lost.
    """
    directory = Path(config.output_dir)
    resume = prepare_directory(config, directory)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    say(f"run directory: {directory}")
    start = build_start(config, _saved_tokenizer(resume) if resume else None)
    say(f"model: {start.note}")
    if config.own_lambda and config.training.lambda_schedule != "constant":
        decides = "model.lrc, whose weights are ternary already," if config.model.lrc is not None else "the curriculum"
        say(f"lambda: {decides} decides it, not training.lambda_schedule={config.training.lambda_schedule}")
    if config.fitted_curriculum != config.curriculum:
        found = phase_steps(config.curriculum, config.curriculum_total, config.training.max_steps)[:-1]
        say(f"curriculum: each phase has at least one of so few steps: {', '.join(map(str, found))}")
    for name, item in config.objective_settings().items():
        if getattr(item.objective, "estimator", None) == "causal":
            say(f"objectives.{name}: estimator=causal is biased, since it knows nothing of what comes after a token: a baseline")
    if config.training.trainable == "gains":
        train_gains_only(start.model)
    teacher = _teacher(config, start)
    if (form := config.diffusion) is not None:  # after the teacher: its tokenizer has no mask token
        add_mask_token(start.model, start.tokenizer, block_size=form.block_size, token_shift=form.token_shift)
    seed = config.training.seed
    train_rows = PackedStream(config.data, start.tokenizer, seed=seed)
    if config.heldout_data != config.data:
        say(
            f"held-out: {config.heldout_data.heldout_tokens:,} of {config.data.heldout_tokens:,} tokens, as training.eval_share="
            f"{config.training.eval_share:g} allows a run of {config.tokens:,}"
        )
    heldout = PackedStream(config.heldout_data, start.tokenizer, seed=seed, split="heldout")
    heldout.heldout_rows()  # now: a split with nothing in it must not be found out after the training
    # How much evaluations look at must not change what a mixture learns, and so what is trained.
    steering = (
        PackedStream(config.data, start.tokenizer, seed=seed, split="heldout") if config.heldout_data != config.data else heldout
    )
    twin = copy.deepcopy(start.model) if config.training.compare_fp and start.original is None else None
    with wandb_logger(config, directory) as logger:
        common: dict[str, Any] = {"config": config, "logger": logger, "tokenizer": start.trained_tokenizer, "teacher": teacher}
        common["steering"] = steering
        ternary = train_arm("ternary", start.model, train_rows, heldout, directory, quantized=True, resume=resume, **common)
        if ternary.interrupted:
            return Outcome(None, ternary.checkpoint)
        if is_first():
            save_master(ternary.model, directory / "model", start.tokenizer, _provenance(start, teacher))
        arms = {"ternary": directory / "metrics.jsonl"}
        reference: ArmResult | None = None
        if twin is not None:
            folder = directory / "fp"
            again = newest_checkpoint(folder / "checkpoints")
            # A controller of its own would give it other tokens: it repeats what the ternary arm's decided.
            common["replay"] = ternary.history or None
            reference = train_arm("unquantised", twin, train_rows, heldout, folder, quantized=False, resume=again, **common)
            if reference.interrupted:
                return Outcome(None, reference.checkpoint)
            arms["unquantised"] = folder / "metrics.jsonl"
    if not is_first():
        return Outcome(None)
    loss_fp = reference.heldout_loss if reference else _original_loss(start, config, heldout)
    return Outcome(_finish(config, start, ternary, reference, loss_fp, arms, directory, teacher, exporter or Exporter()))


def _finish(
    config: RunConfig,
    start: Start,
    ternary: ArmResult,
    reference: ArmResult | None,
    loss_fp: float | None,
    arms: dict[str, Path],
    directory: Path,
    teacher: Teacher | None,
    exporter: Exporter,
) -> dict[str, Any]:
    with exporter:
        plot_losses(directory / "loss.png", arms)
        text = sample(ternary.model, start.tokenizer, config.sample_prompt, config.training.seed)
        # Not beside these: both would have threads of torch on all processors, which wait for each other by spinning.
        say("exporting model.gguf and proving it ...")
        exporter.start(directory / "model", directory / "model.gguf")
        proof = exporter.result()
    compared = None if loss_fp is None else "trained on the same tokens" if reference else "the original, not trained further"
    summary = {
        "model": config.model.name,
        "source": start.note,
        "teacher": None if teacher is None else teacher.note,
        "likelihood": _likelihood(ternary.model),
        "ppl_ternary": finite(perplexity(ternary.heldout_loss)),
        "ppl_fp": None if loss_fp is None else finite(perplexity(loss_fp)),
        "fp": compared,
        "tokens": ternary.tokens,
        "seconds": round(ternary.seconds, 3),
        "seconds_fp": round(reference.seconds, 3) if reference else None,
        "gguf": proof,
        "sample": text,
    }
    write_json(directory / "summary.json", summary)
    return summary


def _likelihood(model: PreTrainedModel) -> str:
    """Return what the held-out loss is to the negative log-likelihood."""
    form = diffusion_of(model.config)
    if form is None:
        return "exact"
    if form.token_shift and form.block_size is not None:
        return (
            "estimated: a block's first token is read from the noisy block before it, and decoding reads it from the finished one"
        )
    return "bounded: perplexity is at most that"


def _teacher(config: RunConfig, start: Start) -> Teacher | None:
    if not config.needs_teacher:
        return None
    teacher = load_teacher(
        config.teacher, start.original, start.note, start.tokenizer, start.model.config.vocab_size, config.tops()
    )
    say(f"teacher: {teacher.note}")
    return teacher


def _provenance(start: Start, teacher: Teacher | None) -> str | None:
    if teacher is None or teacher.note in (start.note, start.provenance):
        return start.provenance
    taught = f"distilled from {teacher.note}"
    return taught if start.provenance is None else f"{start.provenance}; {taught}"


def _original_loss(start: Start, config: RunConfig, heldout: PackedStream) -> float | None:
    if start.original is None or not config.training.compare_fp:
        return None
    say("measuring the original model ...")
    return heldout_loss(load_float_model(Pretrained(start.original, "directory", start.note)), heldout)


def prepare_directory(config: RunConfig, directory: Path) -> Path | None:
    """Create the run directory, record the configuration, and return the checkpoint to continue from.

    Raises:
        UserError: if the directory holds a finished run or checkpoints that would be lost, or the checkpoint is missing, damaged
            or of other settings.
    """
    if (directory / "summary.json").is_file():
        raise UserError(f"{directory} holds a finished run: choose another output_dir")
    _check_own(directory)
    checkpoints = directory / "checkpoints"
    newest = newest_checkpoint(checkpoints)
    if config.resume == "none" and newest:
        raise UserError(f"{directory} holds checkpoints of a run: choose another output_dir, or resume=auto to continue it")
    chosen = newest if config.resume in ("auto", "none") else Path(config.resume)
    if chosen is not None and not chosen.is_file():
        raise UserError(f"the checkpoint {chosen} does not exist: give resume=auto, resume=none or a step-N.ckpt file")
    if chosen is not None and newest is not None and chosen.resolve().parent != checkpoints.resolve():
        raise UserError(f"{directory} holds checkpoints of its own run, and {chosen} is of another: choose another output_dir")
    if chosen is not None:
        check_config(chosen, read_checkpoint(chosen), config)
    if is_first():
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "config.yaml", yaml.safe_dump(plain(config), sort_keys=False))
    return chosen


def _check_own(directory: Path) -> None:
    """Refuse a folder that holds anything but a run: nothing in it may be written over."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"{directory} is a file: choose another output_dir")
    try:
        record = yaml.safe_load((directory / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        record = None
    ours = isinstance(record, dict) and {"model", "training", "data", "output_dir"} <= record.keys()
    if not ours and any(directory.iterdir()):
        raise UserError(f"{directory} holds files that are not of a run: choose another output_dir")
    check_replaceable(directory / "model")


def _saved_tokenizer(checkpoint: Path) -> str | None:
    tokenizer: str | None = read_checkpoint(checkpoint)[KEY]["tokenizer"]
    return tokenizer


@contextmanager
def wandb_logger(config: RunConfig, directory: Path) -> Iterator[Logger | None]:
    """Give the wandb logger, offline where no key is known and training.wandb is "auto"; its run ends with the block.

    Raises:
        UserError: if wandb cannot start, for example because of a malformed key.
    """
    mode = config.training.wandb
    if mode == "off" or not is_first():
        yield None
        return
    # Before the import: it fixes wandb's settings, and its remarks would bury ours.
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    name_frozen_files()
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
    offline = mode == "offline" or not has_key
    logger = WandbLogger(
        project="wrinklefree",
        name=directory.name,
        save_dir=str(directory),
        offline=offline,
        # Said twice: Lightning's `offline` comes too late for settings that are fixed already.
        mode="offline" if offline else "online",
    )
    try:
        run = logger.experiment
    except (wandb.Error, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"wandb could not start ({reason}): set WANDB_API_KEY right, or training.wandb=offline") from None
    try:
        yield logger
    finally:
        run.finish()


def name_frozen_files() -> None:
    """Tell `inspect` which modules the importer's own code is of.

    Pydantic asks that of every frame on the stack for a hundred of wandb's classes, and `inspect`, which finds no file of the
    frozen ones, looks through all modules each time: half of wandb's import.
    """
    for name in ("importlib._bootstrap", "importlib._bootstrap_external"):
        file = f"<frozen {name}>"
        for key in (file, os.path.normcase(os.path.abspath(file))):  # noqa: PTH100 (as inspect writes it)
            inspect.modulesbyfile.setdefault(key, name)


def say(text: str) -> None:
    """Print a line for people, once for all processes."""
    if is_first():
        print(text, file=sys.stderr, flush=True)
