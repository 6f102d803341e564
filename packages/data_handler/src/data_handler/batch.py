"""Rows into batches, and the mask that keeps attention inside a document."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data_handler.packing import IGNORED


def collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack rows into a batch.

    Args:
        rows: at least one row of `PackedStream.rows`.

    Returns:
        `input_ids`, `labels`, `position_ids`, `document_ids`, int64 [B, T] each, and `domain`, int64 [B].
    """
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def document_attention_mask(document_ids: Tensor) -> Tensor:
    """Return who may attend to whom: earlier positions of the same document, and itself.

    Padding (document 0) attends to itself alone, so that no row of a softmax is empty. The mask suits
    `scaled_dot_product_attention` (`attn_implementation="sdpa"`); eager attention adds its mask and needs a float one.

    Args:
        document_ids: int64 [B, T], 0 = padding.

    Returns:
        bool [B, 1, T, T], indexed [batch, 0, query, key], True = may attend.
    """
    length = document_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=document_ids.device)
    query, key = document_ids[:, None, :, None], document_ids[:, None, None, :]
    return ((query == key) & (query > 0) & causal) | itself


def padding_row(like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a row of padding only, of another row's shape: no document, no label."""
    return {name: torch.full_like(value, IGNORED if name == "labels" else 0) for name, value in like.items()}
