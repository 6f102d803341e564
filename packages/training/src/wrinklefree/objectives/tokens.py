"""Objectives of the logits: the next token itself, and a teacher's distribution of it."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from wrinklefree.losses.divergence import Direction, cross_entropy, kl_divergence, top_k_divergence
from wrinklefree.losses.head import RowLoss
from wrinklefree.mapping import require
from wrinklefree.objective import IGNORED
from wrinklefree.objectives.base import Way, next_tokens
from wrinklefree.teachers.base import Lesson, Shape
from wrinklefree.views import Batch, Needs


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossEntropy:
    """Cross-entropy of the next token, in nats, over the tokens that have a label: pre-training, or of answers alone, SFT."""

    @property
    def way(self) -> Way:
        """Return "rows"."""
        return "rows"

    @property
    def uses_teacher(self) -> bool:
        """Return false."""
        return False

    def check(self, student: Shape, teacher: Shape | None) -> None:
        """Refuse nothing."""

    def student_needs(self, student: Shape) -> Needs:
        """Return the logits."""
        return Needs(logits=True)

    def teacher_needs(self, student: Shape, teacher: Shape | None) -> Needs:
        """Return nothing."""
        return Needs()

    def count(self, batch: Batch) -> Tensor:
        """Return the number of scored tokens."""
        return self.scored(batch).sum()

    def scored(self, batch: Batch) -> Tensor:
        """Return the positions whose next token has a label."""
        return next_tokens(batch["labels"]) != IGNORED

    def row_loss(self, targets: Tensor, positions: Tensor, lesson: Lesson | None) -> RowLoss:
        """Return the cross-entropy of the next token."""
        return lambda logits, part: cross_entropy(logits, targets[part])


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsDivergence:
    """KL divergence from a teacher's distribution of the next token (BitDistill's L_LD, arXiv 2510.13998), in nats.

    Attributes:
        temperature: both distributions are softened by it (BitDistill: 5).
        tau_squared: multiply by the square of the temperature, as the official code does and the paper does not.
        direction: "forward" is KL(teacher || student), "reverse" KL(student || teacher).
        top_k: compare the teacher's k likeliest tokens and one bucket of all others; None compares the whole vocabulary, but for
            a mask token that only the student has (with k, it is among the others).
        scope: "scored" takes the positions whose next token has a label, "attended" all that are not padding (the official code).
    """

    temperature: float = 1.0
    tau_squared: bool = False
    direction: Direction = "forward"
    top_k: int | None = None
    scope: Literal["scored", "attended"] = "scored"

    def __post_init__(self) -> None:
        require(0 < self.temperature < float("inf"), f"temperature must be positive, not {self.temperature}")
        require(
            not (self.tau_squared and self.temperature == 1.0),
            "tau_squared has no effect at temperature 1: leave it out, or raise the temperature",
        )
        require(self.top_k is None or self.top_k > 0, f"top_k must be positive or null, not {self.top_k}")

    @property
    def way(self) -> Way:
        """Return "rows"."""
        return "rows"

    @property
    def uses_teacher(self) -> bool:
        """Return true."""
        return True

    def check(self, student: Shape, teacher: Shape | None) -> None:
        """Refuse a teacher of another vocabulary, and a top_k that is none."""
        if teacher is not None:
            require(
                teacher.vocabulary in (student.vocabulary, student.texts),
                f"the teacher has logits of {teacher.vocabulary} tokens and the model of {student.vocabulary}: their distributions "
                "cannot be compared, so choose a teacher of the model's own family",
            )
        require(
            self.top_k is None or self.top_k < student.vocabulary,
            f"top_k={self.top_k} leaves no token of a vocabulary of {student.vocabulary} out: leave top_k out",
        )

    def student_needs(self, student: Shape) -> Needs:
        """Return the logits."""
        return Needs(logits=True)

    def teacher_needs(self, student: Shape, teacher: Shape | None) -> Needs:
        """Return the logits."""
        return Needs(logits=True)

    def count(self, batch: Batch) -> Tensor:
        """Return the number of positions in scope."""
        return self.scored(batch).sum()

    def scored(self, batch: Batch) -> Tensor:
        """Return the positions that are compared."""
        if self.scope == "attended":
            return batch["document_ids"] > 0
        return next_tokens(batch["labels"]) != IGNORED

    def row_loss(self, targets: Tensor, positions: Tensor, lesson: Lesson | None) -> RowLoss:
        """Return the divergence, at the positions in scope."""
        assert lesson is not None
        assert lesson.targets is not None
        teacher, scale = lesson.targets, self.temperature**2 if self.tau_squared else 1.0

        def loss(logits: Tensor, part: slice) -> Tensor:
            if self.top_k is None:
                whole = teacher.full(positions[part])
                # A mask token that the student alone has is never predicted (MDLM's zero masking probability).
                return scale * kl_divergence(logits[:, : whole.shape[1]], whole, self.temperature, self.direction)
            top = teacher.top(positions[part], self.top_k, self.temperature)
            return scale * top_k_divergence(logits, *top, self.temperature, self.direction)

        return loss
