"""Conversion from directory to directory gives what conversion in memory gives, in less memory; files of several shards."""

import json
import subprocess
import sys

import pytest
import torch
from bitnet_arch import (
    ConversionConfig,
    Family,
    UserError,
    convert_model,
    load_model,
    load_tokenizer,
    open_weights,
    quantize_weight,
    register_family,
    save_master,
    save_packed,
)
from bitnet_arch.__main__ import main
from bitnet_arch.shards import ShardFile, ShardWriter, TensorSpec, assign_shards, row_pieces
from bitnet_arch.stream import convert_directory, measure_stream
from bitnet_arch.subln import measure_inputs
from bitnet_arch.testing import SMALL_SHAPE, random_model, tiny_bitnet, tiny_llama, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = SMALL_SHAPE
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
}
PHI3 = Family(
    linears=("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    mixing=("self_attn.o_proj", "mlp.down_proj"),
    pre_norms={"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
)
register_family("phi3", PHI3)
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama-biases": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)),
    "qwen2-windows": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, tie_word_embeddings=True, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **WINDOWS, head_dim=32, rope_parameters=ROPES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE, sliding_window=5)),
}
FORMS = {
    "subln": {"norm": "subln"},
    "subln-rows": {"norm": "subln", "granularity": "row"},
    "subln-groups-rotated": {"norm": "subln", "granularity": "group128", "rotation": True},
    "bitlinear": {"norm": "bitlinear"},
    "allnorm": {"norm": "allnorm"},
    "none": {"norm": "none"},
    "none-rows": {"norm": "none", "granularity": "row"},
}
ROWS = [torch.randint(0, 128, (1, n), generator=torch.Generator().manual_seed(n)) for n in (12, 12, 7)]


def make(family):
    return random_model(MAKERS[family])


def contents(directory):
    """Return what a directory holds: tensors by name, and the other files."""
    with open_weights(directory) as reader:
        names = reader.keys()
        tensors = {name: reader.get(name) for name in names}
    others = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".safetensors"}
    return tensors, others


def assert_same(a, b):
    (tensors, others), (expected, expected_others) = contents(a), contents(b)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name
    assert others == expected_others


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floats")
    for family in MAKERS:
        save_master(make(family), folder / family, tiny_tokenizer(300), provenance="random weights")
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", MAKERS)
def test_streaming_gives_what_conversion_in_memory_gives(family, form, floats, tmp_path):
    config = ConversionConfig(**FORMS[form])
    source = floats / family
    rows = ROWS if config.calibrates else None
    converted = convert_model(load_model(source), config, rows)
    for packed, save in ((False, save_master), (True, save_packed)):
        save(converted, tmp_path / "memory", load_tokenizer(source), provenance="random weights")
        convert_directory(source, tmp_path / "stream", config, rows, packed=packed)
        assert_same(tmp_path / "stream", tmp_path / "memory")
    convert_directory(source, tmp_path / "stream", config, rows, packed=True, linear_class="autobitlinear")
    save_packed(converted, tmp_path / "memory", load_tokenizer(source), "autobitlinear", provenance="random weights")
    assert_same(tmp_path / "stream", tmp_path / "memory")


@pytest.mark.parametrize("family", MAKERS)
def test_calibration_block_by_block_sees_what_the_whole_model_sees(family, floats):
    model = load_model(floats / family)
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj")]
    with open_weights(floats / family) as reader:
        assert measure_stream(reader, names, ROWS) == measure_inputs(model, names, ROWS)
        other = [torch.flip(row, dims=(1,)) for row in ROWS]
        assert measure_stream(reader, names, other) != measure_inputs(model, names, ROWS)


