"""Plain values into configuration dataclasses, with a sentence for whatever does not fit."""

import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from bitnet_arch import UserError
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def require(holds: bool, sentence: str) -> None:
    """Raise `UserError(sentence)` unless `holds`."""
    if not holds:
        raise UserError(sentence)


def from_mapping(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a configuration dataclass from plain values.

    Args:
        kind: the dataclass.
        values: nested mappings, lists and scalars.
        where: dotted prefix of the keys, for messages.

    Raises:
        UserError: for an unknown key (naming the nearest known one), a wrong type, or a value that the class refuses.
    """
    _check_keys(kind, values, where)
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([where, *(str(part) for part in first["loc"])]).strip(".")
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ValueError):
            raise UserError(str(cause)) from None
        if first["type"] == "missing":
            raise UserError(
                f"the key {key} is missing: --help lists groups and keys, --cfg prints the whole configuration"
            ) from None
        raise UserError(f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, and {first['input']!r} was given") from None


def _check_keys(kind: Any, values: object, where: str) -> None:
    for arm in (kind, *typing.get_args(kind)):
        if hasattr(arm, "__dataclass_fields__") and isinstance(values, Mapping):
            hints = typing.get_type_hints(arm)
            for key, value in values.items():
                name = f"{where}.{key}".strip(".")
                if key not in hints:
                    near = difflib.get_close_matches(str(key), hints, n=1)
                    known = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(hints)}"
                    raise UserError(f"unknown key {name}: {known}")
                union = typing.get_origin(hints[key]) in (typing.Union, types.UnionType)
                kinds = typing.get_args(hints[key]) if union else (hints[key],)
                wants_number = bool not in kinds and (int in kinds or float in kinds)
                # Or yes and true would be the number 1.
                require(not (wants_number and isinstance(value, bool)), f"{name} must be a number, not {str(value).lower()}")
                _check_keys(hints[key], value, name)
        elif hasattr(arm, "__dataclass_fields__") and isinstance(values, list):
            for i, value in enumerate(values):
                _check_keys(arm, value, f"{where}.{i}")
