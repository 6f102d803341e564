"""Documents in local files: plain text, JSON lines (also gzip and zstd) and Parquet."""

import glob
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from data_handler.config import SourceConfig
from data_handler.errors import UserError
from data_handler.sources.reader import Record, Shard, missing_column, record_of

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSONL_SUFFIXES = tuple(f"{name}{compressed}" for name in (".jsonl", ".ndjson") for compressed in ("", ".gz", ".zst"))
PARQUET_SUFFIXES = (".parquet",)
COMPRESSED = (".gz", ".zst")
DOCUMENT_CHARACTERS = 16_384
"""A longer text file is cut into documents of at most this many characters, where a paragraph ends if it can be."""
SKIP_BYTES = 1 << 22
PARQUET_ROWS = 1024


class FileReader:
    """What the readers of local files share: a file is a shard, and its size and time of change are its stamp."""

    suffixes: tuple[str, ...]

    def __init__(self, source: SourceConfig) -> None:
        self.source = source
        self._paths: list[Path] | None = None

    def paths(self) -> list[Path]:
        """Return the source's files, sorted."""
        if self._paths is None:
            self._paths = find_files(self.source, self.suffixes)
        return self._paths

    def shards(self) -> Sequence[Shard]:
        """Return one shard a file.

        Raises:
            UserError: if there are no files, or one cannot be looked at.
        """
        return [file_shard(path, self.source) for path in self.paths()]

    def prefix(self, shard: int, position: int) -> str | None:
        """Return None: nothing is known of a part of a file."""
        del shard, position
        return None


class TextReader(FileReader):
    """Text files, long ones in several documents (`cut_text`); a position counts characters."""

    suffixes = TEXT_SUFFIXES

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, Record]]:
        """Yield the documents of a file (see `Reader.read`)."""
        path = self.paths()[shard]
        text = read_text(path, self.source)
        if start > len(text):
            raise ends_early(self.source, path, len(text), start, "characters")
        for piece in cut_text(text[start:]):
            start += len(piece)
            if piece.strip():
                yield start, Record(piece)


class JsonlReader(FileReader):
    """One JSON object a line; a position counts (uncompressed) bytes. Plain files are entered at the position itself."""

    suffixes = JSONL_SUFFIXES

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, Record]]:
        """Yield the rows of a file (see `Reader.read`); null and blank ones are left out."""
        path, at = self.paths()[shard], start
        prefix = f"source {self.source.name}: "
        try:
            with self._open(path, start) as file:
                for line in file:
                    if line.strip():
                        record = record_of(json.loads(line), self.source, partial(line_at, path, at))
                        if record is not None:
                            yield at + len(line), record
                    at += len(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{prefix}{line_at(path, at)} is not JSON ({error.msg}): mend or remove the line") from None
        except RecursionError:
            raise UserError(f"{prefix}{line_at(path, at)} is nested too deeply: mend or remove the line") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{prefix}{line_at(path, at)} is not UTF-8 ({error.reason}): mend or remove the line") from None
        except (OSError, EOFError, zlib.error) as error:
            reason = str(error).rstrip(".")
            raise UserError(f"{prefix}{path} cannot be read after byte {at} ({reason}): replace it") from None

    def prefix(self, shard: int, position: int) -> str | None:
        """Return a digest of the file's first `position` (uncompressed) bytes; None if there are not as many."""
        digest, left = blake2b(digest_size=16), position
        try:
            with self._open(self.paths()[shard], 0) as file:
                while left and (block := file.read(min(SKIP_BYTES, left))):
                    digest.update(block)
                    left -= len(block)
        except (OSError, EOFError, zlib.error):
            return None
        return None if left else digest.hexdigest()

    def _open(self, path: Path, start: int) -> IO[bytes]:
        if path.suffix not in COMPRESSED:
            file: IO[bytes] = path.open("rb")
            size = file.seek(0, io.SEEK_END)
            file.seek(min(start, size))
        else:
            file = decompressed(path)
            size = 0
            while size < start and (skipped := len(file.read(min(SKIP_BYTES, start - size)))):
                size += skipped
        if size < start:
            file.close()
            raise ends_early(self.source, path, size, start, "bytes")
        return file


class ParquetReader(FileReader):
    """Parquet files; a position counts rows, and only row groups from there on are read."""

    suffixes = PARQUET_SUFFIXES

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, Record]]:
        """Yield the rows of a file (see `Reader.read`); null ones are left out."""
        import pyarrow  # type: ignore[import-untyped]  # a second to load, wanted by this source only

        path, at = self.paths()[shard], start
        try:
            for at, record in parquet_records(path, self.source, path, start):
                yield at, record
        except (OSError, pyarrow.ArrowException) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            where = f"source {self.source.name}: {path}"
            raise UserError(f"{where} cannot be read as Parquet after row {at} ({reason}): replace it") from None

    def prefix(self, shard: int, position: int) -> str | None:
        """Return a digest of the columns' values in the first `position` rows; None if there are not as many, or no rows."""
        import pyarrow.parquet  # type: ignore[import-untyped]

        digest, left = blake2b(digest_size=16), position
        try:
            with pyarrow.parquet.ParquetFile(self.paths()[shard]) as file:
                for row in islice(parquet_rows(file, self.source.columns, 0), position):
                    digest.update(repr(row).encode("utf-8", "surrogatepass"))
                    left -= 1
        except (OSError, pyarrow.ArrowException):
            return None
        return None if left else digest.hexdigest()


