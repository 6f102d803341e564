"""The contract of an objective."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from bitnet_arch import UserError
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.losses.head import RowLoss
from wrinklefree.objective import IGNORED
from wrinklefree.teachers.base import Lesson, Shape
from wrinklefree.views import Batch, Needs, Views

Way = Literal["rows", "views", "own"]
"""How an objective is computed: from the logits of single positions, from what the student's forward shows, or by itself."""


class Objective(Protocol):
    """One term of a run's loss. It is stateless: its settings are its fields.

    Every method returns sums over what `count` counts, so that the loss of a step is the mean however it is cut. An objective
    defines the one of `row_loss`, `view_losses` and `own_losses` that its `way` names.
    """

    @property
    def way(self) -> Way:
        """Return how it is computed."""
        ...

    @property
    def uses_teacher(self) -> bool:
        """Whether it compares with a teacher."""
        ...

    def check(self, student: Shape, teacher: Shape | None) -> None:
        """Refuse models that it cannot work on; `teacher` is None where the teacher shows nothing but distributions.

        Raises:
            UserError: naming the setting and the remedy.
        """
        ...

    def student_needs(self, student: Shape) -> Needs:
        """Return what the student's forward must show; nothing for way "own"."""
        ...

    def teacher_needs(self, student: Shape, teacher: Shape | None) -> Needs:
        """Return what the teacher's forward must show."""
        ...

    def count(self, batch: Batch) -> Tensor:
        """Return how many tokens of a batch the mean is over, an int64 scalar."""
        ...


class RowObjective(Objective, Protocol):
    """Way "rows"."""

    def scored(self, batch: Batch) -> Tensor:
        """Return at which positions a prediction is scored, bool `[B, T]`."""
        ...

    def row_loss(self, targets: Tensor, positions: Tensor, lesson: Lesson | None) -> RowLoss:
        """Return the loss of the logits at some positions.

        Args:
            targets: the next token at each, int64 `[N]`, -100 where none is scored.
            positions: their places in the batch, counted row by row, int64 `[N]`.
            lesson: the teacher's.
        """
        ...


class ViewObjective(Objective, Protocol):
    """Way "views"."""

    def view_losses(self, student: Views, lesson: Lesson, batch: Batch, shapes: tuple[Shape, Shape]) -> dict[str, Tensor]:
        """Return named sums whose total is the objective; a single one is named ""."""
        ...


class OwnObjective(Objective, Protocol):
    """Way "own": it runs the student itself."""

    def own_losses(
        self, model: PreTrainedModel, lesson: Lesson | None, batch: Batch, shapes: tuple[Shape, Shape | None]
    ) -> dict[str, Tensor]:
        """Return named sums whose total is the objective; a single one is named ""."""
        ...


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Let a `UserError` begin with the objective that it is about."""
    try:
        yield
    except UserError as error:
        where = f"objectives.{name}"
        raise UserError(str(error) if where in str(error) else f"{where}: {error}") from None


def next_tokens(labels: Tensor) -> Tensor:
    """Return what follows each position, int64 `[B, T]` of `labels` shifted by one, -100 at the end."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)


def layer_index(layer: int, layers: int, what: str) -> int:
    """Return a block's index from 0; negative ones count from the end.

    Raises:
        UserError: if there is no such block.
    """
    if not -layers <= layer < layers:
        raise UserError(f"{what}={layer} is out of range: the model has {layers} layers, 0 to {layers - 1} or -{layers} to -1")
    return layer % layers
