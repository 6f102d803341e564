"""The model that influence is estimated at, and further states of it: model directories and the trainer's checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import (
    Pretrained,
    UserError,
    load_config,
    load_float_model,
    load_model,
    load_tokenizer,
    open_weights,
    resolve_pretrained,
)
from bitnet_arch.calibration import max_positions
from data_handler.influence import AdamMoments, Checkpoint, InfluenceConfig, joined_moments
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from wrinklefree.config import TrainingConfig, from_mapping
from wrinklefree.optim import parameter_groups
from wrinklefree.resume import KEY, read_checkpoint

USES_MOMENTS = ("less", "distillation")
PREFIX = "model."
"""What Lightning puts before the model's names."""


@dataclass(frozen=True)
class Subject:
    """What is scored at.

    Attributes:
        model: float32, evaluation mode; ternary layers as their directory has them.
        tokenizer: its tokenizer.
        note: one line that says where the weights come from.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    note: str


def load_subject(name: str, length: int) -> Subject:
    """Load a float or ternary master model.

    Raises:
        UserError: if there is none, it is packed, or its context is shorter than a row.
    """
    source = resolve_pretrained(name)
    context = max_positions(load_config(source.path))
    if context is not None and length > context:
        raise UserError(f"data.sequence_length={length} is longer than the model's context of {context}: lower it")
    model = _load(source.path, source.note)
    window = getattr(model.config, "sliding_window", None)
    if window is not None and getattr(model.config, "use_sliding_window", True) and length > window:
        raise UserError(f"data.sequence_length={length} is longer than the model's attention window of {window}: lower it")
    return Subject(model.eval(), load_tokenizer(source.path), source.note)


def load_checkpoints(subject: Subject, paths: Sequence[str], rates: Sequence[float], how: InfluenceConfig) -> Iterator[Checkpoint]:
    """Yield the states to take gradients at, each loaded into the subject's own module; without paths, the subject itself.

    Args:
        subject: the model.
        paths: model directories, step-N.ckpt files, or folders of these, in order.
        rates: their learning rates; none takes a checkpoint's own, and 1 for a directory.
        how: whether Adam's moments are needed, and of which layers.

    Raises:
        UserError: for a path that is neither, a state that does not fit, or a number of rates that is not theirs.
    """
    found = [file for path in paths for file in _expanded(Path(path).expanduser())]
    if rates and len(rates) != len(found):
        raise UserError(f"there are {len(found)} checkpoints and {len(rates)} rates: give one each, or none")
    if len(found) > 1 and how.method not in ("tracin", "less"):
        raise UserError(f"method={how.method} takes one checkpoint, and {len(found)} are given: name one step-N.ckpt")
    if not found:
        yield Checkpoint(subject.model)
    for i, path in enumerate(found):
        state, rate, content = _read(path)
        moments = _moments(subject, content, path, how) if content and how.method in USES_MOMENTS else None
        own = {name: tuple(tensor.shape) for name, tensor in subject.model.state_dict().items()}
        if different := sorted(n for n in own.keys() | state.keys() if own.get(n) != tuple(getattr(state.get(n), "shape", ()))):
            raise UserError(f"{path} is of another model (its {different[0]} differs): give checkpoints of model.pretrained")
        subject.model.load_state_dict(state)
        yield Checkpoint(subject.model, rates[i] if rates else rate, moments)


def _load(path: Path, note: str) -> PreTrainedModel:
    with open_weights(path) as reader:
        form = reader.form
    if form == "packed":
        raise UserError(f"{path} is packed, and 2-bit weights have no gradients: give its master form")
    return load_model(path) if form == "master" else load_float_model(Pretrained(path, "directory", note))


def _expanded(path: Path) -> list[Path]:
    if path.is_file() or (path / "config.json").is_file():
        return [path]
    files = sorted(path.glob("step-*.ckpt"), key=_step) if path.is_dir() else []
    if not files:
        raise UserError(f"{path} is no checkpoint: give a model directory, a step-N.ckpt file or a folder of them")
    return files


def _step(path: Path) -> int:
    number = path.stem.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _read(path: Path) -> tuple[Mapping[str, Tensor], float, dict[str, Any] | None]:
    if path.is_dir():
        return _load(path, str(path)).state_dict(), 1.0, None
    content = read_checkpoint(path)
    state = {name.removeprefix(PREFIX): tensor for name, tensor in content["state_dict"].items()}
    rate = max(group["lr"] for group in content["optimizer_states"][0]["param_groups"])
    if not rate > 0:
        raise UserError(f"{path} was left with a learning rate of 0 and would count for nothing: give rates, or other checkpoints")
    return state, float(rate), content


def _moments(subject: Subject, content: dict[str, Any], path: Path, how: InfluenceConfig) -> AdamMoments:
    training = from_mapping(TrainingConfig, content[KEY]["config"]["training"])
    if training.relative_learning_rate:
        raise UserError(
            f"{path} was trained with relative learning rates, and does not say which parameter its moments belong to: "
            "leave out checkpoints, and warm-up steps take their place"
        )
    names = {id(parameter): name for name, parameter in subject.model.named_parameters()}
    ordered = [names[id(p)] for group in parameter_groups(subject.model, training) for p in group["params"]]
    kept = content["optimizer_states"][0]["state"]
    if len(kept) != len(ordered):
        raise UserError(f"{path} is of another model (its optimiser differs): give checkpoints of model.pretrained")
    state = {name: {key: torch.as_tensor(value) for key, value in kept[i].items()} for i, name in enumerate(ordered)}
    return joined_moments(subject.model, how.layers, state, training.betas)
