"""Data sets of the hub, streamed; a local folder of Parquet or JSONL files goes the same way."""

from collections.abc import Iterator
from pathlib import Path

from data_handler.config import SourceConfig
from data_handler.errors import UserError
from data_handler.sources.files import missing_column


def hub_documents(source: SourceConfig) -> Iterator[str]:
    """Yield a streamed data set's text column in the data set's own order; null rows are left out.

    Raises:
        UserError: if it cannot be opened, or has no such text column.
    """
    import datasets  # seconds to load, wanted by this source only

    name = str(source.dataset)
    folder = Path(name).expanduser()
    try:
        stream = datasets.load_dataset(str(folder) if folder.is_dir() else name, source.subset, split=source.split, streaming=True)
        rows = iter(stream)
        first = next(rows, None)
    except Exception as error:  # every transport and builder has its own types; the reason is passed on
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"source {source.name}: the data set {name} could not be opened ({reason}): check its name, subset and split and "
            "the network, or set dataset to a local folder with its Parquet or JSONL files"
        ) from None
    if first is None:
        return
    if source.text_column not in first:
        raise missing_column(source, name, list(first))
    while first is not None:
        value = first[source.text_column]
        if isinstance(value, str):
            yield value
        elif value is not None:
            raise UserError(
                f"source {source.name}: the column {source.text_column!r} of {name} is not text: choose another text_column"
            )
        first = next(rows, None)
