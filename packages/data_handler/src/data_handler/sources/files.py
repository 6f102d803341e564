"""Documents in local files: plain text, JSON lines (also gzipped) and Parquet."""

import glob
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

from data_handler.config import SourceConfig
from data_handler.errors import UserError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
PARQUET_SUFFIXES = (".parquet",)
DOCUMENT_CHARACTERS = 16_384
"""A longer text file is cut into documents of at most this many characters, where a paragraph ends if it can be."""


def text_documents(source: SourceConfig) -> Iterator[str]:
    """Yield the text files of a source, long ones in several documents (`cut_text`)."""
    for path in find_files(source, TEXT_SUFFIXES):
        yield from cut_text(read_text(path, source))


def jsonl_documents(source: SourceConfig) -> Iterator[str]:
    """Yield the text field of every line; lines where it is null are left out."""
    for path in find_files(source, JSONL_SUFFIXES):
        number = 0
        try:
            with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield from _field(json.loads(line), source, f"{path}:{number}")
        except json.JSONDecodeError as error:
            raise UserError(f"source {source.name}: {path}:{number} is not JSON ({error.msg}): mend or remove the line") from None
        except RecursionError:
            raise UserError(f"source {source.name}: {path}:{number} is nested too deeply: mend or remove the line") from None
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise UserError(f"source {source.name}: {path} cannot be read after line {number} ({error}): replace it") from None


def parquet_documents(source: SourceConfig) -> Iterator[str]:
    """Yield the text column of every row; rows where it is null are left out."""
    import pyarrow.parquet  # type: ignore[import-untyped]  # a second to load, wanted by this source only

    for path in find_files(source, PARQUET_SUFFIXES):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if source.text_column not in file.schema_arrow.names:
                    raise missing_column(source, path, file.schema_arrow.names)
                for batch in file.iter_batches(batch_size=1024, columns=[source.text_column]):
                    for row in batch.to_pylist():
                        yield from _field(row, source, path)
        except (OSError, pyarrow.ArrowException) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"source {source.name}: {path} cannot be read as Parquet ({reason}): replace it") from None


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
    except (OSError, UnicodeDecodeError) as error:
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


def missing_column(source: SourceConfig, where: object, columns: list[str]) -> UserError:
    """Return the error for a text column that does not exist."""
    exist = ", ".join(columns) or "none"
    return UserError(f"source {source.name}: {where} has no column {source.text_column!r}: set text_column to one of {exist}")


def _field(row: object, source: SourceConfig, where: object) -> Iterator[str]:
    if not isinstance(row, dict):
        raise UserError(f"source {source.name}: {where} is not a JSON object: each line must be one, with {source.text_column!r}")
    if source.text_column not in row:
        raise missing_column(source, where, list(row))
    value = row[source.text_column]
    if value is None:
        return
    if not isinstance(value, str):
        raise UserError(f"source {source.name}: {source.text_column!r} in {where} is not text but {type(value).__name__}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"source {source.name}: {where} holds half a surrogate pair, which is no text: mend or remove the line")
    yield value
