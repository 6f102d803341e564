"""Influence against truth: leave-group-out retraining, agreement with the exact inverse, and poisoned examples.

uv run python benchmarks/influence.py --json influence.json

uv run python benchmarks/influence.py --parts transformer

Parts, all on small models and one thread; the last takes a quarter of an hour, the others under eight minutes together:

* digits: multinomial logistic regression (650 parameters, convex) on scikit-learn's digits, 10% of the labels wrong;
* LM: a one-layer neural language model (9,344 parameters; the four characters before predict the next) on Python's own library and
  documentation, trained with Adam;
* poison: which of 10% corrupted examples have the lowest scores, as the area under the ROC curve;
* transformer: the second with a Llama of two blocks (52,464 parameters) and more groups;
* halves: the same Llama, trained on random halves of the groups; the sum of a half's scores against the loss that it leads to.

Truth of a group is the rise of the probes' loss when it is left out, a mean over seeds. An interval of Spearman's correlation is a
95% bootstrap over groups, one of an area the smallest and largest over draws.
"""

import random
import string
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from types import SimpleNamespace

import torch
from data_handler import SourceConfig, documents
from data_handler.influence import (
    AdamMoments,
    Gradients,
    PerSampleGradients,
    datainf_scores,
    exact_scores,
    hessian_scores,
    jvp_embeddings,
    kernel_ridge,
    landmark_rows,
    landmark_scores,
    less_scores,
    rank_correlation,
    tracin_scores,
)
from data_handler.influence.gradients import math_attention
from data_handler.influence.objectives import causal_mask
from report import bar, finish, parser
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

Scores = dict[str, Tensor]
DAMPINGS = (1e-3, 0.01, 0.1, 1.0)
CONTROLS = ("random", "loss", "gradient norm")
RESAMPLES = 2000


# Statistics.


def interval(truth: Tensor, found: Tensor) -> tuple[float, float, float]:
    """Return Spearman's correlation and its 95% percentile interval over resampled groups."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(truth), (RESAMPLES, len(truth)), generator=generator)
    values = torch.tensor([rank_correlation(truth[rows], found[rows]) for rows in drawn])
    low, high = values.nanquantile(torch.tensor([0.025, 0.975])).tolist()
    return rank_correlation(truth, found), low, high


def reliability(truths: Tensor) -> float:
    """Return the split-half reliability of the mean over seeds [seeds, groups]: 50 splits, lengthened by Spearman-Brown."""
    generator = torch.Generator().manual_seed(0)
    half, found = len(truths) // 2, []
    for _ in range(50):
        order = torch.randperm(len(truths), generator=generator)
        found.append(rank_correlation(truths[order[:half]].mean(0), truths[order[half : 2 * half]].mean(0)))
    mean = sum(found) / len(found)
    return 2 * mean / (1 + mean)


def compared(part: str, truths: Tensor, scores: Scores) -> list[dict[str, object]]:
    """Return a line for each method: its correlation with the truth, and whether its interval lies above every control's."""
    truth = truths.mean(0)
    intervals = {name: interval(truth, found) for name, found in scores.items()}
    highest = max(max(abs(intervals[name][1]), abs(intervals[name][2])) for name in CONTROLS)
    rows = []
    for name, (value, low, high) in intervals.items():
        verdict = "control" if name in CONTROLS else "above controls" if low > highest else "failed here"
        rows.append(line(part, "Spearman", name, value, low, high, verdict))
    return [*rows, line(part, "Spearman", "the truth's two halves", reliability(truths))]


def line(
    part: str, measure: str, method: str, value: float, low: float | str = "", high: float | str = "", verdict: str = ""
) -> dict[str, object]:
    """Return a line of the table."""
    return {"part": part, "method": method, "measure": measure, "value": value, "low": low, "high": high, "verdict": verdict}


def controls(losses: Tensor, g: Gradients, seed: int = 0) -> Scores:
    """Return scores that know nothing of the probes."""
    return {
        "random": torch.rand(len(losses), generator=torch.Generator().manual_seed(seed)),
        "loss": losses,
        "gradient norm": g.squared_norms().sum(1).sqrt(),
    }


def agreements(g: Gradients, target: Tensor) -> dict[float, float]:
    """Return how DataInf's scores rank against the exact inverse's at the same damping, for each of `DAMPINGS`."""
    return {d: rank_correlation(datainf_scores(g, target, d), exact_scores(g, target, d)) for d in DAMPINGS}


