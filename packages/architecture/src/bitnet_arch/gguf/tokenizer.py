"""Tokenizers in a file's metadata: written from a `tokenizer.json`, and rebuilt from the file alone.

Two kinds: byte-level BPE (GPT-2, SmolLM2, Llama 3, Qwen 2 and 3) and SentencePiece's BPE with bytes for what is missing (Gemma,
Llama 2). SentencePiece's unigram model is refused.
"""

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bitnet_arch.checkpoint import load_tokenizer
from bitnet_arch.configs import short_reason
from bitnet_arch.errors import UserError
from bitnet_arch.gguf.pretokenizers import BYTE_LEVEL, SPACE, byte_level_name, sentencepiece_prefix
from bitnet_arch.gguf.reader import GgufFile, read_gguf

MAX_TOKEN = 1024
"""Characters of the longest token: every way to cut one is looked at."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
GPT2, SENTENCEPIECE = "gpt2", "llama"


@dataclass(frozen=True)
class TokenizerMetadata:
    """What a GGUF file says about its tokenizer.

    Attributes:
        kind: "gpt2" (byte-level BPE) or "llama" (SentencePiece's).
        pre: llama.cpp's pre-tokenizer, whose absence degrades text silently.
        tokens: by id.
        token_types: llama.cpp's numbers.
        merges: "left right", best first; llama.cpp has no use for SentencePiece's.
        scores: of SentencePiece's tokens: the higher, the earlier it is merged.
        bos_id: and the other special ids, if there are any.
        add_bos: whether the engine puts the begin token before every text by itself, and `add_eos` the end token behind it.
        add_space_prefix: whether SentencePiece puts a space before a text.
        chat_template: Jinja.
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
    kind: str = GPT2
    scores: list[float] = field(default_factory=list)
    unk_id: int | None = None
    add_space_prefix: bool | None = None
    mask_id: int | None = None

    def keys(self) -> dict[str, Any]:
        """Return the file's keys without `tokenizer.` before them; None stands for a key that is not written."""
        return {
            "ggml.model": self.kind,
            "ggml.pre": self.pre,
            "ggml.tokens": self.tokens,
            "ggml.scores": self.scores,
            "ggml.token_type": self.token_types,
            "ggml.merges": self.merges,
            "ggml.add_bos_token": self.add_bos,
            "ggml.add_eos_token": self.add_eos,
            "ggml.add_space_prefix": self.add_space_prefix,
            "ggml.bos_token_id": self.bos_id,
            "ggml.eos_token_id": self.eos_id,
            "ggml.padding_token_id": self.pad_id,
            "ggml.unknown_token_id": self.unk_id,
            "ggml.mask_token_id": self.mask_id,
            "chat_template": self.chat_template or None,
        }


# ---------------------------------------------------------------------------------------------------------- writing


def read_tokenizer(directory: Path, vocab_size: int) -> TokenizerMetadata:
    """Read a model directory's tokenizer.

    Raises:
        UserError: if it is none of the kinds above, its pre-tokenizer has no name in llama.cpp, it has more tokens than the model,
            or it does with texts what llama.cpp cannot.
    """
    tokenizer = load_tokenizer(directory)
    raw: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if raw["model"]["type"] != "BPE":
        raise UserError(f"{directory} has a {raw['model']['type']} tokenizer: only BPE can be exported")
    prefix = sentencepiece_prefix(raw)
    pre = _byte_level_pre(raw, directory) if prefix is None else "default"
    _check_added(raw, directory)
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    unknown = raw["model"].get("unk_token") if prefix is not None else None
    entries = [(token, i, _vocabulary_type(token, unknown, prefix)) for token, i in raw["model"]["vocab"].items()]
    entries += [
        (t["content"], t["id"], UNKNOWN if t["content"] == unknown else CONTROL if t["special"] else USER_DEFINED)
        for t in raw["added_tokens"]
    ]
    for token, i, kind in entries:
        if i >= vocab_size:
            raise UserError(f"{directory}: token {token!r} has id {i}, but the model has only {vocab_size} rows")
        tokens[i], types[i] = token, kind
    merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]
    scores: list[float] = []
    if prefix is not None:
        scores = _scores(merges, tokens, types, directory)
    template = tokenizer.chat_template
    return TokenizerMetadata(
        pre,
        tokens,
        types,
        merges,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        *_added_around(tokenizer, directory),
        template if isinstance(template, str) else None,
        GPT2 if prefix is None else SENTENCEPIECE,
        scores,
        raw["model"]["vocab"].get(unknown),
        prefix,
        tokenizer.mask_token_id,
    )


