"""The argv of each package's command, as ARCHITECTURE.md fixes them. Pure: values in, words out."""

from collections.abc import Mapping, Sequence

Value = str | int | float | bool | None


def convert_argv(source: str, options: Mapping[str, Value]) -> tuple[str, ...]:
    """Words after `python -m bitnet_arch`."""
    return _words("convert", positionals=[source], options=options)


def inference_argv(command: str, positionals: Sequence[str], options: Mapping[str, Value]) -> tuple[str, ...]:
    """Words after `python -m wrinklefree_inference`, for `export`, `generate` and `serve`."""
    return _words(command, positionals=positionals, options=options)


def eval_argv(model: str, options: Mapping[str, Value]) -> tuple[str, ...]:
    """Words after `python -m wrinklefree_eval`, which has no subcommands."""
    return _words(positionals=[model], options=options)


def _words(*head: str, positionals: Sequence[str], options: Mapping[str, Value]) -> tuple[str, ...]:
    """Lay out a command line; an option that is `None` or false is left out, so the callee's default holds.

    What begins with a dash is kept from being read as an option: a value is joined to its option by `=`, positionals go
    last behind `--`.
    """
    flags: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        if value is True:
            flags.append(name)
        elif str(value).startswith("-"):
            flags.append(f"{name}={value}")
        else:
            flags += [name, str(value)]
    if any(word.startswith("-") for word in positionals):
        return (*head, *flags, "--", *positionals)
    return (*head, *positionals, *flags)
