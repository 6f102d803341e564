"""Every family in every form as a GGUF file, and back."""

import struct

import pytest
import torch
from bitnet_arch import (
    ConversionConfig,
    Family,
    PackedBitLinear,
    TernaryForm,
    UserError,
    convert_model,
    load_model,
    register_family,
    save_master,
    save_packed,
)
from bitnet_arch.gguf import export_gguf, from_gguf, read_gguf, tokenizer_from_gguf
from bitnet_arch.modeling import form_of, ternary_config
from bitnet_arch.testing import (
    FORMS,
    LLAMA3_ROPE,
    SMALL_SHAPE,
    convert_calibrated,
    softened,
    tiny_bitnet,
    tiny_decoder,
    tiny_tokenizer,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitNetConfig, BitNetForCausalLM, Phi3Config, Phi3ForCausalLM

SHAPE = SMALL_SHAPE | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 320, "max_position_embeddings": 512}
CHANGES = {
    "qwen2-sliding": {"sliding_window": 4},
    "gemma3-capped": {"sliding_window": 4, "final_logit_softcapping": 20.0, "attn_logit_softcapping": 30.0},
}
VARIANTS = ["llama", "llama-untied", "qwen2", "qwen2-sliding", "qwen3-linear", "gemma3-capped"]
IDS = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))


def make(variant):
    model = tiny_decoder(variant, SHAPE, **CHANGES.get(variant, {}))
    model.config._attn_implementation = "eager"
    return model


@torch.no_grad()
def logits(model):
    model.config._attn_implementation = "eager"  # the only one that computes attention softcaps
    return model(input_ids=IDS).logits


def as_stored(directory):
    """Load a directory and round its scales and embeddings as a file does."""
    model = load_model(directory)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, PackedBitLinear):
                layer.weight_scale.copy_(layer.weight_scale.half())
        for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            matrix.copy_(matrix.half())
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_file_gives_back_the_model(variant, form, tmp_path):
    converted = convert_calibrated(make(variant), softened(**FORMS[form]), [IDS])
    save_packed(converted, tmp_path / "m", tiny_tokenizer())
    report = export_gguf(tmp_path / "m", tmp_path / "out.gguf", architecture="wrinklefree")
    assert report.architecture == "wrinklefree"
    restored = from_gguf(tmp_path / "out.gguf")
    expected = as_stored(tmp_path / "m")
    assert form_of(restored.config) == form_of(expected.config)
    for (name, one), (_, two) in zip(expected.named_modules(), restored.named_modules(), strict=True):
        if isinstance(one, PackedBitLinear):
            assert torch.equal(one.codes(), two.codes()), name
            assert torch.equal(one.weight_scale, two.weight_scale), name
    assert torch.equal(logits(restored), logits(expected))


KEYS = {
    ("llama", "subln"): {"norm_placement": "subln", "attention.bias": True, "activation": "silu", "attention.qk_norm": False},
    ("qwen2-sliding", "none"): {"attention.sliding_window": 4, "attention.sliding_window_pattern": [True, False]},
    ("qwen3-linear", "subln-groups-rotated"): {
        "attention.qk_norm": True,
        "scale_granularity": "group128",
        "rotation": True,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 2.0,
    },
    ("gemma3-capped", "bitlinear"): {
        "activation": "gelu_tanh",
        "norm_placement": "bitlinear",
        "post_norms": True,
        "logit_softcap": 20.0,
        "attention.logit_softcap": 30.0,
        "rope.freq_base_swa": 10_000.0,
        "attention.key_length": 64,
        "activation_bits": 8,
    },
}


@pytest.mark.parametrize(("variant", "form"), KEYS, ids="-".join)
def test_the_keys_say_what_the_model_is(variant, form, tmp_path):
    save_master(convert_calibrated(make(variant), ConversionConfig(**FORMS[form]), [IDS]), tmp_path / "m", tiny_tokenizer())
    export_gguf(tmp_path / "m", tmp_path / "out.gguf")
    written = read_gguf(tmp_path / "out.gguf")
    assert written.metadata["general.architecture"] == "wrinklefree"
    assert {key: written.metadata.get(f"wrinklefree.{key}") for key in KEYS[variant, form]} == KEYS[variant, form]
    has_norms = {name.rsplit(".", 1)[0] for name in written.tensors if ".in_norm." in name and name.startswith("blk.1")}
    matrices = {
        "none": [],
        "subln": ["attn_output", "ffn_down"],
        "bitlinear": ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"],
    }[FORMS[form]["norm"]]
    assert has_norms == {f"blk.1.{matrix}.in_norm" for matrix in matrices}
    assert ("blk.1.attn_norm.weight" in written.tensors) is (form != "bitlinear")
    if matrices:
        assert written.tensors["blk.1.ffn_down.in_norm.eps"].shape == (1,)
        assert written.tensors["blk.1.ffn_down.in_norm.weight"].shape == (320,)


