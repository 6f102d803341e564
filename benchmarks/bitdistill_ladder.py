"""BitDistill arm by arm (experiment E4): how much of the gap between ternary and float fine-tuning each part recovers.

uv run python benchmarks/bitdistill_ladder.py --seeds 5 --json bitdistill_ladder.json --plot docs/bitdistill_ladder.png
uv run python benchmarks/bitdistill_ladder.py --tune rates --seeds 2        # settings on seeds of their own, or --tune distillation
uv run python benchmarks/bitdistill_ladder.py --arms "ternary SFT" "+ CPT"  # a part of it; float fine-tuning is always there

The task is `speakers.py`'s: a seed has its own world, base model, labelled set and order. The base has read plain text, the teacher
is the base fine-tuned on the labelled set, and every student starts from the base made ternary. Recovered is (arm - ternary) /
(float - ternary) of accuracies on texts that nothing was trained on.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from bitnet_arch import ConversionConfig, convert_model
from report import finish, parser, write
from speakers import AUTO, CE, World, accuracy, cross_entropy, epochs, new_model, stream, train
from transformers import PreTrainedModel
from wrinklefree.views import Batch

FLOAT, TERNARY = "float SFT (teacher)", "ternary SFT"
TUNING_SEED = 100
"""Tuning runs on seeds from here on, which no result is of."""
GRID = (1e-3, 2e-3, 4e-3)
PACKAGES = ("torch", "transformers", "wrinklefree")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is trained.

    Attributes:
        hidden: the models' width.
        layers: their depth.
        base_steps: of 32 plain texts each.
        base_rate: the base's learning rate.
        cpt_rate: of continued pre-training.
        rows: labelled texts.
        steps: of fine-tuning, 32 labelled texts each.
        test_rows: labelled texts to judge by.
    """

    hidden: int = 32
    layers: int = 3
    base_steps: int = 3000
    base_rate: float = 5e-3
    cpt_rate: float = 4e-3
    rows: int = 512
    steps: int = 200
    test_rows: int = 4000


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to a ternary model of the task.

    Attributes:
        before: the arm that it is held against, seed by seed.
        rate: learning rate of fine-tuning.
        norm: where norms are inserted.
        cpt: steps of continued pre-training.
        parts: objectives beside the cross-entropy.
        longer: how many times the plan's steps fine-tuning takes.
        teacher: who teaches: the float model of the task, or one that was fine-tuned on shuffled labels.
    """

    before: str = TERNARY
    rate: float = 2e-3
    norm: Literal["none", "subln"] = "subln"
    cpt: int = 75
    parts: dict[str, Any]
    longer: int = 1
    teacher: Literal["", "tuned", "shuffled"] = "tuned"


HEADS, LAYER = 4, -2


def logits(weight: float, temperature: float, **options: Any) -> dict[str, Any]:
    """Return the logits objective."""
    return {"logits": {"weight": weight, "temperature": temperature, **options}}


def relations(weight: float | str, normalisation: str, layer: int = LAYER, **options: Any) -> dict[str, Any]:
    """Return the relations objective."""
    return {"relations": {"weight": weight, "normalisation": normalisation, "layer": layer, "heads": HEADS, **options}}


LD = logits(10.0, 1.0, scope="attended")
FULL, COSINE = LD | relations(AUTO, "paper"), LD | relations(AUTO, "official")
PAPER = logits(10.0, 5.0) | relations(1e5, "paper")
OFFICIAL = logits(10.0, 5.0, tau_squared=True, scope="attended") | relations(1e5, "official", causal=False, per_head=True)
RATE_FLOAT = 1e-3
ARMS = {
    TERNARY: Arm(norm="none", cpt=0, parts={}, teacher=""),
    "ternary SFT, twice as long": Arm(norm="none", cpt=0, parts={}, teacher="", longer=2),
    "+ SubLN": Arm(cpt=0, parts={}, teacher=""),
    "+ CPT": Arm(parts={}, teacher="", before="+ SubLN"),
    "+ LD": Arm(parts=LD, before="+ CPT"),
    "+ AD, auto": Arm(parts=relations(AUTO, "paper"), before="+ CPT"),
    "+ AD, auto, cosine": Arm(parts=relations(AUTO, "official"), before="+ CPT"),
    "full, auto": Arm(parts=FULL, before="+ LD"),
    "full, auto, cosine": Arm(parts=COSINE, before="+ LD"),
    "full, paper's constants": Arm(parts=PAPER, before="+ CPT"),
    "full, official constants": Arm(parts=OFFICIAL, before="+ CPT"),
    "+ LD, shuffled teacher": Arm(parts=LD, teacher="shuffled", before="+ CPT"),
    "full, auto, cosine, shuffled teacher": Arm(parts=COSINE, teacher="shuffled", before="+ CPT"),
    "+ CPT, 4 times": Arm(cpt=300, parts={}, teacher="", before="+ CPT"),
    "full, auto, cosine, 4 times CPT": Arm(cpt=300, parts=COSINE, before="+ CPT, 4 times"),
}


class Seed:
    """What the arms of a seed share."""

    def __init__(self, seed: int, plan: Plan) -> None:
        self.seed, self.plan, self.world = seed, plan, World.of(seed)
        self.test = self.world.labelled(seed * 1_000_000 + 999_999, plan.test_rows)
        self.base = new_model(seed, plan.hidden, plan.layers)
        train(self.base, CE, stream(self.world, seed, plan.base_steps), plan.base_steps, plan.base_rate)
        self._starts: dict[tuple[str, int], PreTrainedModel] = {}
        self._teachers: dict[str, PreTrainedModel] = {}

    def float_model(self, rate: float, shuffled: bool = False) -> PreTrainedModel:
        """Return the base, fine-tuned as it is."""
        data = epochs(self._labelled(shuffled), self.seed, self.plan.steps)
        return train(copy.deepcopy(self.base), CE, data, self.plan.steps, rate)

    def teacher(self, kind: str) -> PreTrainedModel:
        """Return a teacher, trained at its first use."""
        if kind not in self._teachers:
            self._teachers[kind] = self.float_model(RATE_FLOAT, kind == "shuffled")
        return self._teachers[kind]

    def student(self, arm: Arm) -> PreTrainedModel:
        """Return an arm's model."""
        data, steps = self._labelled(False), arm.longer * self.plan.steps
        teacher = self.teacher(arm.teacher) if arm.teacher else None
        start = copy.deepcopy(self.start(arm.norm, arm.cpt))
        return train(start, CE | arm.parts, epochs(data, self.seed, steps), steps, arm.rate, teacher)

    def start(self, norm: Literal["none", "subln"], cpt: int) -> PreTrainedModel:
        """Return the base made ternary, continued on `cpt` batches of plain text that it has not read."""
        if (norm, cpt) not in self._starts:
            config = ConversionConfig(norm=norm)
            calibration = [self.world.plain(self.seed * 1_000_000 + 999_998)["input_ids"]] if config.calibrates else None
            model = convert_model(copy.deepcopy(self.base), config, calibration)
            if cpt:
                train(model, CE, stream(self.world, self.seed + 500, cpt), cpt, self.plan.cpt_rate)
            self._starts[norm, cpt] = model
        return self._starts[norm, cpt]

    def score(self, model: PreTrainedModel) -> float:
        """Return a model's accuracy."""
        return accuracy(model, self.test)

    def _labelled(self, shuffled: bool) -> Batch:
        return self.world.labelled(self.seed * 1_000_000 + 999_997, self.plan.rows, shuffled)


