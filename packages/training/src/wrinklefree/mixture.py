"""Look for a mixture on proxies of the configured model: `python scripts/mixture.py METHOD [key=value ...]`.

The methods are `data_handler.mixture`'s; this is the shell that gives them a model, its data and a command line.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import yaml
from bitnet_arch import UserError
from data_handler import UserError as DataUserError
from data_handler.mixture import MixtureConfig, with_weights, write_config
from data_handler.mixture.journal import Journal
from data_handler.mixture.offline import Budget, Found, doremi, proxy_run, regmix
from data_handler.mixture.settings import option_names
from data_handler.mixture.simplex import normalised, per_domain
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from wrinklefree.cli import DONE, INTERRUPTED, MISTAKE, compose_values, load_run_config
from wrinklefree.config import RunConfig

REGMIX_OPTIONS = ("proxies", "kind", "prior", "top", "floor", "cap")
PROXIES = ("aioli", "doremi", "influence", "odm")
METHODS = (*PROXIES, "regmix")

HELP = """usage: mixture.py METHOD [mixture.key=value] [group=choice] [key=value]

Looks for a mixture of the data's sources by training proxies, and writes a data configuration with the weights it found.

methods:
  regmix      many proxies on random mixtures, a regression from mixture to loss, and the best mixture by it
  doremi      a reference and a proxy that is trained against it; the average of the proxy's domain weights
  aioli, odm, influence
              one proxy whose mixture the method steers; the average over its run. All three also act in a real run

the proxy is the configured model, on the configured data, for training.max_steps steps. Of the method:
  mixture.out=FILE.yaml      what is written (default: configs/data/mixed.yaml, which data=mixed takes)
  mixture.force=true         replace it
  mixture.target={{a: 2, b: 1}}  weights of the sources' held-out losses (regmix, aioli, influence); default: the same for all
  mixture.quantized=true     train proxies ternary (default: unquantised, which is faster)
{options}

examples:
  uv run python scripts/mixture.py regmix training.max_steps=100 mixture.proxies=16
  uv run python scripts/mixture.py doremi data=demo model=tiny training.max_steps=200 mixture.out=configs/data/doremi.yaml
  uv run python scripts/train_lightning.py data=doremi

  --cfg   print the whole configuration and stop

