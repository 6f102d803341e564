"""Command line: which training examples and domains help a set of probes, at a checkpoint. Estimates: `data_handler.influence`."""

import difflib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from bitnet_arch import UserError
from data_handler import DataConfig
from data_handler.influence import InfluenceConfig

from wrinklefree.cli import DONE, INTERRUPTED, MISTAKE, compose_values, is_user_error
from wrinklefree.config import from_mapping

HELP = """usage: influence.py model.pretrained=CHECKPOINT [key=value ...]

Ranks the documents and domains of a data configuration by how much training on them helps a set of probes, and leaves
influence.parquet (every example), report.md and influence.png. Every score is positive where an example helps.

common keys:
  model.pretrained=DIR|ID    the model to score at: a model directory or hub id (model=DIR is the same)
  data=NAME                  the documents to rank: demo, text, jsonl, ... as in training
  probes=FILE|DIR|heldout    what they shall help: .jsonl, .parquet, .txt or .md, a group each file; or what data holds out
  method=NAME                tracin, less, datainf (default), distillation, exact
  layers=[last:2]            whose gradients count: last:N blocks, or patterns such as '*.down_proj.weight'
  limit=N probe_limit=N      documents of each source, texts of each probe file
  memory_mib=N spill=DIR     bound on a chunk of gradients; a folder that holds them instead of memory
  checkpoints=[PATH,...]     tracin, less: several checkpoints, or a run's folder of step-N.ckpt
  damping=spectral|reference|NUMBER     datainf, exact
  warmup_steps=N             less: Adam steps, where no checkpoint brings its moments
  landmarks=N                distillation: examples with exact influence
  output_dir=DIR             default: outputs/influence-METHOD-DATE

examples:
  uv run python scripts/influence.py model.pretrained=outputs/run/model
  uv run python scripts/influence.py model.pretrained=outputs/run/model data=jsonl probes=probes/ method=less
  uv run python scripts/influence.py model.pretrained=outputs/run/model method=tracin checkpoints=[outputs/run/checkpoints]
  uv run python scripts/influence.py model.pretrained=HuggingFaceTB/SmolLM2-135M-Instruct limit=50 method=distillation

  --cfg   print the whole configuration and stop

exit codes: 0 done, 1 failed, 2 a mistake in the command, 75 interrupted (nothing was written)
"""

CHECKPOINT_METHODS = ("tracin", "less")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """Which model is scored at.

    Attributes:
        pretrained: a model directory (float or ternary master) or hub id.
    """

    pretrained: str


@dataclass(frozen=True, kw_only=True, slots=True)
class InfluenceRun:
    """What is ranked, for what, and where the result goes; how is an `InfluenceConfig`.

    Attributes:
        model: the model.
        data: the documents.
        probes: a file, a folder or "heldout".
        probe_column: where a probe record keeps its text.
        output_dir: the result's folder, which must be new or empty.
        limit: documents of each source.
        probe_limit: texts of each probe file.
        checkpoints: states of the model to use instead of its own.
        rates: their learning rates.
        threads: CPU threads; None leaves PyTorch's choice.
    """

    model: ModelSource
    data: DataConfig
    probes: str
    output_dir: str
    probe_column: str = "text"
    limit: int = 200
    probe_limit: int = 64
    checkpoints: tuple[str, ...] = ()
    rates: tuple[float, ...] = ()
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "probe_limit", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.rates and not self.checkpoints:
            raise UserError("rates has no effect without checkpoints: leave it out")
        if any(not rate > 0 for rate in self.rates):
            raise UserError(f"rates must be above 0, not {list(self.rates)}")
        if self.probes == "heldout" and self.probe_column != "text":
            raise UserError("probe_column has no effect with probes=heldout: leave it out")


