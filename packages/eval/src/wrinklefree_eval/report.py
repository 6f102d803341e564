"""Results as JSON and as a Markdown card."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bitnet_arch import UserError

RESULTS_FILE, CARD_FILE = "results.json", "card.md"
ARROWS = {True: "↑", False: "↓", None: ""}


@dataclass(frozen=True)
class Metric:
    """One figure; `higher_is_better` is None where nobody said."""

    name: str
    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class ModelInfo:
    """What was evaluated.

    Attributes:
        path: as the user gave it.
        kind: "directory" or "gguf".
        form: "master", "packed" or "float"; of a GGUF file, the types of its matrices.
        engine: what computed the figures.
        provenance: where the weights are from, if that limits what may be claimed.
        parity: the export gate's verdict on a GGUF file.
        parity_reason: what qualifies the verdict, if anything does.
    """

    path: str
    kind: Literal["directory", "gguf"]
    form: str
    engine: str
    provenance: str | None = None
    parity: str | None = None
    parity_reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task's figures.

    Attributes:
        name: the task.
        description: what it measures.
        stand_in: what it stands in for, in a sentence, or None.
        n: examples evaluated.
        available: examples that there are.
        metrics: its figures.
        baseline: what a model that knows nothing reaches.
        details: counts and parts.
    """

    name: str
    description: str
    stand_in: str | None
    n: int
    available: int
    metrics: tuple[Metric, ...]
    baseline: Metric | None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that one run found."""

    model: ModelInfo
    command: str
    context: int
    limit: int | None
    versions: dict[str, str]
    tasks: tuple[TaskResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; its tasks are keyed by name."""
        result = asdict(self)
        result["tasks"] = {task["name"]: task | {"metrics": _by_name(task["metrics"])} for task in result["tasks"]}
        result["notes"] = self.notes()
        return result

    def notes(self) -> list[str]:
        """Return the sentences without which the figures would claim too much."""
        notes = [f"`{task.name}` is {task.stand_in}." for task in self.tasks if task.stand_in]
        if self.model.provenance:
            notes.append(f"The weights are derived from: {self.model.provenance}.")
        if self.model.parity not in (None, "proven"):
            notes.append(f"The GGUF file is not proven to compute what was trained (parity: {self.model.parity}).")
        if self.model.parity_reason:
            notes.append(f"On parity: {self.model.parity_reason}.")
        if partial := [task for task in self.tasks if task.n < task.available]:
            parts = ", ".join(f"{task.n} of {task.available} in `{task.name}`" for task in partial)
            notes.append(f"Only a part of the examples was evaluated: {parts}.")
        return notes

    def to_markdown(self) -> str:
        """Return the card."""
        name = Path(self.model.path).resolve().name
        lines = [f"# Evaluation of {name}", ""]
        facts = {"model": f"`{self.model.path}`", "form": self.model.form, "engine": self.model.engine}
        if self.model.parity:
            facts["parity"] = self.model.parity
        facts["context"] = f"{self.context} tokens"
        lines += [f"- {key}: {value}" for key, value in facts.items()]
        lines += ["", "| task | metric | value | n | baseline |", "|---|---|---|---|---|"]
        for task in self.tasks:
            label = f"{task.name} (stand-in)" if task.stand_in else task.name
            baseline = f"{task.baseline.name} {task.baseline.value:.4f}" if task.baseline else ""
            for metric in task.metrics:
                arrow = ARROWS[metric.higher_is_better]
                lines.append(f"| {label} | {metric.name} {arrow} | {_figure(metric)} | {task.n} | {baseline} |")
        lines += ["", *(f"- {task.name}: {task.description}.{_counts(task)}" for task in self.tasks)]
        if notes := self.notes():
            lines += ["", "## Read this with the figures", "", *(f"- {note}" for note in notes)]
        versions = ", ".join(f"{package} {number}" for package, number in self.versions.items())
        lines += ["", "## How", "", "```", self.command, "```", "", f"Versions: {versions}.", ""]
        return "\n".join(lines)


def prepare_directory(out: Path) -> None:
    """Create the directory for results, before hours are spent on what could not be kept.

    Raises:
        UserError: if it cannot be created or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"results cannot be written to {out} ({error.strerror}): choose another directory with --out") from None


def write_report(result: Evaluation, out: Path) -> tuple[Path, Path]:
    """Write `results.json` and `card.md` into a directory, each complete or not at all; return their paths.

    Raises:
        UserError: if writing fails.
    """
    texts = {RESULTS_FILE: json.dumps(result.to_json(), indent=2, ensure_ascii=False) + "\n", CARD_FILE: result.to_markdown()}
    for name, text in texts.items():
        temporary = out / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, out / name)
        except OSError as error:
            raise UserError(f"writing {out / name} failed ({error.strerror}): free some space or choose another --out") from None
        finally:
            temporary.unlink(missing_ok=True)
    return out / RESULTS_FILE, out / CARD_FILE


def _by_name(metrics: tuple[dict[str, Any], ...]) -> dict[str, dict[str, Any]]:
    return {metric["name"]: {k: v for k, v in metric.items() if k != "name"} for metric in metrics}


def _figure(metric: Metric) -> str:
    return f"{metric.value:.4f}" if metric.stderr is None else f"{metric.value:.4f} ± {metric.stderr:.4f}"


def _counts(task: TaskResult) -> str:
    if "tokens" not in task.details:
        return ""
    parts = "; ".join(
        f"{domain}: perplexity {part['token_perplexity']:.4f}, {part['bits_per_byte']:.4f} bits per byte, {part['tokens']} tokens"
        for domain, part in task.details["domains"].items()
    )
    return f" {task.details['tokens']} tokens, {task.details['bytes']} bytes ({parts})."
