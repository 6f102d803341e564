"""Tiny models and a tokenizer for tests, here so that every package's tests share them."""

import pydoc_data.topics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bitnet_arch.convert import ConversionConfig, convert_model
from bitnet_arch.modeling import Placement

TEXT = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. "
    "A ternary weight is minus one, zero or plus one, and a model made of them is small. "
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i, add(i, i))\n"
)

# Also in `data_handler.tokenizer`, as is the training of a byte-level BPE: the two libraries do not import each other.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


SMALL_SHAPE: dict[str, int | None] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
"""Sizes of a decoder of any family that is made in milliseconds."""

ODD_SHAPE = SMALL_SHAPE | {
    "vocab_size": 512,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
}
"""Sizes that blocks of 64 or 256 weights do not divide, and groups of three heads."""

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
_GEMMA_ROPES = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
_TIED = {"tie_word_embeddings": True}
_SLIDING = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bitnet": ("bitnet", {**_TIED, "hidden_act": "silu"}),
    "bitnet-2b4t": ("bitnet", {**_TIED, "hidden_act": "relu2"}),
    "llama": ("llama", {**_TIED, "attention_bias": True, "rope_parameters": LLAMA3_ROPE}),
    "llama-plain": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True}),
    "llama-untied": ("llama", {"mlp_bias": True}),
    "qwen2": ("qwen2", _TIED),
    "qwen2-sliding": ("qwen2", {**_SLIDING, "use_sliding_window": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-linear": ("qwen3", {"rope_parameters": _LINEAR_ROPE}),
    "gemma3": (
        "gemma3_text",
        {"num_hidden_layers": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 3, "rope_parameters": _GEMMA_ROPES},
    ),
    "gemma3-capped": ("gemma3_text", {**_SLIDING, "query_pre_attn_scalar": 50, "final_logit_softcapping": 2.0}),
}
"""Decoders that differ in what a file has to say of them: their `model_type`, and its configuration beside the sizes."""

_WIDE_HEADS = {"llama-untied", "qwen3", "qwen3-linear", "gemma3-capped"}

FORMS: dict[str, dict[str, Any]] = {
    "subln": {"norm": "subln"},
    "subln-rows": {"norm": "subln", "granularity": "row"},
    "subln-groups-rotated": {"norm": "subln", "granularity": "group128", "rotation": True},
    "bitlinear": {"norm": "bitlinear"},
    "allnorm": {"norm": "allnorm"},
    "none": {"norm": "none"},
}
"""Arguments of conversions that together use every norm placement, granularity and rotation."""


def random_model(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Seed torch and make a float32 model in evaluation mode whose norms and biases are not ones and zeros, the same every time."""
    torch.manual_seed(0)
    model = make()
    model.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_decoder(variant: str, shape: Mapping[str, Any] = SMALL_SHAPE, **changes: Any) -> PreTrainedModel:
    """Return a `random_model` of one of `VARIANTS`.

    Args:
        variant: its name.
        shape: sizes. Some variants have a number of layers or a head's width of their own, or heads twice as wide as usual.
        **changes: of the configuration, after all else.
    """
    model_type, own = VARIANTS[variant]
    wide = {"head_dim": 2 * shape["hidden_size"] // shape["num_attention_heads"]} if variant in _WIDE_HEADS else {}
    config = AutoConfig.for_model(model_type, **{**shape, **wide, **own, **changes})
    return random_model(lambda: AutoModelForCausalLM.from_config(config))


def softened(norm: Placement, **more: Any) -> ConversionConfig:
    """Return a conversion whose norms, if it inserts any, are softened until they do nothing."""
    return ConversionConfig(norm=norm, **more) if norm == "none" else ConversionConfig(norm=norm, softness=1e6, **more)


def convert_calibrated(model: PreTrainedModel, config: ConversionConfig, calibration: list[Tensor]) -> PreTrainedModel:
    """Convert a model, on calibration tokens where the conversion needs them."""
    return convert_model(model, config, calibration if config.calibrates else None)


def assert_equal_up_to_edges(found: Tensor, expected: Tensor) -> None:
    """Assert that two forwards of one ternary model differ by rounding alone.

    Where an activation lies at a rounding edge, a difference in the last place (another order of a sum, another processor) becomes
    one in the last int8 code, which moves the token's logits and those of its successors in the text by up to some percent. All
    others agree. Such codes are rare (`tests/test_native_edges.py` finds them: one text in 20 of the tiny models), so that at most
    every third text may have any, and one of two; what is wrong in every text, such as a window or a block, is seen however few
    positions it moves.

    Args:
        found: float logits `[batch, time, vocabulary]`, of at least two texts: a single one could be spoiled.
        expected: the same of the other forward.
    """
    errors = (found - expected).abs().amax(-1) / expected.abs().max()
    texts, spoiled = len(errors), int((errors > 1e-5).any(-1).sum())
    assert texts > 1, "one text does not tell an error from a code at a rounding edge: compare several"
    assert spoiled <= max(1, texts // 3), f"{spoiled} of {texts} texts differ"
    assert errors.quantile(0.75) <= 1e-5, f"{int((errors > 1e-5).sum())} of {errors.numel()} positions differ"
    assert errors.max() <= 0.03, f"a position differs by {float(errors.max()):.2g} of the largest logit"


def tiny_llama(
    tied: bool = True,
    hidden: int = 256,
    ffn: int = 768,
    layers: int = 2,
    vocab: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Return a random float32 Llama in evaluation mode, the same for the same arguments."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.float().eval()
    return model


def tiny_bitnet(
    tied: bool = True,
    hidden: int = 256,
    ffn: int = 768,
    layers: int = 2,
    vocab: int = 512,
    heads: int = 4,
    kv_heads: int = 2,
    seed: int = 0,
) -> PreTrainedModel:
    """Return `tiny_llama` converted with SubLN of gain 1, λ = 1."""
    model = tiny_llama(tied, hidden, ffn, layers, vocab, heads, kv_heads, seed)
    return convert_model(model, ConversionConfig(gain="one"))


def tiny_tokenizer(vocab: int = 512, around: str | None = None) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (GPT-2's pre-tokenizer) with an end-of-text token (id 0) and a chat template.

    Args:
        vocab: its size.
        around: what it makes of every text, as a template such as "<|begin|> $A"; with it there is a begin token, too (id 1).
    """
    special = ["<|endoftext|>"] if around is None else ["<|endoftext|>", "<|begin|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    if around is not None:
        ids = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    filler = vocab - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(filler)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=None if around is None else "<|begin|>",
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


@torch.no_grad()
def mean_nll(model: PreTrainedModel, ids: Tensor) -> float:
    """Return the loss of rows of tokens, int64 `[rows, time]`, in nats a token."""
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def train_tiny(model: PreTrainedModel, steps: int = 100, rows: int = 8, length: int = 48, seed: int = 0) -> PreTrainedModel:
    """Train a tiny model in place on the installed Python's documentation, with `tiny_tokenizer`; return it in evaluation mode.

    A random model's distributions are nearly uniform, and comparisons of them say little; a hundred steps suffice.
    """
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[key] for key in sorted(topics))[:200_000]
    ids = torch.tensor(tiny_tokenizer(model.config.vocab_size)(text).input_ids)
    optimizer = torch.optim.AdamW(model.train().parameters(), 2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - length - 1, (rows,), generator=generator)
        batch = torch.stack([ids[start : start + length + 1] for start in starts])
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return model
