"""Packed layers on `bitnet-kernels` against the same layers in plain torch."""

import copy
import gc
import json
import os
import subprocess
import sys

import bitnet_kernels
import pytest
import torch
from bitnet_arch import BitLinear, PackedBitLinear, SubLN, UserError, kernel_ops
from bitnet_arch.bitlinear import BitLinearLRC
from bitnet_arch.kernel_ops import ternary_linear, use_kernels
from torch.utils._python_dispatch import TorchDispatchMode

OPERATOR = torch.ops.bitnet.ternary_linear.default
CORRECTION = torch.ops.bitnet.low_rank_corrected.default


@pytest.fixture(autouse=True)
def _kernels():
    before = kernel_ops._switch
    use_kernels("on")
    yield
    use_kernels(before)


@pytest.fixture
def packings(monkeypatch):
    """Return a list that grows by one whenever a weight is brought into the kernels' layout."""
    made = []
    pack = kernel_ops._pack
    monkeypatch.setattr(kernel_ops, "_pack", lambda *arguments: made.append(1) or pack(*arguments))
    return made


class Calls(TorchDispatchMode):
    """Counts calls of an operator."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.count = operator, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is self.operator
        return func(*args, **(kwargs or {}))


def layer(granularity="tensor", features=96, out=32, bias=True, **options):
    torch.manual_seed(0)
    return PackedBitLinear.from_bitlinear(BitLinear(features, out, bias=bias, granularity=granularity, **options))


def in_torch(call):
    use_kernels("off")
    try:
        return call()
    finally:
        use_kernels("on")


def calls_of(call, operator=OPERATOR):
    with Calls(operator) as calls:
        call()
    return calls.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
def test_results_are_those_of_torch(granularity, dtype):
    for features, out, bias, shape in [(576, 64, False, (1,)), (100, 4, True, (2, 3)), (300, 20, True, ()), (64, 32, False, (0,))]:
        packed = layer(granularity, features, out, bias)
        x = torch.randn(*shape, features, generator=torch.Generator().manual_seed(1)).to(dtype)
        with torch.no_grad():
            expected, found = in_torch(lambda p=packed, x=x: p(x)), packed(x)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        if granularity == "group128" and found.numel():
            bound = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 1e-5)  # one step of the dtype
            assert (found - expected).abs().max() <= bound * expected.abs().max()
        else:
            assert torch.equal(found, expected)


def test_views_are_read_as_what_they_are():
    packed, x = layer(bias=False), torch.randn(96, 5)
    with torch.no_grad():
        assert torch.equal(packed(x.T), packed(x.T.contiguous()))
        wide = torch.randn(4, 192)
        assert torch.equal(packed(wide[:, ::2]), packed(wide[:, ::2].contiguous()))


@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
def test_gradients_are_those_of_torch(granularity):
    packed = layer(granularity, in_norm=SubLN(96))
    x, cotangent = torch.randn(2, 3, 96), torch.randn(2, 3, 32)

    def gradient():
        y = x.clone().requires_grad_()
        packed(y).backward(cotangent)
        return y.grad

    found, expected = gradient(), in_torch(gradient)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        kept = packed(x)
    assert torch.equal(packed(x.clone().requires_grad_()), kept)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("gradient", [False, True], ids=["", "gradient"])
def test_the_operator_is_a_good_one(granularity, bias, gradient):
    packed = layer(granularity, bias=bias)
    x = torch.randn(2, 3, 96, requires_grad=gradient)
    found = torch.library.opcheck(OPERATOR, (x, packed.weight, packed.weight_scale, packed.bias))
    assert len(found) == 4  # schema, autograd's registration, fake tensors, compiled with dynamic shapes
    assert set(found.values()) == {"SUCCESS"}


def test_a_compiled_layer_is_one_graph_that_holds_the_operator():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    packed, x = layer(), torch.randn(4, 96)
    with torch.no_grad():
        assert torch.equal(torch.compile(packed, fullgraph=True, backend=backend)(x), packed(x))
    assert sum(node.target in (OPERATOR, OPERATOR.overloadpacket) for node in graphs[0].graph.nodes) == 1
    y = x.clone().requires_grad_()
    torch.compile(packed, fullgraph=True, backend="aot_eager")(y).sum().backward()
    z = x.clone().requires_grad_()
    packed(z).sum().backward()
    torch.testing.assert_close(y.grad, z.grad)


@pytest.mark.slow
def test_inductor_compiles_a_layer():
    packed, x = layer(in_norm=SubLN(96)), torch.randn(4, 96)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(packed, fullgraph=True)(x), packed(x))


def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others():
    packed, x = layer(), torch.randn(3, 96)
    with torch.no_grad():
        expected = packed(x)
        x[1, 7] = float("nan")
        x[2, 7] = float("inf")
        y = packed(x)
    assert torch.equal(y[0], expected[0])
    assert y[1:].isnan().all()


# --------------------------------------------------------------------------------------------------------- when it is used


def test_the_switch_decides():
    packed, x = layer(), torch.randn(2, 96)
    assert calls_of(lambda: packed(x)) == 1
    use_kernels("off")
    assert calls_of(lambda: packed(x)) == 0
    use_kernels("auto")
    assert calls_of(lambda: packed(x)) == (bitnet_kernels.isa() != "scalar")
    with pytest.raises(UserError, match="one of auto, on, off, not 'maybe'"):
        use_kernels("maybe")


def test_automatically_nothing_is_slower_than_torch():
    """The scalar kernels are a reference."""
    before = bitnet_kernels.isa()
    bitnet_kernels.use_isa("scalar")
    try:
        use_kernels("auto")
        packed, x = layer(), torch.randn(2, 96)
        assert calls_of(lambda: packed(x)) == 0
        use_kernels("on")
        assert calls_of(lambda: packed(x)) == 1
    finally:
        bitnet_kernels.use_isa(before)


def test_transforms_of_torch_func_stay_in_torch():
    packed, x, cotangent = layer(), torch.randn(3, 96), torch.randn(3, 32)
    assert calls_of(lambda: torch.func.vmap(packed)(x)) == 0
    y = x.clone().requires_grad_()
    packed(y).backward(cotangent)
    torch.testing.assert_close(torch.func.grad(lambda x: (packed(x) * cotangent).sum())(x), y.grad)


SCRIPT = """
import sys
sys.modules["bitnet_kernels"] = None
import torch
from bitnet_arch import BitLinear, PackedBitLinear, UserError, kernel_ops
torch.manual_seed(0)
packed = PackedBitLinear.from_bitlinear(BitLinear(96, 32, bias=True))
print(packed(torch.randn(2, 96)).tolist())
try:
    kernel_ops.use_kernels("on")