def by_group(scores: Scores, group: Tensor, count: int) -> Scores:
    """Sum over each group's examples: influence is additive to first order."""
    return {name: torch.zeros(count).index_add_(0, group, found.float()) for name, found in scores.items()}


# Part 1: logistic regression.

DECAY = 1e-2


class Logistic(nn.Module):
    """64 pixels to 10 classes, from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, 64] to [n, 10]."""
        return self.linear(x)


def class_loss(forward: Callable[..., Tensor], example: dict[str, Tensor]) -> Tensor:
    """Return the cross-entropy of one example."""
    return F.cross_entropy(forward(example["x"]), example["y"])


def fit(x: Tensor, y: Tensor, weights: Tensor, start: Logistic | None = None) -> Logistic:
    """Minimise the weighted mean loss with an L2 penalty: strictly convex, so that the start does not matter."""
    model = Logistic()
    if start is not None:
        model.load_state_dict(start.state_dict())
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=300, tolerance_grad=1e-6, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (F.cross_entropy(model(x), y, reduction="none") * weights).sum() / len(x)
        loss = loss + DECAY / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


def digits(kind: str, seed: int, count: int = 900) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x, y with 10% corrupted labels, which they are, and clean probes.

    Args:
        kind: "random": to any other class. "directed": in the odd classes only, always to the next class, which a model can learn.
        seed: of the draw.
        count: training examples; 400 others are probes.
    """
    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)
    x, y = torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]
    train, labels = x[:count], y[:count].clone()
    able = torch.arange(count) if kind == "random" else (labels % 2 == 1).nonzero().flatten()
    chosen = able[torch.randperm(len(able), generator=generator)[: count // 10]]
    shift = torch.randint(1, 10, (len(chosen),), generator=generator) if kind == "random" else 1
    labels[chosen] = (labels[chosen] + shift) % 10
    wrong = torch.zeros(count, dtype=torch.bool)
    wrong[chosen] = True
    return train, labels, wrong, x[count : count + 400], y[count : count + 400]


def digit_scores(x: Tensor, y: Tensor, px: Tensor, py: Tensor, seed: int = 0) -> Scores:
    """Return every method's and control's scores of the training examples."""
    model = fit(x, y, torch.ones(len(x)))
    source = PerSampleGradients(model, class_loss)
    train, probes = {"x": x, "y": y}, {"x": px, "y": py}
    g, p = source.collect(train), source.collect(probes)
    target = p.values.mean(0, keepdim=True)
    moments = AdamMoments(torch.zeros(sum(source.sizes)), g.values.square().mean(0), step=1000)
    directions = source.collect(train, transform=moments.direction)
    found = {
        "tracin": tracin_scores(g, target),
        "less": less_scores(directions, p, torch.zeros(len(px), dtype=torch.int64), 1),
        "datainf, reference": datainf_scores(g, target, "reference"),
        "datainf, spectral": datainf_scores(g, target, "spectral"),
        "exact damped, spectral": exact_scores(g, target, "spectral"),
        "exact damped, reference": exact_scores(g, target, "reference"),
        "Hessian (oracle)": hessian_scores(source, train, g, target, damping=1e-6, decay=DECAY),
    }
    return {name: scores[:, 0] for name, scores in found.items()} | controls(source.losses(train), g, seed)


def digits_truth(groups: int = 90, seeds: int = 6) -> list[dict[str, object]]:
    """Compare with leave-group-out retraining; each seed keeps another random 80% of the groups besides the one left out."""
    x, y, _, px, py = digits("random", 0)
    group = torch.arange(len(x)) % groups
    truths = []
    for seed in track(range(seeds), "digits: retraining", console=Console(stderr=True), transient=True):
        kept = torch.rand(groups, generator=torch.Generator().manual_seed(seed)) < 0.8
        base = fit(x, y, kept[group].float())
        differences = []
        for g in range(groups):
            toggled = kept.clone()
            toggled[g] = ~kept[g]
            other = fit(x, y, toggled[group].float(), base)
            with torch.no_grad():
                rise = float(F.cross_entropy(other(px), py) - F.cross_entropy(base(px), py))
            differences.append(rise if kept[g] else -rise)
        truths.append(differences)
    return compared("digits", torch.tensor(truths), by_group(digit_scores(x, y, px, py), group, groups))


def digits_agreement() -> dict[float, float]:
    """Return DataInf's agreement with the exact inverse on the digits."""
    x, y, _, px, py = digits("random", 0)
    source = PerSampleGradients(fit(x, y, torch.ones(len(x))), class_loss)
    g = source.collect({"x": x, "y": y})
    return agreements(g, source.collect({"x": px, "y": py}).values.mean(0, keepdim=True))


