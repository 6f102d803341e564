"""Objectives that make a diffusion model of the student; they run it themselves, on masked rows (docs/diffusion.md)."""

from dataclasses import dataclass
from typing import Literal

from bitnet_arch import UserError
from bitnet_arch.diffusion import DiffusionForm, diffusion_of
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.diffusion import METHODS, DiffusionSettings, TCSSettings, diffusion_step, scored_count, tcs_step
from wrinklefree.mapping import require
from wrinklefree.objectives.base import Way
from wrinklefree.teachers.base import Lesson, Shape
from wrinklefree.views import Batch, Needs

EXACT_VOCABULARY = 1024
"""Tokens of the largest vocabulary that estimator "exact" takes: 4 MiB of logits for each token of a row."""

Method = Literal["fast_dllm_v2", "bd3lm", "mdlm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskedDiffusion:
    """Cross-entropy of masked tokens (`wrinklefree.diffusion.diffusion_step`), in nats.

    Attributes:
        method: the paper whose masks, views and weights are used.
        block_size: D; None takes the paper's. Method mdlm has no blocks.
        seed: of masks and noise levels; None takes the run's.
    """

    method: Method = "fast_dllm_v2"
    block_size: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        require(
            self.block_size is None or self.method != "mdlm",
            "block_size has no effect with method=mdlm, which has no blocks: leave it out",
        )
        self.settings(0)

    @property
    def way(self) -> Way:
        """Return "own": the student reads masked rows."""
        return "own"

    @property
    def uses_teacher(self) -> bool:
        """Return false."""
        return False

    @property
    def form(self) -> DiffusionForm:
        """Return what the trained model says of itself, but for its mask token's number, which is 0 here."""
        return self.settings(0).form()

    def settings(self, mask_token_id: int) -> DiffusionSettings:
        """Return the settings on a model."""
        block = {} if self.block_size is None else {"block_size": self.block_size}
        return DiffusionSettings(mask_token_id=mask_token_id, seed=self.seed or 0, **METHODS[self.method] | block)

    def check(self, student: Shape, teacher: Shape | None) -> None:
        """Refuse nothing."""

    def student_needs(self, student: Shape) -> Needs:
        """Return nothing."""
        return Needs()

    def teacher_needs(self, student: Shape, teacher: Shape | None) -> Needs:
        """Return nothing."""
        return Needs()

    def count(self, batch: Batch) -> Tensor:
        """Return the number of tokens that have a label."""
        return scored_count(batch, self.settings(0))

    def own_losses(
        self, model: PreTrainedModel, lesson: Lesson | None, batch: Batch, shapes: tuple[Shape, Shape | None]
    ) -> dict[str, Tensor]:
        """Return the sum."""
        return {"": diffusion_step(model, batch, self.settings(_mask_of(model)))["dlm"]}


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetScores(MaskedDiffusion):
    """Target Concrete Score distillation: (1 - hard) · KL(teacher || student) + hard · cross-entropy of masked tokens.

    Attributes:
        estimator: how the teacher's distribution of a token, given all others of its block, is found; "causal" is biased.
        top_k: tokens of that distribution; None takes 8. "exact" has all.
        window: of "topk", how many tokens after it score a candidate; None for all to the block's end.
        hard: the share of the cross-entropy.
    """

    estimator: Literal["topk", "gradient", "causal", "exact"] = "topk"
    top_k: int | None = None
    window: int | None = None
    hard: float = 0.0

    def __post_init__(self) -> None:
        MaskedDiffusion.__post_init__(self)
        require(0 <= self.hard < 1, f"hard must lie in [0, 1), not {self.hard}: 1 would need no teacher")
        self.how(0)

    @property
    def uses_teacher(self) -> bool:
        """Return true."""
        return True

    def how(self, mask_token_id: int) -> TCSSettings:
        """Return the settings on a model."""
        return TCSSettings(diffusion=self.settings(mask_token_id), estimator=self.estimator, top_k=self.top_k, window=self.window)

    def check(self, student: Shape, teacher: Shape | None) -> None:
        """Refuse a teacher that cannot be run on other texts, or of another vocabulary."""
        if teacher is None:
            raise UserError(
                "tcs runs its teacher on texts of its own, and this one answers with distributions of the batch alone: use a local "
                "one without a cache"
            )
        require(
            teacher.vocabulary <= student.vocabulary,
            f"the teacher has {teacher.vocabulary} tokens and the model {student.vocabulary}: they need one tokenizer, so choose a "
            "teacher of the model's own family",
        )
        held = teacher.vocabulary**2 * 4 / 2**20
        require(
            self.estimator != "exact" or teacher.vocabulary <= EXACT_VOCABULARY,
            f"estimator=exact scores every one of {teacher.vocabulary:,} tokens in every place and holds {held:,.0f} MiB of logits "
            f"for each token of a row: it is for vocabularies of at most {EXACT_VOCABULARY:,}, so choose topk",
        )
        k = self.how(0).k
        few = f"top_k is {k}, and the teacher has {teacher.vocabulary} tokens: lower it"
        require(self.estimator == "exact" or k < teacher.vocabulary, few)

    def teacher_needs(self, student: Shape, teacher: Shape | None) -> Needs:
        """Return the teacher itself."""
        return Needs(itself=True)

    def own_losses(
        self, model: PreTrainedModel, lesson: Lesson | None, batch: Batch, shapes: tuple[Shape, Shape | None]
    ) -> dict[str, Tensor]:
        """Return both terms with their shares."""
        assert lesson is not None
        assert lesson.model is not None
        found = tcs_step(model, lesson.model, batch, self.how(_mask_of(model)), plain=self.hard > 0)
        scores = (1 - self.hard) * found["tcs"]
        return {"scores": scores, "tokens": self.hard * found["dlm"]} if self.hard else {"": scores}


def _mask_of(model: PreTrainedModel) -> int:
    form = diffusion_of(model.config)
    assert form is not None
    return form.mask_token_id