A stopped regmix goes on: finished proxies are kept beside the file that is to be written.
exit codes: 0 done, 1 failed, 2 a mistake in the command, 75 interrupted
"""


def settings_of(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split `mixture.key=value` from the other arguments; values are YAML.

    Raises:
        UserError: for a value that is no YAML.
    """
    own: dict[str, Any] = {}
    others = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not key.startswith("mixture.") or not equals:
            others.append(argument)
            continue
        try:
            own[key.removeprefix("mixture.")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{key} has a value that cannot be read, {value!r}: quote it") from None
    return own, others


def find(
    config: RunConfig, method: str, settings: Mapping[str, Any], on_step: Callable[[int], None], journal_path: Path | None
) -> Found:
    """Look for the mixture of a configuration's sources.

    Args:
        config: model, data and the length of a proxy.
        method: one of `METHODS`.
        settings: `target`, `quantized` and the method's options.
        on_step: called after each optimiser step.
        journal_path: where regmix keeps finished proxies.

    Raises:
        UserError: for whatever the user can mend.
    """
    domains = [source.name for source in config.data.sources]
    options = {k: v for k, v in settings.items() if k not in ("target", "quantized")}
    target = normalised(per_domain(settings.get("target", 1.0), domains, "mixture.target"), "mixture.target").tolist()
    check_options(method, options, "target" in settings)
    if method != "regmix":
        given = {**options, "target": target} if method == "aioli" else options
        controller = MixtureConfig(method=method, options=given).controller(domains)  # a wrong option fails before anything is read
    from wrinklefree.proxies import LearnerFactory  # after all that a mistake can stop: it brings the trainer
    from wrinklefree.resume import plain

    make = LearnerFactory(config, target=target, quantized=bool(settings.get("quantized", False)))
    budget = Budget(steps=config.training.max_steps, rows_per_step=config.training.rows_per_step)
    seed = config.training.seed
    if method == "doremi":
        return doremi(make, domains, budget, seed, on_step, **options)
    if method != "regmix":
        return proxy_run(make, controller, budget, seed, on_step)
    identity = {"data": make.corpus.fingerprint, "model": plain(config), "quantized": make.quantized, "options": options}
    return regmix(
        make, domains, budget, seed, on_step, target=target, journal=Journal(journal_path, identity), **{"proxies": 32, **options}
    )


def check_options(method: str, options: Mapping[str, Any], has_target: bool) -> None:
    """Check that a method has these options.

    Raises:
        UserError: naming the one it has not.
    """
    if has_target and method in ("doremi", "odm"):
        raise UserError(f"mixture.target has no effect on {method}, which looks at training losses alone: leave it out")
    if method != "regmix":
        MixtureConfig(method=method, options=dict(options))
        return
    for name in options:
        if name not in REGMIX_OPTIONS:
            raise UserError(f"regmix has no option mixture.{name}: its options are {', '.join(REGMIX_OPTIONS)}")
    proxies = options.get("proxies", 32)
    if not isinstance(proxies, int) or proxies < 2:
        raise UserError(f"mixture.proxies must be a whole number of at least 2, not {proxies!r}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or any(argument in ("-h", "--help") for argument in arguments):
        print(HELP.format(options=_options_help()))
        return DONE if arguments else MISTAKE
    try:
        method, *rest = arguments
        if method not in METHODS:
            raise UserError(f"the first argument must be a method ({', '.join(METHODS)}), not {method!r}")
        settings, overrides = settings_of([a for a in rest if a != "--cfg"])
        if flags := [a for a in overrides if a.startswith("-")]:
            raise UserError(f"unknown option {flags[0]}: settings are given as key=value, see --help")
        config = load_run_config(overrides)
        if config.mixture.method != "none":
            raise UserError(f"mixture={config.mixture.method} acts in a training run and has no effect on {method}: leave it out")
        if "--cfg" in rest:
            print(yaml.safe_dump({"method": method, **compose_values(overrides), "mixture": settings}, sort_keys=False), end="")
            return DONE
        return _find_and_write(config, method, settings)
    except ValueError as error:
        if not isinstance(error, UserError | DataUserError):
            raise
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted: the same command goes on after the proxies of regmix that were finished", file=sys.stderr)
        return INTERRUPTED


def _find_and_write(config: RunConfig, method: str, settings: dict[str, Any]) -> int:
    out, force = Path(str(settings.pop("out", "configs/data/mixed.yaml"))), settings.pop("force", False)
    if out.suffix != ".yaml":
        raise UserError(f"mixture.out={out} must end in .yaml")
    if out.exists() and not force:
        raise UserError(f"mixture.out={out} exists: give another name, or mixture.force=true to replace it")
    runs = {"regmix": settings.get("proxies", 32), "doremi": 2}.get(method, 1)
    columns = (
        TextColumn(method),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    journal = out.with_name(f".{out.stem}.proxies.jsonl")
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(method, total=runs * config.training.max_steps)
        found = find(config, method, settings, lambda _: progress.advance(bar), journal)
    names = [source.name for source in config.data.sources]
    weights = dict(zip(names, (float(f"{w:.6g}") for w in found.weights), strict=True))
    comments = [
        f"Weights found by {method} on proxies of model {config.model.name}: {config.training.max_steps} steps of "
        f"{config.training.rows_per_step} rows.",
        f"Cost: {found.trained_tokens:,} tokens trained, {found.measured_tokens:,} measured.",
        *(f"{key}: {value}" for key, value in found.detail.items()),
    ]
    write_config(out, with_weights(config.data, found.weights), comments)
    journal.unlink(missing_ok=True)
    for name, weight in weights.items():
        print(f"{name:<20} {weight:.4f}")
    for comment in comments:
        print(comment)
    print(f"wrote {out}\n\nnext:")
    groups = Path("configs/data")  # where `data=` looks
    if out.parent.resolve() != groups.resolve():
        print(f"  mkdir -p {groups} && cp {quote(str(out))} {groups}/")
    print(f"  uv run python scripts/train_lightning.py data={quote(out.stem)}")
    return DONE


def _options_help() -> str:
    lines = [f"  {method + ':':<11} {', '.join(option_names(method))}" for method in PROXIES]
    heading = "  the method's own options (docs/mixture.md), as mixture.NAME=VALUE:"
    return "\n".join([heading, *lines, f"  regmix:     {', '.join(REGMIX_OPTIONS)}"])
