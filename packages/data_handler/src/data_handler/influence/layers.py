"""Which parameters count: selection by name pattern, or the last blocks of a stack."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from data_handler.errors import UserError

LAST = "last:"


def block_list(model: nn.Module) -> tuple[str, int]:
    """Return the name and length of the model's stack of blocks: its longest `nn.ModuleList`, the first of equals.

    Raises:
        UserError: if it has none.
    """
    stacks = [(name, len(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not stacks:
        raise UserError(f"{type(model).__name__} has no stack of blocks: name its layers by pattern, such as *.weight")
    return max(stacks, key=lambda stack: stack[1])


def select_parameters(model: nn.Module, layers: Sequence[str] = ("*",)) -> dict[str, nn.Parameter]:
    """Return the floating-point parameters that any of the patterns names, in the model's order.

    Args:
        model: any module; a tied parameter occurs once, under its first name.
        layers: shell patterns over parameter names (`model.layers.29.*`, `*.down_proj.weight`), or `last:N` for the last N blocks
            of the model's stack.

    Raises:
        UserError: for no pattern, a pattern that names nothing, or more blocks than there are.
    """
    if not layers:
        raise UserError("no layers are named: give patterns over parameter names, or last:N for the last N blocks")
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    chosen: set[str] = set()
    for pattern in layers:
        found = {n for n in parameters if any(fnmatchcase(n, p) for p in _expanded(model, pattern))}
        if not found:
            raise UserError(f"no parameter is named like {pattern!r}: the names are such as {', '.join(list(parameters)[-3:])}")
        chosen |= found
    return {name: p for name, p in parameters.items() if name in chosen}


def _expanded(model: nn.Module, pattern: str) -> list[str]:
    if not pattern.startswith(LAST):
        return [pattern]
    stack, length = block_list(model)
    wanted = pattern.removeprefix(LAST)
    if not wanted.isdecimal() or not 1 <= int(wanted) <= length:
        raise UserError(f"{pattern!r} must be last:N with N from 1 to the model's {length} blocks")
    return [f"{stack}.{i}.*" for i in range(length - int(wanted), length)]
