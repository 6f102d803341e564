"""`from_gguf`: our own files, other people's, and hostile ones."""

import gguf
import numpy as np
import pytest
import torch
from bitnet_arch import (
    ConversionConfig,
    PackedBitLinear,
    UserError,
    bitlinear_layers,
    convert_model,
    load_model,
    quantize_weight,
    save_master,
    save_packed,
)
from bitnet_arch.gguf import export_gguf, from_gguf
from bitnet_arch.gguf.importer import master_of
from bitnet_arch.gguf.names import deinterleave, interleave
from bitnet_arch.gguf.ternary import _coarsest, _to_groups
from bitnet_arch.modeling import form_of
from bitnet_arch.testing import tiny_bitnet, tiny_llama, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

IDS = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS % model.config.vocab_size).logits


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedBitLinear)}


# ---------------------------------------------------------------------------------------------------------- our files


@pytest.mark.parametrize("kind", ["auto", "f16", "bf16", "tq1_0", "tq2_0", "q2_0", "i2_s"])
def test_every_type_comes_back(kind, tmp_path):
    save_packed(tiny_bitnet(), tmp_path / "m", tiny_tokenizer())
    export_gguf(tmp_path / "m", tmp_path / "out.gguf", kind)
    expected, restored = load_model(tmp_path / "m"), from_gguf(tmp_path / "out.gguf")
    assert type(restored) is type(expected)
    assert restored.config.rms_norm_eps == expected.config.rms_norm_eps
    with torch.no_grad():
        for (name, one), (_, two) in zip(packed_layers(expected).items(), packed_layers(restored).items(), strict=True):
            assert torch.equal(one.codes(), two.codes()), name
            scale = one.weight_scale
            rounded = scale if kind == "i2_s" else scale.bfloat16().float() if kind == "bf16" else scale.half().float()
            assert torch.equal(two.weight_scale, rounded), name
            one.weight_scale.copy_(rounded)
        expected.get_input_embeddings().weight.copy_(expected.get_input_embeddings().weight.half())
    assert torch.equal(logits(restored), logits(expected))
    save_packed(restored, tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(restored))


@pytest.mark.parametrize(("granularity", "kind", "has_scales"), [
    ("row", "tq1_0", False),
    ("row", "tq2_0", False),
    ("row", "q2_0", False),
    ("row", "f16", False),
    ("row", "i2_s", True),
    ("group128", "q2_0", False),
    ("group128", "f16", False),
    ("group128", "tq1_0", True),
    ("group128", "tq2_0", True),
    ("group128", "i2_s", True),
])  # fmt: skip
def test_finer_scales_are_in_the_blocks_or_beside_them(granularity, kind, has_scales, tmp_path):
    config = ConversionConfig(norm="none", granularity=granularity)
    save_packed(convert_model(tiny_llama(), config), tmp_path / "m", tiny_tokenizer())
    report = export_gguf(tmp_path / "m", tmp_path / "out.gguf", kind)
    assert report.architecture == "wrinklefree"
    assert ("blk.0.ffn_down.scale" in report.tensors) is has_scales
    expected, restored = load_model(tmp_path / "m"), from_gguf(tmp_path / "out.gguf")
    assert form_of(restored.config) == form_of(expected.config)
    for (name, one), (_, two) in zip(packed_layers(expected).items(), packed_layers(restored).items(), strict=True):
        assert torch.equal(one.codes(), two.codes()), name
        assert torch.equal(two.weight_scale, one.weight_scale if has_scales else one.weight_scale.half().float()), name


def test_rows_that_cannot_be_packed_come_back_as_layers_that_quantise_to_them(tmp_path):
    save_master(convert_model(tiny_llama(hidden=64, ffn=130), ConversionConfig(norm="none")), tmp_path / "m", tiny_tokenizer())
    export_gguf(tmp_path / "m", tmp_path / "out.gguf")
    expected, restored = load_model(tmp_path / "m"), from_gguf(tmp_path / "out.gguf")
    for (name, one), (_, two) in zip(bitlinear_layers(expected), bitlinear_layers(restored), strict=True):
        codes, scale = quantize_weight(one.weight.detach())
        found, found_scale = quantize_weight(two.weight.detach())
        assert torch.equal(codes, found), name
        assert abs(float(found_scale / scale.half().float()) - 1) < 1e-6, name
    assert (logits(restored) - logits(expected)).abs().max() < 2e-2 * logits(expected).abs().max()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["tensor", "row", "group128"]), st.integers(1, 4), st.integers(1, 300), st.integers(0, 99))
def test_a_master_can_be_made_of_codes_and_scales(granularity, rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scale = quantize_weight(weight, granularity)
    found, found_scale = quantize_weight(master_of(codes, scale), granularity)
    assert torch.equal(found, codes)
    assert torch.allclose(found_scale, scale, rtol=1e-5)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2))
