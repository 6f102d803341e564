"""Relations among the queries, keys or values of a layer (MiniLMv2, Wang et al. 2021; BitDistill, arXiv 2510.13998, L_AD)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from wrinklefree.losses.pieces import PIECE_ELEMENTS, piece_rows, sum_of_pieces

Normalisation = Literal["paper", "official"]


def relation_vectors(states: Tensor, heads: int, normalisation: Normalisation) -> Tensor:
    """Return the vectors whose products are relations, float32 `[B, heads, T, D_r]`.

    Heads are laid side by side and cut anew into `heads` parts of D_r = H * D / heads: queries and grouped keys or values thus have
    as many relations as each other, and a teacher as many as its student.

    Args:
        states: queries, keys or values as attention takes them, before keys and values are repeated for groups, `[B, H, T, D]`.
        heads: how many relations; divides H * D.
        normalisation: "paper" divides by the fourth root of D_r, so that products are those of the paper's
            `softmax(A A' / sqrt(D_r))`; "official" scales every vector to length 1, as BitDistill's code does (temperature 1).
    """
    batch, _, time, _ = states.shape
    vectors = states.float().transpose(1, 2).reshape(batch, time, heads, -1).transpose(1, 2)
    return F.normalize(vectors, dim=-1) if normalisation == "official" else vectors * vectors.shape[-1] ** -0.25


def relation_mask(document_ids: Tensor, queries: slice, causal: bool) -> Tensor:
    """Return which positions a position is related to, bool `[B, 1, Q, T]`: those of its document, and itself.

    Args:
        document_ids: int64 `[B, T]`, 0 = padding, whose positions are related to themselves alone.
        queries: which positions.
        causal: leave out later ones, as attention does.
    """
    at = torch.arange(document_ids.shape[1], device=document_ids.device)
    mine, all_ = document_ids[:, queries, None], document_ids[:, None, :]
    mask = (mine == all_) & (mine > 0)
    if causal:
        mask &= at[None, None, :] <= at[None, queries, None]
    return (mask | (at[None, None, :] == at[None, queries, None]))[:, None]


def relation_divergence(
    student: Tensor,
    teacher: Tensor,
    document_ids: Tensor,
    *,
    heads: int,
    normalisation: Normalisation,
    causal: bool,
    elements: int = PIECE_ELEMENTS,
) -> Tensor:
    """Return the sum over positions of the mean over heads of KL(teacher's relation || student's), in nats, a float32 scalar.

    Neither the `[T, T]` relations nor attention weights are ever whole in memory: a few queries' rows exist at a time. Padding
    counts nothing.

    Deviations: relations stay inside a document, and padding has none; the official code relates all positions to all, padding
    included, and bounds probabilities at 1e-8, where ours are computed from logarithms. It also divides by the number of heads and
    layers; that is the caller's weight.

    Args:
        student: queries, keys or values, `[B, H, T, D]`.
        teacher: the same of the teacher, `[B, H', T, D']`, on any device.
        document_ids: int64 `[B, T]`, 0 = padding.
        heads: number of relations.
        normalisation: see `relation_vectors`.
        causal: whether a position is related to earlier ones only.
        elements: of the scores of a piece.
    """
    ours = relation_vectors(student, heads, normalisation)
    theirs = relation_vectors(teacher.to(student.device), heads, normalisation)
    counted = (document_ids > 0).to(torch.float32)

    def piece(part: slice, vectors: Tensor) -> Tensor:
        mask = relation_mask(document_ids, part, causal)
        with torch.no_grad():
            target = (theirs[:, :, part] @ theirs.mT).masked_fill_(~mask, -torch.inf).log_softmax(-1)
        scores = (vectors[:, :, part] @ vectors.mT).masked_fill(~mask, -torch.inf).log_softmax(-1)
        # Where both are -inf their difference is no number: what is masked counts nothing.
        gap = target.masked_fill(~mask, 0.0) - scores.masked_fill(~mask, 0.0)
        rows = (target.exp() * gap).sum(-1).mean(1)  # [B, Q]
        return (rows * counted[:, part]).sum(0)[None]

    batch, _, time, _ = ours.shape
    slices = piece_rows(time, batch * heads * time, elements)
    return sum_of_pieces(piece, slices, torch.ones(1, device=ours.device), ours)[0]
