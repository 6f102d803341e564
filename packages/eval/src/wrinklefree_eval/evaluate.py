"""Runs lm-eval on one model and collects what it found."""

import logging
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitnet_arch import UserError, open_weights
from bitnet_arch.checkpoint import read_provenance
from bitnet_arch.gguf import PROVENANCE_KEY, read_gguf
from bitnet_arch.gguf.floats import TYPE_NAMES
from bitnet_arch.parity.proof import proof_status
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate as lm_evaluate

from wrinklefree_eval import reviews, texts
from wrinklefree_eval.backends import DirectoryLM, LlamaCppLM
from wrinklefree_eval.report import Evaluation, Metric, ModelInfo, TaskResult
from wrinklefree_eval.statistics import majority_share, rate_summary
from wrinklefree_eval.tasks import DESCRIPTIONS, PERPLEXITY, SST2_LOCAL, STAND_INS, PerplexityTask, Sst2LocalTask

PACKAGES = ("wrinklefree-eval", "bitnet-arch", "data-handler", "lm-eval", "torch", "transformers")
MATRIX = re.compile(r"blk\.\d+\.\w+\.weight")
FEWSHOT_SEED = 1234
BOOTSTRAP_ITERATIONS = 1000


def evaluate(
    model: Path | str, names: Sequence[str], *, limit: int | None = None, context: int | None = None, command: str = ""
) -> Evaluation:
    """Evaluate a model on tasks.

    Args:
        model: a model directory or a GGUF file.
        names: `perplexity`, `sst2_local`, or tasks of lm-eval.
        limit: only the first so many examples of each task.
        context: tokens of a window; by default 1024 or what the model knows.
        command: what the user ran, for the card.

    Raises:
        UserError: for a missing or damaged model, an unknown task, one whose data cannot be had, or a limit below 1.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise UserError(f"no task is named: give some of {', '.join(DESCRIPTIONS)} with --tasks")
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}: give at least 1")
    _quiet()
    info = describe_model(Path(model).expanduser())
    tasks = load_foreign_tasks([name for name in names if name not in DESCRIPTIONS])
    lm: TemplateLM = (LlamaCppLM if info.kind == "gguf" else DirectoryLM)(Path(info.path), context)
    for name in names:
        if name == PERPLEXITY:
            tasks[name] = PerplexityTask(texts.heldout_documents(), lambda text: len(lm.tok_encode(text, add_special_tokens=False)))
        elif name == SST2_LOCAL:
            tasks[name] = Sst2LocalTask(reviews.load_reviews("test"))
    found = lm_evaluate(lm, {"tasks": tasks, "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=BOOTSTRAP_ITERATIONS)
    engines = ("xllamacpp",) if info.kind == "gguf" else ()
    return Evaluation(
        model=info,
        command=command,
        context=lm.max_length,
        limit=limit,
        versions={"python": platform.python_version()} | {name: _version(name) for name in (*PACKAGES, *engines)},
        tasks=tuple(_collect(name, found, len(task.eval_docs)) for name, task in tasks.items()),
    )


def describe_model(path: Path) -> ModelInfo:
    """Say what a path holds: its form, its engine, and what limits the claims made with it.

    Raises:
        UserError: if it is neither a model directory nor a GGUF file, or is damaged.
    """
    if path.is_dir():
        with open_weights(path) as reader:
            form = reader.form
        return ModelInfo(str(path), "directory", form, "PyTorch (transformers)", provenance=read_provenance(path))
    if not path.exists():
        raise UserError(f"{path} does not exist: give a model directory or a .gguf file")
    file = read_gguf(path)
    # What the blocks' matrices are; embeddings and head stay float in every file.
    kinds = {TYPE_NAMES[t.ggml_id] for name, t in file.tensors.items() if MATRIX.fullmatch(name) and len(t.shape) == 2}
    form = ", ".join(sorted(kinds)) or "no matrices"
    # From the file itself: what lies beside it may belong to another one.
    provenance = str(file.metadata[PROVENANCE_KEY]) if PROVENANCE_KEY in file.metadata else None
    parity, reason = proof_status(path) or ("no report", "")
    return ModelInfo(
        str(path), "gguf", form, "llama.cpp (xllamacpp)", provenance=provenance, parity=parity, parity_reason=reason or None
    )


def load_foreign_tasks(names: Sequence[str]) -> dict[str, Task]:
    """Load tasks of lm-eval by name; most fetch a data set from the Hugging Face hub.

    Raises:
        UserError: if lm-eval knows no such task or its data cannot be loaded.
    """
    if not names:
        return {}
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            raise UserError(f"there is no task {name!r}: choose {' or '.join(DESCRIPTIONS)}, or one that `lm-eval ls tasks` prints")
    tasks: dict[str, Task] = {}
    for name in names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:  # data sets fail with the exceptions of every transport and format
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            remedy = "connect to the Hugging Face hub, or use sst2_local" if name == "sst2" else "connect to the Hugging Face hub"
            raise UserError(f"the data of task {name!r} could not be loaded ({reason}): {remedy}") from None
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


def _collect(name: str, found: dict[str, Any], available: int) -> TaskResult:
    samples = found["samples"][name]
    directions = found["higher_is_better"].get(name, {})
    values = found["results"][name]
    metrics, baseline, details = [], None, {}
    for key, value in values.items():
        metric, _, _ = key.partition(",")
        if "," not in key or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(key.replace(metric, f"{metric}_stderr", 1))
        metrics.append(
            Metric(metric, float(value), float(stderr) if isinstance(stderr, int | float) else None, directions.get(metric))
        )
    if name == PERPLEXITY:
        by_domain: dict[str, list[dict[str, Any]]] = {}
        for sample in samples:
            by_domain.setdefault(sample["doc"]["domain"], []).append(sample)
        total = rate_summary(samples)
        metrics = [Metric(m.name, m.value, total[f"{m.name}_stderr"], m.higher_is_better) for m in metrics]
        details = {"tokens": total["tokens"], "bytes": total["bytes"]}
        details["domains"] = {domain: rate_summary(part) for domain, part in by_domain.items()}
    if name == SST2_LOCAL:
        baseline = Metric("majority", majority_share([s["doc"]["label"] for s in samples]), None, True)
    return TaskResult(
        name=name,
        description=DESCRIPTIONS.get(name, "lm-eval's own task"),
        stand_in=STAND_INS.get(name),
        n=len({sample["doc_id"] for sample in samples}),
        available=available,
        metrics=tuple(metrics),
        baseline=baseline,
        details=details,
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _quiet() -> None:
    """Leave progress bars and results: libraries' remarks about ordinary things would bury them."""
    for name in ("lm_eval", "transformers", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
