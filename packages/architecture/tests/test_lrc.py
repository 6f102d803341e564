"""LRC: covariances, solvers, layers, whole models, files."""

import copy
import itertools
import json
from dataclasses import asdict

import pytest
import torch
from bitnet_arch import (
    BitLinear,
    ConversionConfig,
    PackedBitLinear,
    TernaryForm,
    UserError,
    bitlinear_layers,
    convert_model,
    fake_quant_activation,
    fake_quant_weight,
    load_model,
    pack_model,
    quantize_weight,
    save_master,
    save_packed,
    set_lambda,
)
from bitnet_arch.bitlinear import BitLinearLRC
from bitnet_arch.families import quantized_names
from bitnet_arch.lrc.adapters import adapter_bits, as_stored, int8_adapter, layer_rank
from bitnet_arch.lrc.covariance import Covariances, Hessian, run_blocks
from bitnet_arch.lrc.directory import lrc_directory
from bitnet_arch.lrc.files import load_adapters, save_adapters
from bitnet_arch.lrc.model import LRCConfig, adapter_parameters, add_lrc, start_lrc
from bitnet_arch.lrc.solve import (
    alternate,
    fit_adapters,
    relative_error,
    relaxed_adapters,
    ternary_target,
    top_left,
)
from bitnet_arch.modeling import form_of
from bitnet_arch.norm import SubLN
from bitnet_arch.packed import PackedBitLinearLRC
from bitnet_arch.ptq.quantizers import absmean, dequantize, gptq, least_squares
from bitnet_arch.testing import SMALL_SHAPE, convert_calibrated, mean_nll, tiny_bitnet, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------- covariances


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), features=st.integers(1, 20), seed=st.integers(0, 9))
def test_sums_are_the_direct_products_however_batches_are_cut(cuts, features, seed):
    x = rand(40, features, seed=seed) * 10
    y = fake_quant_activation(x).double()
    edges = [0, *sorted(cuts), 40]
    found, syy = Covariances.zeros(features), Hessian.zeros(features)
    for start, stop in itertools.pairwise(edges):
        found.add(x[None, start:stop])
        syy.add(x[start:stop])
    wide = x.double()
    for name, direct in (("sxx", wide.T @ wide), ("sxy", wide.T @ y), ("syy", y.T @ y)):
        assert getattr(found, name).dtype == torch.float64
        torch.testing.assert_close(getattr(found, name), direct, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(syy.syy, found.syy, rtol=1e-12, atol=1e-10)


def test_sums_keep_what_float32_would_lose():
    found = Covariances.zeros(1)
    for value in (4096.0, *[0.5] * 64):
        found.add(torch.tensor([[value]]))
    assert float(found.sxx) == 4096.0**2 + 16.0
    assert float(sum((torch.tensor(v).square() for v in [0.5] * 64), torch.tensor(4096.0**2))) == 4096.0**2  # the control


SHAPE = SMALL_SHAPE
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **LAYERS, head_dim=32)),
}
FORMS = {
    "stock": {"norm": "none"},
    "subln": {"norm": "subln"},
    "subln-rows-rotated": {"norm": "subln", "granularity": "row", "rotation": True},
    "allnorm-groups": {"norm": "allnorm", "granularity": "group128"},
    "bitlinear": {"norm": "bitlinear"},
}
IDS = torch.randint(0, 128, (4, 24), generator=torch.Generator().manual_seed(0))


def make(family):
    torch.manual_seed(0)
    return MAKERS[family]().float().eval()


def converted(family="llama", form="stock"):
    return convert_calibrated(make(family), ConversionConfig(**FORMS[form]), [IDS])


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("form", ["stock", "subln-rows-rotated", "allnorm-groups"])
@pytest.mark.parametrize("family", MAKERS)
def test_blocks_see_what_they_see_in_the_whole_model(family, form):
    model = converted(family, form)
    names = quantized_names(model)
    direct = {name: Covariances.zeros(model.get_submodule(name).in_features) for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, i, name=name: direct[name].add(m.prepare(i[0])))
        for name in names
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    before, streamed = logits(model), {}
    model.train()
    run_blocks(
        model, IDS.split(1), lambda block: streamed.update(block.covariances(n for n in names if n.startswith(block.prefix)))
    )
    assert model.training
    assert torch.equal(logits(model.eval()), before)  # and the model is as it was
    assert list(streamed) == names
    for name in names:
        for key in ("sxx", "sxy", "syy"):
            torch.testing.assert_close(getattr(streamed[name], key), getattr(direct[name], key), rtol=1e-4, atol=1e-4)
    shared = streamed[names[0]] is streamed[names[1]]
    assert shared == (form != "allnorm-groups")  # with a norm in each layer they read different tensors


