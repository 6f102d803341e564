"""Tokenised documents in memory, and the rows they give: every epoch of a finite source, and the held-out rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from data_handler.mixing import permutation
from data_handler.packing import Row, Tokens, best_fit, cut

BATCH_CHARACTERS = 1_000_000
SHOW_PROGRESS_AFTER = 3.0

Span = tuple[int, int]


@dataclass(frozen=True)
class Corpus:
    """Documents as token ids.

    Attributes:
        tokens: all documents one after the other, int32 [N].
        offsets: document d is `tokens[offsets[d] : offsets[d + 1]]`, int64 [D + 1].
    """

    tokens: Tokens
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.offsets) - 1

    def pieces(self, document: int, capacity: int) -> Iterator[Span]:
        """Yield (start, size) of a document's pieces, as positions in `tokens`."""
        first = int(self.offsets[document])
        for start, size in cut(int(self.offsets[document + 1]) - first, capacity):
            yield first + start, size

    def row(self, used: int, spans: list[Span]) -> Row:
        """Return the row of these spans (views, no copy)."""
        return Row(used, [self.tokens[start : start + size] for start, size in spans])


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Yield each text's token ids, int32, ending with the tokenizer's end-of-sequence token if it has one.

    A document begins with the begin-of-sequence token exactly if the tokenizer itself puts one before a text: a model is prompted
    as it was trained. Text is data: a string in it that looks like a special token is encoded as ordinary text. No other special
    token is added.
    """
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begin = tokenizer.bos_token_id
    beginning = [begin] if begin is not None and tokenizer("a").input_ids[0] == begin else []
    for batch in _batches(texts):
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, split_special_tokens=True, verbose=False)
        for ids in encoded["input_ids"]:
            if document := beginning + ids + ending:
                yield np.asarray(document, np.int32)


def build_corpus(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, name: str, enough: float = np.inf) -> Corpus:
    """Tokenise documents until there are no more, or `enough` tokens; a progress bar appears if it takes long."""
    found: list[Tokens] = []
    total = 0
    with tqdm(desc=f"tokenising {name}", unit=" documents", delay=SHOW_PROGRESS_AFTER, disable=None, leave=False) as bar:
        for ids in encode(texts, tokenizer):
            found.append(ids)
            total += len(ids)
            bar.update()
            if total >= enough:
                break
    offsets = np.cumsum([0, *map(len, found)], dtype=np.int64)
    return Corpus(np.concatenate(found) if found else np.empty(0, np.int32), offsets)


def epoch_rows(corpus: Corpus, capacity: int, buffer: int, key: tuple[object, ...]) -> Iterator[Row]:
    """Yield the rows of one epoch: every token of every document exactly once.

    Documents are permuted, packed, and the rows permuted again, so that the pieces of a long document do not follow
    each other. Both orders depend on the key alone.
    """
    order = permutation(len(corpus), "documents", *key)
    pieces = ((size, (start, size)) for d in order for start, size in corpus.pieces(int(d), capacity))
    packed = list(best_fit(pieces, capacity, buffer))
    for index in permutation(len(packed), "rows", *key):
        yield corpus.row(*packed[index])


def endless_rows(corpus: Corpus, capacity: int, buffer: int, seed: int, name: str) -> Iterator[Row]:
    """Yield the rows of epoch 0, 1, 2, ... of a finite source."""
    for epoch in count():
        yield from epoch_rows(corpus, capacity, buffer, (seed, epoch, name))


def heldout_rows(corpus: Corpus, capacity: int, buffer: int, limit: int) -> Iterator[Row]:
    """Yield rows of at most `limit` tokens: the first piece of every document, then the second, and so on.

    Taking pieces by depth lets many documents be heard, where one long document would otherwise fill the limit. The
    piece that passes the limit is shortened.
    """

    def pieces() -> Iterator[tuple[int, Span]]:
        left = limit
        for start, size in _by_depth([list(corpus.pieces(d, capacity)) for d in range(len(corpus))]):
            if left == 0:
                return
            size = min(size, left)
            yield size, (start, size)
            left -= size

    for used, spans in best_fit(pieces(), capacity, buffer):
        yield corpus.row(used, spans)


def _by_depth(documents: list[list[Span]]) -> Iterator[Span]:
    for depth in range(max(map(len, documents), default=0)):
        yield from (spans[depth] for spans in documents if depth < len(spans))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