def _byte_level_pre(raw: dict[str, Any], directory: Path) -> str:
    if (name := byte_level_name(raw)) is not None:
        return name
    pre = raw["pre_tokenizer"] or {}
    kinds = [step["type"] for step in pre.get("pretokenizers", [pre] if pre else [])]
    raise UserError(f"{directory}: the pre-tokenizer {kinds} has no known name in llama.cpp, and text would be cut wrongly")


def _check_added(raw: dict[str, Any], directory: Path) -> None:
    """Refuse what no key can say."""
    model = raw["model"]
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(f"{directory}: a BPE with dropout, prefixes or suffixes cannot be exported")
    for token in raw["added_tokens"]:
        moved = raw["normalizer"] is not None and token["normalized"] and not token["special"]
        if token["lstrip"] or token["rstrip"] or token["single_word"] or moved:
            raise UserError(
                f"{directory}: the added token {token['content']!r} strips spaces, stands for whole words or is normalised, which "
                "no GGUF file can say: save the tokenizer without that"
            )


def _vocabulary_type(token: str, unknown: str | None, prefix: bool | None) -> int:
    if prefix is None:
        return NORMAL
    return UNKNOWN if token == unknown else BYTE if _is_byte(token) else NORMAL


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(merges: list[str], tokens: list[str], types: list[int], directory: Path) -> list[float]:
    """Return scores from which SentencePiece's algorithm makes these merges: minus a token's rank among them.

    SentencePiece merges any two pieces that make a token, BPE those it has a rule for: the rules must be complete.
    """
    rules = [tuple(merge.split(" ", 1)) for merge in merges]
    known = set(rules)
    if missing := next((pair for pair in _all_pairs(tokens, types) if pair not in known), None):
        raise UserError(
            f"{directory}: the tokenizer has no rule that merges {missing[0]!r} and {missing[1]!r}, which llama.cpp would merge: "
            "it is not SentencePiece's"
        )
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(rules):
        rank.setdefault(left + right, index)
    return [float(-rank.get(token, len(rules))) for token in tokens]


def _all_pairs(tokens: list[str], types: list[int]) -> list[tuple[str, str]]:
    """Return all pairs of ordinary tokens that make an ordinary token, in the order of the tokens they make."""
    ordinary = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    pairs = []
    for token, kind in zip(tokens, types, strict=True):
        if kind == NORMAL:
            cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
            pairs += [cut for cut in cuts if cut[0] in ordinary and cut[1] in ordinary]
    return pairs


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


# ---------------------------------------------------------------------------------------------------------- reading


