"""Documents as token ids."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from data_handler.chat import Conversation, encode_conversation
from data_handler.packing import Store
from data_handler.sources.reader import Record

BATCH_CHARACTERS = 250_000
BATCH_DOCUMENTS = 1024


class Encoder:
    """A tokenizer, set to give documents: with an end, without other special tokens.

    A text ends with the tokenizer's end-of-sequence token, if it has one, and begins with the begin-of-sequence token exactly if
    the tokenizer itself puts one before a text: a model is prompted as it was trained. Text is data: a string in it that looks
    like a special token is encoded as ordinary text. Conversations are laid out by the chat template (`data_handler.chat`).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap a Hugging Face tokenizer with a fast backend."""
        self.tokenizer = tokenizer
        self.backend: Any = tokenizer.backend_tokenizer
        begin = tokenizer.bos_token_id
        self._beginning = [begin] if begin is not None and tokenizer("a").input_ids[0] == begin else []
        self._ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    @cached_property
    def dtype(self) -> type[np.generic]:
        """The smallest type that holds every id: uint16 or uint32."""
        return np.uint16 if len(self.tokenizer) <= 1 << 16 else np.uint32

    @cached_property
    def digest(self) -> str:
        """What changes when the same document would be encoded in another way."""
        parts = (self.backend.to_str(), self._beginning, self._ending, self.tokenizer.chat_template)
        return blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def encode(self, records: Sequence[Record], where: str) -> list[Store]:
        """Return each document's tokens, int32, and of conversations which of them are learnt.

        Args:
            records: the documents, texts or conversations.
            where: names their source, for messages.
        """
        texts = [record.text for record in records if record.messages is None]
        ids = iter(self._texts(texts) if texts else [])
        return [Store(*_conversation(record, self.tokenizer, where)) if record.messages else Store(next(ids)) for record in records]

    def _texts(self, texts: list[str]) -> list[NDArray[np.int32]]:
        backend = self.backend
        special, backend.encode_special_tokens = backend.encode_special_tokens, True
        backend.no_truncation()  # what Hugging Face's wrapper sets at each call of its own
        backend.no_padding()
        try:
            encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = special
        begin, end = self._beginning, self._ending
        return [np.array(begin + item.ids + end, np.int32) for item in encoded]


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[NDArray[np.int32]]:
    """Yield each text's token ids, int32 (see `Encoder`)."""
    encoder = Encoder(tokenizer)
    for batch in batches(map(Record, texts)):
        yield from (store.tokens for store in encoder.encode(batch, "text"))


def batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield records in lists of about `BATCH_CHARACTERS`."""
    batch: list[Record] = []
    characters = 0
    for record in records:
        batch.append(record)
        characters += len(record.text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _conversation(record: Record, tokenizer: PreTrainedTokenizerBase, where: str) -> Conversation:
    assert record.messages is not None
    return encode_conversation(record.messages, tokenizer, where)