def test_what_the_file_says_matters(tmp_path):
    """Controls: each of these keys and tensors, read otherwise, changes the logits."""
    save_packed(
        convert_model(make("gemma3-capped"), ConversionConfig(norm="subln", rotation=True), [IDS]), tmp_path / "m", tiny_tokenizer()
    )
    export_gguf(tmp_path / "m", tmp_path / "out.gguf")
    right = logits(from_gguf(tmp_path / "out.gguf"))
    data = (tmp_path / "out.gguf").read_bytes()
    values = {
        "rotation": (b"\x07\x00\x00\x00\x01", b"\x07\x00\x00\x00\x00"),
        "logit_softcap": (struct.pack("<If", 6, 20.0), struct.pack("<If", 6, 2.0)),
        "attention.scale": (struct.pack("<If", 6, 50.0**-0.5), struct.pack("<If", 6, 0.5)),
        "attention.sliding_window": (struct.pack("<II", 4, 4), struct.pack("<II", 4, 2)),
        "rope.freq_base_swa": (struct.pack("<If", 6, 1e4), struct.pack("<If", 6, 1e2)),
        "attention.layer_norm_rms_epsilon": (struct.pack("<If", 6, 1e-6), struct.pack("<If", 6, 1e-1)),
    }
    for key, (old, new) in values.items():
        name = f"wrinklefree.{key}".encode()
        assert data.count(name + old) == 1, key
        (tmp_path / "bad.gguf").write_bytes(data.replace(name + old, name + new))
        assert (logits(from_gguf(tmp_path / "bad.gguf")) - right).abs().max() > 1e-3, key


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_model_of_microsofts_kind_is_ours(tied, tmp_path):
    model = tiny_decoder("bitnet-2b4t", SHAPE, tie_word_embeddings=tied)
    save_packed(convert_model(model, ConversionConfig(norm="none")), tmp_path / "m", tiny_tokenizer())
    with pytest.raises(UserError, match=r"uses relu2, but llama\.cpp's bitnet computes SiLU"):
        export_gguf(tmp_path / "m", tmp_path / "out.gguf", architecture="bitnet")
    report = export_gguf(tmp_path / "m", tmp_path / "out.gguf")
    assert report.architecture == "wrinklefree"
    assert ("output.weight" in report.tensors) is not tied
    written = read_gguf(tmp_path / "out.gguf")
    assert written.metadata["wrinklefree.activation"] == "relu2"
    assert written.metadata["wrinklefree.norm_placement"] == "subln"
    assert "blk.0.ffn_sub_norm.weight" in written.tensors
    restored = from_gguf(tmp_path / "out.gguf")
    assert type(restored) is BitNetForCausalLM
    assert torch.equal(logits(restored), logits(as_stored(tmp_path / "m")))


@pytest.mark.parametrize("architecture", ["auto", "wrinklefree"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_read_from_a_file_is_written_as_the_same_file(variant, architecture, tmp_path):
    form = FORMS["subln-groups-rotated"] if architecture == "wrinklefree" else FORMS["none"]
    save_packed(convert_calibrated(make(variant), ConversionConfig(**form), [IDS]), tmp_path / "m", tiny_tokenizer())
    export_gguf(tmp_path / "m", tmp_path / "one.gguf", architecture=architecture)
    save_packed(from_gguf(tmp_path / "one.gguf"), tmp_path / "again", tokenizer_from_gguf(tmp_path / "one.gguf"))
    export_gguf(tmp_path / "again", tmp_path / "two.gguf", architecture=architecture)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_microsofts_norms_with_finer_scales(tmp_path):
    torch.manual_seed(0)
    config = ternary_config(BitNetConfig(**SHAPE, hidden_act="relu2"), TernaryForm(granularity="row"))
    save_packed(AutoModelForCausalLM.from_config(config).float().eval(), tmp_path / "m", tiny_tokenizer())
    export_gguf(tmp_path / "m", tmp_path / "out.gguf")
    assert read_gguf(tmp_path / "out.gguf").metadata["wrinklefree.norm_placement"] == "subln"
    assert torch.equal(logits(from_gguf(tmp_path / "out.gguf")), logits(as_stored(tmp_path / "m")))


def test_master_and_packed_give_the_same_file(tmp_path):
    converted = convert_model(make("qwen3-linear"), ConversionConfig(norm="allnorm", granularity="row"), [IDS])
    save_master(converted, tmp_path / "m", tiny_tokenizer())
    save_packed(converted, tmp_path / "p", tiny_tokenizer())
    for form in "mp":
        export_gguf(tmp_path / form, tmp_path / f"{form}.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "p.gguf").read_bytes()


def test_a_family_without_names_is_refused(tmp_path):
    linears = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    pre_norms = {"input_layernorm": linears[:1], "post_attention_layernorm": linears[2:3]}
    register_family("phi3", Family(linears=linears, mixing=(linears[1], linears[3]), pre_norms=pre_norms))
    save_master(convert_model(Phi3ForCausalLM(Phi3Config(**SHAPE)), ConversionConfig(gain="one")), tmp_path / "m", tiny_tokenizer())
    with pytest.raises(UserError, match="is a 'wrinklefree-phi3': only bitnet, gemma3_text, llama"):
        export_gguf(tmp_path / "m", tmp_path / "out.gguf")


def test_weights_that_are_no_numbers_are_named(tmp_path):
    save_master(tiny_bitnet(hidden=64, ffn=128), tmp_path / "m", tiny_tokenizer())
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        export_gguf(tmp_path / "m", tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_rotary_positions_that_cannot_be_read_back_are_refused(tmp_path):
    for rope, sentence in (
        (LLAMA3_ROPE | {"high_freq_factor": 9.0}, "cannot be told from a file"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "of kind 'dynamic' cannot be exported"),
    ):
        model = tiny_decoder("llama-plain", SHAPE, rope_parameters=rope)
        save_packed(convert_model(model, ConversionConfig(norm="none")), tmp_path / "m", tiny_tokenizer())
        with pytest.raises(UserError, match=sentence):
            export_gguf(tmp_path / "m", tmp_path / "out.gguf")
