"""Held-out text of the demo corpus, the same documents that training never saw."""

from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import TypedDict

from bitnet_arch import UserError

CORPUS = "demo"


class Document(TypedDict):
    """One held-out document and the source it is from."""

    text: str
    domain: str


def heldout_documents() -> list[Document]:
    """Return the held-out documents of the demo corpus, the domains taking turns so that any prefix has all of them.

    Raises:
        UserError: if the corpus holds none out.
    """
    from data_handler import documents, is_heldout, load_config

    config = load_config(CORPUS)
    domains = [
        [Document(text=text, domain=source.name) for text in documents(source) if text and is_heldout(text, config.heldout_share)]
        for source in config.sources
    ]
    result = list(take_turns(domains))
    if not result:
        raise UserError(
            f"the data configuration {CORPUS!r} holds no document out: give heldout_share more than {config.heldout_share}"
        )
    return result


def take_turns(domains: Iterable[Iterable[Document]]) -> Iterator[Document]:
    """Yield the first document of each domain, then the second, until all are used up."""
    for turn in zip_longest(*domains):
        yield from (document for document in turn if document is not None)
