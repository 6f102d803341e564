"""A whole run: both arms, then the model directory, its proven GGUF, the plot, a sample and the summary."""

import copy
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from bitnet_arch import UserError, load_float_model, save_master
from bitnet_arch.pretrained import Pretrained
from data_handler import PackedStream
from pytorch_lightning.loggers import Logger, WandbLogger

from wrinklefree.arm import ArmResult, train_arm
from wrinklefree.artifacts import export, finite, plot_losses, sample, write_json
from wrinklefree.callbacks import newest_checkpoint
from wrinklefree.config import RunConfig
from wrinklefree.evaluation import heldout_loss, perplexity
from wrinklefree.models import Start, build_start

FREE_TO_CHANGE = {"output_dir", "resume", "sample_prompt", "distributed"}
"""What may differ between a run and the one it continues."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its summary (None in processes other than the first), and the checkpoint if it was interrupted."""

    summary: dict[str, Any] | None
    interrupted: Path | None = None


def train(config: RunConfig) -> Outcome:
    """Train, and write the run directory.

    Raises:
        UserError: for whatever the user can mend; nothing that was saved is lost.
    """
    directory = Path(config.output_dir)
    resume = prepare_directory(config, directory)
    if config.training.threads:
        torch.set_num_threads(config.training.threads)
    say(f"run directory: {directory}")
    start = build_start(config)
    say(f"model: {start.note}")
    seed = config.training.seed
    train_rows = PackedStream(config.data, start.tokenizer, seed=seed)
    heldout = PackedStream(config.data, start.tokenizer, seed=seed, split="heldout")
    twin = copy.deepcopy(start.model) if config.training.compare_fp and start.original is None else None
    logger = build_logger(config, directory)
    ternary = train_arm(
        "ternary", start.model, train_rows, heldout, config, directory, quantized=True, resume=resume, logger=logger
    )
    if ternary.interrupted:
        return Outcome(None, ternary.checkpoint)
    if _is_first():
        save_master(ternary.model, directory / "model", start.tokenizer, start.provenance)
    arms = {"ternary": directory / "metrics.jsonl"}
    reference: ArmResult | None = None
    if twin is not None:
        fp_resume = newest_checkpoint(directory / "fp" / "checkpoints") if config.resume != "none" else None
        reference = train_arm(
            "unquantised", twin, train_rows, heldout, config, directory / "fp", quantized=False, resume=fp_resume, logger=logger
        )
        if reference.interrupted:
            return Outcome(None, reference.checkpoint)
        arms["unquantised"] = directory / "fp" / "metrics.jsonl"
    if not _is_first():
        return Outcome(None)
    loss_fp = reference.heldout_loss if reference else _original_loss(start, config, heldout)
    return Outcome(_finish(config, start, ternary, reference, loss_fp, arms, directory))


def _finish(
    config: RunConfig,
    start: Start,
    ternary: ArmResult,
    reference: ArmResult | None,
    loss_fp: float | None,
    arms: dict[str, Path],
    directory: Path,
) -> dict[str, Any]:
    plot_losses(directory / "loss.png", arms)
    text = sample(ternary.model, start.tokenizer, config.sample_prompt, config.training.seed)
    say("exporting model.gguf and proving it ...")
    proof = export(directory / "model", directory / "model.gguf")
    compared = None if loss_fp is None else "trained on the same tokens" if reference else "the original, not trained further"
    summary = {
        "model": config.model.name,
        "source": start.note,
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


def _original_loss(start: Start, config: RunConfig, heldout: PackedStream) -> float | None:
    if start.original is None or not config.training.compare_fp:
        return None
    say("measuring the original model ...")
    return heldout_loss(load_float_model(Pretrained(start.original, "directory", start.note)), heldout)


def prepare_directory(config: RunConfig, directory: Path) -> Path | None:
    """Create the run directory, record the configuration, and return the checkpoint to continue from.

    Raises:
        UserError: if the directory holds a finished run, another run's configuration, or checkpoints that `resume=none` would lose.
    """
    if (directory / "summary.json").is_file():
        raise UserError(f"{directory} holds a finished run: choose another output_dir")
    newest = newest_checkpoint(directory / "checkpoints")
    if config.resume == "none" and newest:
        raise UserError(f"{directory} holds checkpoints of a run: choose another output_dir, or resume=auto to continue it")
    chosen = newest if config.resume in ("auto", "none") else Path(config.resume)
    if chosen is not None and not chosen.is_file():
        raise UserError(f"the checkpoint {chosen} does not exist: give resume=auto, resume=none or a step-N.ckpt file")
    record = asdict(config)
    if not _is_first():
        return chosen
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "config.yaml"
        if newest and path.is_file():
            _check_same(yaml.safe_load(path.read_text()), yaml.safe_load(yaml.safe_dump(_plain(record))), directory)
        temporary = path.with_suffix(".partial")
        temporary.write_text(yaml.safe_dump(_plain(record), sort_keys=False))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"the run directory {directory} cannot be written ({error.strerror}): choose another output_dir") from None
    return chosen


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _check_same(old: dict[str, Any], new: dict[str, Any], directory: Path, prefix: str = "") -> None:
    for key in old.keys() | new.keys():
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _check_same(a, b, directory, f"{name}.")
        elif a != b and name.split(".")[0] not in FREE_TO_CHANGE:
            raise UserError(
                f"{directory} holds an unfinished run with {name}={a}, and this one has {name}={b}: "
                "give the same value to continue it, or another output_dir"
            )


def build_logger(config: RunConfig, directory: Path) -> Logger | None:
    """Return the wandb logger; offline where no key is known and training.wandb is "auto"."""
    mode = config.training.wandb
    if mode == "off" or not _is_first():
        return None
    import wandb

    has_key = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
    os.environ.setdefault("WANDB_SILENT", "true")
    offline = mode == "offline" or not has_key
    # Said twice: reading the key has fixed wandb's settings already, and Lightning's `offline` comes too late for them.
    chosen = "offline" if offline else "online"
    return WandbLogger(project="wrinklefree", name=directory.name, save_dir=str(directory), offline=offline, mode=chosen)


def say(text: str) -> None:
    """Print a line for people, once for all processes."""
    if _is_first():
        print(text, file=sys.stderr, flush=True)


def _is_first() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0 and int(os.environ.get("NODE_RANK", "0")) == 0