# Part 2: a one-layer language model.

ALPHABET = "\n " + string.ascii_lowercase + string.digits + "()[]=.,:_'\"#-+*/"
LENGTH, VOCABULARY = 32, 64
CONTEXT, WIDTH, HIDDEN = 4, 16, 64
BLENDS = ("code", "prose", "shuffled", "junk")


def encoded(text: str) -> list[int]:
    """Return characters as ids; what is not in the alphabet is id 63."""
    return [ALPHABET.find(c) if c in ALPHABET else VOCABULARY - 1 for c in text.lower()]


@lru_cache
def texts(kind: str) -> list[str]:
    """Return documents of Python's own library."""
    source = SourceConfig(name=kind, kind=f"stdlib_{kind}")
    return [text for text in islice(documents(source), 300) if len(text) > 4 * LENGTH]


def pieces(kind: str, seed: int) -> Iterator[list[int]]:
    """Yield rows of a source."""
    rng = random.Random(f"{kind} {seed}")
    if kind == "junk":
        while True:
            yield encoded(("".join(rng.choices(string.ascii_lowercase, k=3)) * LENGTH)[:LENGTH])
    while True:
        text = rng.choice(texts("code" if kind == "code" else "prose"))
        start = rng.randrange(len(text) - LENGTH)
        row = encoded(text[start : start + LENGTH])
        if kind == "shuffled":
            rng.shuffle(row)
        yield row


def as_examples(rows: list[list[int]]) -> dict[str, Tensor]:
    """Return rows as examples of `next_token_loss`."""
    ids = torch.tensor(rows)
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels}


class NeuralLM(nn.Module):
    """Bengio's neural language model: embeddings of the last `CONTEXT` characters, one hidden layer, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([nn.Linear(CONTEXT * WIDTH, HIDDEN)])
        self.head = nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        """Map [b, T] to logits [b, T, V]; what a decoder is given besides has no meaning here."""
        padded = self.embedding(F.pad(input_ids, (CONTEXT - 1, 0), value=VOCABULARY - 1))
        windows = torch.cat([padded[:, i : i + input_ids.shape[1]] for i in range(CONTEXT)], 2)
        return SimpleNamespace(logits=self.head(self.layers[0](windows).tanh()))


def small_llama() -> nn.Module:
    """Return a decoder of two blocks, random."""
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **shape))


SUBJECTS: dict[str, Callable[[], nn.Module]] = {"LM": NeuralLM, "transformer": small_llama, "halves": small_llama}
BATCHES = {"LM": 32, "transformer": 16, "halves": 16}
TRUTHS = {
    "LM": {"groups": 64, "seeds": 6},
    "transformer": {"groups": 100, "seeds": 6},
    "halves": {"groups": 100, "seeds": 4, "halves": 64},
}


def subject(kind: str, seed: int) -> nn.Module:
    """Return the untrained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SUBJECTS[kind]().eval()


class Ensemble:
    """Models of one seed that differ in which examples they train on: one step of Adam for all at once.

    Attributes:
        state: stacked parameters, by name.
        first, second: Adam's moments.
    """

    def __init__(self, kind: str, seed: int, weights: Tensor, examples: dict[str, Tensor], rate: float = 5e-3) -> None:
        self.model = subject(kind, seed)
        self.weights, self.examples, self.rate, self.batch, self.seed = weights, examples, rate, BATCHES[kind], seed
        stacked, _ = stack_module_state([self.model])
        self.state = {k: v.detach().expand(len(weights), *v.shape[1:]).clone() for k, v in stacked.items()}
        self.first = {k: torch.zeros_like(v) for k, v in self.state.items()}
        self.second = {k: torch.zeros_like(v) for k, v in self.state.items()}
        self.step = 0

    def losses(self, state: dict[str, Tensor], examples: dict[str, Tensor]) -> Tensor:
        """Return one model's loss of every example, [n]."""
        ids = examples["input_ids"]
        places = torch.arange(ids.shape[1])[None]
        inputs = {"attention_mask": causal_mask(ids.shape[1], ids.device), "position_ids": places, "use_cache": False}
        logits = functional_call(self.model, state, (ids,), inputs).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)

    def train(self, steps: int, total: int) -> None:
        """Take steps; all models see the same rows in the same order, and a row that a model lacks weighs nothing."""
        count = len(self.examples["input_ids"])
        with math_attention(), torch.no_grad():
            for _ in range(steps):
                generator = torch.Generator().manual_seed(self.seed * 100_000 + self.step)
                rows = torch.randint(0, count, (self.batch,), generator=generator)
                part = {k: v[rows] for k, v in self.examples.items()}

                def weighted(state: dict[str, Tensor], weights: Tensor, part: dict[str, Tensor] = part) -> Tensor:
                    return (self.losses(state, part) * weights).mean()

                found = vmap(grad(weighted), in_dims=(0, 0), chunk_size=TOGETHER)(self.state, self.weights[:, rows])
                self.step += 1
                rate = self.rate * (1 - (self.step - 1) / total)
                for k, g in found.items():
                    self.first[k].lerp_(g, 0.1)
                    self.second[k].lerp_(g.square(), 0.001)
                    mean, square = self.first[k] / (1 - 0.9**self.step), self.second[k] / (1 - 0.999**self.step)
                    self.state[k] -= rate * mean / (square.sqrt() + 1e-8)

    def evaluate(self, examples: dict[str, Tensor]) -> Tensor:
        """Return every model's mean loss, [models]."""
        with math_attention(), torch.no_grad():
            return vmap(lambda state: self.losses(state, examples).mean(), chunk_size=TOGETHER)(self.state)


