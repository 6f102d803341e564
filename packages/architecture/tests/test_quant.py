import pytest
import torch
from bitnet_arch import (
    BitLinear,
    PackedBitLinear,
    UserError,
    fake_quant_activation,
    fake_quant_weight,
    get_lambda,
    lambda_schedule,
    quantize_activation,
    quantize_weight,
    set_lambda,
)
from bitnet_arch.packing import pack_codes, unpack_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers.integrations import bitnet as stock


def textbook(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """BitNet b1.58, figure 3 of the training tips, written out."""
    beta = weight.abs().mean().clamp(min=1e-5)
    w = weight + ((weight / beta).round().clamp(-1, 1) * beta - weight).detach()
    alpha = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    q = x + ((x * 127 / alpha).round().clamp(-128, 127) * alpha / 127 - x).detach()
    return F.linear(q, w)


def test_five_optimizer_steps_follow_the_textbook():
    torch.manual_seed(0)
    layer = BitLinear(24, 12, bias=False)
    weight = nn.Parameter(layer.weight.detach().clone())
    ours, theirs = torch.optim.SGD(layer.parameters(), 0.1), torch.optim.SGD([weight], 0.1)
    for step in range(5):
        x, target = torch.randn(7, 24), torch.randn(7, 12)
        a, b = F.mse_loss(layer(x), target), F.mse_loss(textbook(x, weight), target)
        for optimizer, loss in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(a, b, msg=f"step {step}")
    torch.testing.assert_close(layer.weight, weight)


def test_fake_quant_equals_stock():
    torch.manual_seed(1)
    w, x = torch.randn(33, 65), torch.randn(9, 65)
    raw_weight = getattr(stock.WeightQuant.forward, "__wrapped__", stock.WeightQuant.forward)
    raw_activation = getattr(stock.ActQuant.forward, "__wrapped__", stock.ActQuant.forward)
    torch.testing.assert_close(fake_quant_weight(w), raw_weight(None, w), rtol=2e-7, atol=0)
    assert torch.equal(fake_quant_activation(x), raw_activation(None, x))


def test_gaussian_weights_have_the_published_code_statistics():
    torch.manual_seed(0)
    w = torch.randn(512, 512)
    codes, scale = quantize_weight(w)
    assert (codes == 0).float().mean().item() == pytest.approx(0.309, abs=0.005)
    assert ((w - codes * scale).pow(2).sum() / w.pow(2).sum()).item() == pytest.approx(0.263, abs=0.005)


def test_rounding_is_half_to_even():
    w = torch.tensor([[0.5, -0.5, 1.5, 1.5]])  # absmean is exactly 1
    assert quantize_weight(w)[0].tolist() == [[0, 0, 1, 1]]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000))
def test_quantizer_is_idempotent_scale_equivariant_and_odd(rows, columns, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, _ = quantize_weight(w)
    assert torch.equal(quantize_weight(4 * w)[0], codes)
    assert torch.equal(quantize_weight(-w)[0], -codes)
    q, s = quantize_activation(w)
    assert torch.equal(quantize_activation(q * s)[0], q)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 10_000))
def test_pack_round_trip_equals_stock_and_leaves_the_argument(quarter, columns, seed):
    codes = torch.randint(-1, 2, (4 * quarter, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    before = codes.clone()
    packed = pack_codes(codes)
    assert torch.equal(codes, before)
    assert torch.equal(packed, stock.pack_weights(codes.clone()))
    assert torch.equal(unpack_codes(packed), codes)


def test_golden_packed_bytes():
    codes = torch.tensor([[-1, 0], [0, 1], [1, -1], [1, 1]], dtype=torch.int8)
    assert pack_codes(codes).tolist() == [[0b10_10_01_00, 0b10_00_10_01]]


@pytest.mark.parametrize("shape", [(4, 1), (12, 7), (192, 576), (576, 1536), (8, 6912)], ids=str)
def test_integer_forward_equals_fake_quant(shape):
    torch.manual_seed(0)
    layer = BitLinear(shape[1], shape[0], bias=True)
    x = torch.randn(3, 5, shape[1]) * 10
    y = layer(x)
    packed = PackedBitLinear.from_bitlinear(layer)(x)
    assert (packed - y).abs().max() <= 1e-5 * y.abs().max()


def test_integer_forward_is_exact_on_extreme_codes():
    codes = torch.ones(4, 132_104, dtype=torch.int8)
    y = PackedBitLinear(codes, torch.tensor(1.0))(torch.ones(1, 132_104))
    torch.testing.assert_close(y, torch.full((1, 4), 132_104.0), rtol=1e-6, atol=0)
    with pytest.raises(UserError, match="exact integer limit"):
        PackedBitLinear(torch.ones(4, 132_105, dtype=torch.int8), torch.tensor(1.0))


def test_lambda_is_state_of_the_model():
    torch.manual_seed(0)
    a, b = BitLinear(16, 8), BitLinear(16, 8)
    x = torch.randn(2, 16)
    set_lambda(a, 0.0)
    torch.testing.assert_close(a(x), F.linear(x, a.weight, a.bias))
    assert get_lambda(b) == 1.0
    set_lambda(a, 0.25)
    b.load_state_dict(a.state_dict())
    assert get_lambda(b) == 0.25
    assert torch.equal(a(x), b(x))
    full = F.linear(x + 0.25 * (fake_quant_activation(x) - x), a.weight + 0.25 * (fake_quant_weight(a.weight) - a.weight), a.bias)
    torch.testing.assert_close(a(x), full)
    with pytest.raises(UserError, match="lambda"):
        set_lambda(a, 1.5)
    with pytest.raises(UserError, match="cannot be packed"):
        PackedBitLinear.from_bitlinear(a)
    set_lambda(a, 0.25)
    a.quant_lambda.fill_(1.0)  # around set_lambda: the forward still uses 0.25, and saving must know
    assert get_lambda(a) == 0.25


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid"])
def test_lambda_schedules_rise_from_zero_to_one(kind):
    values = [lambda_schedule(kind, step, 100) for step in range(120)]
    assert values[0] == pytest.approx(0.0, abs=1e-9)
    assert values == sorted(values)
    assert values[50] == pytest.approx(0.5)
    assert set(values[100:]) == {1.0}
    assert lambda_schedule("constant", 0, 100) == 1.0
    with pytest.raises(UserError, match="unknown lambda schedule"):
        lambda_schedule("cubic", 0, 10)


def test_the_fake_quantisers_give_codes_times_scale_bit_for_bit_also_with_a_gradient():
    torch.manual_seed(0)
    weight = torch.randn(48, 33, requires_grad=True)
    codes, scale = quantize_weight(weight.detach())
    assert torch.equal(fake_quant_weight(weight), codes * scale)
    x = torch.randn(5, 33, requires_grad=True)
    assert torch.equal(fake_quant_activation(x), fake_quant_activation(x.detach()))
    # Control: the usual form of the straight-through estimator rounds twice.
    assert not torch.equal(weight + (codes * scale - weight).detach(), codes * scale)


def test_per_sample_gradients_through_the_quantisers():
    torch.manual_seed(0)
    weight, xs = torch.randn(6, 8), torch.randn(3, 8)

    def loss(weight, x):
        return (fake_quant_activation(x) @ fake_quant_weight(weight).T).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, xs)
    for row, x in zip(together, xs, strict=True):
        leaf = weight.clone().requires_grad_()
        loss(leaf, x).backward()
        torch.testing.assert_close(row, leaf.grad)
