"""BitDistill arm by arm (experiment E4): how much of the gap between ternary and float fine-tuning each part recovers.

uv run python benchmarks/bitdistill_ladder.py --seeds 5 --json bitdistill_ladder.json

A synthetic three-way task stands in for entailment: whether symbols of one set are more, fewer or as many as those of another. A
base model learns the symbols' Markov chain, the teacher is the base fine-tuned on the task, and every student starts from the base.
Arms of a seed see the same tokens. Recovered is (arm - ternary) / (float - ternary) of accuracies.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bitnet_arch import ConversionConfig, convert_model
from bitnet_arch.testing import tiny_llama
from report import finish, parser
from torch import Tensor
from transformers import PreTrainedModel
from wrinklefree.module import model_logits
from wrinklefree.objectives import Objectives, parse_objectives
from wrinklefree.objectives.norms import gradient_norm
from wrinklefree.schedules import learning_rate_share
from wrinklefree.teachers.base import Shape
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.views import Batch

SYMBOLS, LENGTH, SEPARATOR, LABELS, VOCABULARY = 16, 40, 16, (17, 18, 19), 32
HIDDEN, ROWS, BASE_STEPS, TUNING_STEPS, CPT_STEPS, HEADS = 32, 32, 150, 150, 100, 4
TEST_ROWS = 2000
CE: dict[str, Any] = {"ce": {}}
LD = {"logits": {"weight": 10.0, "temperature": 5.0}}
LD_OFFICIAL = {"logits": {"weight": 10.0, "temperature": 5.0, "tau_squared": True, "scope": "attended"}}
AD: dict[str, Any] = {"layer": -2, "heads": HEADS}
AD_PAPER = {"relations": {"weight": 1e5, **AD}}
AD_OFFICIAL = {"relations": {"weight": 1e5, "normalisation": "official", "causal": False, "per_head": True, **AD}}
AUTO = "auto"
ARMS: dict[str, tuple[str, bool, dict[str, Any], str]] = {
    "ternary SFT": ("none", False, CE, ""),
    "+ SubLN": ("subln", False, CE, ""),
    "+ CPT": ("subln", True, CE, ""),
    "+ LD": ("subln", True, CE | LD, "teacher"),
    "+ AD, auto": ("subln", True, CE | {"relations": {"weight": AUTO, **AD}}, "teacher"),
    "full, auto": ("subln", True, CE | LD | {"relations": {"weight": AUTO, **AD}}, "teacher"),
    "full, auto, cosine": ("subln", True, CE | LD | {"relations": {"weight": AUTO, "normalisation": "official", **AD}}, "teacher"),
    "full, paper 1e5": ("subln", True, CE | LD | AD_PAPER, "teacher"),
    "full, official 1e5": ("subln", True, CE | LD_OFFICIAL | AD_OFFICIAL, "teacher"),
    "full, auto, teacher of shuffled labels": ("subln", True, CE | LD | {"relations": {"weight": AUTO, **AD}}, "shuffled"),
}
"""Arm to (norm, continued pre-training, objectives, teacher)."""


def samples(seed: int, rows: int, tuning: bool, shuffled: bool = False) -> Batch:
    """Return sequences of the task, with loss on the label alone, or of the chain, with loss everywhere."""
    generator = torch.Generator().manual_seed(seed)
    chain = torch.rand(SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(0)).pow(2)
    ids = torch.empty(rows, LENGTH + 2, dtype=torch.int64)
    ids[:, 0] = torch.randint(0, SYMBOLS, (rows,), generator=generator)
    for t in range(1, LENGTH):
        ids[:, t] = torch.multinomial(chain[ids[:, t - 1]], 1, generator=generator)[:, 0]
    words = ids[:, :LENGTH]
    more = (words < 4).sum(1) - ((words >= 4) & (words < 8)).sum(1)
    label = torch.where(more > 0, LABELS[0], torch.where(more < 0, LABELS[1], LABELS[2]))
    if shuffled:
        label = label[torch.randperm(rows, generator=generator)]
    ids[:, LENGTH], ids[:, LENGTH + 1] = SEPARATOR, label
    labels = torch.full_like(ids, -100)
    if tuning:
        labels[:, LENGTH + 1] = label
    else:
        labels[:, 1:LENGTH] = words[:, 1:]
    positions = torch.arange(LENGTH + 2).expand_as(ids)
    return {"input_ids": ids, "labels": labels, "document_ids": torch.ones_like(ids), "position_ids": positions}


def batches(seed: int, steps: int, tuning: bool, shuffled: bool = False) -> Iterator[Batch]:
    """Yield a training run's batches."""
    return (samples(seed * 1_000_000 + 1000 * tuning + step + 1, ROWS, tuning, shuffled) for step in range(steps))