def load_influence_config(overrides: Sequence[str]) -> tuple[InfluenceRun, InfluenceConfig]:
    """Compose and check the configuration.

    Raises:
        UserError: naming the key or choice that is wrong and what would be right.
    """
    values = compose_values([_checkpoint_key(override) for override in overrides], "influence")
    method = values.get("method")
    values["output_dir"] = values.get("output_dir") or str(Path("outputs") / f"influence-{method}-{time.strftime('%Y%m%d-%H%M%S')}")
    model = values.get("model")
    if not isinstance(model, dict) or not model.get("pretrained"):
        raise UserError("no model is named: give model.pretrained=DIR, a model directory or hub id")
    if isinstance(values.get("layers"), str):
        values["layers"] = [values["layers"]]
    own = {item.name for item in fields(InfluenceConfig)}
    known = own | {item.name for item in fields(InfluenceRun)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(sorted(known))}"
            raise UserError(f"unknown key {key}: {hint}")
    how = from_mapping(InfluenceConfig, {k: v for k, v in values.items() if k in own})
    what = from_mapping(InfluenceRun, {k: v for k, v in values.items() if k not in own})
    if what.checkpoints and how.method not in CHECKPOINT_METHODS and len(what.checkpoints) > 1:
        raise UserError(
            f"method={how.method} takes one checkpoint: leave out checkpoints, or use {' or '.join(CHECKPOINT_METHODS)}"
        )
    return what, how


def _checkpoint_key(override: str) -> str:
    """Let `model=DIR` name the checkpoint: there is no group of models here."""
    return f"model.pretrained={override.removeprefix('model=')}" if override.startswith("model=") else override


def run(what: InfluenceRun, how: InfluenceConfig) -> Path:
    """Estimate, and write the result's folder; return it.

    Raises:
        UserError: for whatever the user can mend; nothing is left half written.
    """
    import torch
    from data_handler.influence import estimate, probe_examples, training_examples

    from wrinklefree.influence_checkpoints import load_checkpoints, load_subject

    target = Path(what.output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists and is not empty: choose another output_dir")
    if what.threads:
        torch.set_num_threads(what.threads)
    started = time.monotonic()
    subject = load_subject(what.model.pretrained, what.data.sequence_length)
    _say(f"model: {subject.note}")
    probes = probe_examples(what.probes, what.data, subject.tokenizer, what.probe_limit, what.probe_column)
    train = training_examples(what.data, subject.tokenizer, what.limit)
    _say(f"{len(train)} examples of {', '.join(train.names)}; {len(probes)} probes of {', '.join(probes.names)}; {how.method}")
    states = load_checkpoints(subject, what.checkpoints, what.rates, how)
    found = estimate(states, train.tensors, probes.tensors, probes.group, len(probes.names), how)
    found.facts["seconds"] = round(time.monotonic() - started, 1)

    from wrinklefree.influence_report import write_report

    with _new_directory(target) as folder:
        settings = {"model": subject.note, "checkpoints": list(what.checkpoints), "probes": what.probes, "limit": what.limit}
        write_report(folder, found, train, probes.names, how, settings)
        (folder / "config.yaml").write_text(yaml.safe_dump(_plain(what, how), sort_keys=False))
    return target


class _new_directory:  # noqa: N801  (a context manager)
    """A folder beside `target` that takes its name when the block ends without an error."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self._target.name}.", dir=self._target.parent))
        except OSError as error:
            raise UserError(f"cannot write beside {self._target} ({error.strerror or error}): choose another output_dir") from None
        return self._folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> Literal[False]:
        try:
            if kind is None:
                self._folder.chmod(0o755)
                os.replace(self._folder, self._target)  # an empty folder is replaced
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise UserError(f"writing {self._target} failed ({reason}): free some space or choose another output_dir") from None
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(HELP)
        return DONE
    try:
        flags = [a for a in arguments if a.startswith("-") and a != "--cfg"]
        if flags:
            raise UserError(f"unknown option {flags[0]}: settings are given as key=value, see --help")
        what, how = load_influence_config([a for a in arguments if a != "--cfg"])
        if "--cfg" in arguments:
            print(yaml.safe_dump(_plain(what, how), sort_keys=False), end="")
            return DONE
        folder = run(what, how)
    except ValueError as error:
        if not is_user_error(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted: nothing was written; run the command again", file=sys.stderr)
        return INTERRUPTED
    print((folder / "report.md").read_text().split("\n## Examples")[0])
    print(f"examples: {folder / 'influence.parquet'}\nreport:   {folder / 'report.md'}")
    return DONE


def _plain(what: InfluenceRun, how: InfluenceConfig) -> dict[str, Any]:
    from wrinklefree.resume import plain

    return {**plain(what), **plain(how)}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
