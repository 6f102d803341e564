"""Block-diffusion decoding: the caches against recomputing everything, and the thresholds."""

import dataclasses
import math

import pytest
import torch
from bitnet_arch import ConversionConfig, UserError, convert_model
from bitnet_arch.attention import attention_argument, head_logits, hidden_states
from bitnet_arch.diffusion import add_mask_token, diffusion_of
from bitnet_arch.generation import DecodeOptions, cache_agreement, decode
from bitnet_arch.generation.cache import SlotCache
from bitnet_arch.generation.forwards import Forwards
from bitnet_arch.generation.sampling import accept, propose
from bitnet_arch.testing import SMALL_SHAPE, random_model, tiny_llama, tiny_tokenizer
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

PROMPT = torch.tensor([5, 17, 40, 3, 99, 21])
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
SPREAD = 4
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL_SHAPE, head_dim=16)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL_SHAPE, head_dim=16, **SLIDING, final_logit_softcapping=5.0)),
}


def small(family="llama", ternary=False, block_size=4, token_shift=True):
    """Return a random model that diffuses; a ternary one in float64, where rounding is hardly ever decided by noise."""
    model = random_model(MAKERS[family])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(SPREAD)  # so that its distributions differ from position to position
    if ternary:
        model = convert_model(model, ConversionConfig(norm="none")).double()
    model.config.diffusion = {"mask_token_id": 127, "block_size": block_size, "token_shift": token_shift}
    return model.eval()


@torch.no_grad()
def reference(model, ids):
    """Logits of the whole text with its block mask in one plain forward."""
    size = diffusion_of(model.config).block_size or len(ids)
    at = torch.arange(len(ids))[None]
    mask = attention_argument(model, at[:, :, None] // size >= at[:, None, :] // size, at, at)
    return model(input_ids=ids[None], attention_mask=mask, position_ids=at, use_cache=False).logits[0]


@pytest.mark.parametrize("ternary", [False, True], ids=["float", "ternary"])
@pytest.mark.parametrize("family", MAKERS)
def test_the_prefix_caches_logits_are_those_of_recomputing_everything(family, ternary):
    for token_shift in (False, True):
        model = small(family, ternary, token_shift=token_shift)
        tokens = torch.cat([PROMPT, torch.full((6,), 127)])[None]
        tokens[0, 10] = 77
        form = diffusion_of(model.config)
        with torch.inference_mode():
            forwards = Forwards(model, form, tokens, 4, "prefix")
            forwards.finish(4)
            found = [forwards.logits(8, 6, 8)]
            tokens[0, 6:8] = torch.tensor([8, 9])
            forwards.finish(8)
            found.append(forwards.logits(12, 8, 12))
        early = tokens.clone()
        early[0, 6:] = 127
        for logits, ids, start, end in ((found[0], early[0, :8], 6, 8), (found[1], tokens[0], 8, 12)):
            at = torch.arange(start, end) - int(token_shift)
            torch.testing.assert_close(logits, reference(model, ids)[at], rtol=0, atol=1e-4)
        # Control: attention is bidirectional inside the block, so that a token to the right is felt.
        tokens[0, 10] = 78
        assert (
            reference(model, tokens[0])[8] - reference(model, tokens[0].clone().index_fill_(0, torch.tensor([10]), 77))[8]
        ).abs().max() > 1e-3


@pytest.mark.parametrize("token_shift", [True, False], ids=["shifted", "unshifted"])
@pytest.mark.parametrize("ternary", [False, True], ids=["float", "ternary"])
@pytest.mark.parametrize("family", MAKERS)
def test_the_prefix_cache_gives_the_tokens_of_recomputing_everything(family, ternary, token_shift):
    model = small(family, ternary, token_shift=token_shift)
    for length, threshold, block_size in ((4, 1.0, 4), (5, 0.05, 4), (6, 0.02, 8), (1, 0.1, 1)):
        model.config.diffusion["block_size"] = block_size
        # Drawn: greedy texts of random models repeat one token, and would agree whatever is computed.
        options = DecodeOptions(max_tokens=14, threshold=threshold, sub_block_size=3, temperature=2.0, seed=length)
        texts = [decode(model, PROMPT[:length], dataclasses.replace(options, cache=kind)) for kind in ("none", "prefix")]
        assert texts[0].tokens == texts[1].tokens
        assert len(texts[0].tokens) == 14
        assert texts[0].statistics.forwards == texts[1].statistics.forwards
        assert texts[0].statistics.positions > texts[1].statistics.positions
        assert len(set(texts[0].tokens)) > 3


def test_at_block_one_with_token_shift_decoding_is_autoregressive():
    model = small(block_size=1)
    with torch.no_grad():
        ids = PROMPT.clone()
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1, :127].argmax()[None]])
    text = decode(model, PROMPT, DecodeOptions(max_tokens=8))
    assert text.tokens == ids[len(PROMPT) :].tolist()
    assert text.statistics.forwards == 8


