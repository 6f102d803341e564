"""Stock architectures, run by llama.cpp, against torch with llama.cpp's own handling of activations."""

import pydoc_data.topics

import numpy as np
import pytest
import torch
from bitnet_arch import ConversionConfig, PackedBitLinear, UserError, convert_model, load_model, save_packed
from bitnet_arch.gguf import export_gguf, read_gguf
from bitnet_arch.gguf.types import F16, TYPES
from bitnet_arch.parity.activations import BY_WEIGHT_TYPE
from bitnet_arch.parity.forwards import use_half_cache
from bitnet_arch.parity.measure import compare, summarize
from bitnet_arch.testing import tiny_tokenizer, train_tiny
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

llamacpp = pytest.importorskip("wrinklefree_inference.llamacpp")
pytest.importorskip("xllamacpp")

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA_LAYERS = {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "sliding_window": 24, "num_hidden_layers": 6}
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama-3": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, rope_parameters=LLAMA3)),
    "llama-linear": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, head_dim=128, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=128)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE | GEMMA_LAYERS, head_dim=64, query_pre_attn_scalar=64)),
}
POSITIONS = 48
# Largest mean KL divergence in nats. Measured: f16 up to 2e-8, bf16 up to 1.2e-7, tq2_0 up to 2.9e-6, q2_0 up to 1.2e-6.
BOUNDS = {"f16": 1e-6, "bf16": 1e-6, "tq2_0": 1e-5, "q2_0": 1e-5}


def round_bf16(x):
    return x.bfloat16().float()


class Rounded(nn.Module):
    """A packed layer as llama.cpp computes it."""

    def __init__(self, layer, kind):
        super().__init__()
        scale = layer.weight_scale.bfloat16() if kind == "bf16" else layer.weight_scale.half()
        self.weight, self.bias = layer.codes().float() * scale.float(), layer.bias
        # llama.cpp multiplies a bf16 matrix with activations rounded to bf16.
        self.rounding = round_bf16 if kind == "bf16" else BY_WEIGHT_TYPE[F16 if kind == "f16" else TYPES[kind].ggml_id]

    def forward(self, x):
        return nn.functional.linear(self.rounding(x), self.weight, self.bias)


def emulated(directory, kind):
    model = load_model(directory)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedBitLinear):
            model.set_submodule(name, Rounded(module, kind))
        elif name.endswith("self_attn"):
            use_half_cache(module)
    with torch.no_grad():
        for matrix in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            matrix.copy_(matrix.half())
    return model


@torch.no_grad()
def logprobs(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            torch.manual_seed(0)
            model = convert_model(MAKERS[family]().float(), ConversionConfig(norm="none"))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("bias"):
                        parameter.normal_(0, 0.1)
            made[family] = tmp_path_factory.mktemp(family) / "m"
            save_packed(train_tiny(model, steps=60), made[family], tiny_tokenizer())
        return made[family]

    return make


def window():
    text = pydoc_data.topics.topics["lambda"] + pydoc_data.topics.topics["assert"]
    return tiny_tokenizer()(text).input_ids[: POSITIONS + 1]


def distances(directory, kind, path):
    """Return how far llama.cpp running a file is from torch with the engine's handling of activations, KL at each position."""
    ids = window()
    with llamacpp.LlamaCpp(path, context=POSITIONS + 8) as engine:
        found = engine.logprobs(ids[:-1])
    return compare(logprobs(emulated(directory, kind), ids[:-1]), found, np.array(ids[1:]))


def distance(directory, kind, path):
    """Return the same over all positions."""
    return summarize([distances(directory, kind, path)])


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in ("llama-linear", "llama-3") else name for name in MAKERS]
)
def test_llama_cpp_computes_a_stock_model(family, kind, trained, tmp_path):
    report = export_gguf(trained(family), tmp_path / "out.gguf", kind)
    assert report.architecture == family.split("-")[0]
    assert report.tensors["blk.0.ffn_down.weight"] == kind
    rows = distances(trained(family), kind, tmp_path / "out.gguf")
    found = summarize([rows])
    # The last place, which differs between processors, moves now and then an activation across a code's edge, and what follows it.
    assert np.median(rows[:, 0]) < BOUNDS[kind], found
    assert found.mean_kl < BOUNDS[kind] * (100 if kind in ("tq2_0", "q2_0") else 1), found
    assert found.top1 > 0.95


CONTROLS = {
    "rows not reordered": ("llama", "rotary_heads", lambda config, name: 0),
    "biases and rows not reordered": ("llama-3", "interleave", lambda rows, heads: rows),
    "frequencies not scaled": ("llama-3", "llama3_factors", lambda rope, width: np.ones(width // 2, np.float32)),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_wrong_stock_file_is_far_off(control, trained, tmp_path, monkeypatch):
    family, name, wrong = CONTROLS[control]
    monkeypatch.setattr(f"bitnet_arch.gguf.plan.{name}", wrong)
    export_gguf(trained(family), tmp_path / "out.gguf", "f16")
    assert distance(trained(family), "f16", tmp_path / "out.gguf").mean_kl > 100 * BOUNDS["f16"]


@pytest.mark.parametrize("embedding", ["q8_0", "q6_k", "q4_1", "bf16"])
def test_llama_cpp_reads_every_type_of_embedding(embedding, trained, tmp_path):
    directory, path = trained("llama-3"), tmp_path / "out.gguf"
    report = export_gguf(directory, path, "f16", embedding=embedding)
    assert report.tensors["token_embd.weight"] == report.tensors["output.weight"] == embedding
    ids, written = window(), read_gguf(path)
    model = emulated(directory, "f16")
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.from_numpy(written.dequantize("token_embd.weight").copy()))
        model.get_output_embeddings().weight.copy_(torch.from_numpy(written.dequantize("output.weight").copy()))
    with llamacpp.LlamaCpp(path, context=POSITIONS + 8) as engine:
        found = engine.logprobs(ids[:-1])
    # The head's own input is rounded by the engine, too: in blocks of 32 or 256 to 8 bits.
    assert summarize([compare(logprobs(model, ids[:-1]), found, np.array(ids[1:]))]).mean_kl < 1e-4


def test_an_architecture_is_chosen_by_what_it_computes(trained, tmp_path):
    with pytest.raises(UserError, match="is a 'qwen3', which cannot be written as 'llama'"):
        export_gguf(trained("qwen3"), tmp_path / "out.gguf", architecture="llama")
    assert export_gguf(trained("qwen3"), tmp_path / "out.gguf", architecture="wrinklefree").architecture == "wrinklefree"
    rows = convert_model(MAKERS["qwen3"]().float(), ConversionConfig(norm="none", granularity="row"))
    save_packed(rows, tmp_path / "rows", tiny_tokenizer())
    with pytest.raises(UserError, match="has norms, scales or rotations that no stock architecture holds"):
        export_gguf(tmp_path / "rows", tmp_path / "out.gguf", architecture="qwen3")
    assert export_gguf(tmp_path / "rows", tmp_path / "out.gguf").architecture == "wrinklefree"