def test_layers_that_share_their_inputs_are_damped_once():
    model, found = converted(), {}

    def visit(block):
        names = [name for name in quantized_names(model) if name.startswith(block.prefix)]
        found.update({(name, share): sums for share in (0.0, 0.5) for name, sums in block.hessians(names, share).items()})

    run_blocks(model, [IDS], visit)
    for name in quantized_names(model):
        plain, damped = found[name, 0.0].syy, found[name, 0.5].syy
        assert torch.allclose(damped - plain, 0.5 * plain.trace() / len(plain) * torch.eye(len(plain), dtype=torch.float64)), name


def test_the_model_is_whole_again_after_an_error_in_a_visit():
    model = converted()
    before = logits(model)
    with pytest.raises(RuntimeError, match="stop"):
        run_blocks(model, [IDS], lambda block: (_ for _ in ()).throw(RuntimeError("stop")))
    assert torch.equal(logits(model), before)


# --------------------------------------------------------------------------------------------------------------- solvers


def rounded(x, levels):
    scale = x.abs().amax(dim=-1, keepdim=True) / levels
    return (x / scale).round() * scale


def problem(levels=7, out=48, features=64, tokens=4000):
    """A weight and covariances of correlated inputs, rounded to `levels` steps to each side (7: four bits)."""
    x = (
        rand(tokens, features, seed=1) @ rand(features, features, seed=2) / features**0.5 + 0.3 * rand(tokens, features, seed=3)
    ).double()
    y = rounded(x, levels)
    return rand(out, features, seed=4).double(), Covariances(sxx=x.T @ x, sxy=x.T @ y, syy=y.T @ y).regularized(1e-6)


def test_the_relaxed_start_is_the_best_where_weights_may_be_real():
    w, s = problem()
    u, v = relaxed_adapters(w, s, 6)
    best = relative_error(w, ternary_target(w, s, u, v), s, u, v)
    without = relative_error(w, ternary_target(w, s, 0 * u, 0 * v), s)
    assert best < 0.9 * without
    for seed in range(200):
        size = 10.0 ** -(seed % 4)
        du, dv = size * rand(*u.shape, seed=seed).double(), size * rand(*v.shape, seed=1000 + seed).double()
        a, b = u + du * u.std(), v + dv * v.std()
        assert relative_error(w, ternary_target(w, s, a, b), s, a, b) > best


