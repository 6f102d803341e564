"""A planted mixture: three Markov sources of unequal difficulty, of which two are kin, and a source of pure noise.

The model predicts a token from the two before it: 8k parameters, a run takes a fraction of a second.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from data_handler.mixture import StepResult
from data_handler.mixture.driver import Apportioner
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

DOMAINS = ("easy", "hard", "kin", "noise")
TARGET = (1 / 3, 1 / 3, 1 / 3, 0.0)
"""The loss that counts: the three sources that can be learned."""

VOCABULARY, ROW = 40, 32
EASY, HARD = 16, 24
"""Alphabet of the order-1 source, and the one that the two order-2 sources share."""
SHARED = 0.75
"""Share of contexts in which the kin behaves as the hard source."""
BRANCHES = np.array([0.85, 0.1, 0.05])
RATE = 1e-2
POOL_ROWS, HELDOUT_ROWS, INFLUENCE_ROWS = 4096, 64, 16

Table = NDArray[np.int64]


def tables() -> dict[str, Table]:
    """Return what follows a pair of tokens, int64 [n, n, 3]: the same in every run."""
    generator = np.random.default_rng(2024)
    order_one = generator.integers(0, EASY, (1, EASY, 3)).repeat(EASY, axis=0)
    hard = generator.integers(0, HARD, (HARD, HARD, 3))
    other = generator.integers(0, HARD, (HARD, HARD, 3))
    same = generator.random((HARD, HARD, 1)) < SHARED
    return {"easy": order_one, "hard": hard, "kin": np.where(same, hard, other)}


def sample(domain: str, rows: int, generator: np.random.Generator) -> Tensor:
    """Return rows of a source, int64 [rows, ROW + 2]."""
    length = ROW + 2
    if domain == "noise":
        return torch.from_numpy(generator.integers(0, VOCABULARY, (rows, length)))
    table, first = tables()[domain], 0 if domain == "easy" else EASY
    tokens = np.empty((rows, length), np.int64)
    tokens[:, :2] = generator.integers(0, len(table), (rows, 2))
    branch = generator.choice(3, (rows, length), p=BRANCHES)
    for t in range(2, length):
        tokens[:, t] = table[tokens[:, t - 2], tokens[:, t - 1], branch[:, t]]
    return torch.from_numpy(tokens + first)


class TwoBack(nn.Module):
    """Embeds the two tokens before, one hidden layer, logits [.., V]."""

    def __init__(self, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2 * VOCABULARY, width)
        self.hidden = nn.Linear(2 * width, hidden)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, pairs: Tensor) -> Tensor:
        """Map pairs, int64 [N, 2], to logits [N, V]."""
        offset = torch.tensor([0, VOCABULARY])
        return self.head(F.relu(self.hidden(self.embedding(pairs + offset).flatten(1))))


class PlantedLearner:
    """The model with its sources. Everything it draws depends on the seed alone.

    Attributes:
        domains: `DOMAINS`.
        trained_tokens: predictions trained on.
        measured_tokens: predictions measured.
    """

    domains = DOMAINS
    tokens_per_row = ROW

    def __init__(self, seed: int, steps: int, *, reference: "PlantedLearner | None" = None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = TwoBack()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=0.0)
        self.steps, self.done, self.reference = steps, 0, reference
        self.trained_tokens = self.measured_tokens = 0
        self._pools = POOLS.setdefault(seed, make_pools(seed))
        self._next = [0] * len(DOMAINS)

    def step(self, rows: Sequence[int], token_weights: Sequence[float] | None, *, excess: bool) -> StepResult:
        """Take a step; the rate falls linearly to 0."""
        batch, owner = self.draw(rows)
        pairs, targets = windows(batch)
        losses = F.cross_entropy(self.model(pairs), targets, reduction="none").view(len(batch), ROW)
        weights = torch.ones(len(batch)) if token_weights is None else torch.tensor(token_weights)[owner].float()
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * (1 - self.done / self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        ((losses.mean(dim=1) * weights).sum() / weights.sum()).backward()
        self.optimizer.step()
        self.done += 1
        self.trained_tokens += losses.numel()
        losses = losses.detach()
        over = None
        if excess:
            assert self.reference is not None
            with torch.no_grad():
                known = F.cross_entropy(self.reference.model(pairs), targets, reduction="none").view_as(losses)
            self.measured_tokens += losses.numel()
            over = by_domain((losses - known).clamp(min=0), owner)
        return StepResult(losses=by_domain(losses, owner), tokens=[n * ROW for n in rows], excess=over)

    def validate(self) -> list[float]:
        """Return the losses on the held-out rows that methods may see."""
        return self._heldout("validation")

    def test(self) -> list[float]:
        """Return the losses on the held-out rows that decide."""
        return self._heldout("test")

    def influence(self) -> list[list[float]]:
        """Return the product of each domain's training gradient with each target domain's held-out gradient (TracIn)."""
        train = [self._gradient(self._pools[f"train {k}"][-INFLUENCE_ROWS:]) for k in DOMAINS]
        probes = [self._gradient(self._pools[f"validation {k}"]) for k, t in zip(DOMAINS, TARGET, strict=True) if t]
        return [[float(g @ p) for p in probes] for g in train]

    def _gradient(self, rows: Tensor) -> Tensor:
        pairs, targets = windows(rows)
        self.measured_tokens += len(targets)
        loss = F.cross_entropy(self.model(pairs), targets)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(self.model.parameters()))])

    def draw(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the next rows of each domain, [N, ROW + 2], and whose they are, [N]."""
        parts = []
        for k, count in enumerate(rows):
            index = torch.arange(self._next[k], self._next[k] + count) % (POOL_ROWS - INFLUENCE_ROWS)
            self._next[k] += count
            parts.append(self._pools[f"train {DOMAINS[k]}"][index])
        return torch.cat(parts), torch.repeat_interleave(torch.arange(len(DOMAINS)), torch.tensor(rows))

    @torch.no_grad()
    def _heldout(self, split: str) -> list[float]:
        losses = []
        for domain in DOMAINS:
            pairs, targets = windows(self._pools[f"{split} {domain}"])
            self.measured_tokens += len(targets) if split == "validation" else 0
            losses.append(float(F.cross_entropy(self.model(pairs), targets)))
        return losses


