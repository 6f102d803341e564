"""The 2-bit layout of Hugging Face `bitnet` checkpoints.

Four codes share a byte as t + 1 in {0, 1, 2}, strided by rows: with R = out / 4, byte (r, c) holds rows r, r + R, r + 2R
and r + 3R in bits 0-1, 2-3, 4-5 and 6-7.
"""

import torch
from torch import Tensor

from bitnet_arch.errors import UserError

CODES_PER_BYTE = 4


def pack_codes(codes: Tensor) -> Tensor:
    """Pack ternary codes, leaving the argument as it is.

    Args:
        codes: int8 `[out, in]` in {-1, 0, 1}; `out` divisible by 4.

    Returns:
        uint8 `[out / 4, in]`.

    Raises:
        UserError: if `out` is not divisible by 4 or a value is not a ternary code.
    """
    rows = codes.shape[0]
    if rows % CODES_PER_BYTE:
        raise UserError(f"a packed weight needs rows divisible by {CODES_PER_BYTE}, not {rows}: save the master form")
    if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) > 1):
        raise UserError("only codes in {-1, 0, 1} can be packed: quantise the weight first")
    planes = (codes + 1).to(torch.uint8).reshape(CODES_PER_BYTE, rows // CODES_PER_BYTE, *codes.shape[1:])
    return planes[0] | planes[1] << 2 | planes[2] << 4 | planes[3] << 6


def code_planes(packed: Tensor) -> list[Tensor]:
    """Return the int8 codes of a packed uint8 `[rows, in]` as four matrices `[rows, in]`, which follow each other.

    Nothing is checked: that would make a GPU wait. See `check_packed`.
    """
    return [(packed >> (2 * plane)).bitwise_and_(3).view(torch.int8).sub_(1) for plane in range(CODES_PER_BYTE)]


def check_packed(packed: Tensor) -> None:
    """Refuse packed codes that hold the unused bit pair 3.

    Raises:
        UserError: if there is one: the file is damaged or of another layout.
    """
    if (packed & (packed >> 1) & 0b01010101).any():
        raise UserError("a packed weight holds a code outside {-1, 0, 1}: the file is damaged or of another layout")


def unpack_codes(packed: Tensor) -> Tensor:
    """Return int8 codes `[4 * rows, in]` of a packed uint8 `[rows, in]`.

    Raises:
        UserError: if a byte holds the unused bit pair 3, which means the file is damaged or of another layout.
    """
    check_packed(packed)
    return torch.cat(code_planes(packed))