def test_fitted_adapters_are_the_best_for_their_ternary_weight_and_equal_the_papers_form():
    w, s = problem()
    ternary = dequantize(*absmean(w, None, "tensor"))
    u, v = fit_adapters(w, ternary, s, 6)
    best = relative_error(w, ternary, s, u, v)
    for seed in range(200):
        size = 10.0 ** -(seed % 4)
        a = u + size * rand(*u.shape, seed=seed).double() * u.std()
        b = v + size * rand(*v.shape, seed=1000 + seed).double() * v.std()
        assert relative_error(w, ternary, s, a, b) > best
    # The paper's: top eigenvectors of B Sxx^-1 B^T; and the regression residual's truncated SVD in the metric of Sxx.
    b = w @ s.sxx - ternary @ s.sxy.T
    vectors = torch.linalg.eigh(b @ torch.linalg.inv(s.sxx) @ b.T).eigenvectors[:, -6:]
    torch.testing.assert_close(u @ v.T, vectors @ vectors.T @ b @ torch.linalg.inv(s.sxx), rtol=1e-8, atol=1e-8)
    half = torch.linalg.cholesky(s.sxx)
    left, values, right = torch.linalg.svd(b @ torch.linalg.inv(s.sxx) @ half)
    low = (left[:, :6] * values[:6]) @ right[:6] @ torch.linalg.inv(half)
    torch.testing.assert_close(u @ v.T, low, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(u.T @ u, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-10)


def test_the_error_is_that_of_the_outputs_themselves():
    x = rand(300, 64).double()
    y = rounded(x, 7)
    s = Covariances(sxx=x.T @ x, sxy=x.T @ y, syy=y.T @ y)
    w, u, v = rand(48, 64, seed=1).double(), rand(48, 3, seed=2).double(), rand(64, 3, seed=3).double()
    ternary = dequantize(*absmean(w, None, "tensor"))
    direct = (x @ w.T - y @ ternary.T - x @ v @ u.T).square().sum() / (x @ w.T).square().sum()
    assert relative_error(w, ternary, s, u, v) == pytest.approx(float(direct), rel=1e-9)


@pytest.mark.parametrize("how", ["exact", "randomized"])
@pytest.mark.parametrize("quantize", [absmean, least_squares, gptq])
def test_the_error_falls_with_the_rank_and_a_plain_svd_of_the_weights_is_worse(quantize, how):
    w, s = problem()
    ternary = dequantize(*quantize(ternary_target(w, s, rand(48, 1) * 0, rand(64, 1) * 0), s.syy, "tensor"))
    errors = [relative_error(w, ternary, s)]
    for rank in (4, 8, 16, 32):
        errors.append(alternate(w, s, rank, quantize, how=how).errors[-1])
        left, values, right = torch.linalg.svd(w - ternary)
        plain = relative_error(w, ternary, s, left[:, :rank] * values[:rank], right[:rank].T)
        assert errors[-1] < 0.95 * plain
    assert all(b < 0.9 * a for a, b in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("quantize", [absmean, least_squares, gptq])
def test_alternating_lowers_the_error_and_the_best_step_is_returned(quantize):
    w, s = problem()
    one, many = alternate(w, s, 8, quantize), alternate(w, s, 8, quantize, steps=6)
    assert many.errors[0] == one.errors[0]
    assert min(many.errors) < 0.97 * one.errors[0]
    assert relative_error(w, dequantize(many.codes, many.scale), s, many.u, many.v) == pytest.approx(min(many.errors))
    other = alternate(w, s, 8, quantize, start="ternary").errors[0]
    # The paper's start is the better one for quantisers that look at the metric; absmean's grid does not fit what is left over.
    assert (one.errors[0] > other) if quantize is absmean else (one.errors[0] < other)


def test_a_step_that_is_worse_is_not_returned():
    w, s = problem()
    calls = []

    def worse(weight, hessian, granularity):
        calls.append(1)
        codes, scale = absmean(weight, hessian, granularity)
        return (codes, scale) if len(calls) < 3 else (-codes, scale)

    found = alternate(w, s, 8, worse, steps=3)
    assert found.errors[2] > found.errors[1]
    assert relative_error(w, dequantize(found.codes, found.scale), s, found.u, found.v) == pytest.approx(min(found.errors))


def test_at_full_rank_nothing_is_left_and_a_ternary_weight_needs_no_correction():
    w, x = problem()[0], rand(500, 64).double()
    exact = Covariances(sxx=x.T @ x, sxy=x.T @ x, syy=x.T @ x)  # inputs that rounding leaves as they are
    assert alternate(w, exact, 48, absmean).errors[-1] < 1e-9
    assert alternate(w, exact, 40, absmean).errors[-1] > 1e-3
    ternary = 0.3 * w.sign() * (w.abs() > 0.5)
    solution = alternate(ternary, exact, 4, least_squares, start="ternary")
    assert solution.errors[-1] < 1e-9
    assert (solution.u @ solution.v.T).abs().max() < 1e-6


def test_four_bit_activations_leave_low_rank_errors_and_eight_bits_hardly_any():
    """The paper's setting against ours: what rounding takes from the inputs is what few directions can give back."""

    def lost(levels):
        w, s = problem(levels)
        nothing = torch.zeros(48, 1).double(), torch.zeros(64, 1).double()
        return relative_error(w, ternary_target(w, s, *nothing), s)

    assert lost(7) > 100 * lost(127)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_the_randomised_subspace_is_the_exact_one_where_the_spectrum_falls(shape):
    left, _, right = torch.linalg.svd(rand(*shape).double(), full_matrices=False)
    a = (left * 0.5 ** torch.arange(40).double()) @ right
    exact, sketched = top_left(a, 5), top_left(a, 5, "randomized")
    for u in (exact, sketched):
        torch.testing.assert_close(u.T @ u, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)
        torch.testing.assert_close(u @ u.T, left[:, :5] @ left[:, :5].T, rtol=0, atol=1e-7)
        assert (u.T @ left[:, :5]).diagonal().abs().min() > 1 - 1e-7  # in order
    assert not torch.equal(sketched, exact)
    flat = rand(*shape, seed=5).double()
    kept = [float((top_left(flat, 5, how).T @ flat).square().sum()) for how in ("exact", "randomized")]
    assert 0.97 * kept[0] < kept[1] <= kept[0] * (1 + 1e-12)
    torch.testing.assert_close(
        top_left(torch.zeros(9, 4).double(), 2).T @ top_left(torch.zeros(9, 4).double(), 2), torch.eye(2).double()
    )


def test_regularisation_leans_towards_the_weights_where_calibration_saw_nothing():
    w, x = rand(8, 16).double(), rand(4, 16).double()  # four tokens cannot span sixteen channels
    seen = Covariances(sxx=x.T @ x, sxy=x.T @ x, syy=x.T @ x)
    with pytest.raises(UserError, match="not positive definite"):
        fit_adapters(w, w, seen, 2)
    zero = torch.zeros(8, 1).double(), torch.zeros(16, 1).double()
    torch.testing.assert_close(ternary_target(w, seen.regularized(1e-2), *zero), w, rtol=1e-9, atol=1e-9)
    with pytest.raises(UserError, match="all zero or not finite"):
        Covariances.zeros(4).regularized(0.1)


# ---------------------------------------------------------------------------------------------------------------- layers


def layer_with(dtype="float16", **more):
    torch.manual_seed(0)
    base = BitLinear(64, 48, **more)
    return BitLinearLRC(base, rand(48, 4, seed=1) * 0.1, rand(64, 4, seed=2) * 0.1, dtype)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_layer_is_its_formula_and_packs_to_the_same(dtype):
    layer, x = layer_with(dtype), rand(3, 5, 64)
    u, v = as_stored(layer.lrc_u, dtype), as_stored(layer.lrc_v, dtype)
    expected = F.linear(fake_quant_activation(x), fake_quant_weight(layer.weight), layer.bias) + x @ v @ u.T
    torch.testing.assert_close(layer(x), expected)
    packed = PackedBitLinear.from_bitlinear(layer)
    assert isinstance(packed, PackedBitLinearLRC)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-5, atol=1e-5)
    assert set(layer.state_dict()) == {"weight", "bias", "quant_lambda", "lrc_u", "lrc_v"}
    assert set(packed.state_dict()) == {"weight", "weight_scale", "bias", "lrc_u", "lrc_v"}
    layer.set_strength(0.0)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.set_strength(0.5)
    product = BitLinear.forward(layer, x)
    assert not torch.allclose(product, layer(x), atol=1e-3)
    torch.testing.assert_close(layer(x), product + 0.5 * (x @ v @ u.T))


def test_the_correction_reads_what_rounding_loses():
    layer, x = layer_with(bias=False), torch.full((1, 64), 1e-4)
    x[0, 0] = 1.0  # an outlier beside which int8 rounds the rest to zero
    moved = x.clone()
    moved[0, 1:] = -1e-4
    plain = BitLinear.forward(layer, x)
    assert torch.equal(plain, BitLinear.forward(layer, moved))
    assert not torch.equal(layer(x), layer(moved))


def test_the_correction_reads_the_normed_and_rotated_input():
    norm = SubLN(64)
    with torch.no_grad():
        norm.weight.copy_(rand(64, seed=7))
    layer, x = layer_with(in_norm=norm, rotation=True), rand(5, 64)
    prepared = layer.prepare(x)
    assert not torch.allclose(prepared, norm(x))
    u, v = as_stored(layer.lrc_u, "float16"), as_stored(layer.lrc_v, "float16")
    torch.testing.assert_close(layer(x) - BitLinear.forward(layer, x), prepared @ v @ u.T, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 9), rank=st.integers(1, 5), seed=st.integers(0, 99), power=st.integers(-30, 12))