except UserError as error:
    print(error)
"""


def test_without_the_package_layers_give_the_same():
    environment = {name: value for name, value in os.environ.items() if name != "WF_KERNELS"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    numbers, refusal = done.stdout.splitlines()
    packed = layer()
    assert json.loads(numbers) == packed(torch.randn(2, 96)).tolist()
    assert refusal == "WF_KERNELS=on needs the package bitnet-kernels: install bitnet-arch[kernels]"


def test_a_variable_that_says_something_else_is_refused_when_a_layer_is_built(monkeypatch):
    monkeypatch.setattr(kernel_ops, "_switch", "yes")
    with pytest.raises(UserError, match="WF_KERNELS is one of auto, on, off, not 'yes'"):
        layer()


# -------------------------------------------------------------------------------------------------------- the kept layout


def test_the_layout_is_made_once_and_not_saved(packings):
    packed, x = layer(), torch.randn(2, 96)
    names = set(packed.state_dict())
    y = packed(x)
    packed(torch.randn(7, 96))
    assert len(packings) == 1
    assert set(packed.state_dict()) == names
    assert torch.equal(copy.deepcopy(packed)(x), y)
    assert len(packings) == 2


@pytest.mark.parametrize("how", ["in place", "scale in place", "scale replaced", "loaded", "assigned", "data", "data twice"])
def test_a_changed_weight_is_noticed(how):
    packed, x = layer(bias=False), torch.randn(2, 96)
    other = torch.manual_seed(7) and PackedBitLinear.from_bitlinear(BitLinear(96, 32))
    with torch.no_grad():
        before = packed(x)
        match how:
            case "in place":
                packed.weight.copy_(other.weight)
            case "scale in place":
                packed.weight_scale.mul_(2)
            case "scale replaced":
                for factor in (1.5, 1.25, 3.0):  # memory that was freed may be given out again
                    packed.weight_scale = packed.weight_scale * factor
                    packed(x)
            case "loaded" | "assigned":
                state = packed.state_dict() | {"weight": other.weight.clone()}
                packed.load_state_dict(state, assign=how == "assigned")
            case "data":
                packed.weight.data = other.weight.clone()
            case "data twice":
                packed.weight.data = packed.weight.clone()
                packed(x)
                packed.weight.data = other.weight.clone()
        found, expected = packed(x), in_torch(lambda: packed(x))
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


def test_the_layout_goes_with_the_layer():
    gc.collect()
    before = len(kernel_ops._prepared)
    packed = layer()
    packed(torch.randn(2, 96))
    assert len(kernel_ops._prepared) == before + 1
    del packed
    gc.collect()
    assert len(kernel_ops._prepared) == before


def test_codes_that_are_damaged_are_refused():
    packed = layer()
    packed.weight[3, 5] |= 0b1100
    with pytest.raises(UserError, match="holds a code outside"):
        packed(torch.randn(2, 96))


def test_weights_made_in_inference_mode_stay_in_torch():
    """They do not count their changes."""
    with torch.inference_mode():
        packed, x = layer(), torch.randn(2, 96)
        assert calls_of(lambda: packed(x)) == 0
        ordinary = layer().weight
    assert ordinary.is_inference()
    packed = layer()
    with torch.inference_mode():
        assert calls_of(lambda: packed(torch.randn(2, 96))) == 1


# --------------------------------------------------------------------------------------------------- low-rank correction


def corrected(lrc_dtype):
    torch.manual_seed(0)
    master = BitLinearLRC.random(BitLinear(96, 32), 5, lrc_dtype)
    master.lrc_u.data.normal_(std=0.1)
    return PackedBitLinear.from_bitlinear(master)


@pytest.mark.parametrize("lrc_dtype", ["float16", "int8"])
def test_a_low_rank_correction_is_that_of_torch(lrc_dtype):
    packed, x = corrected(lrc_dtype), torch.randn(2, 3, 96)
    with torch.no_grad():
        expected, found = in_torch(lambda: packed(x)), packed(x)
        plain = ternary_linear(x, packed.weight, packed.weight_scale, packed.bias)
        assert calls_of(lambda: packed(x), CORRECTION) == 1
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (found - plain).abs().max() > 1e-2
    torch.library.opcheck(CORRECTION, (plain, x, packed.lrc_u.detach(), packed.lrc_v.detach(), lrc_dtype))


def test_adapters_are_trained_and_followed():
    packed, x, target = corrected("float16"), torch.randn(8, 96), torch.randn(8, 32)
    with torch.no_grad():
        kept = packed(x)
    assert torch.equal(packed(x).detach(), kept)  # a gradient changes no value
    optimizer, losses = torch.optim.Adam([packed.lrc_u, packed.lrc_v], 1e-2), []
    for _ in range(5):
        with torch.no_grad():
            losses.append(float((packed(x) - target).square().mean()))
            torch.testing.assert_close(packed(x), in_torch(lambda: packed(x)))
        optimizer.zero_grad()
        (packed(x) - target).square().mean().backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


def test_lower_precision_is_corrected_in_torch():
    packed, x = corrected("float16"), torch.randn(8, 96)
    with torch.no_grad():
        assert calls_of(lambda: packed(x.bfloat16()), CORRECTION) == 0
        with torch.autocast("cpu", torch.bfloat16):
            assert calls_of(lambda: packed(x), CORRECTION) == 0


def test_a_compiled_correction_is_one_graph():
    packed, x = corrected("int8"), torch.randn(4, 96)
    with torch.no_grad():
        assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))


@pytest.mark.parametrize("shape", [(3, 128), (4000, 512), (3, 32), (), (128,), (96, 3)], ids=str)
def test_an_input_of_another_width_is_refused_before_it_is_read(shape):
    """The kernels get addresses: without this they would read and write beyond."""
    packed, adapted = layer(), corrected("float16")
    for x in (torch.randn(shape), torch.randn(shape, requires_grad=True)):
        with pytest.raises(UserError, match=r"^x: floating point \[\.\.\., 96\] is wanted"):
            packed(x)
        with torch.no_grad(), pytest.raises((UserError, RuntimeError)):
            adapted(x)
    with pytest.raises(Exception, match=r"is wanted, not"):
        torch.compile(packed, backend="aot_eager", fullgraph=True)(torch.randn(shape))


def test_the_operators_refuse_what_does_not_fit():
    packed = layer()
    with pytest.raises(UserError, match=r"^bias: \[32\] is wanted, not \[31\]"):
        ternary_linear(torch.randn(2, 96), packed.weight, packed.weight_scale, torch.zeros(31))
    with pytest.raises(UserError, match=r"^x: floating point"):
        ternary_linear(torch.zeros(2, 96, dtype=torch.int64), packed.weight, packed.weight_scale)
    y, x, u, v = torch.zeros(2, 32), torch.randn(2, 96), torch.randn(32, 4), torch.randn(96, 4)
    good = kernel_ops.low_rank_corrected(y, x, u, v, "float16")
    assert good.shape == y.shape
    for wrong in (
        (y, x.bfloat16(), u, v),
        (y.double(), x, u, v),
        (y[:, :8], x, u, v),
        (y[:1], x, u, v),
        (y, x[:, :64], u, v),
        (y, x, u[:, :3], v),
        (y, x, u[0], v),
    ):
        with pytest.raises(UserError, match=r"wanted"):
            kernel_ops.low_rank_corrected(*wrong, "float16")


def test_a_correction_says_that_it_has_no_gradient():
    y, x, u, v = torch.zeros(2, 32), torch.randn(2, 96, requires_grad=True), torch.randn(32, 4), torch.randn(96, 4)
    with pytest.raises(UserError, match="no gradient"):
        kernel_ops.low_rank_corrected(y, x, u, v, "float16").sum().backward()
