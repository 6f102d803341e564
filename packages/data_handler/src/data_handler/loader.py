"""Batches for one rank, made here or in worker processes, resumable to the batch."""

import os
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from data_handler.batch import collate, padding_row
from data_handler.errors import UserError
from data_handler.mixing import Weights
from data_handler.packing import Gathered, expand, gather, row_tensors, tensors
from data_handler.stream import PackedStream

PREFETCH = 2
"""Steps that every worker is ahead."""
REMEMBERED = 256
CHANGES = 4096
"""Changes of the weights that running workers can be told of before they are started anew."""

Lanes = dict[int, dict[str, Any]]


class BatchLoader:
    """An iterable of batches for one rank of a data-parallel run.

    Batch s consists of rows [s * rows_per_step, (s + 1) * rows_per_step) of the stream, of which rank r takes its
    contiguous slice: the global batch is the same for every world size and every number of workers. The last batch of a stream that
    ends is filled up with rows of padding (no labels), so that all ranks take equally many steps of one shape.

    Position is counted in rows handed out. An endless stream goes on from there whenever it is iterated, also after an error; a
    stream that ends starts over, unless a state was loaded. A consumer that fetches ahead is ahead of what it has used, and asks
    for the state of an earlier row.
    """

    def __init__(
        self, stream: PackedStream, *, rows_per_step: int, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> None:
        """Prepare a loader at row 0.

        Args:
            stream: the rows.
            rows_per_step: rows of the global batch, over all ranks.
            rank: this process, from 0.
            world_size: number of processes.
            num_workers: processes that make this rank's batches; 0 makes them here.

        Raises:
            UserError: if the numbers do not fit together.
        """
        if world_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"rank must be from 0 to world_size - 1, not {rank} with world_size {world_size}")
        if rows_per_step < 1 or rows_per_step % world_size:
            raise UserError(
                f"rows_per_step must be a positive multiple of world_size {world_size}, not {rows_per_step}: change one of them"
            )
        if num_workers < 0 or (num_workers and not stream.endless):
            raise UserError(f"num_workers must be at least 0, and 0 for the few rows of the held-out split, not {num_workers}")
        self.stream = stream
        self.rows_per_step = rows_per_step
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.weights = stream.weights()
        self._rows = 0
        self._loaded = False
        self._lanes: Lanes | None = {}  # None: where the lanes are at this row has yet to be found out
        self._past: deque[tuple[int, Lanes | None]] = deque([(0, {})], REMEMBERED)
        self._shared: _Changes | None = None
        self._stale = False

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's batches, from the loader's position on (read when the first batch is asked for).

        Raises:
            UserError: if a source cannot be read, or a worker died; iterating again goes on behind the last batch handed out.
        """
        if not self.stream.endless:
            yield from self._heldout()
            return
        self._loaded = False
        while True:
            self._stale = False
            with closing(self._parts()) as made:  # workers end before others start
                for batch, lanes in made:
                    self._rows += self.rows_per_step
                    self._lanes = {**(self._lanes or {}), **lanes}
                    self._past.append((self._rows, self._lanes))
                    yield batch
                    if self._stale:
                        break

    @property
    def next_step(self) -> int:
        """The first step that has not been handed out."""
        return self._rows // self.rows_per_step

    def set_weights(self, shares: Mapping[str, float], step: int | None = None) -> None:
        """Let the sources' shares of the tokens be others from a step on; a later change that was set before is dropped.

        Every worker follows: batches that were made ahead with other weights are dropped and made anew.

        Args:
            shares: of every source, summing to 1.
            step: not handed out yet; None takes the next.

        Raises:
            UserError: if the shares are none, or the step has been handed out.
        """
        step = self.next_step if step is None else step
        row = step * self.rows_per_step
        if row < self._rows:
            raise UserError(f"the weights cannot change at step {step}, which was handed out: the next is {self.next_step}")
        self.weights.set(row, shares)
        if self._shared is not None:
            ahead = self._rows + (PREFETCH + 1) * self.rows_per_step  # what workers may have begun
            self._stale |= row < ahead or not self._shared.add(row, self.weights.entries[-1][1])

    def upcoming(self, domain: int, count: int) -> list[dict[str, Tensor]]:
        """Return the rows that a source would give next, whatever its weight, without moving on.

        With several lanes they are those of the first one that this rank follows, which is lane 0 for rank 0.

        Args:
            domain: index of the source.
            count: how many.

        Returns:
            Rows as `PackedStream.rows` has them.

        Raises:
            UserError: if the source cannot be read.
        """
        self.stream.open()
        states = self._lanes or {}
        number = min(states, default=0)
        source = self.stream.lane(number, self.weights, states.get(number)).sources[domain]
        length, padding = self.stream.config.sequence_length, self.stream.padding
        return [row_tensors(source.next(), length, domain, padding) for _ in range(count)]

    def state_dict(self, rows: int | None = None) -> dict[str, Any]:
        """Return what goes on behind the last batch, as plain values of a few hundred bytes a lane.

        Args:
            rows: return the state at this row instead: of a batch that was handed out lately.

        Returns:
            `rows` handed out over all ranks, `tokens` of each source in them, the `weights` from there on, and the `lanes`. One of
            several ranks knows the lanes that it reads: `merge_states` joins those of all.

        Raises:
            UserError: if it is not known any more.
        """
        if not self.stream.endless:
            return {"rows": self._rows}
        rows = self._rows if rows is None else rows
        lanes = next((lanes for at, lanes in reversed(self._past) if at == rows), None)
        if lanes is None:
            if rows == self._rows:
                return {"rows": rows}
            raise UserError(f"the loader's state at row {rows} is not known (any more): ask for that of one of the last batches")
        counted = [lane["tokens"] for lane in lanes.values()]
        tokens = [sum(column) for column in zip(*counted, strict=True)] if counted else [0] * len(self.stream.domains)
        return {
            "rows": rows,
            "tokens": dict(zip(self.stream.domains, tokens, strict=True)),
            "weights": self.weights.state(rows),
            "lanes": {str(lane): state for lane, state in sorted(lanes.items())},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the state's last batch; it may come from another number of ranks or workers.

        A state of `rows` alone is taken too: the order up to there is then made again, with the configured weights.

        Raises:
            UserError: if it is no state of this loader's stream, or lacks lanes that other ranks know.
        """
        rows = state.get("rows")
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 0:
            raise UserError(
                f"the loader's state must be {{'rows': N}} with N of at least 0, not {dict(state)!r}: resume from another"
            )
        lanes: Lanes | None = {} if rows == 0 else None
        weights = self.stream.weights()
        if "lanes" in state:
            lanes = {int(number): dict(lane) for number, lane in state["lanes"].items()}
            self._check(lanes, rows)
            weights = Weights.from_state(self.stream.domains, state["weights"])
        self._rows, self._lanes, self._loaded = rows, lanes, True
        self.weights = weights
        self._past = deque([(rows, lanes)], REMEMBERED)
        self._stale = True

    def _check(self, lanes: Lanes, rows: int) -> None:
        count = self.stream.config.lanes
        if any(number >= count for number in lanes):
            raise UserError(
                f"the loader's state has lane {max(lanes)}, and the data {count} lanes: resume with the lanes it was made with"
            )
        for number in range(count):
            expected = lane_rows(rows, number, count)
            known = lanes.get(number, {"rows": 0})["rows"]
            if known != expected:
                raise UserError(
                    f"the loader's state knows lane {number} at row {known}, not {expected}: join all ranks' states by merge_states"
                )
            if number in lanes and len(lanes[number]["sources"]) != len(self.stream.domains):
                raise UserError("the loader's state has another number of sources: resume with the sources it was made with")

    def _heldout(self) -> Iterator[dict[str, Tensor]]:
        if not self._loaded:
            self._rows = 0
        self._loaded = False
        rows = self.stream.rows(self._rows)
        share = self.rows_per_step // self.world_size
        first = self.rank * share
        while batch := list(islice(rows, self.rows_per_step)):
            batch += [padding_row(batch[0])] * (self.rows_per_step - len(batch))
            self._rows += self.rows_per_step
            yield collate(batch[first : first + share])

    def _parts(self) -> Generator[tuple[dict[str, Tensor], Lanes], None, None]:
        """Yield (batch, states of the lanes that it moved) from the position on, until an error or the end of all wishes."""
        self.stream.open()
        plan = _Plan(self.stream, self.rows_per_step, self.rank, self.world_size, max(1, self.num_workers))
        if not self.num_workers:
            for part in plan.parts(0, self._rows, self._lanes, self.weights):
                yield tensors(expand(part.rows), part.domains), part.lanes
            return
        self._shared = _Changes(self.weights, self._rows)
        dataset = _Parts(plan, self._rows, self._lanes, self._shared)
        workers = DataLoader(
            dataset,
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=PREFETCH,
            collate_fn=_as_is,
            multiprocessing_context="fork",
        )
        received = iter(workers)
        try:
            while True:
                yield self._receive(received)
        finally:
            self._shared = None
            # Now, not when the iterator is collected: an error's traceback can hold it until long after others were started.
            received._shutdown_workers()  # type: ignore[attr-defined]

    def _receive(self, received: Iterator[Any]) -> tuple[dict[str, Tensor], Lanes]:
        """Return the workers' parts of a step as a batch, and the states of their lanes."""
        try:
            parts = [next(received) for _ in range(self.num_workers)]
            mistake = next((part for part in parts if isinstance(part, str)), None)
            if mistake is None:
                return _joined(parts), {number: state for part in parts for number, state in part.lanes.items()}
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = str(error).splitlines()[0].rstrip(". ")
            raise UserError(
                f"a data worker of rank {self.rank} died while rows {self._rows} to {self._rows + self.rows_per_step} were made "
                f"({reason}): go on from the loader's state, nothing that was handed out comes again"
            ) from None
        raise UserError(mistake)