def static_losses(seed: int, mixtures: NDArray[np.float64], steps: int, rows_per_step: int) -> list[list[list[float]]]:
    """Train one model a mixture, all of them at once, and return [M][validation, test][K].

    The same runs as `PlantedLearner` driven by `Static`, up to rounding: the models are stacked, which spares the overhead of
    steps this small.
    """
    learners = [PlantedLearner(seed, steps) for _ in mixtures]
    parameters, _ = stack_module_state([learner.model for learner in learners])  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=0.0)
    plans = torch.stack([reading_plan(mixture, steps, rows_per_step) for mixture in mixtures], dim=1)
    rows = torch.cat([make_pools(seed)[f"train {domain}"] for domain in DOMAINS])

    def loss(own: dict[str, Tensor], pairs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(learners[0].model, own, (pairs,)), targets)

    for step in range(steps):
        batch = rows[plans[step]]  # [M, rows, ROW + 2]
        pairs = torch.stack([batch[..., :-2].flatten(1), batch[..., 1:-1].flatten(1)], dim=-1)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        optimizer.zero_grad(set_to_none=True)
        torch.vmap(loss)(parameters, pairs, batch[..., 2:].flatten(1)).sum().backward()
        optimizer.step()
    found = []
    for i, learner in enumerate(learners):
        learner.model.load_state_dict({name: value[i].detach() for name, value in parameters.items()})
        found.append([learner.validate(), learner.test()])
    return found


def reading_plan(mixture: NDArray[np.float64], steps: int, rows_per_step: int) -> Tensor:
    """Return which training rows a run on fixed weights reads, int64 [steps, rows], domains one after the other."""
    apportioner, following = Apportioner(len(DOMAINS)), [0] * len(DOMAINS)
    plan = []
    for _ in range(steps):
        for k, count in enumerate(apportioner.rows(mixture, rows_per_step)):
            usable = POOL_ROWS - INFLUENCE_ROWS
            plan += [k * POOL_ROWS + i % usable for i in range(following[k], following[k] + count)]
            following[k] += count
    return torch.tensor(plan).view(steps, rows_per_step)


POOLS: dict[int, dict[str, Tensor]] = {}
"""Samples by seed: all runs of a seed read the same."""


def make_pools(seed: int) -> dict[str, Tensor]:
    """Return the samples of a seed: training, validation and test rows of each domain."""
    if seed in POOLS:
        return POOLS[seed]
    generator = np.random.default_rng([7, seed])
    sizes = {"train": POOL_ROWS, "validation": HELDOUT_ROWS, "test": 4 * HELDOUT_ROWS}
    return {f"{split} {domain}": sample(domain, rows, generator) for split, rows in sizes.items() for domain in DOMAINS}


def windows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return every pair of tokens, [N, 2], and what followed it, [N]."""
    return torch.stack([rows[:, :-2].flatten(), rows[:, 1:-1].flatten()], dim=1), rows[:, 2:].flatten()


def by_domain(values: Tensor, owner: Tensor) -> list[float]:
    """Return the mean of each domain's rows; not a number where it has none."""
    return [float(values[owner == k].mean()) for k in range(len(DOMAINS))]


class PlantedTask:
    """The planted mixture as a task of `benchmarks/mixture.py`: 286 mixtures at steps of 10%."""

    domains, target, rows_per_step, grid_parts, chunk = DOMAINS, TARGET, 8, 10, 22

    def __init__(self, steps: int) -> None:
        self.steps = steps or 200
        self.title = f"planted mixture ({', '.join(DOMAINS)}), runs of {self.steps * self.rows_per_step * ROW:,} tokens"

    def make(self, seed: int, reference: PlantedLearner | None = None) -> PlantedLearner:
        """Return a fresh learner."""
        return PlantedLearner(seed, self.steps, reference=reference)

    def static(self, seed: int, mixtures: NDArray[np.float64]) -> list[list[list[float]]]:
        """Train on each fixed mixture, all at once."""
        return static_losses(seed, mixtures, self.steps, self.rows_per_step)

    def identity(self) -> dict[str, Any]:
        """Return what decides the results."""
        return {"task": "planted", "steps": self.steps, "rows": self.rows_per_step, "rate": RATE, "parts": self.grid_parts}
