"""Masks, views, attention and losses of diffusion training, against the textbook and the autoregressive checkpoint."""

from dataclasses import replace

import pytest
import torch
from bitnet_arch import ConversionConfig, UserError, convert_model
from bitnet_arch.attention import attention_argument, head_logits, hidden_states
from bitnet_arch.testing import SMALL_SHAPE, random_model
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from wrinklefree.diffusion import METHODS, DiffusionSettings, diffusion_bound, diffusion_step, scored_count
from wrinklefree.diffusion.loss import support_kl, support_losses, token_nll
from wrinklefree.diffusion.mask import block_ends, block_numbers, noisy_clean_mask, whole_mask
from wrinklefree.diffusion.noise import row_draws
from wrinklefree.diffusion.step import view_states
from wrinklefree.diffusion.views import make_views
from wrinklefree.module import model_logits

MASK = 127
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL_SHAPE, head_dim=16)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL_SHAPE, head_dim=16, **SLIDING)),
}


def made(family, ternary=False):
    """A random model; a ternary one in float64, where rounding to codes is hardly ever decided by noise."""
    model = random_model(MAKERS[family])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return convert_model(model, ConversionConfig(norm="none")).double().eval() if ternary else model


def packed(rows=2, seed=0):
    """Rows of two documents of 9 and 5 tokens and two of padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, MASK, (rows, 16), generator=generator)
    documents = torch.tensor([[1] * 9 + [2] * 5 + [0] * 2]).repeat(rows, 1)
    positions = torch.tensor([[*range(9), *range(5), *range(2)]]).repeat(rows, 1)
    labels = ids.clone()
    labels[:, [0, 9, 14, 15]] = -100
    return {
        "input_ids": ids.masked_fill(documents == 0, 0),
        "labels": labels,
        "position_ids": positions,
        "document_ids": documents,
        "sample_index": torch.arange(rows) + 40,
    }


def settings(method="fast_dllm_v2", **changes):
    block = {} if method == "mdlm" else {"block_size": 4}
    return DiffusionSettings(mask_token_id=MASK, **METHODS[method] | block | changes)


# ------------------------------------------------------------------------------------------------------ blocks and masks


def test_blocks_are_counted_from_each_documents_start():
    batch = packed(1)
    blocks = block_numbers(batch["position_ids"], batch["document_ids"], 4)
    assert blocks[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4, 5, 5]
    assert block_ends(blocks)[0].tolist() == [4] * 4 + [8] * 4 + [9] + [13] * 4 + [14] + [16] * 2
    assert block_numbers(batch["position_ids"], batch["document_ids"], None)[0].tolist() == [0] * 9 + [1] * 5 + [2] * 2


def test_the_layouts_mask_is_the_papers():
    batch = packed(1)
    documents, length = batch["document_ids"][0].tolist(), 16
    blocks = block_numbers(batch["position_ids"], batch["document_ids"], 4)
    mask = noisy_clean_mask(blocks, batch["document_ids"])[0]
    b = blocks[0].tolist()
    for q in range(2 * length):
        for k in range(2 * length):
            i, j = q % length, k % length
            same_document = documents[i] == documents[j] > 0
            diagonal = b[i] == b[j] and (q < length) == (k < length)
            offset = q < length <= k and b[i] > b[j]
            causal = q >= length and k >= length and b[i] >= b[j]
            assert bool(mask[q, k]) == ((same_document and (diagonal or offset or causal)) or q == k), (q, k)
    whole = whole_mask(batch["document_ids"])[0]
    assert whole[0].tolist() == [True] * 9 + [False] * 7
    assert whole[15].tolist() == [False] * 15 + [True]


# ------------------------------------------------------------------------------------------------------ noise and views


def test_masks_depend_on_seed_and_sample_index_alone():
    batch = packed(6)
    whole = make_views(batch, settings(complementary=False))
    for cut in ([[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [1, 3, 5]], [[5], [0, 1, 2, 3, 4]]):  # micro-batches, two ranks, odd parts
        for rows in cut:
            part = make_views({key: value[rows] for key, value in batch.items()}, settings(complementary=False))
            assert torch.equal(part.masked, whole.masked[rows])
    assert len({tuple(row.tolist()) for row in whole.masked}) == 6
    other = make_views(batch, settings(complementary=False, seed=1))
    assert not torch.equal(other.masked, whole.masked)
    moved = make_views(batch | {"sample_index": batch["sample_index"] + 1}, settings(complementary=False))
    assert torch.equal(moved.masked[:-1], whole.masked[1:])


def test_draws_are_uniform_and_independent():
    draws = row_draws(0, torch.arange(400), 64)
    assert draws.shape == (2, 400, 64)
    flat = draws.double().reshape(2, -1)
    assert flat.mean(1).tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert flat.var(1).tolist() == pytest.approx([1 / 12] * 2, abs=0.005)
    assert abs(float(torch.corrcoef(flat)[0, 1])) < 0.02


def test_complementary_views_mask_every_token_that_has_a_label_once():
    batch = packed(4)
    views = make_views(batch, settings())
    first, second = views.masked.chunk(2)
    assert torch.equal(first ^ second, batch["labels"] != -100)
    assert not (first & second).any()
    ids = views.input_ids.chunk(2)
    for view, mask in zip(ids, (first, second), strict=True):
        assert torch.equal(view, batch["input_ids"].masked_fill(mask, MASK))


def test_levels_are_shared_in_a_block_and_weights_are_their_inverse():
    batch = packed(300)
    views = make_views(batch, settings("bd3lm"))
    assert (views.weights[:, :4] == views.weights[:, :1]).all()
    assert (views.weights[:, 3] != views.weights[:, 4]).all()
    # Each token's expected weight where it is masked is 1: what makes the sum an estimate of the bound.
    mean = (views.weights * views.masked)[:, 1:9].mean()
    assert float(mean) == pytest.approx(1, abs=0.15)
    assert float(views.masked[:, 1:9].double().mean()) == pytest.approx(0.5, abs=0.05)


# ------------------------------------------------------------------------------------------------------ against autoregression


@torch.no_grad()
@pytest.mark.parametrize("ternary", [False, True], ids=["float", "ternary"])
@pytest.mark.parametrize("family", MAKERS)
def test_the_clean_half_at_block_one_is_the_autoregressive_checkpoint(family, ternary):
    model, batch = made(family, ternary), packed()
    blocks = block_numbers(batch["position_ids"], batch["document_ids"], 1)
    noisy = torch.full_like(batch["input_ids"], MASK)
    at = batch["position_ids"].repeat(1, 2)
    states = hidden_states(
        model,
        input_ids=torch.cat([noisy, batch["input_ids"]], dim=1),
        attention_mask=attention_argument(model, noisy_clean_mask(blocks, batch["document_ids"]), at, at),
        position_ids=at,
        use_cache=False,
    )
    clean = head_logits(model, states[:, 16:])
    ids, positions = batch["input_ids"], batch["position_ids"]
    for span in (slice(0, 9), slice(9, 14)):  # each document by itself, as stock transformers computes it
        alone = model(input_ids=ids[:, span], position_ids=positions[:, span]).logits
        torch.testing.assert_close(clean[:, span], alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(clean[:, :14], model_logits(model, batch)[:, :14], rtol=0, atol=1e-4)
    # Control: at block 2 the clean half sees a token ahead.
    blocks = block_numbers(batch["position_ids"], batch["document_ids"], 2)
    other = hidden_states(
        model,
        input_ids=torch.cat([noisy, batch["input_ids"]], dim=1),
        attention_mask=attention_argument(model, noisy_clean_mask(blocks, batch["document_ids"]), at, at),
        position_ids=at,
        use_cache=False,
    )
    assert (head_logits(model, other[:, 16:]) - clean).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("ternary", [False, True], ids=["float", "ternary"])
@pytest.mark.parametrize("family", MAKERS)
def test_the_bound_at_block_one_with_every_token_masked_is_the_likelihood_of_separate_forwards(family, ternary):
    model, batch = made(family, ternary), packed()
    how = settings("bd3lm", block_size=1, epsilon=1.0)
    found = diffusion_step(model, batch, how)["dlm"] / scored_count(batch, how)
    nll = []
    for row in range(2):
        for start, end in ((0, 9), (9, 14)):
            ids = batch["input_ids"][row, start:end]
            for i in range(1, len(ids)):
                logits = model(input_ids=torch.cat([ids[:i], torch.tensor([MASK])])[None]).logits[0, -1]
                logits[MASK] = -torch.inf
                nll.append(F.cross_entropy(logits.float(), ids[i]))
    assert abs(float(found) - float(torch.stack(nll).mean())) < 1e-4
    # Control: at block 2 some tokens are predicted with masks for neighbours.
    assert abs(float(diffusion_step(model, batch, replace(how, block_size=2))["dlm"] / len(nll)) - float(found)) > 1e-3


@torch.no_grad()
def test_token_shift_reads_a_token_from_the_position_before():
    model, batch = made("llama"), packed()
    how = settings(complementary=False)
    views = make_views(batch, how)
    logits = head_logits(model, view_states(model, batch, views, how)).log_softmax(-1)
    logits[..., MASK] = -torch.inf
    logits = logits.log_softmax(-1)
    by_hand = -sum(logits[b, t - 1, batch["input_ids"][b, t]] for b, t in views.masked.nonzero().tolist())
    torch.testing.assert_close(diffusion_step(model, batch, how)["dlm"], by_hand)
    unshifted = replace(how, token_shift=False)
    by_hand = -sum(logits[b, t, batch["input_ids"][b, t]] for b, t in views.masked.nonzero().tolist())
    torch.testing.assert_close(diffusion_step(model, batch, unshifted)["dlm"], by_hand)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_another_document_changes_nothing(method):
    model, batch, how = made("qwen3"), packed(), settings(method)
    views = make_views(batch, how)
    changed = batch | {"input_ids": torch.where(batch["document_ids"] == 1, batch["input_ids"] % 100 + 7, batch["input_ids"])}
    states = view_states(model, batch, views, how)
    other = view_states(model, changed, make_views(changed, how), how)
    assert torch.equal(states[:, 9:], other[:, 9:])
    assert not torch.equal(states[:, :9], other[:, :9])


# ------------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_and_its_gradient_add_up_over_parts(method):
    model, batch, how = made("llama"), packed(4), settings(method)
    whole = diffusion_step(model, batch, how)["dlm"]
    whole.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    parts = [{key: value[rows] for key, value in batch.items()} for rows in ([0], [1, 2], [3])]
    losses = [diffusion_step(model, part, how)["dlm"] for part in parts]
    sum(losses).backward()
    torch.testing.assert_close(sum(losses), whole)
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, gradient, rtol=1e-3, atol=1e-4)
    assert sum(int(scored_count(part, how)) for part in parts) == int(scored_count(batch, how)) == 4 * 12


def test_a_single_view_without_weights_counts_what_it_masks():
    batch, how = packed(4), settings(complementary=False)
    assert int(scored_count(batch, how)) == int(make_views(batch, how).masked.sum()) < 48


def test_pieces_shrink_as_the_vocabulary_grows():
    model, sizes = made("llama"), []
    width = model.config.vocab_size
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.numel()))
    hidden, targets = torch.randn(9, 64), torch.arange(9)
    for elements, rows in ((4 * width, [4, 4, 1]), (width - 1, [1] * 9), (1 << 23, [9])):
        sizes.clear()
        token_nll(model, hidden, targets, MASK, elements=elements)
        assert sizes == [n * width for n in rows]


def test_losses_of_pieces_are_the_textbooks_with_the_same_gradients():
    model = made("gemma3")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 64, generator=generator, requires_grad=True)
    targets = torch.randint(0, MASK, (7,), generator=generator)
    log_p = model.lm_head(hidden).index_fill(1, torch.tensor(MASK), -torch.inf).log_softmax(1)
    expected = F.nll_loss(log_p, targets, reduction="none")
    found = token_nll(model, hidden, targets, MASK, elements=3 * model.config.vocab_size)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.sum(), [hidden, model.lm_head.weight], retain_graph=True)
    for a, b in zip(torch.autograd.grad(found.sum(), [hidden, model.lm_head.weight]), wanted, strict=True):
        torch.testing.assert_close(a, b)

    q = torch.randn(7, MASK, generator=generator).log_softmax(1)
    ids = q.topk(5).indices
    head = q.gather(1, ids)
    tail = q.scatter(1, ids, -torch.inf).logsumexp(1)
    p_tail = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
    expected = (head.exp() * (head - log_p.gather(1, ids))).sum(1) + tail.exp() * (tail - p_tail)
    found = support_kl(model, hidden, ids, head, tail, MASK, elements=2 * model.config.vocab_size)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.sum(), [hidden, model.lm_head.weight], retain_graph=True)
    for a, b in zip(torch.autograd.grad(found.sum(), [hidden, model.lm_head.weight]), wanted, strict=True):
        torch.testing.assert_close(a, b)
    both = support_losses(model, hidden, targets, ids, head, tail, MASK, elements=2 * model.config.vocab_size)
    for value, alone in zip(both, (expected, -log_p.gather(1, targets[:, None])[:, 0]), strict=True):
        torch.testing.assert_close(value, alone)
        wanted = torch.autograd.grad(alone.sum(), [hidden, model.lm_head.weight], retain_graph=True)
        given = torch.autograd.grad(value.sum(), [hidden, model.lm_head.weight], retain_graph=True)
        for a, b in zip(given, wanted, strict=True):
            torch.testing.assert_close(a, b)
    every = torch.arange(MASK).expand(7, -1)
    full = support_kl(model, hidden, every, q, torch.full((7,), -torch.inf), MASK)
    torch.testing.assert_close(full, (q.exp() * (q - log_p[:, :MASK])).sum(1))


def test_the_bound_measures_the_same_every_time_and_leaves_the_model_as_it_was():
    model, batches = made("llama").train(), [packed(2), packed(2, seed=1)]
    first = diffusion_bound(model, batches, settings(), draws=2)
    assert first == diffusion_bound(model, batches, settings(seed=5), draws=2)
    assert first != diffusion_bound(model, batches, settings(block_size=2), draws=2)
    assert model.training


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_size": 0}, "at least 1"),
        ({"weighting": "square"}, "choose none or inverse"),
        ({"weighting": "inverse"}, "complementary views"),
        ({"epsilon": 0.0}, "\\(0, 1\\]"),
        ({"epsilon": 1.0}, "leaves nothing"),
        ({"seed": -1}, "not be negative"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_mean_nothing_are_one_sentence(changes, says):
    with pytest.raises(UserError, match=says):
        settings(**changes)


def test_rows_that_cannot_be_trained_on_are_one_sentence():
    model, batch = made("llama"), packed()
    holed = batch["input_ids"].clone()
    holed[0, 3] = MASK
    with pytest.raises(UserError, match="contains the mask token"):
        diffusion_step(model, batch | {"input_ids": holed}, settings())
    with pytest.raises(UserError, match="first token of a row"):
        diffusion_step(model, batch | {"labels": batch["input_ids"]}, settings())
