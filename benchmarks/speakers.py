"""A small world for distillation: texts of several speakers, a language model that has read them, and how students are trained.

A text is five runs of eight symbols; each run is of one of three speakers, most often the text's main one. No symbol gives a
speaker away: each is as likely as any other with all of them, and only which symbols follow which differs. Predicting the next
symbol asks for who is speaking, so that a model that has read plain text can tell; who the main speaker is, a few hundred labelled
texts have to teach. Even who knows all probabilities guesses wrong at times.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitnet_arch.testing import tiny_llama
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from wrinklefree.module import model_logits
from wrinklefree.objectives import Objectives, parse_objectives
from wrinklefree.objectives.norms import gradient_norm
from wrinklefree.schedules import learning_rate_share
from wrinklefree.teachers.base import Shape
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.views import Batch

SYMBOLS, SPEAKERS, FOLLOWERS, RUN, RUNS = 32, 3, 2, 8, 5
LENGTH = RUN * RUNS
SEPARATOR, FIRST_LABEL, VOCABULARY = SYMBOLS, SYMBOLS + 1, 40
HABIT, SHARE = 0.7, 0.8
"""How often a symbol follows its speaker's habit, else it is any; how often a run is the main speaker's, else another's."""
ROWS = 32
CE: dict[str, Any] = {"ce": {}}
AUTO, AUTO_EVERY = "auto", 50


@dataclass(frozen=True, slots=True)
class World:
    """What is said, and by whom.

    Attributes:
        chain: probability of a symbol after another, float32 `[speakers, symbols, symbols]`.
    """

    chain: Tensor

    @classmethod
    def of(cls, seed: int) -> "World":
        """Return a seed's world: every speaker's habits are the mean of `FOLLOWERS` permutations."""
        generator = torch.Generator().manual_seed(seed)
        orders = [[torch.randperm(SYMBOLS, generator=generator) for _ in range(FOLLOWERS)] for _ in range(SPEAKERS)]
        habits = torch.stack([sum(F.one_hot(order, SYMBOLS).float() for order in own) / FOLLOWERS for own in orders])
        return cls((1.0 - HABIT) / SYMBOLS + HABIT * habits)

    def draw(self, seed: int, rows: int) -> tuple[Tensor, Tensor]:
        """Return texts, int64 `[rows, LENGTH]`, and their main speakers, int64 `[rows]`."""
        generator = torch.Generator().manual_seed(seed)
        main = torch.randint(0, SPEAKERS, (rows,), generator=generator)
        other = torch.randint(1, SPEAKERS, (rows, RUNS), generator=generator)
        mine = torch.rand(rows, RUNS, generator=generator) < SHARE
        speakers = torch.where(mine, main[:, None], (main[:, None] + other) % SPEAKERS).repeat_interleave(RUN, dim=1)
        ids = torch.randint(0, SYMBOLS, (rows, LENGTH), generator=generator)
        for t in range(1, LENGTH):
            ids[:, t] = torch.multinomial(self.chain[speakers[:, t], ids[:, t - 1]], 1, generator=generator)[:, 0]
        return ids, main

    def plain(self, seed: int, rows: int = ROWS) -> Batch:
        """Return unlabelled texts, with loss on every symbol but the first."""
        ids, _ = self.draw(seed, rows)
        labels = ids.clone()
        labels[:, 0] = -100
        return as_batch(ids, labels)

    def labelled(self, seed: int, rows: int, shuffled: bool = False) -> Batch:
        """Return texts that end in their main speaker's name, the only token with a loss; or in another text's, if `shuffled`."""
        ids, main = self.draw(seed, rows)
        if shuffled:
            main = main[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))]
        ends = torch.stack([torch.full_like(main, SEPARATOR), FIRST_LABEL + main], dim=1)
        ids = torch.cat([ids, ends], dim=1)
        labels = torch.full_like(ids, -100)
        labels[:, -1] = ids[:, -1]
        return as_batch(ids, labels)

    def best_guess(self, batch: Batch) -> float:
        """Return the accuracy of who knows the world's probabilities: no model can do better on many texts."""
        ids = batch["input_ids"][:, :LENGTH]
        step = self.chain[:, ids[:, :-1], ids[:, 1:]].log()
        runs = F.pad(step, (1, 0)).unflatten(-1, (RUNS, RUN)).sum(-1)  # of the first symbol every speaker says the same
        prior = torch.full((SPEAKERS, SPEAKERS), (1.0 - SHARE) / (SPEAKERS - 1)).fill_diagonal_(SHARE).log()
        score = (prior[:, :, None, None] + runs).logsumexp(1).sum(-1)
        return float((score.argmax(0) + FIRST_LABEL == batch["input_ids"][:, -1]).float().mean())


