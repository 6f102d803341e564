"""A tokenizer of one's own: byte-level BPE that stock engines read."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_handler.errors import UserError

END_OF_TEXT = "<|endoftext|>"
MINIMUM_VOCABULARY = 257

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with GPT-2's pre-tokenizer (llama.cpp knows it as `gpt-2`).

    `<|endoftext|>` has id 0 and is the end-of-sequence token; every byte has a token, so any text round-trips. A chat
    template is set. The same texts give the same tokenizer.

    Args:
        texts: the documents; consumed once.
        vocab_size: the exact size of the result. If the texts give fewer merges, `<extra_N>` tokens fill it.

    Raises:
        UserError: if `vocab_size` cannot hold the 256 bytes and the end-of-text token, or there is no text.
    """
    if vocab_size < MINIMUM_VOCABULARY:
        raise UserError(f"vocab_size must be at least {MINIMUM_VOCABULARY} (256 bytes and {END_OF_TEXT}), not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    tokenizer.train_from_iterator(counted(), trainer)
    if not seen:
        raise UserError("there is no text to train a tokenizer on: give at least one non-empty document")
    filler = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(filler)])
    return _wrapped(tokenizer)


def restore_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Rebuild a tokenizer of `train_tokenizer` from its JSON (`tokenizer.backend_tokenizer.to_str()`)."""
    return _wrapped(Tokenizer.from_str(text))


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
