"""Data sets of the hub, streamed; a local folder of Parquet or JSONL files goes the same way."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]

from data_handler.config import SourceConfig
from data_handler.errors import UserError
from data_handler.sources.files import ends_early, parquet_records
from data_handler.sources.reader import Record, Shard, missing_column, record_of

BATCH_ROWS = 1024


class HubReader:
    """A data set of the hub, or a folder in the hub's form; a position counts rows of one of its shards.

    The shards of a Parquet data set are its files, of which the wanted columns are read from the position's row group on. Other
    formats are read through `datasets`, which has to pass over the rows before a position, as Arrow tables.
    """

    def __init__(self, source: SourceConfig) -> None:
        self.source = source
        self._stream: Any = None
        self._tables: list[str] = []

    def shards(self) -> Sequence[Shard]:
        """Return the data set's own shards.

        Raises:
            UserError: if it cannot be opened, or lacks a column.
        """
        name = str(self.source.dataset)
        return [Shard(f"{name}, shard {i}", 1, "") for i in range(self._opened().num_shards)]

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, Record]]:
        """Yield the rows of a shard (see `Reader.read`)."""
        stream, at = self._opened(), start
        where = f"{self.source.dataset}, shard {shard}"
        rows = self._parquet if self._tables else partial(self._other, stream)
        try:
            for at, record in rows(shard, where, start):
                yield at, record
        except UserError:
            raise
        except Exception as error:  # every transport and builder has its own types; the reason is passed on
            raise UserError(
                f"source {self.source.name}: {where} cannot be read after row {at} ({_reason(error)}): "
                "check the network or replace the file, and resume"
            ) from None

    def _parquet(self, shard: int, where: str, start: int) -> Iterator[tuple[int, Record]]:
        with fsspec.open(self._tables[shard]) as file:
            yield from parquet_records(file, self.source, where, start)

    def _other(self, stream: Any, shard: int, where: str, start: int) -> Iterator[tuple[int, Record]]:
        if stream.num_shards > 1:
            stream = stream.shard(num_shards=stream.num_shards, index=shard)
        at = 0
        for table in stream.with_format("arrow").iter(BATCH_ROWS):
            kept = table.slice(max(0, start - at))
            at += len(table) - len(kept)
            for row in kept.to_pylist():
                at += 1
                record = record_of(row, self.source, partial("{}, row {}".format, where, at))
                if record is not None:
                    yield at, record
        if at < start:
            raise ends_early(self.source, where, at, start, "rows")

    def prefix(self, shard: int, position: int) -> str | None:
        """Return None: nothing is known of a part of a shard."""
        del shard, position
        return None

    def _opened(self) -> Any:
        if self._stream is not None:
            return self._stream
        import datasets  # seconds to load, wanted by this source only
        from datasets.packaged_modules.parquet.parquet import Parquet

        source, name = self.source, str(self.source.dataset)
        folder = Path(name).expanduser()
        where = str(folder) if folder.is_dir() else name
        try:
            builder = datasets.load_dataset_builder(where, source.subset)
            stream = builder.as_streaming_dataset(split=source.split)
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
        if isinstance(builder, Parquet):
            self._tables = [str(file) for file in builder.config.data_files[source.split]]
        self._stream = stream
        return stream


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
