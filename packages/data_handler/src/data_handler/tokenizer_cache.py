"""A tokenizer of a configuration's own, trained once for the same text."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from itertools import chain, islice
from pathlib import Path

import tokenizers
from transformers import PreTrainedTokenizerFast

from data_handler.cache import cache_directory
from data_handler.config import DataConfig
from data_handler.errors import UserError
from data_handler.sources import documents, open_source
from data_handler.split import is_heldout
from data_handler.tokenizer import restore_tokenizer, train_tokenizer

VERSION = 1
"""Changes when the same text gives another tokenizer."""


def training_documents(config: DataConfig, source: int) -> Iterator[str]:
    """Yield the texts of a source (its number in the configuration) that are not held out, in the order of reading.

    Raises:
        UserError: if the source cannot be read.
    """
    return (text for text in documents(config.sources[source]) if not is_heldout(text, config.heldout_share))


def own_tokenizer(config: DataConfig, vocab_size: int, documents_per_source: int) -> PreTrainedTokenizerFast:
    """Return `train_tokenizer` of the first training documents of every source.

    What finite sources gave is kept beside their tokens (`data_handler.cache.cache_directory`), under a digest of how they are
    read, of their files' names, sizes and times of change, and of the library that trains: the same text is not read and trained
    on again.

    Args:
        config: the sources, and which share of them is held out.
        vocab_size: as `train_tokenizer` takes it.
        documents_per_source: how many documents of each are trained on.

    Raises:
        UserError: if a source cannot be read, there is no text, or `vocab_size` is too small.
    """
    kept = _place(config, vocab_size, documents_per_source)
    if kept is not None and (found := _read(kept)) is not None:
        return found
    chosen = (islice(training_documents(config, number), documents_per_source) for number in range(len(config.sources)))
    texts = chain.from_iterable(chosen)
    first = next(texts, None)
    if first is None:
        names = ", ".join(source.name for source in config.sources)
        raise UserError(f"the data has no text to train a tokenizer on (sources: {names}): give it at least one document with text")
    tokenizer = train_tokenizer(chain([first], texts), vocab_size)
    if kept is not None:
        with suppress(OSError):  # it is only trained again; that tokens cannot be kept is said where they are
            _write(kept, tokenizer.backend_tokenizer.to_str())
    return tokenizer


def _place(config: DataConfig, vocab_size: int, documents_per_source: int) -> Path | None:
    """Return the file of a tokenizer, or None where it cannot be known without reading whether a source has changed."""
    parts: list[object] = [VERSION, tokenizers.__version__, vocab_size, documents_per_source, config.heldout_share]
    for source in config.sources:
        if source.streamed:
            return None
        stamps = [shard.stamp for shard in open_source(source).shards()]
        if not all(stamps):
            return None
        parts.append((replace(source, name="-", weight=1.0), stamps))
    digest = blake2b(repr(parts).encode(), digest_size=16).hexdigest()
    return cache_directory(config.cache_dir) / f"tokenizer-{digest}.json"


def _read(path: Path) -> PreTrainedTokenizerFast | None:
    try:
        return restore_tokenizer(path.read_text(encoding="utf-8"))
    except Exception:  # not there, or damaged: the library raises no narrower type
        return None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".tokenizer-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