def test_reordering_rows_is_undone(heads, half, more):
    rows = np.arange(heads * 2 * half * 3**more).reshape(-1, *[3] * more)
    assert np.array_equal(deinterleave(interleave(rows, heads), heads), rows)
    first = interleave(np.arange(2 * half), 1)
    assert first.tolist() == [i // 2 + (i % 2) * half for i in range(2 * half)]  # halves become pairs


# ---------------------------------------------------------------------------------------------- other people's files


def write(path, architecture, keys, tensors):
    """Write a file with gguf-py; a tensor is an array, or (bytes, shape, type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            data, shape, kind = tensor
            block, size = gguf.GGML_QUANT_SIZES[kind]
            byte_shape = (*shape[:-1], shape[-1] // block * size)
            writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), data.nbytes, raw_dtype=kind)
        else:
            writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        writer.write_tensor_data(tensor[0] if isinstance(tensor, tuple) else tensor)
    writer.close()


def i2_s_by_hand(codes, scale):
    """Pack as bitnet.cpp's page says, weight by weight."""
    flat = codes.reshape(-1)
    data = bytearray(len(flat) // 4 + 32)
    for index, code in enumerate(flat):
        block, within = divmod(index, 128)
        data[32 * block + within % 32] |= (int(code) + 1) << (6 - 2 * (within // 32))
    data[len(flat) // 4 : len(flat) // 4 + 4] = np.float32(scale).tobytes()
    return np.frombuffer(bytes(data), np.uint8)


def file_tensors(model, encode, heads=None):
    """Return a stock model's tensors under llama.cpp's names; `encode` makes a file's tensor of (float matrix)."""
    short = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.attn_sub_norm": "attn_sub_norm",
        "mlp.ffn_sub_norm": "ffn_sub_norm", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    tensors = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            stored = f"blk.{index}.{short[rest.removesuffix('.weight')]}.weight"
            if heads and (count := heads.get(rest)):
                values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
            tensors[stored] = encode(values) if "_proj" in name else values
        else:
            stored = {"model.norm": "output_norm", "lm_head": "output", "model.embed_tokens": "token_embd"}[name[: -len(".weight")]]
            tensors[f"{stored}.weight"] = values
    return tensors


KEYS = {
    "context_length": 512,
    "embedding_length": 256,
    "block_count": 2,
    "feed_forward_length": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500_000.0,
    "rope.dimension_count": 64,
    "vocab_size": 512,
}
CONFIG = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "bos_token_id": None,
    "eos_token_id": None,
}


def randomize(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return model.float().eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ["bitnet-25", "bitnet-b1.58"])
def test_microsofts_model_is_imported_with_relu2(architecture, tied, tmp_path):
    model = randomize(BitNetForCausalLM(BitNetConfig(**CONFIG, hidden_act="relu2", tie_word_embeddings=tied)))

    def encode(values):
        codes, scale = quantize_weight(torch.from_numpy(values))
        return i2_s_by_hand(codes.numpy(), float(scale)), values.shape, 36

    write(tmp_path / "ms.gguf", architecture, KEYS, file_tensors(model, encode))
    restored = from_gguf(tmp_path / "ms.gguf")
    assert restored.config.hidden_act == "relu2"
    assert len(packed_layers(restored)) == 14
    expected = logits(convert_model(model, ConversionConfig(norm="none")))
    # Equal up to codes of activations that fall on the other side of a rounding edge.
    assert (logits(restored) - expected).abs().max() < 2e-2 * expected.abs().max()
    for layer in restored.model.layers:
        layer.mlp.act_fn = torch.nn.SiLU()
    assert (logits(restored) - expected).abs().max() > 0.2 * expected.abs().max()  # control


FOREIGN = {
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**CONFIG)),
        {"self_attn.q_proj.weight": 4, "self_attn.k_proj.weight": 2},
    ),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**CONFIG, head_dim=64, tie_word_embeddings=True)), None),
}


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "Q8_0"])
@pytest.mark.parametrize("architecture", FOREIGN)
def test_what_gguf_py_made_of_ternary_weights_is_imported(architecture, kind, tmp_path):
    maker, heads = FOREIGN[architecture]
    model = randomize(maker())
    quantization = gguf.GGMLQuantizationType[kind]
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            codes, _ = quantize_weight(parameter.detach())
            parameter.data = codes * 0.0625  # which f16 holds exactly, and 127 steps of Q8_0 nearly

    def encode(values):
        return gguf.quants.quantize(values, quantization), values.shape, quantization

    keys = KEYS | ({"attention.key_length": 64, "attention.value_length": 64} if architecture == "qwen3" else {})
    write(tmp_path / "out.gguf", architecture, keys, file_tensors(model, encode, heads))
    restored = from_gguf(tmp_path / "out.gguf")
    assert form_of(restored.config) is None
    parameters = dict(model.named_parameters())
    for name, layer in packed_layers(restored).items():
        assert torch.equal(layer.codes(), parameters[f"{name}.weight"].sign().to(torch.int8)), name
        assert abs(float(layer.weight_scale) / 0.0625 - 1) < 1e-3, name
    # Without rounding of activations the file's model is the float model.
    with torch.no_grad():
        for name, layer in packed_layers(restored).items():
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            linear.weight.copy_(layer.codes().float() * layer.weight_scale)
            restored.set_submodule(name, linear)
    bound = 1e-5 if kind != "Q8_0" else 1e-2
    assert (logits(restored) - logits(model)).abs().max() < bound * logits(model).abs().max()