def test_the_dual_cache_computes_less_and_reports_how_far_it_agrees():
    model = small(block_size=8)
    options = DecodeOptions(max_tokens=34, threshold=1.0, sub_block_size=4)
    agreement = cache_agreement(model, PROMPT, options)
    prefix, dual = agreement.prefix, agreement.dual
    assert prefix == decode(model, PROMPT, options)
    assert dual.statistics.forwards == prefix.statistics.forwards
    assert dual.statistics.positions < prefix.statistics.positions
    equal = [a == b for a, b in zip(prefix.tokens, dual.tokens, strict=True)]
    assert agreement.share == sum(equal) / 34
    assert agreement.first_difference == (equal.index(False) if False in equal else None)
    # Where a sub-block is the block, nothing else in it can have changed: the dual cache is exact.
    whole = cache_agreement(model, PROMPT, dataclasses.replace(options, sub_block_size=8))
    assert whole.share == 1.0
    assert whole.first_difference is None


def test_the_dual_cache_keeps_stale_keys_of_the_blocks_other_tokens():
    model = small(block_size=8)
    tokens = torch.full((1, 8), 127)
    tokens[0, 0] = 3
    found = {}
    with torch.inference_mode():
        for kind in ("prefix", "dual"):
            ids = tokens.clone()
            forwards = Forwards(model, diffusion_of(model.config), ids, 8, kind)
            forwards.logits(8, 0, 4)
            ids[0, 2] = 50
            found[kind] = forwards.logits(8, 0, 4)
            assert forwards.cost.positions == (16 if kind == "prefix" else 12)
    assert 1e-6 < (found["prefix"] - found["dual"])[1:].abs().max() < 5  # near, not equal


def test_a_lower_threshold_needs_fewer_forwards_and_one_takes_one_token_each():
    model = small(block_size=8)
    costs = {}
    for threshold in (1.0, 0.035, 0.0):
        text = decode(model, PROMPT[:1], DecodeOptions(max_tokens=31, threshold=threshold))
        assert len(text.tokens) == 31
        costs[threshold] = text.statistics.forwards
    # At 1: 7 of the first block, 7 of each of three more whose first token is known, and 3 that finish a block.
    assert costs[1.0] == 7 + 3 * 7 + 3
    # At 0 every block takes one forward, and one that finishes it.
    assert costs[0.0] == 4 + 3
    assert costs[0.0] < costs[0.035] < costs[1.0]


def test_text_ends_at_an_end_token_and_is_emitted_in_order():
    model = small(block_size=4)
    options = DecodeOptions(max_tokens=12, sub_block_size=2)
    full, pieces = decode(model, PROMPT, options).tokens, []
    end = full[5]
    text = decode(model, PROMPT, options, ends={end}, emit=pieces.extend)
    assert text.stop == "eos"
    assert text.tokens == pieces == full[: full.index(end) + 1]
    assert decode(model, PROMPT, options).stop == "length"


def test_the_context_bounds_a_text():
    model = small(block_size=8)
    model.config.max_position_embeddings = 19
    text = decode(model, PROMPT, DecodeOptions(max_tokens=100, threshold=0.0))
    assert len(text.tokens) == 13
    assert 127 not in text.tokens