def lane_rows(rows: int, lane: int, lanes: int) -> int:
    """Return how many of the stream's first `rows` rows a lane gives."""
    return max(0, -(-(rows - lane) // lanes))


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the states that all ranks have at one row into the state of the whole loader.

    Raises:
        UserError: if they are not of the same row.
    """
    first = states[0]
    if any(state["rows"] != first["rows"] for state in states):
        raise UserError(
            f"states of different rows ({', '.join(str(s['rows']) for s in states)}) cannot be joined: take them at one step"
        )
    if "lanes" not in first:
        return dict(first)
    lanes: dict[str, Any] = {}
    for state in states:
        for number, lane in state["lanes"].items():
            if number not in lanes or lanes[number]["rows"] < lane["rows"]:
                lanes[number] = lane
    tokens = [[lane["tokens"][i] for lane in lanes.values()] for i in range(len(first["tokens"]))]
    total = {name: sum(column) for name, column in zip(first["tokens"], tokens, strict=True)}
    return {**first, "tokens": total, "lanes": {number: lanes[number] for number in sorted(lanes, key=int)}}


class _Part:
    """One worker's share of a step: its rows, their places in the rank's slice, and the lanes behind it."""

    def __init__(self, rows: Gathered, domains: list[int], places: list[int], lanes: Lanes) -> None:
        self.rows, self.domains, self.places, self.lanes = rows, domains, places, lanes


class _Plan:
    """Who makes which rows: with one lane, workers share a step's rows; with several, each has lanes of its own."""

    def __init__(self, stream: PackedStream, rows_per_step: int, rank: int, world_size: int, workers: int) -> None:
        self.stream, self.rows_per_step, self.workers = stream, rows_per_step, workers
        self.share = rows_per_step // world_size
        self.first = rank * self.share
        self.lanes = stream.config.lanes

    def own(self, worker: int) -> list[int]:
        """Return the lanes that a worker has to follow: those that any of its rows can come from."""
        if self.lanes == 1:
            return [0]
        reached = range(self.lanes)
        if self.rows_per_step % self.lanes == 0 and self.share < self.lanes:  # the same in every step
            reached = sorted({(self.first + i) % self.lanes for i in range(self.share)})  # type: ignore[assignment]
        return [lane for lane in reached if lane % self.workers == worker]

    def parts(self, worker: int, row: int, states: Lanes | None, weights: Weights) -> Iterator[_Part]:
        """Yield a worker's part of every step from a row on.

        Args:
            worker: which.
            row: where the first step begins.
            states: of the lanes there; None makes the order up to there again.
            weights: followed as they change.
        """
        numbers = self.own(worker)
        lanes = {n: self.stream.lane(n, weights, (states or {}).get(n)) for n in numbers}
        if states is None:
            for number, lane in lanes.items():
                for _ in range(lane_rows(row, number, self.lanes)):
                    lane.next()
        length, padding = self.stream.config.sequence_length, self.stream.padding
        while True:
            rows, domains, places = [], [], []
            for at in range(row, row + self.rows_per_step):
                if at % self.lanes not in lanes:
                    continue
                domain, planned = lanes[at % self.lanes].next()
                place = at - row - self.first
                if 0 <= place < self.share and (self.lanes > 1 or place * self.workers // self.share == worker):
                    rows.append(planned)
                    domains.append(domain)
                    places.append(place)
            yield _Part(gather(rows, length, padding), domains, places, {number: lane.state() for number, lane in lanes.items()})
            row += self.rows_per_step


class _Parts(IterableDataset[Any]):
    """What a worker process iterates: its parts, or the message of a user's mistake."""

    def __init__(self, plan: _Plan, row: int, states: Lanes | None, changes: "_Changes") -> None:
        self.plan, self.row, self.states, self.changes = plan, row, states, changes

    def __iter__(self) -> Iterator[Any]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its thread pool did not survive the fork
        information = torch.utils.data.get_worker_info()
        assert information is not None
        try:
            # Arrays, in the pipe: a tensor would come through a file of its own, at a connection a batch.
            yield from self.plan.parts(information.id, self.row, self.states, _Followed(self.changes))
        except UserError as error:
            while True:
                yield str(error)


class _Changes:
    """The weights that running workers follow: in shared memory, written by the loader only."""

    def __init__(self, weights: Weights, row: int) -> None:
        coming = weights.state(row)["entries"]
        self.names, self.room = weights.names, len(coming) + CHANGES
        self.table = torch.zeros(self.room, 1 + len(weights.names), dtype=torch.float64).share_memory_()
        self.count = torch.zeros(1, dtype=torch.int64).share_memory_()
        for start, *shares in coming:
            self.add(start, tuple(shares))

    def add(self, row: int, shares: tuple[float, ...]) -> bool:
        """Append an entry; return False if there is no room."""
        count = int(self.count)
        if count == self.room:
            return False
        self.table[count] = torch.tensor([row, *shares], dtype=torch.float64)
        self.count += 1  # last: a worker that sees it sees the entry
        return True


class _Followed(Weights):
    """A worker's view of `_Changes`."""

    def __init__(self, changes: _Changes) -> None:
        super().__init__(changes.names, [])
        self._changes, self._seen = changes, 0

    def at(self, row: int) -> tuple[int, tuple[float, ...]]:
        """Return the entry for a row, after taking in what has been appended; an entry replaces those for later rows."""
        count = int(self._changes.count)
        for index in range(self._seen, count):
            start, *shares = self._changes.table[index].tolist()
            self.entries[:] = [entry for entry in self.entries if entry[0] < start] + [(int(start), tuple(shares))]
        self._seen = count
        return super().at(row)


def _joined(parts: Sequence[_Part]) -> dict[str, Tensor]:
    """Return the workers' parts as a batch, rows in order."""
    filled = [expand(part.rows) for part in parts]
    whole = filled[0] if len(parts) == 1 else np.concatenate(filled, axis=1)
    domains = [domain for part in parts for domain in part.domains]
    places = [place for part in parts for place in part.places]
    if places != sorted(places):
        order = sorted(range(len(places)), key=places.__getitem__)
        whole, domains = whole[:, order], [domains[i] for i in order]
    return tensors(whole, domains)


def _as_is(part: Any) -> Any:
    return part