def test_stored_adapters_stay_as_they_are(rows, rank, seed, power):
    values = rand(rows, rank, seed=seed) * 2.0**power
    codes, scale = int8_adapter(values)
    assert (codes * scale - values).abs().max() <= 0.501 * scale.max()
    again, same = int8_adapter(codes * scale)
    assert torch.equal(again, codes)
    live = codes.abs().amax(dim=0) > 0
    assert torch.equal(same[live], scale[live])
    half = as_stored(values, "float16")
    assert torch.equal(as_stored(half, "float16"), half)


def test_only_adapters_are_trained_unless_the_base_is_asked_for():
    x, target = rand(32, 64), rand(32, 48, seed=9)

    def gradients(train_base):
        layer = layer_with()
        layer.train_base = train_base
        F.mse_loss(layer(x), target).backward()
        return layer

    frozen, free = gradients(False), gradients(True)
    assert frozen.weight.grad is None
    assert free.weight.grad.abs().max() > 0
    for layer in (frozen, free):
        assert layer.lrc_u.grad.abs().max() > 0
        assert layer.lrc_v.grad.abs().max() > 0


@pytest.mark.parametrize("packed", [False, True], ids=["master", "packed"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_training_from_u_zero_lowers_a_layers_error_and_leaves_the_base(packed, dtype):
    torch.manual_seed(0)
    base = BitLinear(64, 48, bias=False)
    x, target = rand(512, 64), F.linear(rand(512, 64), base.weight.detach())
    plain = base(x).detach()
    if packed:
        layer = PackedBitLinearLRC.random(PackedBitLinear.from_bitlinear(base), 8, dtype)
    else:
        layer = BitLinearLRC.random(base, 8, dtype)
    before = layer.weight.detach().clone()
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)  # U = 0 changes nothing yet
    F.mse_loss(layer(x), target).backward()
    assert layer.lrc_u.grad.abs().max() > 0
    assert layer.lrc_v.grad.abs().max() == 0
    first = F.mse_loss(layer(x), target).item()
    optimizer = torch.optim.Adam([layer.lrc_u, layer.lrc_v], 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
    assert F.mse_loss(layer(x), target).item() < 0.8 * first
    assert torch.equal(layer.weight.detach(), before)


def test_a_packed_layer_passes_its_masters_gradient_to_the_input():
    layer = layer_with()
    packed = PackedBitLinear.from_bitlinear(layer)
    found = []
    for module in (layer, packed):
        x = rand(6, 64).requires_grad_()
        module(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        inference = packed(rand(6, 64))
    assert torch.equal(packed(rand(6, 64).requires_grad_()), inference)


def test_a_correction_that_cannot_be_trained_or_does_not_fit_is_refused():
    base = BitLinear(64, 48)
    with pytest.raises(UserError, match="neither gets a gradient"):
        BitLinearLRC(base, torch.zeros(48, 4), torch.zeros(64, 4))
    with pytest.raises(UserError, match="neither gets a gradient"):
        PackedBitLinearLRC(PackedBitLinear.from_bitlinear(base), torch.zeros(48, 4), torch.zeros(64, 4))
    with pytest.raises(UserError, match="do not fit a layer of 48 x 64"):
        BitLinearLRC(base, rand(64, 4), rand(48, 4))
    with pytest.raises(UserError, match="not finite"):
        BitLinearLRC(base, rand(48, 4) * float("nan"), rand(64, 4))


def test_the_layer_compiles_without_a_graph_break():
    for layer in (layer_with(), layer_with("int8")):
        compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), rand(6, 64)
        compiled(x).square().sum().backward()
        torch.testing.assert_close(compiled(x), layer(x))
        assert layer.lrc_v.grad.abs().max() > 0


def test_ranks_are_numbers_or_shares_of_the_smaller_side():
    assert layer_rank(8, 576, 192) == 8
    assert layer_rank(192, 576, 192) == 192
    with pytest.raises(UserError, match=r"a rank of 193 is above what k_proj can have, a matrix of 192 x 576: choose at most 192,"):
        layer_rank(193, 576, 192, "k_proj")
    assert layer_rank(0.1, 576, 192) == 19
    assert layer_rank(0.001, 576, 192) == 1
    for bad in (0.0, 1.0, -1, 1.5, True, "8", None):
        with pytest.raises(UserError, match="lrc_rank"):
            TernaryForm(lrc_rank=bad)
    with pytest.raises(UserError, match="unknown lrc_dtype"):
        TernaryForm(lrc_rank=4, lrc_dtype="float8")
    assert TernaryForm(lrc_rank=0) == TernaryForm()
    # A square layer at a tenth of its side: 3.2 bits a weight in float16, half of it in int8.
    assert adapter_bits(100, 1000, 1000, "float16") == 3.2
    assert 1.6 < adapter_bits(100, 1000, 1000, "int8") < 1.61


# ---------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAKERS)
def test_a_corrected_model_survives_saving_and_loading(family, form, tmp_path):
    plain = converted(family, form)
    expected_form = form_of(plain.config) or TernaryForm()
    model = add_lrc(plain, [IDS], LRCConfig(rank=0.25, dtype="int8" if form == "subln" else "float16"))
    found = asdict(form_of(model.config))
    assert found == {**asdict(expected_form), "lrc_rank": 0.25, "lrc_dtype": "int8" if form == "subln" else "float16"}
    assert model.config.model_type == f"wrinklefree-{MAKERS[family]().config.model_type}"
    expected = logits(model)
    save_master(model, tmp_path / "master")
    assert torch.equal(logits(load_model(tmp_path / "master")), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "master", dtype=torch.float32)), expected)
    save_packed(model, tmp_path / "packed")
    packed = load_model(tmp_path / "packed")
    assert sum(isinstance(m, PackedBitLinearLRC) for m in packed.modules()) == 14
    again = logits(packed)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)), again)
    assert (again - expected).abs().max() < 2e-2 * expected.abs().max()
    assert torch.equal(logits(pack_model(copy.deepcopy(model))), again)
    save_packed(packed, tmp_path / "twice")
    assert torch.equal(logits(load_model(tmp_path / "twice")), again)


