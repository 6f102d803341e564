"""What a run has to share with the checkpoint that it continues from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import UserError
from torch import nn

from wrinklefree.config import MixtureConfig, RunConfig
from wrinklefree.curriculum import CurriculumConfig
from wrinklefree.teachers.settings import TeacherConfig

KEY = "wrinklefree"
"""Where a Lightning checkpoint holds what is ours."""

FREE_TO_CHANGE = (
    "output_dir",
    "resume",
    "sample_prompt",
    "distributed",
    "training.micro_batch_rows",
    "training.activation_checkpointing",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.data_workers",
    "data.cache_dir",
    "teacher.cache_dir",
    "teacher.url",
    "teacher.timeout_s",
    "teacher.retries",
    "teacher.concurrency",
    "teacher.api_key_file",
    "training.wandb",
)
"""Settings that may differ from those of the checkpoint, because they change no result (micro-batches only its rounding)."""


@dataclass(frozen=True)
class Identity:
    """What every checkpoint of an arm says about the run, and what a run that continues from it must repeat.

    Attributes:
        arm: "ternary" or "unquantised".
        config: the run's configuration as plain values.
        data: `PackedStream.fingerprint` of the training rows.
        tokenizer: `tokenizer.json` of a tokenizer that the run has trained itself; None if it came with the model.
    """

    arm: str
    config: dict[str, Any]
    data: str
    tokenizer: str | None


def plain(value: Any) -> Any:
    """Return a configuration as nested dicts, lists and scalars, the same after a trip through YAML or a checkpoint."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content; tensors are mapped from the file, not read.

    Raises:
        UserError: if it is damaged or not one of ours.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive raises whatever its damaged part does
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise UserError(f"{path} is damaged or no checkpoint ({reason}): {_older(path)}") from None
    kept = content.get(KEY) if isinstance(content, dict) else None
    ours = isinstance(kept, dict) and {f.name for f in fields(Identity)} <= kept.keys()
    if not ours or not {"state_dict", "optimizer_states"} <= content.keys():
        raise UserError(f"{path} is no checkpoint of this trainer: {_older(path)}")
    return content


def check_config(path: Path, content: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse to continue a checkpoint with other settings.

    Raises:
        UserError: naming the first setting that differs, unless it is in `FREE_TO_CHANGE`.
    """
    _check_same(_with_defaults(content[KEY]["config"], plain(config)), plain(config), path)


def check_teacher(path: Path, content: Mapping[str, Any], digest: str | None) -> None:
    """Refuse to continue a checkpoint with another teacher.

    Raises:
        UserError: saying so.
    """
    if content[KEY].get("teacher") != digest:
        raise UserError(f"{path} was trained with another teacher: restore it, or start again in another output_dir")


def check_fits(path: Path, content: Mapping[str, Any], identity: Identity, module: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Refuse a checkpoint of another arm, model or text.

    Args:
        path: the checkpoint, for messages.
        content: what `read_checkpoint` gave.
        identity: of the run that wants to continue it.
        module: the module whose state it would replace.
        groups: the parameter groups of its optimiser.

    Raises:
        UserError: naming what differs.
    """
    kept = content[KEY]
    if kept["arm"] != identity.arm:
        raise UserError(f"{path} is of the {kept['arm']} arm, not of the {identity.arm} one: give another checkpoint")
    saved = {name: tuple(tensor.shape) for name, tensor in content["state_dict"].items()}
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if different := sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name)):
        raise UserError(f"{path} is of another model (its {different[0]} differs): continue it with the model it was made from")
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in content["optimizer_states"]]
    if sizes != [[len(group["params"]) for group in groups]]:
        raise UserError(f"{path} groups its parameters in another way: continue it with the model it was made from")
    if kept["data"] != identity.data:
        raise UserError(
            f"{path} was trained on other text or with another tokenizer (a file of the data has changed): "
            "restore it, or start again in another output_dir"
        )


def _with_defaults(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what a checkpoint is too old to know: groups and keys that came later, with the values that change nothing."""
    filled = {**_LATER_GROUPS, **old}
    for group, keys in _LATER_KEYS.items():
        if isinstance(filled.get(group), dict) and isinstance(new.get(group), dict):
            filled[group] = {**keys, **filled[group]}
    return filled


_LATER_GROUPS: dict[str, Any] = {
    "mixture": plain(MixtureConfig()),
    "objectives": {"ce": {"weight": 1.0}},
    "teacher": plain(TeacherConfig()),
    "curriculum": plain(CurriculumConfig()),
}
_LATER_KEYS: dict[str, dict[str, Any]] = {
    "training": {"trainable": "all", "gradient_norms_every": 0, "activation_checkpointing": False},
    "model": {"lrc": None},
}


def _older(path: Path) -> str:
    return f"give resume=PATH of an older one in {path.parent}, or start again in another output_dir"


def _check_same(old: dict[str, Any], new: dict[str, Any], path: Path, prefix: str = "") -> None:
    for key in sorted(old.keys() | new.keys()):
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if name in FREE_TO_CHANGE:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            _check_same(a, b, path, f"{name}.")
        elif a != b:
            raise UserError(
                f"{path} was trained with {name}={a}, and this run has {name}={b}: "
                "give the same value to continue it, or another output_dir"
            )
