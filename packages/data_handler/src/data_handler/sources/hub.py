"""Data sets of the hub, streamed; a local folder of Parquet or JSONL files goes the same way."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_handler.config import SourceConfig
from data_handler.errors import UserError
from data_handler.sources.reader import Record, Shard, missing_column, record_of


class HubReader:
    """A data set as `datasets` streams it; a position counts rows of one of its shards."""

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
        """Yield the rows of a shard (see `Reader.read`); rows before `start` are read and thrown away."""
        stream, at = self._opened(), start
        where = f"{self.source.dataset}, shard {shard}"
        if stream.num_shards > 1:
            stream = stream.shard(num_shards=stream.num_shards, index=shard)
        rows = iter(stream.skip(start) if start else stream)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # every transport and builder has its own types; the reason is passed on
                raise UserError(
                    f"source {self.source.name}: {where} cannot be read after row {at} ({_reason(error)}): "
                    "check the network or replace the file, and resume"
                ) from None
            if row is None:
                return
            at += 1
            record = record_of(row, self.source, partial("{}, row {}".format, where, at))
            if record is not None:
                yield at, record

    def prefix(self, shard: int, position: int) -> str | None:
        """Return None: nothing is known of a part of a shard."""
        del shard, position
        return None

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
