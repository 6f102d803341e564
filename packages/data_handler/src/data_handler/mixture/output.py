"""A data configuration with found weights, as the YAML that `data=` takes."""

import os
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from data_handler.config import DataConfig
from data_handler.errors import UserError

NEGLIGIBLE = 1e-6
"""A source with a smaller share is left out: at this share it would supply one token in a million."""


def with_weights(config: DataConfig, weights: Sequence[float]) -> DataConfig:
    """Return the configuration with these weights; sources of a negligible one are left out.

    Args:
        config: any.
        weights: one a source, in order.

    Raises:
        UserError: if their number is another, or none is left.
    """
    if len(weights) != len(config.sources):
        raise UserError(f"{len(weights)} weights do not fit the {len(config.sources)} sources of the data: give one each")
    total = float(sum(weights))
    kept = [
        replace(source, weight=float(f"{weight / total:.6g}"))
        for source, weight in zip(config.sources, weights, strict=True)
        if weight / total >= NEGLIGIBLE
    ]
    return replace(config, sources=tuple(kept))


def config_yaml(config: DataConfig, comments: Sequence[str] = ()) -> str:
    """Return a configuration as YAML that `load_config` reads back: the values that differ from their defaults, and all weights."""
    body = yaml.safe_dump(_plain(config), sort_keys=False, width=130, default_flow_style=None, allow_unicode=True)
    return "".join(f"# {line}\n" for comment in comments for line in comment.splitlines()) + body


def write_config(path: Path, config: DataConfig, comments: Sequence[str] = ()) -> None:
    """Write `config_yaml` to a file, whole or not at all.

    Raises:
        UserError: if the name is no `.yaml` file or writing fails.
    """
    if path.suffix != ".yaml":
        raise UserError(f"{path} must end in .yaml, as `data=` finds no other file: rename it")
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(config_yaml(config, comments), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"writing {path} failed ({error.strerror or error}): choose another path") from None
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: _plain(getattr(value, item.name))
            for item in fields(value)
            if item.name == "weight" or item.default is MISSING or getattr(value, item.name) != item.default
        }
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