def test_a_stock_subln_model_and_one_without_a_correction_keep_their_ways(tmp_path):
    model = tiny_bitnet(hidden=64, ffn=96, vocab=128)
    assert model.config.model_type == "bitnet"
    corrected = add_lrc(model, [IDS], LRCConfig(rank=4))
    assert corrected.config.model_type == "wrinklefree-bitnet"
    save_packed(corrected, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(pack_model(corrected)))
    # Directories from before there was a correction have no such keys.
    save_master(converted(form="allnorm-groups"), tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    for key in ("lrc_rank", "lrc_dtype"):
        del config["ternary"][key]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load_model(tmp_path / "old")), logits(converted(form="allnorm-groups")))


def fresh(state):
    model = tiny_llama(hidden=64, ffn=192)
    model.load_state_dict(state)
    return model


def test_a_trained_model_comes_back_with_the_rank(trained):
    state, calibration, heldout, _ = trained
    original = mean_nll(fresh(state), heldout)
    found, layers = [], []
    for rank in (1, 8, 24, 0.999):  # the last is each matrix's full rank, which as a number only the smallest of them may have
        model = add_lrc(fresh(state), [calibration], LRCConfig(rank=rank), on_layer=lambda name, _: layers.append(name))
        assert layers == quantized_names(model)
        layers.clear()
        found.append(mean_nll(model, heldout))
    assert found[0] > found[1] > found[2] > found[3]
    assert found[0] > original + 0.05
    assert found[3] < original + 0.02  # of the full rank there is nothing left to correct


