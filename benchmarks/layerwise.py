"""The layer-wise stage against plain continued pre-training at equal tokens (experiment E5).

uv run python benchmarks/layerwise.py --seeds 5 --json layerwise.json --plot docs/layerwise.png
uv run python benchmarks/layerwise.py --tune --seeds 1        # learning rates, on seeds of their own

A base model has read `speakers.py`'s plain text; its ternary copies go on reading, one part of the budget after another, under one
learning-rate schedule. How far blocks are from the base's (free-running, in squared error over the square) and the cross-entropy of
held-out text are measured before, after every part and at the end: the one may fall without the other.
"""

import copy
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import ConversionConfig, convert_model
from report import finish, parser, write
from speakers import CE, World, cross_entropy, new_model, stream, train
from transformers import PreTrainedModel
from wrinklefree.losses.layerwise import normalised_mse
from wrinklefree.views import Batch, Needs, forward_views

TUNING_SEED = 100
"""Tuning runs on seeds from here on, which no result is of."""
GRID = (1e-3, 2e-3, 4e-3)
PACKAGES = ("torch", "transformers", "wrinklefree")
PLAIN = "plain CPT"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is trained: steps of 32 texts, `steps` of the base, and `budget` of every student, all parts together."""

    hidden: int = 32
    layers: int = 3
    base_steps: int = 1500
    base_rate: float = 5e-3
    budget: int = 200
    held_out: int = 500


def layerwise(weights: str = "uniform", mode: str = "free", **options: Any) -> dict[str, Any]:
    """Return the layer-wise objective, normalised squared error."""
    return {"layerwise": {"weights": weights, "mode": mode, **options}}


LAST = {"weights": "last", "last": 1}
LOGITS: dict[str, Any] = {"logits": {}}
Parts = Sequence[tuple[float, dict[str, Any]]]
ARMS: dict[str, Parts] = {
    PLAIN: [(1.0, CE)],
    "logits, then CE": [(0.5, LOGITS), (0.5, CE)],
    "teacher-forced, then CE": [(0.5, layerwise(mode="teacher_forced")), (0.5, CE)],
    "free, then CE": [(0.5, layerwise()), (0.5, CE)],
    "free, linear, then CE": [(0.5, layerwise("linear")), (0.5, CE)],
    "free, last, then CE": [(0.5, layerwise(**LAST)), (0.5, CE)],
    "forced, free, then CE": [(0.25, layerwise(mode="teacher_forced")), (0.25, layerwise()), (0.5, CE)],
    "free and logits, then CE": [(0.5, layerwise() | LOGITS), (0.5, CE)],
    "free and CE together": [(1.0, layerwise() | CE)],
    "free alone": [(1.0, layerwise())],
    "free, untrained teacher, then CE": [(0.5, layerwise()), (0.5, CE)],
}
"""Arm to its parts: share of the budget, objectives."""
RATES: dict[str, float] = dict.fromkeys(ARMS, 2e-3) | {"teacher-forced, then CE": 4e-3}


@torch.no_grad()
def distances(student: PreTrainedModel, teacher: PreTrainedModel, data: Batch) -> list[float]:
    """Return the mean normalised squared error of every block's output, each model running by itself."""
    needs = Needs(hidden=frozenset(range(teacher.config.num_hidden_layers)))
    mine, theirs = (forward_views(model, data, needs).hidden for model in (student, teacher))
    return [float(normalised_mse(mine[i].flatten(0, 1), theirs[i].flatten(0, 1)).mean()) for i in sorted(needs.hidden)]