@pytest.mark.parametrize("key", ["sliding_window", "rope_parameters"])
def test_windows_and_rotary_tables_of_a_layers_type_reach_it(key, floats, tmp_path):
    """The control of the test above: what each block is handed matters to the statistics."""
    config = json.loads((floats / "gemma3/config.json").read_text())
    config[key] = {"sliding_window": 2, "rope_parameters": {**ROPES, "sliding_attention": ROPES["full_attention"]}}[key]
    save_master(make("gemma3"), tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    names = ["model.layers.0.self_attn.o_proj"]
    with open_weights(floats / "gemma3") as reader, open_weights(tmp_path / "m") as changed:
        assert measure_stream(reader, names, ROWS) != measure_stream(changed, names, ROWS)


def test_residual_scale_and_producers_are_streamed_too(tmp_path):
    for tied in (True, False):
        model = tiny_llama(tied=tied, hidden=64, ffn=128, seed=1)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.up_proj.weight.mul_(1e-3)
                layer.mlp.gate_proj.weight.mul_(300)
        save_master(model, tmp_path / "float")
        converted = convert_model(load_model(tmp_path / "float"), ConversionConfig(softness=1e4), ROWS)
        assert converted.config.rms_norm_eps > 1e-4
        save_master(converted, tmp_path / "memory")
        convert_directory(tmp_path / "float", tmp_path / "stream", ConversionConfig(softness=1e4), ROWS)
        assert_same(tmp_path / "stream", tmp_path / "memory")


def test_half_precision_sources_become_float32_masters(floats, tmp_path):
    make("qwen3").bfloat16().save_pretrained(tmp_path / "half")
    convert_directory(tmp_path / "half", tmp_path / "stream", ConversionConfig(gain="one"))
    save_master(convert_model(load_model(tmp_path / "half"), ConversionConfig(gain="one")), tmp_path / "memory")
    assert_same(tmp_path / "stream", tmp_path / "memory")


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(floats, tmp_path):
    out = tmp_path / "out"
    for arguments, words in (
        ((floats / "qwen3", floats / "qwen3", ConversionConfig(gain="one")), "is the source itself"),
        ((floats / "qwen3", out), "need calibration token ids"),
        ((floats / "qwen3", out, None, [torch.tensor([[5, 128]])]), "outside the vocabulary of 128"),
    ):
        with pytest.raises(UserError, match=words):
            convert_directory(*arguments)
    for more, words in (
        ({"linear_class": "x"}, "unknown scale convention"),
        ({"linear_class": "autobitlinear"}, "has no effect on float masters"),
        ({"max_shard_size": 0}, "at least 1 byte"),
    ):
        with pytest.raises(UserError, match=words):
            convert_directory(floats / "qwen3", out, ConversionConfig(gain="one"), **more)
    odd = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "intermediate_size": 63}))
    save_master(odd, tmp_path / "odd")
    with pytest.raises(UserError, match=r"gate_proj: a packed weight needs rows divisible by 4, not 63"):
        convert_directory(tmp_path / "odd", out, ConversionConfig(norm="none"), packed=True)
    convert_directory(tmp_path / "odd", out, ConversionConfig(norm="none"))
    with pytest.raises(UserError, match=r"is ternary already \(master\)"):
        convert_directory(out, tmp_path / "again", ConversionConfig(norm="none"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd", "out"]


# --------------------------------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named(name, value, tmp_path):
    model = tiny_llama(hidden=64, ffn=128)
    save_master(model, tmp_path / "float")
    state = load_file(tmp_path / "float/model.safetensors")
    state[name].view(-1)[7] = value
    save_file(state, tmp_path / "float/model.safetensors", metadata={"format": "pt"})
    for packed in (False, True):
        with pytest.raises(UserError, match=rf"{name} has 1 values that are NaN or infinite"):
            convert_directory(tmp_path / "float", tmp_path / "out", ConversionConfig(norm="none"), packed=packed)
    with pytest.raises(UserError, match=rf"{name} has 1 values"):
        convert_model(load_model(tmp_path / "float"), ConversionConfig(norm="none"))
    trained = tiny_bitnet(hidden=64, ffn=128)
    with torch.no_grad():
        trained.get_parameter(name).view(-1)[7] = value
    for save in (save_master, save_packed):
        with pytest.raises(UserError, match=rf"{name} has 1 values"):
            save(trained, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_activations_that_overflow_are_named(tmp_path):
    model = tiny_llama(hidden=64, ffn=128)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
    save_master(model, tmp_path / "float")
    with pytest.raises(UserError, match=r"the input of model\.layers\.1\.mlp\.down_proj is not finite"):
        convert_directory(tmp_path / "float", tmp_path / "out", None, ROWS)
    with pytest.raises(UserError, match=r"the input of model\.layers\.1\.mlp\.down_proj is not finite"):
        convert_model(model, None, ROWS)


# ------------------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("save", [save_master, save_packed], ids=["master", "packed"])
def test_a_model_in_several_files_is_the_same_model(save, tmp_path):
    model = tiny_bitnet(hidden=64, ffn=128)
    save(model, tmp_path / "one")
    limit = 40_000 if save is save_master else 8_000
    save(model, tmp_path / "many", max_shard_size=limit)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    (tensors, _), (expected, _) = contents(tmp_path / "many"), contents(tmp_path / "one")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    ids = torch.arange(20)[None]
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        assert torch.equal(load_model(tmp_path / "many")(ids).logits, load_model(tmp_path / "one")(ids).logits)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "many", dtype=torch.float32)
        assert torch.allclose(stock(ids).logits, model(ids).logits, atol=1e-5)


def test_shards_are_read_written_and_streamed(floats, tmp_path):
    make("qwen3").save_pretrained(tmp_path / "float", max_shard_size="50KB")
    assert len(list((tmp_path / "float").glob("*.safetensors"))) > 2
    convert_directory(tmp_path / "float", tmp_path / "many", ConversionConfig(gain="one"), max_shard_size=30_000)
    convert_directory(tmp_path / "float", tmp_path / "one", ConversionConfig(gain="one"))
    assert (tmp_path / "one/model.safetensors").exists()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    (tensors, _), (expected, _) = contents(tmp_path / "many"), contents(tmp_path / "one")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_files_are_what_other_writers_write(tmp_path):
    """Type, shape and place of every tensor as `safetensors` has them, whose own reader checks the rest."""
    state = {
        "bytes": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "half": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "wide": torch.randn(2, 2, 2, dtype=torch.float64),
        "flag": torch.tensor([True, False, True]),
    }
    with ShardWriter(tmp_path, {name: TensorSpec.of(tensor) for name, tensor in state.items()}) as writer:
        for name, tensor in reversed(state.items()):
            for piece in tensor.split(1) if name == "half" else [tensor]:
                writer.write(name, piece)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == state.keys()
    mine = ShardFile(tmp_path / "model.safetensors")
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(mine.read(name), tensor)
        assert mine.read(name).dtype == tensor.dtype
    assert torch.equal(mine.read("half", slice(1, 3)), state["half"][1:3])
    save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "theirs.safetensors").stat().st_size <= (tmp_path / "model.safetensors").stat().st_size + 8


def test_sizes_and_pieces():
    specs = {name: TensorSpec(torch.float32, (size,)) for name, size in {"a": 10, "b": 10, "c": 100, "d": 5}.items()}
    assert assign_shards(specs, 80) == [["a", "b"], ["c"], ["d"]]
    assert assign_shards(specs, 10**6) == [["a", "b", "c", "d"]]
    assert assign_shards({}, 1) == [[]]
    assert [(s.start, s.stop) for s in row_pieces(TensorSpec(torch.float32, (5, 10)), 80)] == [(0, 2), (2, 4), (4, 5)]
    assert [(s.start, s.stop) for s in row_pieces(TensorSpec(torch.float32, (2, 10)), 1)] == [(0, 1), (1, 2)]


def test_the_command_writes_shards(floats, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["convert", str(floats / "qwen3"), "--out", str(out), "--gain", "one", "--max-shard-gib", "0.0001"]) == 0
    assert (out / "model.safetensors.index.json").exists()
    again = ["convert", str(floats / "qwen3"), "--out", str(out), "--gain", "one"]
    assert main(again) == 2
    assert "is not empty" in capsys.readouterr().err.splitlines()[-1]
    assert (out / "model.safetensors.index.json").exists()
    assert main([*again, "--force"]) == 0
    assert not (out / "model.safetensors.index.json").exists()
    assert main([*again, "--force", "--max-shard-gib", "0"]) == 2
    assert "--max-shard-gib must be a number of GiB above 0" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- ternary weights as floats


@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
def test_weights_that_are_ternary_already_keep_their_scale(granularity, tmp_path):
    """As onebitllms' `convert_to_bf16` stores them: absmean alone would shrink each matrix by its share of nonzero codes."""
    model = tiny_llama(hidden=256, ffn=256)
    plain = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                codes, scale = quantize_weight(parameter)
                codes[0] = 0  # a first row that tells nothing
                parameter.copy_(codes * scale.bfloat16().float())
                plain[name] = parameter.clone()
    save_master(model, tmp_path / "float")
    convert_directory(tmp_path / "float", tmp_path / "m", ConversionConfig(norm="none", granularity=granularity))
    with open_weights(tmp_path / "m") as reader:
        for name, expected in plain.items():
            codes, scale = reader.ternary(name)
            assert torch.equal(codes, expected.sign().to(torch.int8))
            assert torch.allclose(scale[1:] if granularity != "tensor" else scale, expected.abs().max(), rtol=1e-5)
            assert expected.abs().mean() < 0.75 * expected.abs().max()  # what absmean alone would have made of it
    again = convert_model(load_model(tmp_path / "float"), ConversionConfig(norm="none", granularity=granularity))
    save_master(again, tmp_path / "memory")
    assert_same(tmp_path / "m", tmp_path / "memory")


# ------------------------------------------------------------------------------------------------------------- memory

PEAK = """
import sys
from pathlib import Path
import torch
from bitnet_arch import ConversionConfig
from bitnet_arch.stream import convert_directory
def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
before = peak()
convert_directory(sys.argv[1], sys.argv[2], ConversionConfig(), [torch.arange(256)[None]])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_conversion_holds_a_part_of_the_model(tmp_path):
    """A model of 560 MB in float32, whose largest tensor has 32 MB: converting it in memory takes more than its size."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=11,
            num_attention_heads=16,
            num_key_value_heads=4,
            tie_word_embeddings=True,
        )
    )
    size = sum(p.nbytes for p in model.parameters()) / 2**20
    assert size > 450
    save_master(model, tmp_path / "float")
    del model
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "float"), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 32 + 300 < size


# ---------------------------------------------------------------------------------------------------------- bad files


@settings(deadline=None, max_examples=300)
@given(
    flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 2**16)),
)
def test_a_damaged_file_is_read_or_named(flips, cut, hostile):
    """Bytes of the header and of its length are changed, the file is cut: values, or one sentence with the file's name."""
    folder, content, header = hostile
    damaged = bytearray(content)
    for place, value in flips:
        damaged[place % header] = value
    (folder / "model.safetensors").write_bytes(damaged if cut is None else damaged[: cut % len(damaged)])
    sentence = f"{folder}/model.safetensors"
    try:
        with open_weights(folder) as reader:
            names = reader.keys()
            for name in names:
                assert reader.get(name).shape == reader.spec(name).shape
                assert sum(piece.numel() for piece in reader.pieces(name)) == reader.get(name).numel()
    except UserError as error:
        sentence = str(error)
    assert sentence.startswith(f"{folder}/model.safetensors")
    assert "\n" not in sentence


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "m"
    save_packed(tiny_bitnet(hidden=32, ffn=32, layers=1, vocab=8), folder)
    content = (folder / "model.safetensors").read_bytes()
    return folder, content, 8 + int.from_bytes(content[:8], "little")