def test_every_choice_of_the_configuration_changes_the_solution(trained):
    state, calibration, *_ = trained

    def solved(**choices):
        solutions = {}
        add_lrc(fresh(state), [calibration], LRCConfig(rank=4, **choices), on_layer=solutions.__setitem__)
        return solutions["model.layers.0.self_attn.q_proj"]

    plain = solved()
    for choice in ({"quantizer": "absmean"}, {"start": "ternary"}, {"epsilon": 1.0}, {"decomposition": "randomized"}):
        assert not torch.equal(solved(**choice).u, plain.u), choice
    assert solved(quantizer="absmean").errors[-1] > plain.errors[-1]
    assert len(solved(steps=3).errors) == 3
    for bad, why in (
        ({"quantizer": "rtn"}, "unknown quantiser"),
        ({"steps": 0}, "steps must be"),
        ({"start": "zero"}, "unknown start"),
        ({"dtype": "float32"}, "unknown dtype"),
        ({"decomposition": "lanczos"}, "unknown decomposition"),
        ({"epsilon": float("nan")}, "epsilon must be"),
        ({"rank": 0}, "lrc_rank must be"),
        ({"quantizer": "keep", "steps": 2}, "no effect"),
    ):
        with pytest.raises(UserError, match=why):
            LRCConfig(**{"rank": 4, **bad})


