"""All objectives of a run on a batch: one forward of the student, at most one of the teacher, and one sum to differentiate."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.losses.head import RowLoss, head_losses
from wrinklefree.objectives.base import Objective, OwnObjective, RowObjective, ViewObjective, naming, next_tokens
from wrinklefree.objectives.tokens import CrossEntropy
from wrinklefree.teachers.base import Lesson, Shape, Teacher
from wrinklefree.views import Batch, Head, Needs, Views, forward_views


@dataclass(slots=True)
class Losses:
    """What a batch gave.

    Attributes:
        total: the sum of all objectives, each times its coefficient; what is differentiated.
        sums: name to the objective's own sum, detached, and `name/part` to those of its parts.
        token_losses: cross-entropy of every position, float32 `[B, T]`, 0 where none is scored, detached; None without one.
    """

    total: Tensor
    sums: dict[str, Tensor]
    token_losses: Tensor | None


class Objectives:
    """Objectives by name, on one student and at most one teacher."""

    def __init__(self, objectives: Mapping[str, Objective], student: Shape, teacher: Teacher | None = None) -> None:
        """Check that they can be computed.

        Args:
            objectives: those that may ever be asked for.
            student: the model's sizes.
            teacher: None where no objective needs one.

        Raises:
            UserError: naming the objective that cannot.
        """
        self.objectives = dict(objectives)
        self.student, self.teacher = student, teacher
        for name, objective in self.objectives.items():
            assert teacher is not None or not objective.uses_teacher
            with naming(name):
                objective.check(student, teacher.shape if teacher else None)

    def counts(self, batch: Batch, names: Iterable[str]) -> dict[str, Tensor]:
        """Return how many tokens each objective's mean is over, int64 scalars."""
        return {name: self.objectives[name].count(batch).to(torch.int64) for name in names}

    def __call__(self, model: PreTrainedModel, batch: Batch, coefficients: Mapping[str, Tensor]) -> Losses:
        """Compute the objectives that have a coefficient.

        Args:
            model: the student.
            batch: what the data room gives.
            coefficients: name to the float scalar that the objective's sum is multiplied by.
        """
        chosen = {name: self.objectives[name] for name in coefficients}
        lesson = None
        if taught := [objective for objective in chosen.values() if objective.uses_teacher]:
            assert self.teacher is not None
            shape = self.teacher.shape
            asked = reduce(or_, (objective.teacher_needs(self.student, shape) for objective in taught), Needs())
            lesson = self.teacher.lesson(batch, asked)
        needs = reduce(or_, (objective.student_needs(self.student) for objective in chosen.values()), Needs())
        views = forward_views(model, batch, needs) if needs else None
        sums: dict[str, Tensor] = {}
        total, token_losses = self._rows(model, views, batch, lesson, chosen, coefficients, sums)
        for name, objective in chosen.items():
            if objective.way != "rows":
                parts = self._parts(objective, model, views, lesson, batch)
                whole = torch.stack(list(parts.values())).sum()
                total = total + coefficients[name] * whole
                sums[name] = whole.detach()
                sums |= {f"{name}/{part}": value.detach() for part, value in parts.items() if part}
        return Losses(total, sums, token_losses)

    def _rows(
        self,
        model: PreTrainedModel,
        views: Views | None,
        batch: Batch,
        lesson: Lesson | None,
        chosen: Mapping[str, Objective],
        coefficients: Mapping[str, Tensor],
        sums: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the objectives of single positions, in one pass over the logits."""
        found = {name: cast(RowObjective, objective) for name, objective in chosen.items() if objective.way == "rows"}
        device = batch["input_ids"].device
        if not found:
            return torch.zeros((), device=device), None
        assert views is not None
        scored = torch.stack([objective.scored(batch).flatten() for objective in found.values()])
        positions = scored.any(0).nonzero()[:, 0]
        targets = next_tokens(batch["labels"]).flatten()[positions]
        losses: list[RowLoss] = [
            _masked(objective.row_loss(targets, positions, lesson), mask)
            for objective, mask in zip(found.values(), scored[:, positions], strict=True)
        ]
        head = Head(model)
        weights = torch.stack([torch.as_tensor(coefficients[name], dtype=torch.float32, device=device) for name in found])
        hidden = views.last.flatten(0, 1)[positions]
        total, values = head_losses(hidden, head, head.parameters, losses, weights, vocabulary=head.vocabulary)
        sums |= {name: row.sum() for name, row in zip(found, values, strict=True)}
        token_losses = None
        for name, row in zip(found, values, strict=True):
            if isinstance(found[name], CrossEntropy) and token_losses is None:
                token_losses = torch.zeros(scored.shape[1], device=device).index_copy_(0, positions, row)
                token_losses = token_losses.view_as(batch["labels"])
        return total, token_losses

    def _parts(
        self, objective: Objective, model: PreTrainedModel, views: Views | None, lesson: Lesson | None, batch: Batch
    ) -> dict[str, Tensor]:
        shapes: Any = self.student, self.teacher.shape if self.teacher else None
        if objective.way == "own":
            return cast(OwnObjective, objective).own_losses(model, lesson, batch, shapes)
        assert views is not None
        assert lesson is not None
        return cast(ViewObjective, objective).view_losses(views, lesson, batch, shapes)


def _masked(loss: RowLoss, mask: Tensor) -> RowLoss:
    def masked(logits: Tensor, part: slice) -> Tensor:
        values = loss(logits, part)
        return torch.where(mask[part], values, torch.zeros_like(values))

    return masked