def as_batch(ids: Tensor, labels: Tensor) -> Batch:
    """Return one document a row."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return {"input_ids": ids, "labels": labels, "document_ids": torch.ones_like(ids), "position_ids": positions}


def stream(world: World, seed: int, steps: int) -> Iterator[Batch]:
    """Yield batches of unlabelled texts, none twice."""
    return (world.plain(seed * 1_000_000 + step) for step in range(steps))


def epochs(data: Batch, seed: int, steps: int) -> Iterator[Batch]:
    """Yield batches of a labelled set, in another order every time through."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(data["input_ids"])
    order = torch.cat([torch.randperm(rows, generator=generator) for _ in range(math.ceil(steps * ROWS / rows))])
    for step in range(steps):
        yield {name: values[order[step * ROWS : (step + 1) * ROWS]] for name, values in data.items()}


def new_model(seed: int, hidden: int, layers: int) -> PreTrainedModel:
    """Return a random float Llama."""
    return tiny_llama(hidden=hidden, ffn=2 * hidden, layers=layers, vocab=VOCABULARY, heads=4, kv_heads=2, seed=seed)


def train(
    model: PreTrainedModel,
    values: dict[str, Any],
    data: Iterable[Batch],
    steps: int,
    rate: float,
    teacher: PreTrainedModel | None = None,
    first: int = 0,
) -> PreTrainedModel:
    """Train in place with AdamW, 5% of warm-up and a cosine.

    Args:
        model: the student.
        values: its objectives as a run names them; weights of "auto" are measured at the first step and every `AUTO_EVERY`.
        data: as many batches as are trained on.
        steps: the length of the schedule.
        rate: the highest learning rate.
        teacher: where an objective needs one.
        first: the step of the schedule that training begins at, where it goes on from another part.
    """
    model.train()
    settings = parse_objectives(values)
    found = {name: item.objective for name, item in settings.items() if item.active}
    objectives = Objectives(found, Shape.of(model), LocalTeacher(teacher, "float") if teacher is not None else None)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01, fused=True)
    weights = {name: 1.0 if settings[name].weight == AUTO else float(settings[name].weight) for name in found}
    matched = [name for name in found if settings[name].weight == AUTO]
    for step, batch in enumerate(data, first):
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_share("cosine", step, steps, steps // 20)
        counts = objectives.counts(batch, found)
        if matched and (step - first) % AUTO_EVERY == 0:
            norms = {n: gradient_norm(objectives, model, [batch], n, 1.0 / counts[n]) for n in ("ce", *matched)}
            weights |= {n: norms["ce"] / max(norms[n], 1e-12) for n in matched}
        optimizer.zero_grad()
        objectives(model, batch, {name: weights[name] / count for name, count in counts.items()}).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: PreTrainedModel, data: Batch) -> float:
    """Return the share of texts whose main speaker the model names, among the three names."""
    chosen = model_logits(model, data)[:, LENGTH, FIRST_LABEL : FIRST_LABEL + SPEAKERS].argmax(-1)
    return float((chosen + FIRST_LABEL == data["input_ids"][:, -1]).float().mean())


@torch.no_grad()
def cross_entropy(model: PreTrainedModel, data: Batch) -> float:
    """Return nats a scored token."""
    logits = model_logits(model, data)[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1), data["labels"][:, 1:].flatten(), ignore_index=-100))
