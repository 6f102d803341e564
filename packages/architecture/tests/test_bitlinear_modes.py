"""`BitLinear` against the textbook in float32, under bf16 autocast and under torch.compile."""

from contextlib import nullcontext

import pytest
import torch
from bitnet_arch import BitLinear, fake_quant_activation, fake_quant_weight, set_lambda
from torch import nn
from torch.nn import functional as F


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
