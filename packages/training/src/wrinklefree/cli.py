"""Command line: `python -m wrinklefree [key=value ...]`, configured by Hydra's groups."""

import atexit
import gc
import os
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

from bitnet_arch import UserError
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wrinklefree.config import RunConfig, from_mapping
from wrinklefree.processes import is_first

DONE, FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 75
MISSING = "Could not find"

HELP = """usage: train_lightning.py [key=value ...]

Trains a 1.58-bit language model and leaves a model directory, a proven GGUF file, metrics and a plot.

groups (group=choice):
{groups}

common keys:
  output_dir=DIR             the run directory (default: outputs/MODEL-DATE)
  resume=auto|none|PATH      continue from the newest checkpoint in output_dir (auto), refuse to, or from a file
  training.max_steps=N       optimiser steps
  training.seed=N            of weights, data order and sampling
  objectives.NAME.weight=W   of an objective that the preset names; 0 costs nothing (docs/objectives.md)
  teacher.model=DIR|ID       what objectives compare with (default: the original of the student)
  mixture.options.NAME=V     of the method that moves the sources' shares (docs/mixture.md)
  model.pretrained=DIR|ID    the model directory or hub id to start from

examples:
  uv run python scripts/train_lightning.py
  uv run python scripts/train_lightning.py model=smollm2_135m training=base
  uv run python scripts/train_lightning.py training=smoke output_dir=outputs/try
  uv run python scripts/train_lightning.py model=smollm2_135m training=bitdistill_full
  uv run python scripts/train_lightning.py mixture=odm mixture.options.every=20
  uv run python scripts/train_lightning.py data=text 'data.sources.0.path=notes/*.txt'

  --cfg   print the whole configuration and stop

exit codes: 0 done, 1 failed, 2 a mistake in the command, 75 interrupted and resumable
"""


def configs_directory(package: str) -> Path:
    """Return a member's `configs/`: inside the installed wheel, or beside `src/` in the source tree."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    inside = Path(spec.origin).parent / "configs"
    return inside if inside.is_dir() else Path(spec.origin).parents[2] / "configs"


def search_path() -> list[Path]:
    """Return the folders with further groups and presets: data_handler's, and `configs/` where the command is run."""
    return [path for path in (configs_directory("data_handler"), Path.cwd() / "configs") if path.is_dir()]


def load_run_config(overrides: Sequence[str]) -> RunConfig:
    """Compose and check the configuration.

    Raises:
        UserError: naming the key or choice that is wrong and what would be right.
    """
    values = compose_values(overrides)
    if values.get("output_dir") is None:
        # Processes that Lightning starts later must choose the same name.
        stamp = os.environ.setdefault("WF_RUN_STAMP", time.strftime("%Y%m%d-%H%M%S"))
        model = values.get("model")
        name = model.get("name") if isinstance(model, dict) else None
        values["output_dir"] = str(Path("outputs") / f"{name}-{stamp}")
    return from_mapping(RunConfig, values)


def compose_values(overrides: Sequence[str], name: str = "train") -> dict[str, Any]:
    """Return the composed configuration as plain values; `name` is that of the primary YAML file."""
    paths = ",".join(f"file://{path}" for path in search_path())
    try:
        with initialize_config_dir(str(configs_directory("wrinklefree").resolve()), version_base="1.3"):
            composed = compose(name, overrides=[*map(_forced, overrides), f"hydra.searchpath=[{paths}]"])
            values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_one_sentence(error)) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _forced(override: str) -> str:
    """Let a plain `key=value` set a key that no YAML file mentions; our own check, with a better message, follows."""
    key, equals, _ = override.partition("=")
    settable = equals and key and (key[0].isalpha() or key[0] == "_") and "@" not in key and key not in group_choices()
    return f"++{override}" if settable else override


