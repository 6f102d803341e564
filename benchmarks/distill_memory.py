"""What a BitDistill step costs: memory and time beside the naive formulation's, and whether the gradients are the same.

uv run python benchmarks/distill_memory.py --json distill_memory.json

Both have the same student and teacher, scaled dot product attention, and the same three losses. The naive one has whole logits and
whole relation matrices, and keeps every block's activations; ours is `wrinklefree.objectives` with
`training.activation_checkpointing` (`--keep-activations` leaves that out). Memory is the peak of the resident set in a step above
what it is before: weights and gradients are there already, and no optimiser is made. Time is the processor's, on one thread, which
other processes on the machine disturb less.

Every step runs in a process of its own, naive, ours, naive, ours, ..., so that none finds memory that another one left. One that
the system ends for lack of memory is named, and the other is still reported. The default is 2,048 tokens, of which the naive
formulation takes some 12 GiB above the models' 2.
"""

import argparse
import ctypes
import gc
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import ConversionConfig, convert_model
from bitnet_arch.testing import tiny_llama
from report import bar, finish, median_ratio, parser
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from wrinklefree.module import model_logits
from wrinklefree.objectives import Objectives, parse_objectives
from wrinklefree.teachers.base import Shape
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.views import Batch, Head, Needs, forward_views

HEADS, TEMPERATURE, LOGITS, RELATIONS = 32, 5.0, 10.0, 1e5
FORMULATIONS = ("naive", "ours")


def status(key: str) -> int:
    """Return a figure of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_of(step: Callable[[], object]) -> tuple[int, float]:
    """Return a step's peak of memory above what there was before, in bytes, and its processor seconds."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, start = status("VmRSS"), time.process_time()
    step()
    return status("VmHWM") - before, time.process_time() - start


def whole_relation(states: Tensor, mask: Tensor) -> Tensor:
    """Return log relations `[B, heads, T, T]` as the paper writes them."""
    batch, _, length, _ = states.shape
    vectors = states.transpose(1, 2).reshape(batch, length, HEADS, -1).transpose(1, 2)
    scores = vectors @ vectors.mT / vectors.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -1e30).log_softmax(-1)


def naive_loss(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, layer: int) -> Tensor:
    """Return BitDistill's loss from whole logits and relations."""
    needs = Needs(logits=True, qkv=frozenset([layer]))
    with torch.no_grad():
        theirs = forward_views(teacher, batch, needs)
        teacher_logits = Head(teacher)(theirs.last)[:, :-1].flatten(0, 1)
    ours = forward_views(student, batch, needs)
    logits = Head(student)(ours.last)[:, :-1].flatten(0, 1)
    loss = F.cross_entropy(logits, batch["labels"][:, 1:].flatten())
    log_p = (teacher_logits / TEMPERATURE).log_softmax(-1)
    log_q = (logits / TEMPERATURE).log_softmax(-1)
    loss = loss + LOGITS * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    length = batch["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    for mine, target in zip(ours.qkv[layer], theirs.qkv[layer], strict=True):
        log_s, log_t = whole_relation(mine, mask), whole_relation(target, mask)
        loss = loss + RELATIONS * (log_t.exp() * (log_t - log_s)).sum(-1).mean()
    return loss


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Run one step, `given.only`; return its peak in bytes, its processor seconds and a sample of every parameter's gradient."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory ends, it is this process that goes
    torch.set_num_threads(given.threads)
    sizes = {"hidden": 576, "ffn": 1536, "layers": given.layers, "vocab": given.vocabulary, "heads": 9, "kv_heads": 3}
    teacher = tiny_llama(**sizes).requires_grad_(False)
    student = convert_model(tiny_llama(**sizes, seed=1), ConversionConfig(gain="one")).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, given.vocabulary, (given.rows, given.length), generator=generator)
    positions = torch.arange(given.length).expand_as(ids)
    batch = {"input_ids": ids, "labels": ids, "document_ids": torch.ones_like(ids), "position_ids": positions}
    layer = given.layers - 6
    values = {
        "ce": {},
        "logits": {"weight": LOGITS, "temperature": TEMPERATURE},
        "relations": {"weight": RELATIONS, "layer": layer, "heads": HEADS},
    }
    settings = parse_objectives(values)
    objectives = Objectives(
        {name: item.objective for name, item in settings.items()}, Shape.of(student), LocalTeacher(teacher, "float")
    )
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def naive() -> None:
        naive_loss(student, teacher, batch, layer).backward()

    def ours() -> None:
        if not given.keep_activations:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        counts = objectives.counts(batch, settings)
        objectives(student, batch, {n: settings[n].weight / count for n, count in counts.items()}).total.backward()

    model_logits(teacher, {key: value[:1, :8] for key, value in batch.items()})  # what is made once
    peak, seconds = peak_of({"naive": naive, "ours": ours}[given.only])
    sample = [p.grad.flatten()[::16].clone() for p in student.parameters() if p.grad is not None]
    return {"peak": peak, "seconds": seconds, "sample": sample}


