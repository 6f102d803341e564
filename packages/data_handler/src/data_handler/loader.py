"""Batches for one rank, resumable to the batch."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

from torch import Tensor

from data_handler.batch import collate, padding_row
from data_handler.errors import UserError


class RowStream(Protocol):
    """What a loader needs: `PackedStream` has it."""

    endless: bool

    def rows(self, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """Yield rows from number `start` on."""
        ...


class BatchLoader:
    """An iterable of batches for one rank of a data-parallel run.

    Batch s consists of rows [s * rows_per_step, (s + 1) * rows_per_step) of the stream, of which rank r takes its
    contiguous slice: the global batch is the same for every world size. The last batch of a stream that ends is filled
    up with rows of padding (no labels), so that all ranks take equally many steps of one shape.

    Position is counted in rows handed out. An endless stream goes on from there whenever it is iterated; a stream that
    ends starts over, unless a state was loaded. A consumer that fetches ahead is ahead in the state, too.
    """

    def __init__(self, stream: RowStream, *, rows_per_step: int, rank: int = 0, world_size: int = 1) -> None:
        """Prepare a loader at row 0.

        Args:
            stream: a `PackedStream`.
            rows_per_step: rows of the global batch, over all ranks.
            rank: this process, from 0.
            world_size: number of processes.

        Raises:
            UserError: if the numbers do not fit together.
        """
        if world_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"rank must be from 0 to world_size - 1, not {rank} with world_size {world_size}")
        if rows_per_step < 1 or rows_per_step % world_size:
            raise UserError(
                f"rows_per_step must be a positive multiple of world_size {world_size}, not {rows_per_step}: change one of them"
            )
        self.stream = stream
        self.rows_per_step = rows_per_step
        self.rank = rank
        self.world_size = world_size
        self._rows = 0
        self._loaded = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's batches, from the loader's position on (read when the first batch is asked for)."""
        if not self.stream.endless and not self._loaded:
            self._rows = 0
        self._loaded = False
        rows = self.stream.rows(self._rows)
        share = self.rows_per_step // self.world_size
        first = self.rank * share
        while batch := list(islice(rows, self.rows_per_step)):
            batch += [padding_row(batch[0])] * (self.rows_per_step - len(batch))
            self._rows += self.rows_per_step
            yield collate(batch[first : first + share])

    def state_dict(self) -> dict[str, int]:
        """Return `{"rows": n}`: rows of the stream handed out so far, over all ranks."""
        return {"rows": self._rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the state's last batch; it may come from another rank or world size.

        Raises:
            UserError: if it is no loader's state.
        """
        rows = state.get("rows")
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 0:
            raise UserError(
                f"the loader's state must be {{'rows': N}} with N of at least 0, not {dict(state)!r}: resume from another"
            )
        self._rows = rows
        self._loaded = True