def _one_sentence(error: Exception) -> str:
    """Shorten Hydra's message to one sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Available options in") for line in lines):
        start = next(i for i, line in enumerate(lines) if line.startswith("Available options in"))
        missing = next((line[line.index(MISSING) :] for line in lines if MISSING in line), "unknown choice").rstrip(".")
        choices = [line for line in lines[start + 1 :] if "/" not in line and ":" not in line]
        return f"{missing}: choose one of {', '.join(choices)}"
    first = lines[0].rstrip(".:") if lines else type(error).__name__
    return f"{first} (--help lists groups and keys, --cfg prints the whole configuration)"


def group_choices() -> dict[str, list[str]]:
    """Return every group with its choices."""
    roots = [configs_directory("wrinklefree"), *search_path()]
    groups: dict[str, list[str]] = {}
    for root in roots:
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            groups.setdefault(folder.name, []).extend(sorted(file.stem for file in folder.glob("*.yaml")))
    return groups


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. Without `argv` it is this process's own, which then ends."""
    if argv is None:
        # Python's last collection would look at everything that was imported, for seconds, before the system takes it anyway.
        atexit.register(gc.freeze)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        groups = "\n".join(f"  {name:<12} {', '.join(choices)}" for name, choices in group_choices().items())
        print(HELP.format(groups=groups))
        return DONE
    show = "--cfg" in arguments
    try:
        flags = [a for a in arguments if a.startswith("-") and a != "--cfg"]
        if flags:
            raise UserError(f"unknown option {flags[0]}: settings are given as key=value, see --help")
        overrides = [a for a in arguments if a != "--cfg"]
        if show:
            load_run_config(overrides)
            print(OmegaConf.to_yaml(OmegaConf.create(compose_values(overrides))), end="")
            return DONE
        return _train(load_run_config(overrides), is_command=argv is None)
    except ValueError as error:
        if not is_user_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted: whatever was saved is still there; the same command with its output_dir continues it", file=sys.stderr)
        return INTERRUPTED


def is_user_error(error: ValueError) -> bool:
    """Say whether an error is a mistake that the user can mend: each library has its own type for it."""
    import data_handler

    return isinstance(error, UserError | data_handler.UserError)


def _train(config: RunConfig, *, is_command: bool) -> int:
    """Train; `is_command`: this process does nothing else, and nothing has been computed in it."""
    from wrinklefree.exporting import Exporter, WaitingExporter
    from wrinklefree.run import train

    if is_command:
        gc.freeze()  # what was imported stays: collections need not look at it, and a copy's memory is not written to for that
    with WaitingExporter() if is_command and is_first() and WaitingExporter.possible() else Exporter() as exporter:
        outcome = train(config, exporter)
    if outcome.interrupted is not None:
        print(
            f"interrupted: saved {outcome.interrupted}; continue with the same command and "
            f"output_dir={quote(str(config.output_dir))}",
            file=sys.stderr,
        )
        return INTERRUPTED
    if outcome.summary is not None:
        report(config, outcome.summary)
        gguf = outcome.summary["gguf"]
        if gguf["status"] in ("failed", "refused"):
            directory = Path(config.output_dir)
            again = f"uv run wf export {quote(str(directory / 'model'))} --out {quote(str(directory / 'model.gguf'))}"
            hint = f"; the model is whole, and `{again}` tries again" if gguf["status"] == "refused" else ""
            print(f"error: model.gguf was not written: {gguf['note']}{hint}", file=sys.stderr)
            return FAILED
    return DONE


def report(config: RunConfig, summary: dict[str, Any]) -> None:
    """Print what a finished run came to, and the commands that its model is for."""
    from bitnet_arch.parity import has_native_engine

    directory = Path(config.output_dir)
    ternary, fp = summary["ppl_ternary"], summary["ppl_fp"]
    known = {"exact": "", "bounded": " (an upper bound)", "estimated": " (an estimate)"}[summary["likelihood"].partition(":")[0]]
    print(
        f"\nheld-out perplexity: ternary {ternary:.2f}{known}" if ternary else "\nheld-out perplexity: ternary overflowed", end=""
    )
    print(f", unquantised {fp:.2f} ({summary['fp']})" if fp else "")
    print(f"sample: {summary['sample']!r}")
    print(f"model:  {directory / 'model'}")
    gguf = summary["gguf"]
    written = gguf["status"] in ("proven", "unproven")
    plain = gguf["status"] == "proven" and gguf["note"].startswith("see ")
    status = gguf["status"] if plain else f"{gguf['status']}: {gguf['note']}"
    print(f"gguf:   {directory / 'model.gguf'} ({status})" if written else f"gguf:   not written: {gguf['note']}")
    print(f"curves: {directory / 'loss.png'}\n\nnext:")
    model, file = (quote(str(directory / name)) for name in ("model", "model.gguf"))
    # The native engine runs any file; without it, a directory runs in PyTorch.
    commands = [f'generate {file if written and has_native_engine() else model} "def main"']
    if gguf["runs"]:  # the server is llama.cpp's
        commands.append(f"serve {file}")
    if summary["likelihood"] == "exact":  # tasks compare likelihoods
        commands.append(f"eval {model} --tasks perplexity,sst2_local")
    for command in commands:
        print(f"  uv run wf {command}")
