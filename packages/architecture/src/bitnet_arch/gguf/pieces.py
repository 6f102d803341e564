"""A file's tensors encoded piece by piece: an embedding need not be whole in memory."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from bitnet_arch.gguf.plan import TensorPlan, encode
from bitnet_arch.shards import TensorSpec, row_pieces
from bitnet_arch.weights import WeightReader


class _Rows:
    """A directory of which every tensor has some of its rows only."""

    def __init__(self, reader: WeightReader, rows: slice) -> None:
        self._reader, self._rows = reader, rows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def get(self, name: str) -> Tensor:
        return self._reader.get(name, self._rows)


def encoded_pieces(reader: WeightReader, plan: TensorPlan) -> Iterator[tuple[slice | None, NDArray[Any]]]:
    """Yield a tensor's data as the file holds it, in order: some rows of a float matrix at a time, everything else whole.

    Args:
        reader: the opened model directory.
        plan: the tensor.

    Yields:
        The rows (None for all) and what `bitnet_arch.gguf.plan.encode` makes of them.

    Raises:
        UserError: if a value or a scale cannot be held.
    """
    if plan.part != "float" or len(plan.shape) != 2 or plan.heads:  # whose rows are not in the order of the file's
        yield None, encode(reader, plan)
        return
    for rows in row_pieces(TensorSpec(reader.spec(plan.source).dtype, plan.shape)):
        shape = (rows.stop - rows.start, plan.shape[1])
        yield rows, encode(_Rows(reader, rows), replace(plan, shape=shape))  # type: ignore[arg-type]
