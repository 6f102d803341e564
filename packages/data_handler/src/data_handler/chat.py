"""Conversations as tokens, and which of those the assistant says: supervised fine-tuning."""

import re
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from data_handler.errors import UserError

Messages = list[dict[str, Any]]


class Conversation(NamedTuple):
    """A conversation's tokens, int32 [N], and which of them are learnt, bool [N]."""

    tokens: NDArray[np.int32]
    loss: NDArray[np.bool_]


def marks_generation(template: str) -> bool:
    """Say whether a chat template marks what the assistant says (`{% generation %}`)."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def encode_conversation(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str) -> Conversation:
    """Lay a conversation out by the tokenizer's chat template; every turn of the assistant is learnt, and nothing else.

    A template that marks the assistant's words (`{% generation %}`) decides itself. Of another, a turn's words are what the
    template adds to the conversation before it, with the prompt to answer: the turn's end marker is learnt with them. The text
    is tokenised as a whole and its characters are assigned to tokens; a token that spans both sides is not learnt.

    Args:
        messages: each with a `role` and a `content`.
        tokenizer: with a chat template and a fast backend.
        where: for messages.

    Raises:
        UserError: if there is no template, it refuses the conversation, or it lays an earlier turn out in another way once a
            later one is there, so that turns cannot be told apart.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise UserError(f"{where} holds conversations, and the tokenizer has no chat template: use a tokenizer that has one")
    try:
        if marks_generation(template):
            found: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
            return Conversation(np.asarray(found["input_ids"], np.int32), np.asarray(found["assistant_masks"], bool))
        text, spans = assistant_spans(messages, tokenizer, where)
    except TemplateError as error:
        reason = str(error).rstrip(".")
        raise UserError(f"{where}: the chat template refuses a conversation ({reason}): mend or remove it") from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False)
    offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    loss = np.zeros(len(offsets), bool)
    for start, end in spans:
        loss |= (offsets[:, 0] >= start) & (offsets[:, 1] <= end) & (offsets[:, 1] > offsets[:, 0])
    return Conversation(np.asarray(encoded["input_ids"], np.int32), loss)


def assistant_spans(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, list[tuple[int, int]]]:
    """Return the conversation's text and the (start, end) of what the assistant says, in characters, by prefix differences.

    Raises:
        UserError: if the text up to a turn is not how the whole text begins.
    """

    def laid_out(upto: int, prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=prompt)) if upto else ""

    whole = laid_out(len(messages))
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = laid_out(number, prompt=True) if number else _opening(messages, tokenizer)
        behind = laid_out(number + 1)
        if not (whole.startswith(behind) and behind.startswith(before)):
            raise UserError(
                f"{where}: the chat template lays message {number + 1} out in another way once later ones follow, so the "
                "assistant's words cannot be told apart: use a template that marks them with {% generation %}"
            )
        spans.append((len(before), len(behind)))
    return whole, spans


def _opening(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what stands before the words of an assistant who speaks first: found with two probes, as no conversation is empty."""
    probes = [
        str(tokenizer.apply_chat_template([{**messages[0], "content": content}], tokenize=False)) for content in ("\x01", "\x02")
    ]
    return probes[0][: probes[0].index("\x01")] if "\x01" in probes[0] else ""
