"""Every family in every form: norm placements, scales, rotation; converted, saved, loaded here and by AutoModelForCausalLM."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitnet_arch import (
    ConversionConfig,
    Family,
    PackedBitLinear,
    SubLN,
    TernaryForm,
    UserError,
    bitlinear_layers,
    convert_model,
    load_model,
    quantize_weight,
    register_family,
    save_master,
    save_packed,
    set_lambda,
)
from bitnet_arch.hadamard import rotate
from bitnet_arch.modeling import form_of
from bitnet_arch.quant import absmean_scale, expand_scale
from bitnet_arch.testing import SMALL_SHAPE, convert_calibrated, random_model, softened
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = SMALL_SHAPE
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **LAYERS, head_dim=32)),
}
FORMS = {
    "subln": {"norm": "subln"},
    "subln-rows": {"norm": "subln", "granularity": "row"},
    "subln-groups-rotated": {"norm": "subln", "granularity": "group128", "rotation": True},
    "bitlinear": {"norm": "bitlinear"},
    "allnorm": {"norm": "allnorm"},
    "none-rows": {"norm": "none", "granularity": "row"},
}
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def make(family):
    return random_model(MAKERS[family])


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAKERS)
def test_a_form_survives_saving_and_loading(family, form, tmp_path):
    model = make(family)
    plain = logits(model)
    converted = convert_calibrated(model, softened(**FORMS[form]), [IDS])
    expected = logits(converted)
    assert form_of(converted.config) == TernaryForm(**FORMS[form])
    # Without quantisation, and with norms softened until they do nothing, a conversion changes nothing: rotations cancel, and
    # the gains of pre-norms have moved right.
    set_lambda(converted, 0.0)
    assert (logits(converted) - plain).abs().max() < 5e-6 * plain.abs().max()
    set_lambda(converted, 1.0)
    assert (expected - plain).abs().max() > 1e-2
    save_master(converted, tmp_path / "master")
    assert torch.equal(logits(load_model(tmp_path / "master")), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "master", dtype=torch.float32)), expected)
    set_lambda(converted, 0.0)
    assert torch.equal(logits(load_model(tmp_path / "master", quantized=False)), logits(converted))
    set_lambda(converted, 1.0)
    save_packed(converted, tmp_path / "packed")
    packed = load_model(tmp_path / "packed")
    layers = [module for module in packed.modules() if isinstance(module, PackedBitLinear)]
    assert len(layers) == 14
    again = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32))
    assert torch.equal(logits(packed), again)
    # Codes at a rounding edge may fall on either side; what is packed is exact layer by layer.
    assert (again - expected).abs().max() < 2e-2 * expected.abs().max()
    for (name, layer), module in zip(bitlinear_layers(converted), layers, strict=True):
        codes, scale = quantize_weight(layer.weight.detach(), layer.granularity)
        assert torch.equal(module.codes(), codes), name
        assert torch.equal(module.weight_scale.flatten(), scale.flatten()), name


def test_a_saved_lambda_is_computed_with_again(tmp_path):
    model = convert_model(make("qwen3"), ConversionConfig(gain="one"))
    set_lambda(model, 0.5)
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)), logits(model))


@pytest.mark.parametrize("form", ["subln", "bitlinear", "allnorm"])
def test_norms_act_and_calibration_keeps_the_model_nearer_than_gain_one(form):
    plain = logits(make("qwen3"))

    def distance(**more):
        converted = convert_calibrated(make("qwen3"), ConversionConfig(norm=form, **more), [IDS])
        set_lambda(converted, 0.0)
        return float((logits(converted) - plain).pow(2).mean())

    one, calibrated, soft = distance(gain="one"), distance(softness=0.0), distance(softness=10.0)
    assert one > calibrated > soft > 0


def test_a_stock_form_stays_stock(tmp_path):
    tied = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
    assert type(convert_model(tied, ConversionConfig(gain="one"))).__name__ == "BitNetForCausalLM"
    assert type(convert_model(make("gemma3"), ConversionConfig(norm="none"))).__name__ == "Gemma3ForCausalLM"
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'm')!r})"
    save_master(convert_model(make("qwen3"), ConversionConfig(gain="one")), tmp_path / "m")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode != 0
    assert "wrinklefree-qwen3" in done.stderr  # refused by name without our import, never computed wrongly
    done = subprocess.run([sys.executable, "-c", "import bitnet_arch; " + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


PHI3 = Family(
    linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    mixing=("self_attn.o_proj", "mlp.down_proj"),
    pre_norms={"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
)
OLMO2 = Family(
    linears=(*(f"self_attn.{n}_proj" for n in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    mixing=("self_attn.o_proj", "mlp.down_proj"),
    pre_norms={},
)
OPT = Family(
    linears=(*(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")), "fc1", "fc2"),
    mixing=("self_attn.out_proj", "fc2"),
    pre_norms={},
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
)
OPT_SHAPE = {"vocab_size": 128, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
NEW = {
    "opt": (OPT, lambda: OPTForCausalLM(OPTConfig(**OPT_SHAPE, word_embed_proj_dim=64, max_position_embeddings=64))),
    "phi3": (PHI3, lambda: Phi3ForCausalLM(Phi3Config(**SHAPE))),
    "olmo2": (OLMO2, lambda: Olmo2ForCausalLM(Olmo2Config(**SHAPE))),
}


@pytest.mark.parametrize("norm", ["none", "subln", "bitlinear", "allnorm"])
@pytest.mark.parametrize("kind", NEW)
def test_a_family_of_the_users_own_takes_a_description(kind, norm, tmp_path):
    family, maker = NEW[kind]
    register_family(kind, family)
    register_family(kind, family)  # twice is once
    model = maker().eval()
    plain = logits(model)
    converted = convert_calibrated(model, softened(norm), [IDS])
    assert len(list(bitlinear_layers(converted))) == 2 * len(family.linears)
    expected = logits(converted)
    set_lambda(converted, 0.0)
    assert (logits(converted) - plain).abs().max() < 5e-6 * plain.abs().max()
    set_lambda(converted, 1.0)
    save_master(converted, tmp_path / "m")
    assert torch.equal(logits(load_model(tmp_path / "m")), expected)


def test_families_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="'llama' is described already"):
        register_family("llama", PHI3)
    with pytest.raises(UserError, match="no decoder with model_type 'nonesuch'"):
        register_family("nonesuch", PHI3)
    with pytest.raises(UserError, match="is none of its linears"):
        Family(linears=("a",), mixing=("b",), pre_norms={})
    register_family("phi3", PHI3)
    with pytest.raises(UserError, match="unknown norm placement"):
        ConversionConfig(norm="everywhere")
    with pytest.raises(UserError, match="unknown granularity"):
        ConversionConfig(granularity="column")


# ------------------------------------------------------------------------------------------------------ the new parts


@settings(deadline=None, max_examples=50)
@given(width=st.integers(1, 160).map(lambda n: 2 * n), seed=st.integers(0, 9))
def test_the_rotation_is_orthogonal_and_its_own_inverse_at_every_even_width(width, seed):
    x = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    matrix = rotate(torch.eye(width, dtype=torch.float64))
    assert torch.allclose(matrix @ matrix.T, torch.eye(width, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(rotate(rotate(x)), x, atol=1e-6)
    assert torch.allclose(rotate(x), x @ matrix, atol=1e-6)


def test_the_rotation_spreads_an_outlier_and_refuses_an_odd_width():
    x = torch.zeros(1, 576)
    x[0, 5] = 8.0
    assert rotate(x).abs().max() == 1.0  # a block of 64: 8 / sqrt(64)
    with pytest.raises(UserError, match="odd"):
        rotate(torch.zeros(1, 63))
    odd = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "intermediate_size": 63}))
    with pytest.raises(UserError, match="63 is odd"):
        convert_model(odd, ConversionConfig(norm="none", rotation=True))


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 5), columns=st.integers(1, 300), seed=st.integers(0, 9))
def test_scales_are_the_means_of_their_groups(rows, columns, seed):
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(absmean_scale(w, "row")[:, 0], w.abs().mean(dim=1).clamp(min=1e-5))
    groups = absmean_scale(w, "group128")
    for index, part in enumerate(w.split(128, dim=1)):
        assert torch.allclose(groups[:, index], part.abs().mean(dim=1).clamp(min=1e-5), rtol=1e-5)
    codes, scale = quantize_weight(w, "group128")
    assert torch.equal(codes, (w / expand_scale(scale, columns)).round().clamp(-1, 1).to(torch.int8)) or torch.allclose(
        (codes - w / expand_scale(scale, columns)).abs().clamp(max=0.5), (codes - w / expand_scale(scale, columns)).abs(), atol=1e-4
    )


def test_finer_scales_lie_nearer_to_the_weights():
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 64)[:, None]
    w = w * torch.linspace(0.2, 2, 512)

    def error(granularity):
        codes, scale = quantize_weight(w, granularity)
        return float((codes * expand_scale(scale, 512) - w).pow(2).sum() / w.pow(2).sum())

    assert error("tensor") > error("row") > error("group128")


def test_subln_is_the_textbook_rmsnorm():
    norm = SubLN(48, eps=0.3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(48))
    x = torch.randn(2, 5, 48)
    expected = torch.nn.functional.rms_norm(x, (48,), norm.weight, 0.3)
    assert torch.allclose(norm(x), expected, atol=1e-6)
    assert torch.allclose(norm(x.bfloat16()).float(), expected, atol=5e-2)


def test_the_page_on_adding_a_family_does_what_it_says(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) < 60
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(code, found)
    assert form_of(found["loaded"].config) == TernaryForm(norm="subln", packed=True)
    with torch.no_grad():
        one, two = (found[name].eval()(input_ids=found["ids"]).logits for name in ("ternary", "loaded"))
    assert (one - two).abs().max() < 2e-2 * one.abs().max()