@pytest.mark.parametrize("form", [None, "stock", "subln-rows-rotated"])
def test_a_rank_above_the_smallest_matrix_is_refused_and_the_model_is_as_it_was(form, tmp_path):
    """Of 64 x 64, 96 x 64 and (keys and values) 32 x 64 the last are the smallest: 32 is a rank of all, 33 of the others alone."""
    model = make("llama") if form is None else converted("llama", form)
    before = logits(model)
    named = (
        r"a rank of 33 is above what model\.layers\.0\.self_attn\.k_proj can have, a matrix of 32 x 64: choose at most 32, or a "
    )
    for attempt in (lambda: add_lrc(model, [], LRCConfig(rank=33)), lambda: start_lrc(model, 33)):
        with pytest.raises(UserError, match=named):
            attempt()
        assert torch.equal(logits(model), before)
    with pytest.raises(UserError, match=named):
        start_lrc(pack_model(converted("llama", "stock")), 33)
    if form is None:
        save_master(model, tmp_path / "float")
        with pytest.raises(UserError, match=named):
            lrc_directory(tmp_path / "float", tmp_path / "out", LRCConfig(rank=33), [])
        assert not (tmp_path / "out").exists()
    corrected = start_lrc(model, 32)
    assert {layer.lrc_u.shape[1] for _, layer in bitlinear_layers(corrected)} == {32}


def test_ternary_weights_can_be_kept_also_packed_ones(trained):
    state, calibration, heldout, _ = trained
    master = convert_model(fresh(state), ConversionConfig(norm="none"))
    floats = {name: layer.weight.detach().clone() for name, layer in bitlinear_layers(master)}
    codes = {name: quantize_weight(weight)[0] for name, weight in floats.items()}
    packed = pack_model(copy.deepcopy(master))
    bare = mean_nll(packed, heldout)
    with pytest.raises(UserError, match="is packed: pass its float weights"):
        add_lrc(packed, [calibration], LRCConfig(rank=8, quantizer="keep"))
    with pytest.raises(UserError, match=r"weights has no model\.layers\.0"):
        add_lrc(packed, [calibration], LRCConfig(rank=8, quantizer="keep"), weights={})
    corrected = add_lrc(packed, [calibration], LRCConfig(rank=8, quantizer="keep"), weights=floats)
    for name, layer in corrected.named_modules():
        if isinstance(layer, PackedBitLinearLRC):
            assert torch.equal(layer.codes(), codes[name]), name
    assert mean_nll(corrected, heldout) < bare - 0.1
    kept = add_lrc(master, [calibration], LRCConfig(rank=8, quantizer="keep"))
    assert mean_nll(kept, heldout) == pytest.approx(mean_nll(corrected, heldout), abs=0.02)
    with pytest.raises(UserError, match="has a low-rank correction already"):
        start_lrc(kept, 4)
    half = convert_model(fresh(state), ConversionConfig(norm="none"))
    set_lambda(half, 0.5)
    with pytest.raises(UserError, match=r"lambda is 0\.5"):
        add_lrc(half, [calibration], LRCConfig(rank=4))