class Seed:
    """What the arms of a seed share."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self.seed, self.plan, self.world = seed, plan, World.of(seed)
        self.held_out = self.world.plain(seed * 1_000_000 + 999_996, plan.held_out)
        self.base = new_model(seed, plan.hidden, plan.layers)
        self.untrained = copy.deepcopy(self.base)
        train(self.base, CE, stream(self.world, seed, plan.base_steps), plan.base_steps, plan.base_rate)
        calibration = [self.world.plain(seed * 1_000_000 + 999_998)["input_ids"]]
        self.start = convert_model(copy.deepcopy(self.base), ConversionConfig(), calibration)

    def measure(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return a model's cross-entropy and its blocks' distances from the base's."""
        return {"ce": cross_entropy(model, self.held_out), "nmse": distances(model, self.base, self.held_out)}

    def run(self, name: str, rate: float) -> list[dict[str, Any]]:
        """Return what an arm measures after each of its parts."""
        student, budget = copy.deepcopy(self.start), self.plan.budget
        teacher = self.untrained if "untrained" in name else self.base
        data, found, done = stream(self.world, self.seed + 500, budget), [], 0
        for share, values in ARMS[name]:
            steps = round(share * budget)
            train(student, values, itertools.islice(data, steps), budget, rate, teacher if values is not CE else None, done)
            done += steps
            found.append(self.measure(student))
        assert done == budget
        return found


def table(found: Sequence[dict[str, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Return a row an arm: cross-entropy and blocks' distances after the first part and at the end, means over seeds."""
    rows = []
    for name in found[0]:
        runs = [one[name] for one in found]
        pairs = [one[name][-1]["ce"] - one[PLAIN][-1]["ce"] for one in found if PLAIN in one]
        row: dict[str, Any] = {"arm": name}
        for place, at in (("part 1", 0), ("end", -1)):
            row[f"CE, {place}"] = statistics.mean(run[at]["ce"] for run in runs)
            blocks = zip(*(run[at]["nmse"] for run in runs), strict=True)
            row[f"nMSE, {place}"] = " ".join(f"{statistics.mean(block):.3f}" for block in blocks)
        row["against plain CPT"] = statistics.mean(pairs) if pairs else float("nan")
        row["by seed"] = " ".join(f"{pair:+.4f}" for pair in pairs)
        rows.append(row)
    return rows


def plot(found: Sequence[dict[str, list[dict[str, Any]]]], out: Path) -> None:
    """Draw blocks' distances and the cross-entropy at the end, arm by arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, name in enumerate(found[0]):
        runs, colour = [one[name] for one in found], f"C{number}" if number < 10 else "k"
        blocks = [statistics.mean(block) for block in zip(*(run[-1]["nmse"] for run in runs), strict=True)]
        left.semilogy(range(len(blocks)), blocks, color=colour, marker="o", ms=3, label=name)
        values = [run[-1]["ce"] for run in runs]
        right.plot(values, [-number] * len(values), "o", ms=4, alpha=0.5, color=colour)
        right.plot(statistics.mean(values), -number, "|", ms=14, color="k")
    left.set_xticks(range(len(blocks)))
    left.set_xlabel("block")
    left.set_ylabel("squared error over the square, at the end")
    right.set_yticks([-i for i in range(len(found[0]))], list(found[0]))
    right.set_xlabel("nats a symbol at the end")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--tune", action="store_true", help="compare learning rates on seeds of their own instead")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the result there")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    start = time.monotonic()

    def say(seed: int, label: str, measured: dict[str, Any]) -> None:
        blocks = " ".join(f"{value:.3f}" for value in measured["nmse"])
        print(f"{time.monotonic() - start:6.0f} s  seed {seed}: {label}: CE {measured['ce']:.4f}, nMSE {blocks}", flush=True)

    found: list[dict[str, list[dict[str, Any]]]] = []
    rates = {f"{name} @ {rate:g}": (name, rate) for name in ARMS for rate in GRID}
    runs = rates if given.tune else {name: (name, RATES[name]) for name in ARMS}
    for seed in range(TUNING_SEED, TUNING_SEED + given.seeds) if given.tune else range(given.seeds):
        shared = Seed(seed, Plan())
        print(
            f"seed {seed}: base {cross_entropy(shared.base, shared.held_out):.4f}, start {shared.measure(shared.start)}", flush=True
        )
        one = {}
        for label, (name, rate) in runs.items():
            one[label] = shared.run(name, rate)
            say(seed, label, one[label][-1])
        found.append(one)
        if given.json:
            write(table(found), [], PACKAGES, given.json)
    if given.plot and not given.tune:
        plot(found, given.plot)
    finish(f"layer-wise stage, {given.seeds} seeds", table(found), [], PACKAGES, given.json)


if __name__ == "__main__":
    main()
