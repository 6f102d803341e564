"""Where documents come from: one module a family of sources, one `Reader` each."""

from collections.abc import Callable, Iterator

from data_handler.config import SourceConfig
from data_handler.sources.files import JsonlReader, ParquetReader, TextReader
from data_handler.sources.hub import HubReader
from data_handler.sources.package import PackageReader
from data_handler.sources.reader import Reader, Record, Shard
from data_handler.sources.stdlib import CodeReader, ProseReader

READERS: dict[str, Callable[[SourceConfig], Reader]] = {
    "stdlib_code": CodeReader,
    "stdlib_prose": ProseReader,
    "text": TextReader,
    "jsonl": JsonlReader,
    "parquet": ParquetReader,
    "hub": HubReader,
    "package": PackageReader,
}

__all__ = ["READERS", "Reader", "Record", "Shard", "documents", "open_source", "records"]


def open_source(source: SourceConfig) -> Reader:
    """Return the reader of a source; nothing is read yet."""
    return READERS[source.kind](source)


def records(source: SourceConfig) -> Iterator[Record]:
    """Yield a source's documents, always in the same order; documents of white space only are left out.

    Raises:
        UserError: if the source cannot be read, or a column is missing.
    """
    reader = open_source(source)
    for shard in range(len(reader.shards())):
        for _, record in reader.read(shard):
            yield record


def documents(source: SourceConfig) -> Iterator[str]:
    """Yield the text of `records`; of a conversation, `ROLE: CONTENT` lines.

    Raises:
        UserError: as `records`.
    """
    return (record.text for record in records(source))
