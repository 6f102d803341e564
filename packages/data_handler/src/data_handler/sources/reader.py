"""What every kind of source gives: shards, and records with the position behind each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from data_handler.config import SourceConfig
from data_handler.errors import UserError


class Shard(NamedTuple):
    """A part of a source that can be read by itself: a file, or what the hub calls a shard.

    Attributes:
        name: for messages.
        size: bytes, or 1 where that is not known.
        stamp: changes when the content does; empty where that cannot be known without reading it.
    """

    name: str
    size: int
    stamp: str


class Record(NamedTuple):
    """One document.

    Attributes:
        text: its text; of a conversation `ROLE: CONTENT` lines, which stand for it where text is wanted (split, statistics).
        messages: of a conversation, each with a `role` and a `content`.
    """

    text: str
    messages: list[dict[str, Any]] | None = None


class Reader(Protocol):
    """One source, opened."""

    def shards(self) -> Sequence[Shard]:
        """Return the shards, always in the same order.

        Raises:
            UserError: if there are none.
        """
        ...

    def read(self, shard: int, start: int = 0) -> Iterator[tuple[int, Record]]:
        """Yield (position behind it, record) from a position on: 0, or one that this method has given.

        What a position counts is the reader's affair (bytes, rows, characters).

        Raises:
            UserError: naming shard and offset, if it cannot be read from there.
        """
        ...

    def prefix(self, shard: int, position: int) -> str | None:
        """Return a digest of a shard up to a position, or None where that cannot be told more cheaply than by reading it anew."""
        ...


def record_of(row: object, source: SourceConfig, where: Callable[[], str]) -> Record | None:
    """Return the record of a row with named columns, or None if it is null or white space only.

    Several text columns are joined by the source's separator; null ones among them are left out.

    Args:
        row: a mapping of columns to values.
        source: says which columns.
        where: gives shard and offset, for messages.

    Raises:
        UserError: if a column is missing, or its value is not what it should be.
    """
    if not isinstance(row, dict):
        raise UserError(f"source {source.name}: {where()} is not a JSON object: each line must be one, with {source.columns[0]!r}")
    for column in source.columns:
        if column not in row:
            raise missing_column(source, where(), list(row), column)
    if source.messages_column:
        return _conversation(row[source.messages_column], source, where)
    parts = []
    for column in source.columns:
        value = row[column]
        if value is None:
            continue
        _check_text(value, source, column, where)
        parts.append(value)
    text = source.separator.join(part for part in parts if part)
    return Record(text) if text.strip() else None


def missing_column(source: SourceConfig, where: object, columns: list[str], column: str) -> UserError:
    """Return the error for a column that does not exist."""
    exist = ", ".join(columns) or "none"
    option = "messages_column" if source.messages_column else "text_columns" if source.text_columns else "text_column"
    return UserError(f"source {source.name}: {where} has no column {column!r}: set {option} to one of {exist}")


def _conversation(value: object, source: SourceConfig, where: Callable[[], str]) -> Record | None:
    if value is None:
        return None
    column = source.messages_column
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f"source {source.name}: {column!r} in {where()} is not a list of messages: mend or remove the row")
    messages = []
    for message in value:
        for key in ("role", "content"):
            if message.get(key) is None:
                raise UserError(f"source {source.name}: a message of {column!r} in {where()} has no {key}: mend or remove the row")
            _check_text(message[key], source, f"{column}.{key}", where)
        messages.append({key: part for key, part in message.items() if part is not None})
    text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return Record(text, messages) if text.strip() else None


def _check_text(value: object, source: SourceConfig, column: str, where: Callable[[], str]) -> None:
    if not isinstance(value, str):
        raise UserError(
            f"source {source.name}: {column!r} in {where()} is not text but {type(value).__name__}: mend or remove the row"
        )
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise UserError(f"source {source.name}: {where()} holds half a surrogate pair, which is no text: mend or remove the line")
