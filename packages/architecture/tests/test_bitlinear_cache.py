"""`constant_weights`: a weight that has not changed is quantised once, and one that has is never taken for it."""

import copy
import io

import pytest
import torch
from bitnet_arch import BitLinear, PackedBitLinear, UserError, fake_quant_activation, fake_quant_weight, set_lambda
from bitnet_arch import kept as kept_module
from bitnet_arch.bitlinear import BitLinearLRC, constant_weights
from bitnet_arch.quant import LARGE, PIECE, ternary_weight
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


def make(granularity="tensor", bias=True, lrc=False, seed=0):
    torch.manual_seed(seed)
    layer = BitLinear(64, 32, bias=bias, granularity=granularity)
    return BitLinearLRC.random(layer, 4) if lrc else layer


X = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def count(monkeypatch):
    """Return a list that grows by one whenever a kept weight is quantised."""
    calls = []

    def counted(*arguments):
        calls.append(1)
        return ternary_weight(*arguments)

    monkeypatch.setattr(kept_module, "ternary_weight", counted)
    return calls


def plain(layer, x=X):
    """What a layer computes outside of the context: from a copy, which keeps nothing."""
    return copy.deepcopy(layer)(x)


# ----------------------------------------------------------------------------------------------- how often, and what


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda g: g.__name__)
@pytest.mark.parametrize("lrc", [False, True], ids=["plain", "lrc"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
def test_a_weight_is_quantised_once(granularity, lrc, grad, count):
    layer = make(granularity, lrc=lrc).eval()
    with grad():
        expected = layer(X)
        assert not count  # outside, nothing is kept
        with constant_weights(layer):
            assert all(torch.equal(layer(X), expected) for _ in range(5))
            assert len(count) == 1
        assert len(count) == 2  # the check on leaving
        layer(X)
        assert len(count) == 2


def test_inference_mode_leaves_nothing_that_training_cannot_use(count):
    layer = make()
    with constant_weights(layer):
        with torch.inference_mode():
            layer(X)
        layer(X).sum().backward()
        assert len(count) == 1
    assert layer.weight.grad is not None


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_values_and_gradients_are_bit_for_bit_the_same(autocast, strength):
    layer, other = make(), make()
    for each in (layer, other):
        set_lambda(each, strength)
    batches = torch.randn(3, 6, 64)
    with constant_weights(other):
        for batch in batches:  # micro-batches, whose gradients add up
            found = []
            for each in (layer, other):
                x = batch.clone().requires_grad_()
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    y = each(x)
                y.float().square().sum().backward()
                found.append((y, x.grad))
            assert torch.equal(found[0][0], found[1][0])
            assert torch.equal(found[0][1], found[1][1])
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                assert torch.equal(layer(batch), other(batch))
    assert torch.equal(layer.weight.grad, other.weight.grad)


def test_under_autocast_the_rounded_weight_is_kept_too(count):
    layer = make()
    with constant_weights(layer), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(X)
        first = layer._kept.forms[torch.bfloat16]
        layer(X)
        assert layer._kept.forms[torch.bfloat16] is first
        assert set(layer._kept.forms) == {torch.float32, torch.bfloat16}


def test_a_graph_that_is_still_to_be_run_backwards_survives_a_change_of_weight():
    layer, other = make(), make()
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    expected = other(y)
    with constant_weights(layer):
        out = layer(x)
        with torch.no_grad():
            layer.weight.add_(1.0)
        layer(x)
        out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(layer.weight.grad, other.weight.grad)


# ----------------------------------------------------------------------------------------------- changes that are seen


def optimizer_step(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    layer(X).square().sum().backward()
    optimizer.step()


def load(layer, assign=False):
    layer.load_state_dict(make(bias=False, seed=1).state_dict(), assign=assign)


def assign_data(layer):
    layer.weight.data = make(seed=1).weight.data


def assign_data_twice(layer):
    """Ends at another address or the first one, with the version that it began with."""
    for seed in (1, 2):
        layer.weight.data = torch.empty_like(layer.weight).copy_(make(seed=seed).weight)


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(-1),
    "a row": lambda layer: layer.weight[3].fill_(0.3),
    "through a detached view": lambda layer: layer.weight.detach()[3].fill_(0.3),
    "load_state_dict": load,
    "load_state_dict, assigning": lambda layer: load(layer, assign=True),
    "data assigned": assign_data,
    "data assigned twice": assign_data_twice,
    "a new parameter": lambda layer: setattr(layer, "weight", nn.Parameter(-layer.weight.detach())),
    "to float64": lambda layer: layer.double(),
    "to bfloat16": lambda layer: layer.bfloat16(),
    "transposed in place": lambda layer: setattr(layer.weight, "data", layer.weight.data.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_changed_weight_is_quantised_anew(mode, change, count):
    layer = make(bias=False).train(mode == "train")
    with constant_weights(layer):
        before = layer(X)
        with torch.no_grad():
            CHANGES[change](layer)
        x = X.to(layer.weight.dtype)
        after = layer(x)
        assert torch.equal(after, plain(layer, x))
        assert not torch.equal(after, before.to(after.dtype))
        assert len(count) == 2


def test_an_optimiser_step_is_seen():
    layer = make()
    with constant_weights(layer):
        before = layer(X)
        optimizer_step(layer)
        assert torch.equal(layer(X), plain(layer))
        assert not torch.equal(layer(X), before)


def test_lambda_is_followed():
    layer = make()
    with constant_weights(layer), torch.no_grad():
        for strength in (1.0, 0.5, 0.0, 1.0):
            set_lambda(layer, strength)
            assert torch.equal(layer(X), plain(layer))


# ------------------------------------------------------------------------------------- changes that torch does not count


def merge_in_place(layer):
    layer.weight.data += 0.1  # as PEFT merges an adapter


HIDDEN = {
    "data +=": merge_in_place,
    "data, one element": lambda layer: layer.weight.data[3, 4].fill_(9.0),
    "numpy": lambda layer: layer.weight.detach().numpy().fill(1.0),
}


@pytest.mark.parametrize("write", HIDDEN)
def test_a_write_behind_torchs_back_is_never_silent(write):
    layer = make(bias=False)
    version, address = layer.weight._version, layer.weight.data_ptr()
    layer(X)
    HIDDEN[write](layer)
    assert (layer.weight._version, layer.weight.data_ptr()) == (version, address)  # why nothing is kept without being asked
    assert torch.equal(layer(X), F.linear(fake_quant_activation(X), fake_quant_weight(layer.weight)))
    layer = make(bias=False)
    with pytest.raises(UserError, match=r"^0\.weight was changed through \.data .* change weights outside of it$"):
        written_inside(nn.Sequential(layer), layer, HIDDEN[write])
    assert layer._kept is None


def written_inside(model, layer, write):
    with constant_weights(model):
        layer(X)
        write(layer)
        layer(X)


def test_an_error_inside_is_not_hidden_by_the_check():
    layer = make()
    with pytest.raises(ZeroDivisionError):
        written_inside(layer, layer, lambda layer: merge_in_place(layer) or 1 / 0)
    assert layer._kept is None


# ------------------------------------------------------------------------------------------------ copies, files, nesting


def test_copies_and_files_hold_nothing_of_it():
    layer = make()
    names = set(layer.state_dict())
    with constant_weights(layer):
        layer(X)
        assert set(layer.state_dict()) == names
        for other in (copy.deepcopy(layer), copy.copy(layer)):
            assert other._kept is None
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        size = buffer.tell()
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        assert again._kept is None
        assert torch.equal(again(X), layer(X))
    assert size < 2 * layer.weight.nbytes


def test_a_context_inside_another_changes_nothing(count):
    layer = make()
    with constant_weights(layer):
        with constant_weights(layer):
            layer(X)
        layer(X)
        assert len(count) == 1


# ------------------------------------------------------------------------------------------- where it must stay out of it


def test_compiled_layers_compute_everything_without_a_break(count):
    layer = make()
    torch._dynamo.reset()
    with constant_weights(layer):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for _ in range(3):
            assert torch.equal(compiled(X), plain(layer))
        with torch.no_grad():
            layer.weight.mul_(-1)
        torch._dynamo.utils.counters.clear()
        assert torch.equal(compiled(X), plain(layer))
        assert not torch._dynamo.utils.counters["graph_break"]
        assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")  # nor was it compiled again
    assert not count
    torch.testing.assert_close(compiled(X), plain(layer))
    assert torch._dynamo.explain(layer)(X).graph_break_count == 0


def test_weights_that_a_transform_swaps_are_not_kept(count):
    layer = make(bias=False)
    other = make(seed=1).weight.detach()
    with constant_weights(layer):
        layer(X)
        swapped = torch.func.functional_call(layer, {"weight": other}, (X,))
        assert torch.equal(swapped, F.linear(fake_quant_activation(X), fake_quant_weight(other)))

        def forward(weight):
            return torch.func.functional_call(layer, {"weight": weight}, (X,)).sum()

        assert torch.equal(torch.func.grad(forward)(other), torch.autograd.grad(forward(w := other.clone().requires_grad_()), w)[0])
    assert len(count) == 2  # its own weight, and the check


def test_fully_sharded_models_keep_nothing(count, tmp_path):
    """FSDP gathers into the same memory without moving versions: what it holds changes without any sign."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        model = nn.Sequential(make(), nn.ReLU())
        expected = plain(model[0])
        fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        with constant_weights(model):
            assert model[0]._kept is None
            assert torch.equal(model(X), expected.relu())
            with torch.no_grad():
                model[0].weight.to_local().mul_(-1)
            assert not torch.equal(model(X), expected.relu())
        with constant_weights(model[0]):
            assert model[0]._kept is None
    finally:
        dist.destroy_process_group()
    assert not count


class NoScalars(TorchDispatchMode):
    """Refuses every operation that makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def forwards():
    """Return every kind of layer."""
    for granularity in ("tensor", "row", "group128"):
        for lrc in (False, True):
            yield make(granularity, lrc=lrc)
            yield PackedBitLinear.from_bitlinear(make(granularity, lrc=lrc))


def test_no_forward_or_backward_waits_for_the_device():
    with pytest.raises(AssertionError, match="waits"), NoScalars():  # the control
        bool(X.sum() > 0)
    for layer in forwards():
        for strength in (1.0, 0.5) if isinstance(layer, BitLinear) else (None,):
            if strength is not None:
                set_lambda(layer, strength)
            with constant_weights(layer):
                for autocast in (False, True):
                    for _ in range(2):
                        x = X.clone().requires_grad_()
                        with NoScalars(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                            layer(x).sum().backward()
                        assert x.grad.isfinite().all()
                        assert x.grad.any()


def test_layers_run_on_the_meta_device():
    """Where there are no values, nothing can read one."""
    for layer in forwards():
        if isinstance(layer, BitLinear):  # the packed ones switch autocast off, which this device does not have
            layer.to("meta")
            with constant_weights(layer):
                assert layer(X.to("meta")).shape == (6, 32)


# ------------------------------------------------------------------------------------------------- the same bits, faster


@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
@pytest.mark.parametrize("shape", [(3000, 1000), (701, 3001), (5, 2 * PIECE), (2, LARGE // 2)], ids=str)
def test_large_weights_are_quantised_to_the_same_bits(shape, granularity):
    weight = nn.Parameter(0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert weight.numel() >= LARGE or shape[0] == 5
    assert torch.equal(ternary_weight(weight, granularity), ternary_weight(weight.detach(), granularity))