def test_a_scale_for_every_block_becomes_groups(tmp_path):
    model = randomize(LlamaForCausalLM(LlamaConfig(**CONFIG)))
    kind = gguf.GGMLQuantizationType.TQ2_0
    heads = FOREIGN["llama"][1]
    write(
        tmp_path / "out.gguf",
        "llama",
        KEYS,
        file_tensors(model, lambda values: (gguf.quants.quantize(values, kind), values.shape, kind), heads),
    )
    restored = from_gguf(tmp_path / "out.gguf")  # of float weights: every block of 256 has a scale
    assert form_of(restored.config).granularity == "group128"
    weight = model.get_parameter("model.layers.1.self_attn.k_proj.weight").detach().numpy()
    found = packed_layers(restored)["model.layers.1.self_attn.k_proj"]
    dequantized = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    expanded = found.weight_scale.repeat_interleave(128, dim=1).numpy()
    assert np.array_equal(found.codes().numpy() * expanded, dequantized)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def parts():
    model = randomize(LlamaForCausalLM(LlamaConfig(**CONFIG)))
    kind = gguf.GGMLQuantizationType.TQ2_0
    heads = FOREIGN["llama"][1]
    return file_tensors(model, lambda values: (gguf.quants.quantize(values, kind), values.shape, kind), heads)


HEAD_WIDTH = ["attention.key_length", "attention.value_length", "rope.dimension_count"]
BROKEN = {
    "architecture": ({}, {}, "phi3", "has the architecture 'phi3'"),
    "layers": ({"block_count": 10**6}, {}, "llama", "claims 1000000 layers"),
    "heads": ({"attention.head_count": 0}, {}, "llama", "claims 0 heads"),
    "width": ({"embedding_length": 512}, {}, "llama", "different widths|keys ask for"),
    "head-width": (dict.fromkeys(HEAD_WIDTH, 2**16), {}, "llama", "keys ask for"),
    "wide-heads": (dict.fromkeys(HEAD_WIDTH, 2**30), {}, "llama", "wider than 8388608"),
    "eps": ({"attention.layer_norm_rms_epsilon": float("nan")}, {}, "llama", "layer_norm_rms_epsilon is nan"),
    "type": ({"block_count": 2.0}, {}, "llama", "block_count is 2.0"),
    "theta": ({"rope.freq_base": -1.0}, {}, "llama", "rotary base is -1.0"),
    "missing": ({}, {"blk.1.ffn_up.weight": None}, "llama", "has no tensor blk.1.ffn_up.weight"),
    "unknown": ({}, {"blk.0.attn_q.lora_a": np.zeros((2, 2), np.float32)}, "llama", "holds 'blk.0.attn_q.lora_a'"),
    "nan": ({}, {"output_norm.weight": np.full(256, np.nan, np.float32)}, "llama", "no numbers"),
    "float": ({}, {"blk.0.ffn_up.weight": np.random.default_rng(0).random((512, 256), np.float32)}, "llama", "is not ternary"),
    "rope": ({}, {"rope_freqs.weight": np.arange(1, 33, dtype=np.float32)}, "llama", "rotary frequencies are scaled"),
    "scale": ({}, {"blk.0.ffn_up.scale": np.ones((3, 1), np.float32)}, "llama", r"scale is \[3, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("damage", BROKEN)
def test_what_no_model_can_be_is_one_sentence(damage, parts, tmp_path):
    keys, tensors, architecture, sentence = BROKEN[damage]
    changed = {name: tensor for name, tensor in (parts | tensors).items() if tensor is not None}
    write(tmp_path / "bad.gguf", architecture, KEYS | keys, changed)
    with pytest.raises(UserError, match=sentence) as caught:
        from_gguf(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_codes_and_scales_that_are_none_are_named(parts, tmp_path):
    data, shape, kind = parts["blk.0.ffn_up.weight"]
    for position, value, sentence in ((0, 0xFF, "outside -1, 0 and 1"), (65, 0x7E, "no numbers")):
        bad = data.copy()
        bad[0, position] = value
        write(tmp_path / "bad.gguf", "llama", KEYS, parts | {"blk.0.ffn_up.weight": (bad, shape, kind)})
        with pytest.raises(UserError, match=rf"blk\.0\.ffn_up\.weight.*{sentence}"):
            from_gguf(tmp_path / "bad.gguf")


def test_differing_scales_of_64_are_refused():
    codes = np.ones((4, 128), np.int8)
    scales = np.array([[1.0, 2.0]] * 4, np.float32)
    with pytest.raises(UserError, match="differ among 128 neighbours"):
        _to_groups(scales, codes, "x")
    codes[:, 64:] = 0  # whose scale says nothing
    assert _coarsest(codes, _to_groups(scales, codes, "x")).granularity == "tensor"