def measured(given: argparse.Namespace, name: str, folder: Path) -> dict[str, Any] | None:
    """Run a step in a process of its own; return what `measure` does, None if the system ended it for lack of memory."""
    file = folder / "step.pt"
    sizes = [f"--{key}={getattr(given, key)}" for key in ("rows", "length", "vocabulary", "layers", "threads")]
    command = [sys.executable, __file__, *sizes, *(["--keep-activations"] if given.keep_activations else [])]
    done = subprocess.run([*command, "--only", name, "--step", str(file)], check=False)
    if done.returncode == -signal.SIGKILL:
        print(f"{name}: ended by the system, which had too little memory", file=sys.stderr)
        return None
    if done.returncode:
        raise SystemExit(f"{name} failed with code {done.returncode}")
    result: dict[str, Any] = torch.load(file, weights_only=True)
    print(f"{name}: {result['peak'] / 2**20:,.0f} MiB, {result['seconds']:.1f} processor s", file=sys.stderr)
    return result


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--rows", type=int, default=4, help="rows of the batch")
    arguments.add_argument("--length", type=int, default=512, help="tokens of a row")
    arguments.add_argument("--vocabulary", type=int, default=128256)
    arguments.add_argument("--layers", type=int, default=30)
    arguments.add_argument("--keep-activations", action="store_true", help="leave activation checkpointing out")
    arguments.add_argument("--only", choices=FORMULATIONS, help="measure one, where memory does not hold the other; no bars")
    arguments.add_argument("--step", type=Path, help=argparse.SUPPRESS)  # of a process that runs one
    arguments.set_defaults(rounds=3)
    given = arguments.parse_args()
    if given.step is not None:
        torch.save(measure(given), given.step)
        return
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMULATIONS if given.only in (None, name)}
    lost: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(given.rounds):
            for name in [name for name in found if name not in lost]:
                result = measured(given, name, Path(folder))
                if result is None:
                    lost.add(name)
                else:
                    found[name].append(result)
    rows: list[dict[str, Any]] = [
        {
            "formulation": name,
            "peak MiB": min(run["peak"] for run in runs) / 2**20,
            "processor s (median)": statistics.median(run["seconds"] for run in runs),
        }
        for name, runs in found.items()
        if runs
    ]
    bars = []
    if all(found.get(name) and name not in lost for name in FORMULATIONS):
        naive, ours = (found[name] for name in FORMULATIONS)
        pairs = list(zip(naive[-1]["sample"], ours[-1]["sample"], strict=True))
        difference = max(float((a - b).norm() / a.norm().clamp(min=1e-12)) for a, b in pairs)
        memory = min(run["peak"] for run in ours) / min(run["peak"] for run in naive)
        for row in rows:  # a bar rounds to four digits
            row["largest relative difference of a gradient"] = 0.0 if row["formulation"] == "naive" else difference
        time_ratio = median_ratio(*([run["seconds"] for run in runs] for runs in (ours, naive)))
        bars = [
            bar("memory: ours / naive", memory, "<=", 0.35),
            bar("largest relative difference of a gradient", difference, "<=", 1e-3),
            bar("processor time: ours / naive", time_ratio, "<=", 1.1),
        ]
    tokens = given.rows * given.length
    finish(f"a BitDistill step of {tokens} tokens, fp32", rows, bars, ("torch", "transformers", "wrinklefree"), given.json)
    if lost:
        raise SystemExit(f"not measured for lack of memory: {', '.join(sorted(lost))}")


if __name__ == "__main__":
    main()
