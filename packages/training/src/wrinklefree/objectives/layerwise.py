"""Layer-wise distillation: blocks that answer as the teacher's do."""

from dataclasses import dataclass
from typing import Literal

import torch
from bitnet_arch import UserError
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.losses.layerwise import ROW_DISTANCES, Weighing, layer_weights, masked_sum
from wrinklefree.losses.relations import relation_divergence
from wrinklefree.mapping import require
from wrinklefree.objectives.base import Way, layer_index
from wrinklefree.teachers.base import Lesson, Shape
from wrinklefree.views import Batch, Needs, Views, forward_views


@dataclass(frozen=True, kw_only=True, slots=True)
class Layerwise:
    """Distance of the student's hidden states from the teacher's, the weighted mean over blocks ("stage 1.9").

    Attributes:
        distance: "nmse" is |s - t|^2 / |t|^2; "cosine" is 1 - cos(s, t), blind to norms; "relation" is the KL divergence of the
            relations among positions, `wrinklefree.losses.relations`.
        weights: "uniform", "linear" (l + 1 of block l from 0), or "last".
        last: how many blocks, with "last".
        mode: "free" compares the student as it runs; "teacher_forced" gives every block the teacher's states to read, which keeps
            the errors of blocks apart (the reconstruction of blocks) and takes a forward pass of its own.
        heads: relation heads, with distance "relation".
    """

    distance: Literal["nmse", "cosine", "relation"] = "nmse"
    weights: Weighing = "uniform"
    last: int | None = None
    mode: Literal["free", "teacher_forced"] = "free"
    heads: int | None = None

    def __post_init__(self) -> None:
        require(
            (self.last is None) == (self.weights != "last"),
            "last says how many blocks count, and belongs to weights=last alone",
        )
        require(self.last is None or self.last > 0, f"last must be positive, not {self.last}")
        require(
            (self.heads is None) == (self.distance != "relation"),
            "heads counts relation heads, and belongs to distance=relation alone",
        )
        require(self.heads is None or self.heads > 0, f"heads must be positive, not {self.heads}")

    @property
    def way(self) -> Way:
        """Return "own" where blocks read the teacher's states, which no other objective can use."""
        return "own" if self.mode == "teacher_forced" else "views"

    @property
    def uses_teacher(self) -> bool:
        """Return true."""
        return True

    def check(self, student: Shape, teacher: Shape | None) -> None:
        """Refuse a teacher of another width or depth, or one that shows no layers."""
        if teacher is None:
            raise UserError(
                "layer-wise distillation needs a teacher that shows its layers, and this one shows nothing but distributions: use "
                "a local one without a cache, or leave it out"
            )
        for what in ("layers", "hidden"):
            mine, theirs = getattr(student, what), getattr(teacher, what)
            name = "depth" if what == "layers" else "width"
            require(
                mine == theirs,
                f"layer-wise distillation compares block by block, and the teacher's {name} is {theirs}, the model's {mine}: "
                "choose a teacher of the same shape",
            )
        if self.last is not None:
            layer_index(-self.last, student.layers, "last")
        require(
            self.heads is None or student.hidden % self.heads == 0,
            f"{self.heads} relation heads do not divide hidden states of width {student.hidden}: change heads",
        )

    def of_blocks(self, layers: int) -> dict[int, float]:
        """Return the weight of every block that counts."""
        weights = layer_weights(self.weights, layers, self.last or 1)
        return {block: weight for block, weight in enumerate(weights) if weight}

    def student_needs(self, student: Shape) -> Needs:
        """Return the blocks' outputs."""
        return Needs() if self.way == "own" else Needs(hidden=frozenset(self.of_blocks(student.layers)))

    def teacher_needs(self, student: Shape, teacher: Shape | None) -> Needs:
        """Return the blocks' outputs, and where they are read, too, those of the blocks before."""
        blocks = set(self.of_blocks(student.layers))
        if self.way == "own":
            blocks |= {block - 1 for block in blocks if block}
        return Needs(hidden=frozenset(blocks))

    def count(self, batch: Batch) -> Tensor:
        """Return the number of positions that are not padding."""
        return (batch["document_ids"] > 0).sum()

    def view_losses(self, student: Views, lesson: Lesson, batch: Batch, shapes: tuple[Shape, Shape]) -> dict[str, Tensor]:
        """Return the weighted sum of each block, by its index."""
        return {
            str(block): weight * self._distance(student.hidden[block], lesson.hidden[block], batch["document_ids"])
            for block, weight in self.of_blocks(shapes[0].layers).items()
        }

    def own_losses(
        self, model: PreTrainedModel, lesson: Lesson | None, batch: Batch, shapes: tuple[Shape, Shape | None]
    ) -> dict[str, Tensor]:
        """Let every block read the teacher's states, and compare what it makes of them."""
        assert lesson is not None
        blocks = self.of_blocks(shapes[0].layers)
        device = batch["input_ids"].device  # the teacher may run on another
        inputs = {block: lesson.hidden[block - 1].to(device) for block in blocks if block}
        seen = forward_views(model, batch, Needs(hidden=frozenset(blocks)), inputs)
        assert shapes[1] is not None
        return self.view_losses(seen, lesson, batch, (shapes[0], shapes[1]))

    def _distance(self, student: Tensor, teacher: Tensor, document_ids: Tensor) -> Tensor:
        teacher = teacher.to(student.device)
        with torch.autocast(student.device.type, enabled=False):
            if self.heads is not None:
                return relation_divergence(
                    student[:, None],
                    teacher[:, None],
                    document_ids,
                    heads=self.heads,
                    normalisation="paper",
                    causal=True,
                )
            rows = ROW_DISTANCES[self.distance](student.flatten(0, 1), teacher.flatten(0, 1))
            return masked_sum(rows, document_ids.flatten() > 0)