@pytest.mark.parametrize("packed", [False, True], ids=["master", "packed"])
def test_adapters_learn_end_to_end_and_the_base_stays(trained, packed):
    state, _, heldout, ids = trained
    torch.manual_seed(0)
    model = convert_model(fresh(state), ConversionConfig(norm="none"))
    model = start_lrc(pack_model(model) if packed else model, 8)
    bare = mean_nll(model, heldout)
    others = {name: p.detach().clone() for name, p in model.state_dict().items() if ".lrc_" not in name}
    optimizer = torch.optim.AdamW(adapter_parameters(model), 5e-3)
    for _ in range(100):
        rows = torch.stack([ids[start : start + 64] for start in torch.randint(0, len(ids) - 64, (8,)).tolist()])
        loss = F.cross_entropy(model(input_ids=rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean_nll(model, heldout) < bare - 0.3
    for name, tensor in model.state_dict().items():
        assert ".lrc_" in name or torch.equal(tensor, others[name]), name


# ----------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("packed", [False, True], ids=["master", "packed"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_an_adapter_file_makes_the_base_the_corrected_model_again(dtype, packed, tmp_path):
    model = add_lrc(converted("qwen2", "subln"), [IDS], LRCConfig(rank=6, dtype=dtype))
    save_adapters(model, tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    assert {t.dtype for n, t in stored.items() if not n.endswith("scale")} == {getattr(torch, dtype)}
    numbers = sum(p.numel() for p in adapter_parameters(model))
    assert sum(t.nbytes for n, t in stored.items() if not n.endswith("scale")) == numbers * (2 if dtype == "float16" else 1)
    bare = converted("qwen2", "subln")
    for (_, layer), (_, solved) in zip(bitlinear_layers(bare), bitlinear_layers(model), strict=True):
        layer.weight = torch.nn.Parameter(solved.weight.detach().clone())
    assert not torch.equal(logits(bare), logits(model))
    if packed:
        bare, model = pack_model(bare), pack_model(model)
    with_adapters = load_adapters(bare, tmp_path / "a.safetensors")
    assert torch.equal(logits(with_adapters), logits(model))
    assert form_of(with_adapters.config) == TernaryForm(norm="subln", lrc_rank=6, lrc_dtype=dtype, packed=packed)
    assert torch.equal(logits(load_adapters(with_adapters, tmp_path / "a.safetensors")), logits(model))  # again, in place of itself


def test_files_that_do_not_belong_are_refused_in_a_sentence(tmp_path):
    file = tmp_path / "a.safetensors"
    model = start_lrc(converted(), 4)
    save_adapters(model, file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]
    with pytest.raises(UserError, match="belongs to another model"):
        load_adapters(converted("qwen3"), file)
    changed = converted()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0].neg_()  # the same shapes, other codes
    with pytest.raises(UserError, match="belongs to another model"):
        load_adapters(changed, file)
    scaled = converted()
    with torch.no_grad():
        scaled.model.layers[1].mlp.up_proj.weight.mul_(3.0)  # the same codes, another scale
    with pytest.raises(UserError, match="belongs to another model"):
        load_adapters(scaled, file)
    with pytest.raises(UserError, match="does not exist"):
        load_adapters(converted(), tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"end in \.safetensors"):
        save_adapters(model, tmp_path / "a.bin")
    with pytest.raises(UserError, match="no low-rank correction to save"):
        save_adapters(converted(), file)
    whole = file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated or damaged"):
        load_adapters(converted(), tmp_path / "cut.safetensors")
    state = load_file(file)
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="no adapter file"):
        load_adapters(converted(), tmp_path / "b.safetensors")

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    name = "model.layers.0.mlp.up_proj.lrc_u"
    for broken, words, why in (
        ({k: v for k, v in state.items() if k != name}, metadata, "has no 'model.layers.0.mlp.up_proj.lrc_u'"),
        ({**state, "extra": torch.zeros(1)}, metadata, "holds 'extra'"),
        ({**state, name: state[name][:, :2].contiguous()}, metadata, "contradicts itself on the rank"),
        ({**state, name: torch.full_like(state[name], float("nan"))}, metadata, "up_proj.lrc_u that are not finite"),
        (state, {**metadata, "form": '[4, "float8"]'}, "names no rank and dtype"),
        (state, {**metadata, "form": "nonsense"}, "names no rank and dtype"),
    ):
        save_file(broken, tmp_path / "c.safetensors", words)
        with pytest.raises(UserError, match=why):
            load_adapters(converted(), tmp_path / "c.safetensors")
