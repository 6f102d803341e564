"""Post-training ternary: every quantiser against brute force and its textbook, then whole models."""

import pydoc_data.topics

import pytest
import torch
from bitnet_arch import (
    ConversionConfig,
    PackedBitLinear,
    UserError,
    bitlinear_layers,
    convert_model,
    fake_quant_activation,
    load_float_model,
    load_model,
    load_tokenizer,
    pack_model,
    quantize_weight,
    resolve_pretrained,
    save_packed,
    set_lambda,
)
from bitnet_arch.ptq.model import quantize_model
from bitnet_arch.ptq.quantizers import (
    QUANTIZERS,
    absmean,
    dequantize,
    fit_scale,
    gptq,
    least_squares,
    master_weight,
    quantizer,
)
from bitnet_arch.quant import absmean_scale, expand_scale
from bitnet_arch.testing import mean_nll, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

GRANULARITIES = ("tensor", "row", "group128")
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hessian(columns, seed=1, tokens=600):
    """The covariance of correlated inputs with a few large channels."""
    mixed = matrix(tokens, columns, seed) @ matrix(columns, columns, seed + 1) / columns**0.5 + matrix(tokens, columns, seed + 2)
    mixed[:, ::17] *= 4
    found = mixed.double().T @ mixed.double()
    return found + 0.01 * found.diagonal().mean() * torch.eye(columns)


def error(weight, found, metric=None):
    rest = weight.double() - dequantize(*found)
    metric = torch.eye(weight.shape[1], dtype=torch.float64) if metric is None else metric
    return float(((rest @ metric) * rest).sum() / ((weight.double() @ metric) * weight.double()).sum())


# ------------------------------------------------------------------------------------------------------ the quantisers


def test_relative_errors_on_gaussian_weights_are_the_known_ones():
    w = matrix(512, 512)
    assert error(w, absmean(w, None, "tensor")) == pytest.approx(0.263, abs=0.003)
    codes, _ = quantize_weight(w)
    scale = (w * codes).sum() / codes.square().sum()
    assert error(w, (codes, scale)) == pytest.approx(0.213, abs=0.003)  # absmean's codes with the best scale
    assert error(w, least_squares(w, None, "tensor")) == pytest.approx(0.1905, abs=0.003)