STEPS, STATES = 160, 4
TOGETHER = 26
"""Models whose gradients are computed at once."""


def lm_scores(kind: str, examples: dict[str, Tensor], probes: dict[str, Tensor], seed: int) -> tuple[Scores, dict[float, float]]:
    """Train one model on everything and score each example; also DataInf against the exact inverse, over damping."""
    ensemble = Ensemble(kind, seed, torch.ones(1, len(examples["input_ids"])), examples)
    names = [name for name, _ in ensemble.model.named_parameters()]
    only = torch.zeros(len(probes["input_ids"]), dtype=torch.int64)
    total: Scores = {"tracin": torch.zeros(1), "less": torch.zeros(1)}
    for i in range(STATES):
        ensemble.train(STEPS // STATES, STEPS)
        rate = ensemble.rate * (1 - i / STATES)
        state = {k: v[0] for k, v in ensemble.state.items()}
        source = PerSampleGradients(ensemble.model, parameters=state)
        first, second = (torch.cat([m[name][0].flatten() for name in names]) for m in (ensemble.first, ensemble.second))
        moments = AdamMoments(first, second, step=ensemble.step)
        g, p = source.collect(examples), source.collect(probes)
        target = p.values.mean(0, keepdim=True)
        total["tracin"] = total["tracin"] + tracin_scores(g, target, rate)[:, 0]
        total["less"] = total["less"] + less_scores(source.collect(examples, transform=moments.direction), p, only, 1, rate)[:, 0]
    last = tracin_scores(g, target)[:, 0]
    agreement = agreements(g, target)
    count = len(examples["input_ids"])
    landmarks = landmark_rows(count, count // 4, seed)
    near = source.collect({k: v[landmarks] for k, v in examples.items()}, transform=moments.precondition)
    embeddings = jvp_embeddings(source, examples, seed=seed)
    found = total | {
        "tracin, last checkpoint": last,
        "datainf, reference": datainf_scores(g, target, "reference")[:, 0],
        "datainf, spectral": datainf_scores(g, target, "spectral")[:, 0],
        "exact damped, spectral": exact_scores(g, target, "spectral")[:, 0],
        "distillation, all landmarks": landmark_scores(source.collect(examples, transform=moments.precondition), target)[:, 0],
        "distillation, 1/4 landmarks": kernel_ridge(embeddings, landmarks, landmark_scores(near, target))[:, 0],
    }
    return found | controls(source.losses(examples), g, seed), agreement


def blended(groups: int, size: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return rows in groups; each group is another blend of the sources (Dirichlet 0.5)."""
    rng = random.Random(seed)
    sources = {kind: pieces(kind, seed) for kind in BLENDS}
    rows, group = [], []
    for g in range(groups):
        shares = [rng.gammavariate(0.5, 1) for _ in BLENDS]
        for kind in rng.choices(BLENDS, shares, k=size):
            rows.append(next(sources[kind]))
            group.append(g)
    return as_examples(rows), torch.tensor(group)


def lm_truth(
    kind: str, groups: int, seeds: int, halves: int = 0, size: int = 8
) -> tuple[list[dict[str, object]], dict[float, float]]:
    """Compare with retraining: without each group, or on random halves of the groups (Park et al., arXiv 2303.14186).

    The models of a seed have the same initial weights and order.
    """
    examples, group = blended(groups, size, 0)
    source = pieces("code", 1)
    probes = as_examples([next(source) for _ in range(128)])
    if halves:
        order = torch.rand(halves, groups, generator=torch.Generator().manual_seed(0)).argsort(1)
        kept = (order < groups // 2).float()
    else:
        kept = torch.cat([1 - torch.eye(groups), torch.ones(1, groups)])
    truths = []
    for seed in track(range(seeds), f"{kind}: retraining", console=Console(stderr=True), transient=True):
        ensemble = Ensemble(kind, seed, kept[:, group], examples)
        ensemble.train(STEPS, STEPS)
        losses = ensemble.evaluate(probes)
        truths.append(-losses if halves else losses[:-1] - losses[-1])
    runs = [lm_scores(kind, examples, probes, 100 + seed) for seed in range(3)]
    scores = by_group({name: sum(found[name] for found, _ in runs) / len(runs) for name in runs[0][0]}, group, groups)
    if halves:
        scores = {name: kept @ found for name, found in scores.items()}
    agreement = {damping: min(found[damping] for _, found in runs) for damping in DAMPINGS}
    return compared(kind, torch.stack(truths), scores), agreement


# Part 3: poison.


def poison_rows(part: str, found: list[tuple[Scores, Tensor]]) -> list[dict[str, object]]:
    """Return each method's area under the ROC curve, the mean and the extremes over draws; the loss counts where it is high."""
    areas = {}
    for name in found[0][0]:
        sign = 1 if name in CONTROLS else -1
        areas[name] = [float(roc_auc_score(wrong.numpy(), (sign * scores[name]).numpy())) for scores, wrong in found]
    rows = []
    for name, values in areas.items():
        won = all(a > b for a, b in zip(values, areas["loss"], strict=True))
        lost = all(a < b for a, b in zip(values, areas["loss"], strict=True))
        verdict = "control" if name in CONTROLS else "above loss" if won else "failed here" if lost else "undecided"
        rows.append(line(part, "AUC", name, sum(values) / len(values), min(values), max(values), verdict))
    return rows


def poisoned_digits(kind: str, draws: int = 5) -> list[dict[str, object]]:
    """Find wrong labels."""
    found = []
    for draw in range(draws):
        x, y, wrong, px, py = digits(kind, 10 + draw)
        found.append((digit_scores(x, y, px, py, draw), wrong))
    return poison_rows(f"digits, {kind} labels", found)


def poisoned_lm(kind: str, draws: int = 3, count: int = 320) -> list[dict[str, object]]:
    """Find rows of another source among code and prose."""
    found = []
    for draw in range(draws):
        sources = {name: pieces(name, 20 + draw) for name in ("code", "prose", kind)}
        wrong = torch.zeros(count, dtype=torch.bool)
        wrong[torch.randperm(count, generator=torch.Generator().manual_seed(draw))[: count // 10]] = True
        rows = [next(sources[kind if wrong[i] else ("code", "prose")[i % 2]]) for i in range(count)]
        clean = {name: pieces(name, 40 + draw) for name in ("code", "prose")}
        probes = as_examples([next(clean[("code", "prose")[i % 2]]) for i in range(128)])
        found.append((lm_scores("LM", as_examples(rows), probes, draw)[0], wrong))
    return poison_rows(f"LM, {kind} rows", found)


PARTS = ("digits", "LM", "transformer", "halves", "poison")


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--parts", nargs="+", choices=PARTS, default=("digits", "LM", "poison"), help="what is measured")
    chosen = arguments.parse_args()
    torch.set_num_threads(chosen.threads)
    rows, bars = [], []
    for part in (part for part in PARTS[:-1] if part in chosen.parts):
        found, agreement = (digits_truth(), digits_agreement()) if part == "digits" else lm_truth(part, **TRUTHS[part])
        rows += found
        for damping, value in agreement.items():
            rows.append(line(part, "Spearman", f"DataInf and the exact inverse, {damping:g} E|g|^2", value))
        bars.append(
            bar(f"{part}: DataInf and the exact inverse, Spearman at the best damping", max(agreement.values()), ">=", 0.95)
        )
        won = sum(row["verdict"] == "above controls" for row in found)
        bars.append(bar(f"{part}: methods whose interval lies above every control's", won, ">=", 1))
    if "poison" in chosen.parts:
        rows += [row for kind in ("random", "directed") for row in poisoned_digits(kind)]
        rows += [row for kind in ("shuffled", "junk") for row in poisoned_lm(kind)]
    finish("influence against truth", rows, bars, ("torch", "transformers", "scikit-learn", "data-handler"), chosen.json)


if __name__ == "__main__":
    main()
