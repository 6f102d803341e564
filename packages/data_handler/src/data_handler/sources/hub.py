"""Data sets of the hub, streamed; a local folder of Parquet or JSONL files goes the same way."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_handler.config import SourceConfig
from data_handler.errors import UserError
from data_handler.sources.files import ends_early
from data_handler.sources.reader import Record, Shard, missing_column, record_of

GROUP = 1 << 32
"""A position is (row group of the shard) * GROUP + (rows of it before); a shard without row groups is one group."""
BATCH_ROWS = 1024


class HubReader:
    """A data set as `datasets` streams it.

    A shard is entered at its row group where it has any (Parquet): nothing before that is read. In the group rows are passed over
    as Arrow tables, without making Python values of them. A shard of another format is one group.
    """

    def __init__(self, source: SourceConfig) -> None:
        self.source = source
        self._stream: Any = None

    def shards(self) -> Sequence[Shard]:
        """Return the data set's own shards.

        Raises:
            UserError: if it cannot be opened, or lacks a column.
        """
        name = str(self.source.dataset)
        return [Shard(f"{name}, shard {i}", 1, "") for i in range(self._opened().num_shards)]

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, Record]]:
        """Yield the rows of a shard (see `Reader.read`)."""
        stream, (first, skipped) = self._opened(), divmod(start, GROUP)
        where = f"{self.source.dataset}, shard {shard}"
        if stream.num_shards > 1:
            stream = stream.shard(num_shards=stream.num_shards, index=shard)
        groups = self._guarded(stream.reshard, where)
        count = groups.num_shards
        for group in range(first, count):
            place, rows, at = where, groups, 0
            if count > 1:
                place, rows = f"{where}, row group {group}", groups.shard(num_shards=count, index=group)
            tables = rows.with_format("arrow").iter(BATCH_ROWS)
            while (table := self._guarded(partial(next, tables, None), place, at)) is not None:
                kept = table.slice(max(0, skipped - at))
                at += len(table) - len(kept)
                for row in kept.to_pylist():
                    at += 1
                    record = record_of(row, self.source, partial("{}, row {}".format, place, at))
                    if record is not None:
                        yield group * GROUP + at, record
            if at < skipped:
                raise ends_early(self.source, place, at, skipped, "rows")
            skipped = 0
        if first >= count and start:
            raise ends_early(self.source, where, count, first, "row groups")

    def prefix(self, shard: int, position: int) -> str | None:
        """Return None: nothing is known of a part of a shard."""
        del shard, position
        return None

    def _guarded(self, get: Callable[[], Any], where: str, at: int = 0) -> Any:
        try:
            return get()
        except Exception as error:  # every transport and builder has its own types; the reason is passed on
            raise UserError(
                f"source {self.source.name}: {where} cannot be read after row {at} ({_reason(error)}): "
                "check the network or replace the file, and resume"
            ) from None

    def _opened(self) -> Any:
        if self._stream is not None:
            return self._stream
        import datasets  # seconds to load, wanted by this source only

        source, name = self.source, str(self.source.dataset)
        folder = Path(name).expanduser()
        where = str(folder) if folder.is_dir() else name
        try:
            stream = datasets.load_dataset(where, source.subset, split=source.split, streaming=True)
            first = next(iter(stream), None)
        except StopIteration:  # what `datasets` raises where there is nothing to guess the columns from
            raise UserError(f"source {source.name}: the data set {name} is empty: give one with rows") from None
        except Exception as error:  # as above
            raise UserError(
                f"source {source.name}: the data set {name} could not be opened ({_reason(error)}): check its name, subset and "
                "split and the network, or set dataset to a local folder with its Parquet or JSONL files"
            ) from None
        for column in source.columns:
            if first is not None and column not in first:
                raise missing_column(source, name, list(first), column)
        self._stream = stream
        return stream


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