def of_seed(seed: int, plan: Plan, arms: dict[str, Arm]) -> Iterator[tuple[str, float]]:
    """Yield arms' accuracies as they come, float fine-tuning first."""
    shared = Seed(seed, plan)
    held_out = shared.world.plain(seed * 1_000_000 + 999_996, 500)
    yield "best guess", shared.world.best_guess(shared.test)
    yield "nats a symbol of the base", cross_entropy(shared.base, held_out)
    yield FLOAT, shared.score(shared.teacher("tuned"))
    for name, arm in arms.items():
        yield name, shared.score(shared.student(arm))


def table(found: Sequence[dict[str, float]], arms: dict[str, Arm]) -> list[dict[str, Any]]:
    """Return a row an arm: every seed's accuracy, the recovered share, and how it compares with the arm before it.

    Args:
        found: accuracies by arm, of every seed that is complete.
        arms: what was run.
    """
    rows = []
    for name in [key for key in found[0] if key == FLOAT or key in arms]:
        row: dict[str, Any] = {"arm": name, "mean": statistics.mean(one[name] for one in found)}
        row["seeds"] = " ".join(f"{one[name]:.3f}" for one in found)
        gaps = [(one[name] - one[TERNARY], one[FLOAT] - one[TERNARY]) for one in found if TERNARY in one]
        row["recovered"] = sum(gain for gain, _ in gaps) / sum(gap for _, gap in gaps) if gaps else float("nan")
        row["recovered (seeds)"] = " ".join(f"{gain / gap:.2f}" for gain, gap in gaps)
        before = arms[name].before if name in arms and name != TERNARY else ""
        pairs = [one[name] - one[before] for one in found if before in one]
        row["against"] = before if pairs else ""
        row["difference"] = statistics.mean(pairs) if pairs else float("nan")
        row["better on"] = f"{sum(pair > 0 for pair in pairs)} of {len(pairs)}" if pairs else ""
        rows.append(row)
    return rows


