"""How text is cut before BPE, by llama.cpp's names: for the tokenizers that a file can hold.

A file names its pre-tokenizer (`tokenizer.ggml.pre`) and holds no description of it, so that only those count that are exactly one
of these. llama.cpp's own do the same but for one thing: it does not apply Qwen's normalisation (NFC), and cuts text that is not
normalised otherwise.
"""

from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST

SPACE = "\u2581"
"""What SentencePiece writes for a space."""


@dataclass(frozen=True)
class ByteLevelCut:
    """A byte-level BPE's pre-tokenizer.

    Attributes:
        steps: what comes before the bytes, as the `tokenizers` library writes it.
        use_regex: whether the byte level cuts by GPT-2's expression.
        normalizer: "NFC" or None.
        ignore_merges: whether a piece that is a token is taken whole, even if its merges lead elsewhere.
    """

    steps: tuple[dict[str, Any], ...] = ()
    use_regex: bool = True
    normalizer: str | None = None
    ignore_merges: bool = False


def _split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


BYTE_LEVEL: dict[str, ByteLevelCut] = {
    "gpt-2": ByteLevelCut(),
    "smollm": ByteLevelCut(steps=({"type": "Digits", "individual_digits": True},)),
    "llama-bpe": ByteLevelCut(steps=(_split(LLAMA3),), use_regex=False, ignore_merges=True),
    "qwen2": ByteLevelCut(steps=(_split(QWEN2),), use_regex=False, normalizer="NFC"),
}
"""Maps llama.cpp's name to a description. Qwen3 has Qwen2's."""


def byte_level_name(tokenizer: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the pre-tokenizer of a parsed byte-level `tokenizer.json`, None if it has none."""
    steps, normalizer = _flat(tokenizer["pre_tokenizer"], "pretokenizers"), _flat(tokenizer["normalizer"], "normalizers")
    if len(normalizer) > 1 or not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return None
    found = ByteLevelCut(
        steps=tuple(steps[:-1]),
        use_regex=steps[-1].get("use_regex", True),
        normalizer=normalizer[0]["type"] if normalizer else None,
        ignore_merges=tokenizer["model"].get("ignore_merges", False),
    )
    return next((name for name, cut in BYTE_LEVEL.items() if cut == found), None)


def _flat(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """Return the steps of a part of a `tokenizer.json`: none, one, or a sequence of them."""
    return [] if part is None else part.get(inside, [part])


def sentencepiece_prefix(tokenizer: dict[str, Any]) -> bool | None:
    """Return whether a `tokenizer.json` of SentencePiece's kind puts a space before a text, None if it is of another kind."""
    normalizer, pre = _flat(tokenizer["normalizer"], "normalizers"), tokenizer["pre_tokenizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    # Gemma's cut at spaces finds none: they have been replaced before.
    void = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if not tokenizer["model"].get("byte_fallback") or pre not in (None, void):
        return None
    if normalizer == [replace]:
        return False
    return True if normalizer == [{"type": "Prepend", "prepend": SPACE}, replace] else None
