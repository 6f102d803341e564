"""From an autoregressive checkpoint to a diffusion model that decodes several tokens a forward."""

import copy
import math

import pytest
import torch
from bitnet_arch import ConversionConfig, convert_model
from bitnet_arch.diffusion import add_mask_token
from bitnet_arch.generation import DecodeOptions, cache_agreement, decode
from bitnet_arch.testing import SMALL_SHAPE, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from wrinklefree.diffusion import METHODS, DiffusionSettings, diffusion_bound, diffusion_step, scored_count
from wrinklefree.objective import token_loss_sum

NUMBERS, LENGTH = 24, 24
MAKERS = {
    "llama": lambda size: LlamaForCausalLM(LlamaConfig(**SMALL_SHAPE | size)),
    "qwen3": lambda size: Qwen3ForCausalLM(Qwen3Config(**SMALL_SHAPE | size, head_dim=16)),
}


def counting(rows, seed, length=LENGTH):
    """Texts that count up by 1 or 2, modulo 24: after two tokens the rest follows."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, NUMBERS, (rows, 1), generator=generator)
    return (start + torch.randint(1, 3, (rows, 1), generator=generator) * torch.arange(length)) % NUMBERS


def batch_of(rows, seed, shuffled=False):
    ids = counting(rows, seed)
    if shuffled:
        ids = torch.stack([row[torch.randperm(LENGTH, generator=torch.Generator().manual_seed(i))] for i, row in enumerate(ids)])
    labels = ids.clone()
    labels[:, 0] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.arange(LENGTH).expand(rows, -1),
        "document_ids": torch.ones_like(ids),
        "sample_index": torch.arange(rows) + rows * seed,
    }


def settings(model, method="fast_dllm_v2"):
    block = {} if method == "mdlm" else {"block_size": 8}
    return DiffusionSettings(mask_token_id=model.config.diffusion["mask_token_id"], **METHODS[method] | block)


def autoregressive(family, steps=120):
    """A ternary model trained on counting, which diffuses in name only."""
    torch.manual_seed(0)
    model = convert_model(MAKERS[family]({"vocab_size": NUMBERS}).float(), ConversionConfig(norm="subln", gain="one")).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        batch = batch_of(8, step)
        loss, count = token_loss_sum(model(input_ids=batch["input_ids"], use_cache=False).logits, batch["labels"])
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    tokenizer = tiny_tokenizer(300)  # only its mask token matters: texts are numbers
    model.resize_token_embeddings(300, mean_resizing=False)
    add_mask_token(model, tokenizer, block_size=8, token_shift=True)
    return model.eval()


def diffuse(model, how, steps=120, shuffled=False):
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps):
        batch = batch_of(8, 1000 + step, shuffled)
        loss = diffusion_step(model, batch, how)["dlm"] / scored_count(batch, how)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module", params=["llama", pytest.param("qwen3", marks=pytest.mark.slow)])
def pair(request):
    """An autoregressive model, and what diffusion training made of it."""
    start = autoregressive(request.param)
    return start, diffuse(start, settings(start))


HELDOUT = [batch_of(32, 10**6)]


def test_training_lowers_the_bound_and_shuffled_texts_do_not(pair):
    start, trained = pair
    how = settings(start)
    before, after = (diffusion_bound(model, HELDOUT, how, draws=4) for model in (start, trained))
    assert after < 0.5 * before
    shuffled = diffusion_bound(diffuse(start, how, shuffled=True), HELDOUT, how, draws=4)
    assert shuffled > 2 * after


def test_a_trained_model_needs_fewer_forwards_than_tokens_at_a_lower_threshold(pair):
    _, model = pair
    forwards, right = {}, {}
    for threshold in (1.0, 0.6, 0.0):
        texts = counting(8, 2 * 10**6, 28)
        found = [decode(model, text[:4], DecodeOptions(max_tokens=24, threshold=threshold)) for text in texts]
        forwards[threshold] = sum(text.statistics.forwards for text in found) / (8 * 24)
        tokens = torch.tensor([text.tokens for text in found])
        right[threshold] = float((tokens == texts[:, 4:]).double().mean())
    assert forwards[1.0] == 1.0
    assert forwards[0.0] < forwards[0.6] < 0.9
    assert right[0.6] > 0.6
    assert right[0.6] >= right[0.0]


def test_the_dual_cache_mostly_agrees_on_a_trained_model(pair):
    _, model = pair
    options = DecodeOptions(max_tokens=24, threshold=0.9, sub_block_size=4)
    shares = [cache_agreement(model, text[:4], options).share for text in counting(6, 3 * 10**6)]
    assert sum(shares) / len(shares) > 0.5


@pytest.mark.parametrize("method", [pytest.param("bd3lm", marks=pytest.mark.slow), "mdlm"])
def test_unshifted_methods_train_too(method):
    model = autoregressive("llama", steps=1)
    model.config.diffusion |= {"token_shift": False, "block_size": None if method == "mdlm" else 8}
    how = settings(model, method)
    trained = diffuse(model, how, steps=150)
    # Lower than what knowing the numbers, and nothing of their order, gives.
    assert diffusion_bound(trained, HELDOUT, how, draws=4) < math.log(NUMBERS) - 0.3
