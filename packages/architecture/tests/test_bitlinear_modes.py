"""`BitLinear` against the textbook in float32, under bf16 autocast and under torch.compile."""

from contextlib import nullcontext

import pytest
import torch
from bitnet_arch import BitLinear, PackedBitLinear, SubLN, UserError, fake_quant_activation, fake_quant_weight, set_lambda
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


def textbook(x, weight):
    """BitNet b1.58, figure 3 of the training tips, written out; statistics and codes in float32."""
    w, a = weight.float(), x.float()
    beta = w.abs().mean().clamp(min=1e-5)
    wq = (w / beta).round().clamp(-1, 1) * beta
    alpha = a.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    aq = (a * 127 / alpha).round().clamp(-128, 127) * alpha / 127
    return F.linear(x + (aq.to(x.dtype) - x).detach(), weight + (wq.to(weight.dtype) - weight).detach())


MODES = {
    "float32": (lambda f: f, nullcontext, 1e-5),
    "autocast": (lambda f: f, lambda: torch.autocast("cpu", torch.bfloat16), 2e-2),
    "compiled": (lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"), nullcontext, 1e-5),
    "compiled-autocast": (
        lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        2e-2,
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_five_steps_follow_the_textbook(mode):
    wrap, context, tolerance = MODES[mode]
    torch.manual_seed(0)
    layer = BitLinear(64, 32, bias=False)
    weight = nn.Parameter(layer.weight.detach().clone())
    forward = wrap(layer)
    ours, theirs = torch.optim.SGD(layer.parameters(), 0.05), torch.optim.SGD([weight], 0.05)
    for step in range(5):
        x, target = torch.randn(8, 64, requires_grad=True), torch.randn(8, 32)
        y = x.detach().clone().requires_grad_()
        with context():
            a, b = forward(x), textbook(y, weight)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"forward, step {step}")
        for optimizer, out in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            F.mse_loss(out.float(), target).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=tolerance, atol=tolerance, msg=f"input gradient, step {step}")
        torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=tolerance, atol=tolerance, msg=f"gradient, step {step}")
        # Both go on from the same point: a code at a rounding edge must not decide the rest.
        ours.step()
        with torch.no_grad():
            weight.copy_(layer.weight)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_compiled_layer_has_no_graph_break_at_any_strength(strength):
    torch.manual_seed(0)
    layer = BitLinear(64, 32, in_norm=None, granularity="group128")
    set_lambda(layer, strength)
    x = torch.randn(4, 64)
    explained = torch._dynamo.explain(layer)(x)
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_a_compiled_layer_follows_lambda():
    torch.manual_seed(0)
    layer = BitLinear(64, 32)
    compiled = torch.compile(layer, backend="aot_eager")
    x = torch.randn(4, 64)
    for strength in (1.0, 0.0, 0.5):
        set_lambda(layer, strength)
        torch.testing.assert_close(compiled(x), layer(x))


def test_forward_mode_goes_straight_through():
    torch.manual_seed(0)
    layer = BitLinear(24, 12, bias=False)
    weight, dw = layer.weight.detach(), torch.randn(12, 24)
    x, dx = torch.randn(5, 24), torch.randn(5, 24)

    def forward(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    _, tangent = torch.func.jvp(forward, (x, weight), (dx, dw))
    expected = F.linear(dx, fake_quant_weight(weight)) + F.linear(fake_quant_activation(x), dw)
    torch.testing.assert_close(tangent, expected)
    # And it is the transpose of the backward.
    cotangent = torch.randn(5, 12)
    _, vjp = torch.func.vjp(forward, x, weight)
    gx, gw = vjp(cotangent)
    torch.testing.assert_close((tangent * cotangent).sum(), (gx * dx).sum() + (gw * dw).sum())


# ------------------------------------------------------------------------------------------------------------- packed


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
def test_a_packed_layer_passes_the_gradient_that_its_master_passes(granularity, autocast):
    torch.manual_seed(0)
    master = BitLinear(256, 32, granularity=granularity, in_norm=SubLN(256), rotation=True)
    packed = PackedBitLinear.from_bitlinear(master)
    x, cotangent = torch.randn(6, 256), torch.randn(6, 32)
    found = []
    for layer in (master, packed):
        y = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(y)
        out.backward(cotangent.to(out.dtype))
        found.append((out.detach(), y.grad))
    torch.testing.assert_close(found[1][1], found[0][1], **({"rtol": 2e-2, "atol": 2e-2} if autocast else {}))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(packed(x), found[1][0])  # a gradient changes no value


def test_layers_below_a_packed_one_are_trained_through_it():
    torch.manual_seed(0)
    packed, below = PackedBitLinear.from_bitlinear(BitLinear(64, 32)), nn.Linear(64, 64)
    target, x = torch.randn(16, 32), torch.randn(16, 64)
    optimizer = torch.optim.Adam(below.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(packed(below(x)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_gradient_costs_nothing_where_none_is_wanted():
    packed = PackedBitLinear.from_bitlinear(BitLinear(64, 32))
    flops = {}
    for wanted in (False, True):
        with FlopCounterMode(display=False) as counter:
            y = packed(torch.randn(6, 64, requires_grad=wanted))
            if wanted:
                y.sum().backward()
        flops[wanted] = counter.get_total_flops()
    assert flops[False] == 2 * 6 * 64 * 32
    assert flops[True] >= 2 * flops[False]  # in plain torch, a third product gives the gradient its value


def test_damaged_codes_are_refused_when_they_are_loaded():
    packed = PackedBitLinear.from_bitlinear(BitLinear(64, 32))
    state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
    packed.load_state_dict(state)
    state["weight"][3, 5] |= 0b1100
    for assign in (False, True):
        with pytest.raises(UserError, match="holds a code outside"):
            packed.load_state_dict(state, assign=assign)


def test_a_compiled_packed_layer_has_no_graph_break():
    torch.manual_seed(0)
    packed = PackedBitLinear.from_bitlinear(BitLinear(64, 32, granularity="row"))
    x = torch.randn(4, 64, requires_grad=True)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), packed(x))