@settings(deadline=None, max_examples=40)
@given(columns=st.integers(1, 9), seed=st.integers(0, 99), kind=st.sampled_from(("row", "group128")))
def test_least_squares_is_the_best_of_all_ternary_vectors(columns, seed, kind):
    w = matrix(1, columns, seed)
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * columns).reshape(-1, columns)
    gain = (every @ w[0].double()).clamp(min=0).square() / every.square().sum(dim=1).clamp(min=1)
    best = float(w.double().square().sum() - gain.max())
    codes, scale = least_squares(w, None, kind)
    assert float((w - dequantize(codes, scale)).square().sum()) == pytest.approx(best, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", QUANTIZERS)
def test_what_a_quantiser_returns_has_the_contracts_types_and_is_kept_by_a_master(method, granularity):
    w, h = matrix(12, 300), hessian(300)
    w[3] = 0.0
    codes, scale = quantizer(method)(w, h, granularity)
    assert codes.dtype == torch.int8
    assert codes.shape == w.shape
    assert set(codes.unique().tolist()) <= {-1, 0, 1}
    assert scale.dtype == torch.float32
    assert scale.shape == absmean_scale(w, granularity).shape
    assert (scale > 0).all()
    again, kept = quantize_weight(master_weight(codes, scale, granularity), granularity)
    assert torch.equal(again, codes)
    live = expand_scale(scale, 300).expand(12, 300)[codes != 0]  # where all codes are zero, no master can keep the scale
    torch.testing.assert_close(expand_scale(kept, 300).expand(12, 300)[codes != 0], live, rtol=1e-6, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_each_method_that_looks_at_more_is_nearer_in_the_metric_of_the_inputs(granularity):
    w, h = matrix(64, 300), hessian(300)
    errors = {name: error(w, method(w, h, granularity), h) for name, method in QUANTIZERS.items()}
    assert errors["absmean"] > errors["least_squares"] > 1.15 * errors["gptq"]
    assert errors["absmean"] > errors["least_squares"] > 1.15 * errors["gptq_act_order"]
    # Control: where inputs are uncorrelated there is nothing to feed back, and the order of columns does not matter.
    white = torch.eye(300, dtype=torch.float64)
    codes, _ = least_squares(w, None, granularity)
    assert torch.equal(gptq(w, white, granularity)[0], codes)
    assert torch.equal(gptq(w, white, granularity, activation_order=True)[0], codes)
    assert not torch.equal(gptq(w, h, granularity)[0], gptq(w, h, granularity, activation_order=True)[0])


def test_gptq_is_the_textbooks_column_by_column():
    """Optimal brain quantisation in a fixed order: the inverse Hessian of what is left is updated after every column."""
    w, h = matrix(16, 200), hessian(200)
    codes, _ = gptq(w, h, "tensor")
    _, scale = least_squares(w, None, "tensor")
    rest, inverse = w.double().clone(), torch.linalg.inv(h)
    expected = torch.zeros_like(rest)
    for i in range(200):
        expected[:, i] = (rest[:, i] / scale).round().clamp(-1, 1)
        lost = (rest[:, i] - expected[:, i] * scale) / inverse[0, 0]
        rest[:, i:] -= torch.outer(lost, inverse[0])
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    assert (codes == expected).float().mean() > 0.999  # a code at a rounding edge may fall on either side


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_fitted_scales_are_the_best_for_their_codes(granularity):
    w, h = matrix(8, 300), hessian(300)
    codes, start = quantize_weight(w, granularity)
    fitted = fit_scale(w, codes, h, start)
    best = error(w, (codes, fitted), h)
    assert best < error(w, (codes, start), h)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        nudged = fitted * (1 + 0.02 * torch.randn(fitted.shape, generator=generator))
        assert error(w, (codes, nudged), h) > best


def test_a_hessian_that_is_not_definite_and_unknown_methods_are_refused():
    with pytest.raises(UserError, match="not positive definite"):
        gptq(matrix(4, 8), torch.zeros(8, 8), "tensor")
    with pytest.raises(UserError, match="unknown quantiser 'rtn'"):
        quantizer("rtn")


# -------------------------------------------------------------------------------------------------------- whole models


def fresh(state):
    model = tiny_llama(hidden=64, ffn=192)
    model.load_state_dict(state)
    return model


def test_a_trained_model_loses_less_the_more_its_quantiser_looks_at(trained):
    state, calibration, heldout, _ = trained
    original = mean_nll(fresh(state), heldout)
    found = {}
    for method in QUANTIZERS:
        rows = None if method == "absmean" else [calibration]
        model = quantize_model(fresh(state), method, rows)
        assert all(float(layer.quant_lambda) == 1.0 for _, layer in bitlinear_layers(model))
        found[method] = mean_nll(model, heldout)
    found["rows"] = mean_nll(
        quantize_model(convert_model(fresh(state), ConversionConfig(norm="none", granularity="row")), "gptq", [calibration]),
        heldout,
    )
    found["weights alone"] = mean_nll(quantize_model(fresh(state), "least_squares"), heldout)
    assert found["absmean"] > found["weights alone"] + 0.3
    # Those that look at activations lie too near each other, on either side on different processors, to have an order.
    for method in ("least_squares", "gptq", "gptq_act_order", "rows"):
        assert found["weights alone"] > found[method] > original, method


def test_absmean_is_the_conversion_and_weights_alone_need_no_calibration(trained):
    state, calibration, *_ = trained
    one = quantize_model(fresh(state), "absmean")
    two = convert_model(fresh(state), ConversionConfig(norm="none"))
    with torch.no_grad():
        assert torch.equal(one(calibration).logits, two(calibration).logits)
    plain = quantize_model(fresh(state), "least_squares")
    for (name, a), (_, b) in zip(bitlinear_layers(plain), bitlinear_layers(two), strict=True):
        assert torch.equal(quantize_weight(a.weight)[0], least_squares(b.weight, None, "tensor")[0]), name


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_quantised_model_packs_and_loads_as_it_is(trained, granularity, tmp_path):
    state, calibration, *_ = trained
    model = quantize_model(
        convert_model(fresh(state), ConversionConfig(norm="none", granularity=granularity)), "gptq", [calibration]
    )
    save_packed(model, tmp_path / "m", linear_class="autobitlinear")  # the other convention stores reciprocals, which round
    loaded = load_model(tmp_path / "m")
    for (name, layer), other in zip(
        bitlinear_layers(model), (m for m in loaded.modules() if isinstance(m, PackedBitLinear)), strict=True
    ):
        assert torch.equal(quantize_weight(layer.weight, granularity)[0], other.codes()), name
    with torch.no_grad():
        assert torch.equal(pack_model(model)(calibration).logits, loaded(calibration).logits)


def test_a_block_is_fitted_to_what_the_quantised_blocks_before_it_hand_over(trained):
    state, calibration, *_ = trained
    result = quantize_model(fresh(state), "gptq", [calibration])
    name = "model.layers.1.self_attn.q_proj"

    def codes(first_block):
        """GPTQ of one layer in the second block, by hand, behind a first block."""
        model = convert_model(fresh(state), ConversionConfig(norm="none"))
        set_lambda(model, 0.0)
        model.model.layers[0] = first_block or model.model.layers[0]
        seen = []
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            model(calibration)
        y = fake_quant_activation(seen[0]).flatten(0, 1).double()
        h = y.T @ y
        h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
        return gptq(model.get_submodule(name).weight.detach(), h, "tensor")[0]

    found = quantize_weight(result.get_submodule(name).weight)[0]
    assert (found == codes(result.model.layers[0])).float().mean() > 0.999
    assert (found == codes(None)).float().mean() < 0.99


@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
@pytest.mark.parametrize("method", ["least_squares", "gptq"])
def test_what_is_ternary_already_is_refused(method, granularity):
    """Solving again would keep the codes and blow the scale up: the master's weights are not what was rounded."""
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    config = ConversionConfig(norm="none", granularity=granularity)
    model = convert_model(tiny_llama(hidden=64, ffn=128, vocab=300), config)
    quantize_model(model, method, [ids])
    with pytest.raises(UserError, match=r"layers.0.self_attn.q_proj is ternary already: start from float weights"):
        quantize_model(model, method, [ids])
    with torch.no_grad():
        for _, layer in bitlinear_layers(model):
            layer.weight += 1e-3 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    quantize_model(model, method, [ids])  # trained since: there is something to round


def test_what_has_no_effect_or_no_meaning_is_refused(trained):
    state, calibration, *_ = trained
    with pytest.raises(UserError, match="gptq needs calibration"):
        quantize_model(fresh(state), "gptq")
    with pytest.raises(UserError, match="no effect"):
        quantize_model(fresh(state), "absmean", [calibration])
    with pytest.raises(UserError, match="epsilon must be"):
        quantize_model(fresh(state), "gptq", [calibration], epsilon=-1.0)
    with pytest.raises(UserError, match="no tokens"):
        quantize_model(fresh(state), "gptq", [])
    with pytest.raises(UserError, match="outside the vocabulary of 512"):
        quantize_model(fresh(state), "gptq", [calibration + 500])
    with pytest.raises(UserError, match="packed and has no float weights"):
        quantize_model(pack_model(convert_model(fresh(state), ConversionConfig(norm="none"))), "absmean")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_pretrained_smollm2_is_destroyed_by_every_method_yet_in_order():
    """The honest baseline (docs/experiments.md): without training, one ternary scale a matrix leaves no language model."""
    source = resolve_pretrained(SMOLLM2)
    topics = pydoc_data.topics.topics
    ids = torch.tensor(load_tokenizer(source.path)("\n".join(topics[key] for key in sorted(topics))).input_ids)
    calibration, heldout = ids[:2048].view(4, 512), ids[40_000:42_048].view(4, 512)
    absmean_nll = mean_nll(quantize_model(load_float_model(source), "absmean"), heldout)
    gptq_nll = mean_nll(quantize_model(load_float_model(source), "gptq", [calibration]), heldout)
    groups = convert_model(load_float_model(source), ConversionConfig(norm="none", granularity="group128"))
    groups_nll = mean_nll(quantize_model(groups, "gptq", [calibration]), heldout)
    assert mean_nll(load_float_model(source), heldout) < 2.9
    assert absmean_nll > 16 > gptq_nll > groups_nll > 8
