"""Find the codes and scales of a matrix in a file, whatever type holds them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_arch.errors import UserError
from bitnet_arch.gguf.reader import GgufFile
from bitnet_arch.gguf.types import BY_ID, I2_S, Codes
from bitnet_arch.quant import EPS, GROUP, Granularity

Scales = NDArray[np.float32]


@dataclass(frozen=True)
class TernaryMatrix:
    """A matrix of a file.

    Attributes:
        codes: int8 `[rows, columns]` in {-1, 0, 1}.
        groups: the scale of every group of 128 columns, float32 `[rows, ceil(columns / 128)]`, or of coarser ones `[rows or 1, 1]`.
            Groups without a code other than 0 have any.
        granularity: the coarsest that says the same.
    """

    codes: Codes
    groups: Scales
    granularity: Granularity

    def reordered(self, order: Callable[[NDArray[Any]], NDArray[Any]]) -> "TernaryMatrix":
        """Return the matrix with its rows in another order."""
        groups = order(self.groups) if len(self.groups) == len(self.codes) else self.groups
        return TernaryMatrix(order(self.codes), groups, self.granularity)

    def scales(self, granularity: Granularity) -> Scales:
        """Return scales in the shape of `bitnet_arch.quant.absmean_scale`, at least as fine as `self.granularity`."""
        rows, columns = self.codes.shape
        if granularity == "tensor":
            return self.groups.reshape(())
        shape = (rows, 1 if granularity == "row" else -(-columns // GROUP))
        return np.array(np.broadcast_to(self.groups, shape))


def find_ternary(file: GgufFile, name: str) -> TernaryMatrix:
    """Return a matrix's codes and scales.

    Args:
        file: the file.
        name: a matrix of a ternary type, or of any other type whose values are ternary; a tensor `.scale` beside it multiplies.

    Raises:
        UserError: if it holds other codes or scales than a ternary layer can have.
    """
    info = file.tensors[name]
    if info.ggml_id in BY_ID or info.ggml_id == I2_S:
        codes, scales = file.ternary(name)
        if codes.max() > 1:
            raise UserError(f"{name} holds a code outside -1, 0 and 1")
    else:
        codes, scales = _split_values(file.dequantize(name), name)
    rows, columns = codes.shape
    own_scale = name.removesuffix("weight") + "scale"
    if own_scale in file.tensors:
        extra = file.dequantize(own_scale)
        extra = extra.reshape(1, 1) if extra.size == 1 else extra
        if extra.shape not in ((1, 1), (rows, 1), (rows, -(-columns // GROUP))):
            raise UserError(f"{own_scale} is {list(extra.shape)}, which does not fit a matrix of {[rows, columns]}")
        with np.errstate(all="ignore"):
            scales = _to_groups(scales, codes, name) * extra
    if not np.isfinite(scales).all():
        raise UserError(f"{name} has scales that are no numbers")
    return _coarsest(codes, _to_groups(scales, codes, name))


def _split_values(values: NDArray[np.float32], name: str) -> tuple[Codes, Scales]:
    """Split a float matrix into codes and a scale for each 128 columns."""
    rows, columns = values.shape
    groups = -(-columns // GROUP)
    magnitude = np.abs(values)
    largest = _by_group(magnitude, groups).max(axis=2)
    wide = np.repeat(largest, GROUP, axis=1)[:, :columns]
    if not np.array_equal(magnitude, np.where(values != 0, wide, 0)):
        raise UserError(f"{name} is not ternary: its weights have more than one magnitude among 128 neighbours")
    assert largest.shape == (rows, groups)
    return np.sign(values).astype(np.int8), largest


def _by_group(values: NDArray[Any], groups: int) -> NDArray[Any]:
    padded = np.pad(values, ((0, 0), (0, groups * GROUP - values.shape[1])))
    return padded.reshape(len(values), groups, GROUP)


def _to_groups(scales: Scales, codes: Codes, name: str) -> Scales:
    """Bring scales of blocks `[rows, blocks]` to groups of 128 columns; scales of whole rows or the tensor stay as they are."""
    rows, columns = codes.shape
    groups = -(-columns // GROUP)
    if scales.shape[1] in (1, groups):
        return scales
    block = columns // scales.shape[1]
    if block % GROUP == 0:
        return np.repeat(scales, block // GROUP, axis=1)
    live = codes.reshape(rows, -1, block).any(axis=2)
    per_group = GROUP // block
    pad = ((0, 0), (0, groups * per_group - scales.shape[1]))
    parts, alive = (np.pad(a, pad).reshape(rows, groups, per_group) for a in (scales, live))
    chosen = np.take_along_axis(parts, alive.argmax(axis=2)[..., None], axis=2)
    if np.any(alive & (parts != chosen)):
        raise UserError(f"{name} has scales for every {block} weights that differ among 128 neighbours, which no layer here has")
    return np.ascontiguousarray(chosen[..., 0])


def _coarsest(codes: Codes, scales: Scales) -> TernaryMatrix:
    """Return the matrix with as few scales as say the same: what scales a group of zeros has says nothing."""
    rows, columns = codes.shape
    groups = -(-columns // GROUP)
    live = _by_group(codes != 0, groups).any(axis=2)
    wide = np.broadcast_to(scales, (rows, groups))
    wide = np.where(live, wide, np.nan)
    if not live.any():
        return TernaryMatrix(codes, np.full((1, 1), EPS, np.float32), "tensor")
    one = wide[live][0]
    if np.array_equal(wide[live], np.full(int(live.sum()), one)):
        return TernaryMatrix(codes, np.full((1, 1), one, np.float32), "tensor")
    first = np.take_along_axis(wide, live.argmax(axis=1)[:, None], axis=1)
    filled = np.where(np.isnan(first), np.float32(EPS), first).astype(np.float32)
    if not np.any(live & (wide != first)):
        return TernaryMatrix(codes, filled, "row")
    return TernaryMatrix(codes, np.where(live, wide, filled).astype(np.float32), "group128")