def train(
    model: PreTrainedModel, values: dict[str, Any], data: Iterator[Batch], steps: int, rate: float, teacher: PreTrainedModel | None
) -> PreTrainedModel:
    """Train in place; weights of "auto" are measured at the first step and then every 50."""
    model.train()
    settings = parse_objectives(values)
    found = {name: item.objective for name, item in settings.items()}
    objectives = Objectives(found, Shape.of(model), LocalTeacher(teacher, "fine-tuned") if teacher is not None else None)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    weights = {name: 1.0 if item.weight == AUTO else float(item.weight) for name, item in settings.items()}
    for step, batch in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_share("cosine", step, steps, steps // 20)
        counts = objectives.counts(batch, found)
        if step % 50 == 0 and any(item.weight == AUTO for item in settings.values()):
            norms = {n: gradient_norm(objectives, model, [batch], n, 1.0 / count) for n, count in counts.items()}
            weights |= {n: norms["ce"] / max(norms[n], 1e-12) for n, item in settings.items() if item.weight == AUTO}
        optimizer.zero_grad()
        objectives(model, batch, {name: weights[name] / count for name, count in counts.items()}).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: PreTrainedModel) -> float:
    """Return the share of right labels on rows that nothing was trained on."""
    data = samples(-1 % 2**31, TEST_ROWS, True)
    chosen: Tensor = model_logits(model, data)[:, LENGTH, list(LABELS)].argmax(-1)
    return float((chosen + LABELS[0] == data["input_ids"][:, -1]).float().mean())


def of_seed(seed: int, rates: tuple[float, float], say: Callable[[str], None]) -> dict[str, float]:
    """Return every arm's accuracy."""
    base = tiny_llama(hidden=HIDDEN, ffn=2 * HIDDEN, layers=2, vocab=VOCABULARY, heads=4, kv_heads=2, seed=seed)
    train(base, CE, batches(seed, BASE_STEPS, False), BASE_STEPS, rates[0], None)
    teachers = {
        name: train(copy.deepcopy(base), CE, batches(seed, TUNING_STEPS, True, name == "shuffled"), TUNING_STEPS, rates[0], None)
        for name in ("teacher", "shuffled")
    }
    found = {"float SFT (teacher)": accuracy(teachers["teacher"])}
    say(f"seed {seed}: float SFT (teacher): {found['float SFT (teacher)']:.4f}")
    calibration = [samples(seed * 1_000_000 + i, 8, False)["input_ids"] for i in range(2)]
    starts: dict[tuple[str, bool], PreTrainedModel] = {}
    for name, (norm, cpt, values, teacher) in ARMS.items():
        if (norm, cpt) not in starts:
            config = ConversionConfig(norm=norm)  # type: ignore[arg-type]
            model = convert_model(copy.deepcopy(base), config, calibration if config.calibrates else None)
            if cpt:
                train(model, CE, batches(seed + 500, CPT_STEPS, False), CPT_STEPS, rates[1], None)
            starts[norm, cpt] = model
        student = copy.deepcopy(starts[norm, cpt])
        train(student, values, batches(seed, TUNING_STEPS, True), TUNING_STEPS, rates[1], teachers.get(teacher))
        found[name] = accuracy(student)
        say(f"seed {seed}: {name}: {found[name]:.4f}")
    return found


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--rate-float", type=float, default=2e-3)
    arguments.add_argument("--rate", type=float, default=2e-3)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    start = time.monotonic()
    found = [
        of_seed(seed, (given.rate_float, given.rate), lambda line: print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True))
        for seed in range(given.seeds)
    ]
    rows = []
    for name in found[0]:
        values = [one[name] for one in found]
        gaps = [one["float SFT (teacher)"] - one["ternary SFT"] for one in found]
        shares = [(one[name] - one["ternary SFT"]) / gap for one, gap in zip(found, gaps, strict=True) if gap > 0.01]
        rows.append(
            {
                "arm": name,
                "accuracy": statistics.mean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
                "recovered (mean)": statistics.mean(shares) if shares else float("nan"),
                "recovered (seeds)": " ".join(f"{share:.2f}" for share in shares),
            }
        )
    finish(f"BitDistill ladder, {given.seeds} seeds", rows, [], ("torch", "wrinklefree"), given.json)


if __name__ == "__main__":
    main()
