"""Where documents come from: one module a family of sources, one function each, `SourceConfig -> Iterator[str]`."""

from collections.abc import Callable, Iterator

from data_handler.config import SourceConfig
from data_handler.sources.files import jsonl_documents, parquet_documents, text_documents
from data_handler.sources.hub import hub_documents
from data_handler.sources.package import package_documents
from data_handler.sources.stdlib import code_documents, prose_documents

READERS: dict[str, Callable[[SourceConfig], Iterator[str]]] = {
    "stdlib_code": code_documents,
    "stdlib_prose": prose_documents,
    "text": text_documents,
    "jsonl": jsonl_documents,
    "parquet": parquet_documents,
    "hub": hub_documents,
    "package": package_documents,
}


def documents(source: SourceConfig) -> Iterator[str]:
    """Yield a source's documents, always in the same order; documents of white space only are left out.

    Raises:
        UserError: if the source cannot be read, or its text column is missing.
    """
    return (text for text in READERS[source.kind](source) if text.strip())
