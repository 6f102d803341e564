"""Blocks of a packed row, and who attends to whom.

Rows hold several documents. Blocks are counted from each document's first token, as decoding counts them, so no block crosses a
document, and a document's last block may be short. Deviation from Fast-dLLM v2, which fills documents up with end tokens instead.
"""

import torch
from torch import Tensor


def block_numbers(position_ids: Tensor, document_ids: Tensor, block_size: int | None) -> Tensor:
    """Return which block of its row a position is in, counted from 0 along the row.

    Args:
        position_ids: int64 `[B, T]`, from 0 in each document.
        document_ids: int64 `[B, T]`, 0 = padding.
        block_size: D; None makes each document one block.

    Returns:
        int64 `[B, T]`.
    """
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    if block_size is not None:
        first |= (position_ids % block_size == 0) & (document_ids > 0)
    return first.long().cumsum(1) - 1


def block_ends(blocks: Tensor) -> Tensor:
    """Return for each position where its block ends (the index after its last), int64 `[B, T]`, of block numbers `[B, T]`."""
    length = blocks.shape[1]
    return torch.searchsorted(blocks.contiguous(), blocks.contiguous(), right=True).clamp(max=length)


def noisy_clean_mask(blocks: Tensor, document_ids: Tensor) -> Tensor:
    """Return the mask of the layout [noisy | clean] (BD3-LM, arXiv 2503.09573, section 3.1).

    A noisy token attends to its own noisy block and to the clean blocks before it; a clean one to its own clean block and those
    before it; nobody to another document. Padding attends to itself.

    Args:
        blocks: int64 `[B, T]`.
        document_ids: int64 `[B, T]`.

    Returns:
        bool `[B, 2T, 2T]`, indexed [batch, query, key].
    """
    query, key = blocks[:, :, None], blocks[:, None, :]
    together = _together(document_ids)
    same, before = together & (query == key), together & (query > key)
    itself = torch.eye(blocks.shape[1], dtype=torch.bool, device=blocks.device)
    noisy = torch.cat([same | itself, before], dim=2)
    clean = torch.cat([torch.zeros_like(same), same | before | itself], dim=2)
    return torch.cat([noisy, clean], dim=1)


def whole_mask(document_ids: Tensor) -> Tensor:
    """Return the mask of a model without blocks, bool `[B, T, T]`: everything in the same document; padding itself."""
    itself = torch.eye(document_ids.shape[1], dtype=torch.bool, device=document_ids.device)
    return _together(document_ids) | itself


def _together(document_ids: Tensor) -> Tensor:
    query, key = document_ids[:, :, None], document_ids[:, None, :]
    return (query == key) & (query > 0)