def test_draws_follow_the_seed():
    model = small(block_size=4)
    texts = [decode(model, PROMPT, DecodeOptions(max_tokens=12, temperature=1.5, seed=seed)).tokens for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_proposals_never_are_masks_and_have_their_probability():
    logits = torch.tensor([[0.0, 9.0, 1.0], [2.0, 0.0, 0.0]])
    tokens, confidence = propose(logits, 1, 0.0, None)
    assert tokens.tolist() == [2, 0]
    torch.testing.assert_close(confidence, torch.tensor([1 / (1 + torch.e**-1), 1 / (1 + torch.e**-2)], dtype=torch.float64))
    draws = torch.stack([propose(logits, 1, 1.0, torch.Generator().manual_seed(i))[0] for i in range(400)])
    assert 1 not in draws
    assert (draws[:, 0] == 2).double().mean() == pytest.approx(1 / (1 + torch.e**-1), abs=0.06)


def test_what_is_accepted():
    confidence, masked = torch.tensor([0.99, 0.5, 0.95, 0.91]), torch.tensor([False, True, True, True])
    assert accept(confidence, masked, 0.9).tolist() == [False, False, True, True]
    assert accept(confidence, masked, 1.0).tolist() == [False, False, True, False]
    assert accept(confidence, masked, 0.0).tolist() == [False, True, True, True]


def test_slots_are_written_where_they_are_placed():
    cache = SlotCache(1, 6)
    values = torch.arange(4.0).view(1, 1, 4, 1)
    cache.place(0, 4)
    cache.update(values, -values, 0)
    cache.place(1, 4)
    keys, other = cache.update(values[:, :, :2] + 10, values[:, :, :2], 0)
    assert keys.flatten().tolist() == [0, 10, 11, 3]
    assert other.flatten().tolist() == [0, 0, 1, -3]


@torch.no_grad()
def test_causal_masks_are_those_of_stock_transformers():
    for make in MAKERS.values():
        model = random_model(make)
        ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
        at = torch.arange(12).expand(2, 12)
        mask = attention_argument(model, (at[:, :, None] >= at[:, None, :]), at, at)
        hidden = hidden_states(model, input_ids=ids, attention_mask=mask, position_ids=at, use_cache=False)
        torch.testing.assert_close(head_logits(model, hidden), model(input_ids=ids).logits)
        eager = random_model(make)
        eager.set_attn_implementation("eager")
        mask = attention_argument(eager, (at[:, :, None] >= at[:, None, :]), at, at)
        torch.testing.assert_close(
            eager(input_ids=ids, attention_mask=mask, position_ids=at).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": 0}, "at least 1"),
        ({"threshold": 1.5}, "probability"),
        ({"sub_block_size": 0}, "at least 1"),
        ({"cache": "triple"}, "choose none, prefix, dual"),
        *(
            ({"temperature": value}, "0 \\(greedy\\) or a number from 1e-05 to 100000")
            for value in (-1.0, 1e-320, 1e-6, 1e300, math.nan)
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_out_of_range_are_one_sentence(options, says):
    with pytest.raises(UserError, match=says):
        DecodeOptions(**options)


@pytest.mark.parametrize("temperature", [1e-5, 1e5])
def test_the_coldest_and_the_hottest_draws_are_texts(temperature):
    assert len(decode(small(), PROMPT, DecodeOptions(max_tokens=12, temperature=temperature)).tokens) == 12


def test_what_cannot_be_decoded_is_one_sentence():
    plain, model = random_model(MAKERS["llama"]), small()
    for wrong, prompt, says in (
        (plain, PROMPT, "no diffusion model"),
        (model, PROMPT[:0], "empty"),
        (model, torch.tensor([3, 127]), "mask token"),
        (model, torch.zeros(5000, dtype=torch.int64), "shorten"),
    ):
        with pytest.raises(UserError, match=says):
            decode(wrong, prompt, DecodeOptions())


def test_a_model_whose_vocabulary_grew_decodes():
    model = tiny_llama(hidden=64, ffn=128)
    form = add_mask_token(model, tiny_tokenizer(), block_size=4, token_shift=True)
    assert form.mask_token_id not in decode(model, PROMPT, DecodeOptions(max_tokens=8)).tokens
