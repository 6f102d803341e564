"""Tokenizer metadata: byte-level BPE from a `tokenizer.json`."""

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from bitnet_arch.checkpoint import load_tokenizer
from bitnet_arch.errors import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class TokenizerMetadata:
    """What a GGUF file says about its tokenizer.

    `pre` names llama.cpp's pre-tokenizer, whose absence degrades text silently; `add_bos` and `add_eos` say whether the engine
    puts those tokens around every text by itself.
    """

    pre: str
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_tokenizer(directory: Path, vocab_size: int) -> TokenizerMetadata:
    """Read a model directory's tokenizer.

    Raises:
        UserError: if it is no byte-level BPE, its pre-tokenizer has no name in llama.cpp, it has more tokens than the model, or it
            adds tokens to a text that llama.cpp cannot add.
    """
    tokenizer = load_tokenizer(directory)
    raw: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if raw["model"]["type"] != "BPE":
        raise UserError(f"{directory} has a {raw['model']['type']} tokenizer: only byte-level BPE can be exported")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    entries = [(token, i, NORMAL) for token, i in raw["model"]["vocab"].items()]
    entries += [(t["content"], t["id"], CONTROL if t["special"] else USER_DEFINED) for t in raw["added_tokens"]]
    for token, i, kind in entries:
        if i >= vocab_size:
            raise UserError(f"{directory}: token {token!r} has id {i}, but the model has only {vocab_size} rows")
        tokens[i], types[i] = token, kind
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    template = tokenizer.chat_template
    return TokenizerMetadata(
        _pre_tokenizer_name(raw["pre_tokenizer"], directory),
        tokens,
        types,
        merges,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        *_added_around(tokenizer, directory),
        template if isinstance(template, str) else None,
    )


def _added_around(tokenizer: PreTrainedTokenizerFast, directory: Path) -> tuple[bool, bool]:
    """Return whether the tokenizer puts its begin token before every text, and its end token behind it."""
    bare = {text: tokenizer(text, add_special_tokens=False).input_ids for text in ("", "a")}
    whole = {text: tokenizer(text).input_ids for text in bare}
    for begin, end in product((False, True), repeat=2):
        before, behind = [tokenizer.bos_token_id] * begin, [tokenizer.eos_token_id] * end
        if all(whole[text] == [*before, *ids, *behind] for text, ids in bare.items()):
            return begin, end
    made = " ".join(str(token) for token in tokenizer.convert_ids_to_tokens(whole["a"]))
    raise UserError(
        f"{directory}/tokenizer.json makes {made!r} of the text 'a', and llama.cpp can add no more than the tokenizer's "
        "bos_token before a text and its eos_token behind it: name these tokens in tokenizer_config.json or change the "
        "post_processor"
    )


def _pre_tokenizer_name(pre: dict[str, Any] | None, directory: Path) -> str:
    steps = (pre or {}).get("pretokenizers", [pre] if pre else [])
    kinds = [step["type"] for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and steps[-1].get("use_regex", True) and not steps[-1]["add_prefix_space"]:
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
    raise UserError(f"{directory}: the pre-tokenizer {kinds} has no known name in llama.cpp, and text would be cut wrongly")