def parquet_records(file: Any, source: SourceConfig, where: object, start: int) -> Iterator[tuple[int, Record]]:
    """Yield (rows up to it, record) of a Parquet file from row `start` on.

    Args:
        file: a path, or an open binary file.
        source: says which columns.
        where: the file's name, for messages.
        start: rows to pass over; row groups before that are not read.

    Raises:
        UserError: if a column is missing or holds something else, or the file ends before `start`.
    """
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, pre_buffer=True) as table:  # one request a row group, of a remote file
        for column in source.columns:
            if column not in table.schema_arrow.names:
                raise missing_column(source, where, table.schema_arrow.names, column)
        if start > table.metadata.num_rows:
            raise ends_early(source, where, table.metadata.num_rows, start, "rows")
        for at, row in enumerate(parquet_rows(table, source.columns, start), start + 1):
            record = record_of(row, source, partial("{}, row {}".format, where, at))
            if record is not None:
                yield at, record


def parquet_rows(table: Any, columns: Sequence[str], start: int) -> Iterator[dict[str, object]]:
    """Yield an open Parquet file's rows from `start` on; a row group before it is not read, and no batch crosses into another."""
    first = 0
    for group in range(table.num_row_groups):
        behind = first + table.metadata.row_group(group).num_rows
        if behind > start:
            for batch in table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=list(columns), use_threads=False):
                yield from batch.slice(max(0, start - first)).to_pylist()
                first += len(batch)
        first = behind


def line_at(path: Path, at: int) -> str:
    """Return where byte `at` of a (compressed) file of lines is, for messages: `PATH:LINE (byte OFFSET)`."""
    line, left = 1, at
    with decompressed(path) if path.suffix in COMPRESSED else path.open("rb") as file:
        while left > 0 and (block := file.read(min(SKIP_BYTES, left))):
            line, left = line + block.count(b"\n"), left - len(block)
    return f"{path}:{line} (byte {at})"


def decompressed(path: Path) -> IO[bytes]:
    """Open a gzip or zstd file for reading what is in it."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    import pyarrow  # has zstd, which Python has from 3.14 on

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 16)


def file_shard(path: Path, source: SourceConfig) -> Shard:
    """Return a file as a shard.

    Raises:
        UserError: if it is gone.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"source {source.name}: {path} cannot be read ({error.strerror}): restore it") from None
    return Shard(str(path), status.st_size, f"{path.resolve()}:{status.st_size}:{status.st_mtime_ns}")


def find_files(source: SourceConfig, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files that a source's path names: a file, a folder's files with the suffixes, or a glob's; sorted.

    Raises:
        UserError: if there are none.
    """
    path = Path(str(source.path)).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [f for f in path.rglob("*") if f.is_file() and f.name.endswith(suffixes)]
        wanted = f"has no {', '.join(suffixes)} file: check it, or give a glob such as {path}/*"
    else:
        found = [f for f in map(Path, glob.glob(str(path), recursive=True)) if f.is_file()]  # noqa: PTH207 an absolute glob
        wanted = "names no file: check the path"
    if not found:
        raise UserError(f"source {source.name}: {path} {wanted}")
    return sorted(found)


def read_text(path: Path, source: SourceConfig) -> str:
    """Return a UTF-8 file's text.

    Raises:
        UserError: if it cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        where = f"source {source.name}: {path} cannot be read as UTF-8 text"
        raise UserError(f"{where} after byte {error.start} ({error.reason}): convert or remove it") from None
    except OSError as error:
        raise UserError(f"source {source.name}: {path} cannot be read as UTF-8 text ({error}): convert or remove it") from None


def cut_text(text: str, limit: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Cut a text into documents of at most `limit` characters that joined give the text again.

    A cut falls behind the last blank line that fits, else behind the last line, else behind `limit` characters. So a
    book in one file is many documents, some of which can be held out.
    """
    start = 0
    while len(text) - start > limit:
        window = text[start : start + limit]
        for pattern in (r"(?s).*\n[^\S\n]*\n", r"(?s).*\n"):
            if match := re.match(pattern, window):
                window = match.group()
                break
        yield window
        start += len(window)
    yield text[start:]


def ends_early(source: SourceConfig, where: object, end: int, position: int, unit: str) -> UserError:
    """Return the error for a shard that ends before a position that it once had."""
    return UserError(
        f"source {source.name}: {where} ends after {end} {unit}, before the position {position} to continue from: restore it"
    )