def tokenizer_from_gguf(path: Path | str | GgufFile) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a file, with its special tokens and chat template.

    Args:
        path: the file, or what `read_gguf` found in it.

    Raises:
        UserError: if the file is damaged, or has none or one of another kind.
    """
    file = path if isinstance(path, GgufFile) else read_gguf(path)
    stated = _read_keys(file)
    named = {
        f"{name}_token": stated.tokens[i]
        for name, i in (
            ("bos", stated.bos_id),
            ("eos", stated.eos_id),
            ("pad", stated.pad_id),
            ("unk", stated.unk_id),
            ("mask", stated.mask_id),
        )
        if i is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=_rebuild(stated, file.path),
        clean_up_tokenization_spaces=False,
        chat_template=stated.chat_template,
        **named,
    )


def rebuild_tokenizer(file: GgufFile) -> Tokenizer:
    """Return the `tokenizers.Tokenizer` that a file's metadata describes.

    Raises:
        UserError: if it describes none, or one of another kind.
    """
    return _rebuild(_read_keys(file), file.path)


def _read_keys(file: GgufFile) -> TokenizerMetadata:
    found = {key.removeprefix("tokenizer."): value for key, value in file.metadata.items() if key.startswith("tokenizer.")}

    def get(key: str, kind: type, default: Any = None) -> Any:
        value = found.get(key, default)
        if value is not None and type(value) is not kind:
            raise UserError(f"{file.path} has no tokenizer that can be rebuilt (its key tokenizer.{key} is no {kind.__name__})")
        return value

    def items(key: str, kind: type) -> list[Any]:
        values = get(key, list, [])
        if any(type(value) is not kind for value in values):
            raise UserError(f"{file.path} has no tokenizer that can be rebuilt (its key tokenizer.{key} holds other things)")
        return list(values)

    tokens, model = items("ggml.tokens", str), get("ggml.model", str, "")
    types = items("ggml.token_type", int) or [NORMAL] * len(tokens)
    scores = items("ggml.scores", float)
    if not tokens or len(types) != len(tokens) or len(scores) not in (0, len(tokens)):
        raise UserError(f"{file.path} has no tokenizer that can be rebuilt (it has {len(tokens)} tokens and {len(types)} types)")
    if longest := next((token for token in tokens if len(token) > MAX_TOKEN), None):
        raise UserError(
            f"{file.path} has no tokenizer that can be rebuilt (its token {longest:.20}... is {len(longest)} characters long)"
        )
    ids = {}
    for name in ("bos", "eos", "padding", "unknown", "mask"):
        value = get(f"ggml.{name}_token_id", int)
        if value is not None and not 0 <= value < len(tokens):
            raise UserError(f"{file.path} has no tokenizer that can be rebuilt (its {name} token {value} does not exist)")
        ids[name] = value
    pre = get("ggml.pre", str, "")
    if model not in (GPT2, SENTENCEPIECE) or (model == GPT2 and pre not in BYTE_LEVEL):
        raise UserError(
            f"{file.path} has a tokenizer of the kind {model!r:.40} with the pre-tokenizer {pre!r:.40}: only {GPT2} with "
            f"{', '.join(BYTE_LEVEL)}, and {SENTENCEPIECE} can be rebuilt"
        )
    # llama.cpp's defaults where a file does not say.
    return TokenizerMetadata(
        pre,
        tokens,
        types,
        items("ggml.merges", str),
        ids["bos"],
        ids["eos"],
        ids["padding"],
        get("ggml.add_bos_token", bool, model == SENTENCEPIECE or pre == "llama-bpe"),
        get("ggml.add_eos_token", bool, False),
        get("chat_template", str),
        model,
        scores,
        ids["unknown"],
        get("ggml.add_space_prefix", bool, model == SENTENCEPIECE),
        ids["mask"],
    )


def _rebuild(stated: TokenizerMetadata, path: Path) -> Tokenizer:
    try:
        tokenizer = _byte_level(stated) if stated.kind == GPT2 else _sentencepiece(stated)
        added = [
            AddedToken(token, special=kind != USER_DEFINED, normalized=False)
            for token, kind in zip(stated.tokens, stated.token_types, strict=True)
            if kind in (CONTROL, USER_DEFINED) or (kind == UNKNOWN and token)
        ]
        tokenizer.add_tokens(added)
        around = [(stated.bos_id, stated.add_bos), None, (stated.eos_id, stated.add_eos)]
        single, special = [], []
        for part in around:
            if part is None:
                single.append("$A")
            elif part[1] and part[0] is not None:
                name = stated.tokens[part[0]]
                single.append(name)
                special.append((name, part[0]))
        if special:
            tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise UserError(f"{path} has no tokenizer that can be rebuilt ({short_reason(error)})") from None
    return tokenizer


def _vocabulary(stated: TokenizerMetadata) -> dict[str, int]:
    vocabulary: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(stated.tokens, stated.token_types, strict=True)):
        if kind == UNUSED:
            continue
        if token in vocabulary:
            raise ValueError(f"the token {token!r} is there twice")
        vocabulary[token] = i
    return vocabulary


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _byte_level(stated: TokenizerMetadata) -> Tokenizer:
    cut = BYTE_LEVEL[stated.pre]
    merges = [_pair(merge) for merge in stated.merges]
    tokenizer = Tokenizer(models.BPE(_vocabulary(stated), merges, ignore_merges=cut.ignore_merges))
    steps: list[Any] = []
    for step in cut.steps:
        if step["type"] == "Digits":
            steps.append(pre_tokenizers.Digits(individual_digits=step["individual_digits"]))
        else:
            steps.append(pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.use_regex))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    if cut.normalizer == "NFC":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(stated: TokenizerMetadata) -> Tokenizer:
    merges = [_pair(merge) for merge in stated.merges]
    if not merges:
        # As transformers' converter orders them: by the score of what they make, best first.
        score = dict(zip(stated.tokens, stated.scores, strict=True)) if stated.scores else {}
        pairs = _all_pairs(stated.tokens, stated.token_types)
        merges = sorted(pairs, key=lambda pair: -score.get(pair[0] + pair[1], 0.0))
    unknown = None if stated.unk_id is None else stated.tokens[stated.unk_id]
    tokenizer = Tokenizer(models.BPE(_vocabulary(stated), merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if stated.add_space_prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
        back.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = replace
    tokenizer.decoder = decoders.Sequence(back)
    return tokenizer