def variants(what: str) -> dict[str, Arm]:
    """Return what tuning compares: learning rates of every arm, or weights, temperatures, scopes and layers of distillation."""
    if what == "rates":
        return {f"{name} @ {rate:g}": replace(arm, rate=rate) for name, arm in ARMS.items() if arm.cpt < 300 for rate in GRID}
    base = ARMS["+ LD"]
    found = {
        f"LD {weight:g}, temperature {temperature:g}, {scope}": replace(base, parts=logits(weight, temperature, scope=scope))
        for scope in ("scored", "attended")
        for weight in (1.0, 10.0)
        for temperature in (1.0, 2.0, 5.0)
    }
    for kind in ("paper", "official"):
        for layer in (-1, -2, -3):
            found[f"AD {kind}, layer {layer}"] = replace(base, parts=relations(AUTO, kind, layer))
    return found


def tune(what: str, seeds: int, plan: Plan, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return every variant's accuracies on the tuning seeds."""
    found: dict[str, list[float]] = {}
    for seed in range(TUNING_SEED, TUNING_SEED + seeds):
        shared = Seed(seed, plan)
        for rate in GRID if what == "rates" else ():
            found.setdefault(f"{FLOAT} @ {rate:g}", []).append(shared.score(shared.float_model(rate)))
        for name, arm in variants(what).items():
            found.setdefault(name, []).append(shared.score(shared.student(arm)))
            say(f"seed {seed}: {name}: {found[name][-1]:.4f}")
    return [
        {"variant": name, "mean": statistics.mean(values), "seeds": " ".join(f"{value:.3f}" for value in values)}
        for name, values in found.items()
    ]


def plot(found: Sequence[dict[str, float]], arms: dict[str, Arm], out: Path) -> None:
    """Draw every seed's accuracy and the mean, arm by arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [FLOAT, *arms]
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(names) + 0.9), layout="constrained")
    for y, name in enumerate(reversed(names)):
        values = [one[name] for one in found]
        axes.plot(values, [y] * len(values), "o", ms=4, alpha=0.5, color="C0")
        axes.plot(statistics.mean(values), y, "|", ms=14, color="k")
    for name, style in ((FLOAT, "--"), (TERNARY, ":")):
        if name in names:
            axes.axvline(statistics.mean(one[name] for one in found), ls=style, lw=0.8, color="grey")
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlabel("accuracy; dots are seeds, bars means")
    figure.savefig(out, dpi=110)


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="some of the arms")
    arguments.add_argument("--tune", choices=["rates", "distillation"], help="compare settings on seeds of their own instead")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the result there")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", flush=True)

    if given.tune:
        finish(f"tuning, {given.seeds} seeds", tune(given.tune, given.seeds, Plan(), say), [], PACKAGES, given.json)
        return
    arms = {name: ARMS[name] for name in given.arms}
    found: list[dict[str, float]] = []
    for seed in range(given.seeds):
        one: dict[str, float] = {}
        for name, value in of_seed(seed, Plan(), arms):
            one[name] = value
            say(f"seed {seed}: {name}: {value:.4f}")
        found.append(one)
        if given.json:
            write(table(found, arms), [], PACKAGES, given.json)
    if given.plot:
        plot(found, arms, given.plot)
    finish(f"BitDistill ladder, {given.seeds} seeds", table(found, arms), [], PACKAGES, given.json)


if __name__ == "__main__":
    main()
