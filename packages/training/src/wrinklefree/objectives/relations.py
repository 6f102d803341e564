"""BitDistill's attention relations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wrinklefree.losses.relations import Normalisation, relation_divergence
from wrinklefree.mapping import require
from wrinklefree.objectives.base import Way, layer_index
from wrinklefree.teachers.base import Lesson, Shape
from wrinklefree.views import Batch, Needs, Views


@dataclass(frozen=True, kw_only=True, slots=True)
class Relations:
    """KL divergence of the relations among the queries, the keys and the values of one layer (BitDistill's L_AD), in nats.

    The sum over queries, keys and values of the mean over positions and relation heads.

    Attributes:
        layer: the student's block; negative ones count from the end. BitDistill takes a late one (22 of 28 for Qwen3-0.6B).
        teacher_layer: the teacher's; None takes the same place, counted from the end where depths differ.
        heads: relation heads A_r; divides the width of queries and of keys.
        normalisation: "paper" or "official", see `wrinklefree.losses.relations`. The official code's losses are smaller by orders
            of magnitude, and its weight of 1e5 means nothing with the paper's.
        causal: whether positions are related to earlier ones only; the official code relates all to all.
        per_head: divide by `heads` once more, as the official code does.
    """

    layer: int
    teacher_layer: int | None = None
    heads: int = 32
    normalisation: Normalisation = "paper"
    causal: bool = True
    per_head: bool = False

    def __post_init__(self) -> None:
        require(self.heads > 0, f"heads must be positive, not {self.heads}")

    @property
    def way(self) -> Way:
        """Return "views"."""
        return "views"

    @property
    def uses_teacher(self) -> bool:
        """Return true."""
        return True

    def check(self, student: Shape, teacher: Shape | None) -> None:
        """Refuse layers that are not there, widths that cannot be cut, and a teacher that shows no layers."""
        require(
            teacher is not None,
            "attention relations need a teacher that shows its layers, and this one shows nothing but distributions: "
            "use a local one without a cache, or leave the relations out",
        )
        assert teacher is not None
        self.layers(student, teacher)
        for model, who in ((student, "the model"), (teacher, "the teacher")):
            for count, what in ((model.heads, "queries"), (model.kv_heads, "keys")):
                require(
                    count * model.head_size % self.heads == 0,
                    f"{self.heads} relation heads do not divide {who}'s {what} of width {count * model.head_size}: change heads",
                )

    def layers(self, student: Shape, teacher: Shape) -> tuple[int, int]:
        """Return the student's block and the teacher's, from 0.

        Raises:
            UserError: if there is no such block.
        """
        mine = layer_index(self.layer, student.layers, "layer")
        if self.teacher_layer is not None:
            return mine, layer_index(self.teacher_layer, teacher.layers, "teacher_layer")
        same_depth = student.layers == teacher.layers
        return mine, layer_index(mine if same_depth else mine - student.layers, teacher.layers, "teacher_layer")

    def student_needs(self, student: Shape) -> Needs:
        """Return the layer's queries, keys and values."""
        return Needs(qkv=frozenset([layer_index(self.layer, student.layers, "layer")]))

    def teacher_needs(self, student: Shape, teacher: Shape | None) -> Needs:
        """Return the layer's queries, keys and values."""
        assert teacher is not None
        return Needs(qkv=frozenset([self.layers(student, teacher)[1]]))

    def count(self, batch: Batch) -> Tensor:
        """Return the number of positions that are not padding."""
        return (batch["document_ids"] > 0).sum()

    def view_losses(self, student: Views, lesson: Lesson, batch: Batch, shapes: tuple[Shape, Shape]) -> dict[str, Tensor]:
        """Return the sums of "q", "k" and "v"."""
        mine, theirs = self.layers(*shapes)
        scale = 1.0 / self.heads if self.per_head else 1.0
        with torch.autocast(batch["document_ids"].device.type, enabled=False):
            return {
                name: scale
                * relation_divergence(
                    ours,
                    target,
                    batch["document_ids"],
                    heads=self.heads,
                    normalisation=self.normalisation,
                    causal=self.causal,
                )
                for name, ours, target in zip("qkv", student.qkv[mine], lesson.qkv[theirs], strict=True)
            }
