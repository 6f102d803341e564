"""One step's losses of a diffusion student that an autoregressive teacher corrects."""

from dataclasses import dataclass

import torch
from bitnet_arch import UserError
from bitnet_arch.bitlinear import constant_weights
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.diffusion.loss import support_kl, support_losses, token_nll
from wrinklefree.diffusion.mask import block_ends
from wrinklefree.diffusion.settings import DiffusionSettings
from wrinklefree.diffusion.step import Batch, check_masked, masked_states, view_states
from wrinklefree.diffusion.tcs import ESTIMATORS, Target, Teacher
from wrinklefree.diffusion.views import Views, make_views


@dataclass(frozen=True, kw_only=True, slots=True)
class TCSSettings:
    """How the teacher's targets are made (`wrinklefree.diffusion.tcs`).

    Attributes:
        diffusion: how the student is trained.
        estimator: "topk", "gradient", "causal" (biased: a baseline) or "exact" (V forwards a token: for tests).
        top_k: K, tokens of a target; None takes 8. "exact" has a target of all tokens.
        window: W of "topk": how many tokens after i score a candidate; None for all to the end of the block.

    Raises:
        UserError: for a value out of range, or one without effect.
    """

    diffusion: DiffusionSettings
    estimator: str = "topk"
    top_k: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise UserError(f"unknown estimator {self.estimator!r}: choose {', '.join(ESTIMATORS)}")
        if self.top_k is not None and self.estimator == "exact":
            raise UserError("top_k has no effect with estimator=exact, whose targets are of all tokens: leave it out")
        if self.k < 2:
            raise UserError(f"top_k is {self.top_k}: a target needs at least 2 tokens")
        if self.window is not None and self.estimator != "topk":
            raise UserError(f"window has no effect with estimator={self.estimator}: leave it out")
        if self.window is not None and self.window < 1:
            raise UserError(f"window is {self.window}: give at least 1, or leave it out for the whole block")

    @property
    def k(self) -> int:
        """K."""
        return 8 if self.top_k is None else self.top_k


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel, settings: TCSSettings) -> None:
    """Refuse a teacher whose tokens are not the student's.

    Raises:
        UserError: if its vocabulary is larger, lacks more than the mask token, or is smaller than K.
    """
    theirs, ours, mask = teacher.config.vocab_size, student.config.vocab_size, settings.diffusion.mask_token_id
    if theirs > ours or theirs < min(ours, mask):
        raise UserError(
            f"the teacher has {theirs} tokens and the student {ours}, the mask token being number {mask}: they need one tokenizer"
        )
    if settings.estimator != "exact" and settings.k > theirs - (mask < theirs):
        raise UserError(f"top_k is {settings.k}, and the teacher has {theirs} tokens: lower it")


def make_target(teacher: PreTrainedModel, batch: Batch, views: Views, settings: TCSSettings) -> Target:
    """Return the teacher's distribution of every masked token, in the order of `views.masked`; no gradient flows.

    A token that several views mask is estimated once. The teacher runs where it is, in its own precision.
    """
    masks = views.masked.view(views.count, *batch["input_ids"].shape)
    wanted = masks.any(0)
    ends = block_ends(views.blocks)
    here, there = wanted.device, teacher.device
    read = {name: batch[name].to(there) for name in ("input_ids", "position_ids", "document_ids")}
    with constant_weights(teacher), torch.autocast(there.type, enabled=False):
        look = Teacher(teacher, read, wanted.to(there), ends.to(there), settings.diffusion.mask_token_id)
        target = ESTIMATORS[settings.estimator](look, settings.k, settings.window)
    place = wanted.flatten().long().cumsum(0) - 1
    chosen = torch.cat([place[mask.flatten()] for mask in masks])
    return Target(target.ids.to(here)[chosen], target.log_q.to(here)[chosen], target.log_tail.to(here)[chosen])


def tcs_step(
    model: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, settings: TCSSettings, plain: bool = True
) -> dict[str, Tensor]:
    """Return the losses of a batch by name, float32 scalars, summed over what `scored_count` counts, in nats.

    "dlm" is the loss of `diffusion_step`, "tcs" the mean divergence KL(teacher || student) of the same tokens with the same
    weights. A run mixes them: (1 - hard)·tcs + hard·dlm.

    Args:
        model: the student.
        teacher: frozen, in evaluation mode, of the same tokenizer.
        batch: as in `diffusion_step`.
        settings: how.
        plain: compute "dlm" too.

    Raises:
        UserError: for rows that the student cannot be trained on, or a teacher of another vocabulary.
    """
    check_teacher(model, teacher, settings)
    how = settings.diffusion
    views = make_views(batch, how)
    check_masked(batch, views, how)
    states = masked_states(view_states(model, batch, views, how), views, how)
    weights = views.weights[views.masked]
    own = batch["input_ids"].repeat(views.count, 1)[views.masked]
    if not len(states):  # rows of padding, or without labels: nothing to ask the teacher
        nothing = (token_nll(model, states, own, how.mask_token_id) * weights).sum()
        return {"dlm": nothing, "tcs": nothing}
    target = make_target(teacher, batch, views, settings)
    of_target = target.ids, target.log_q, target.log_tail, how.mask_token_id
    if not plain:
        return {"tcs": (support_kl(model, states, *of_target) * weights).sum()}
    divergence, nll = support_losses(model, states, own, *of_target)
    return {"dlm": (nll * weights).sum(), "tcs": (divergence * weights).sum()}
