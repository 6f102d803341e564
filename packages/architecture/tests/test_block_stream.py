"""Calibrated methods from directory to directory give what they give in memory, in less memory."""

import json
import subprocess
import sys

import pytest
import torch
from bitnet_arch import (
    ConversionConfig,
    UserError,
    convert_model,
    load_model,
    load_tokenizer,
    open_weights,
    save_master,
    save_packed,
    set_lambda,
)
from bitnet_arch.__main__ import calibration_rows, main
from bitnet_arch.lrc.directory import lrc_directory
from bitnet_arch.lrc.model import LRCConfig, add_lrc
from bitnet_arch.ptq.directory import quantize_directory
from bitnet_arch.ptq.model import quantize_model
from bitnet_arch.stream import convert_directory
from bitnet_arch.testing import SMALL_SHAPE, random_model, tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file
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

SHAPE = SMALL_SHAPE
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
MAKERS = {
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama-biases": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **WINDOWS, head_dim=32)),
}
FORMS = {
    "stock-subln": ("llama-tied", {"norm": "subln"}),
    "own-rows-rotated": ("qwen3", {"norm": "subln", "granularity": "row", "rotation": True}),
    "own-bitlinear": ("gemma3", {"norm": "bitlinear"}),
    "own-allnorm-groups": ("llama-biases", {"norm": "allnorm", "granularity": "group128"}),
}
ROWS = [torch.randint(0, 128, (2, n), generator=torch.Generator().manual_seed(n)) for n in (24, 24, 9)]


def make(family):
    return random_model(MAKERS[family])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return a folder of float directories, and of masters made of some."""
    folder = tmp_path_factory.mktemp("sources")
    for family in MAKERS:
        save_master(make(family), folder / family, tiny_tokenizer(300), provenance="random weights")
    for form, (family, config) in FORMS.items():
        convert_directory(folder / family, folder / form, ConversionConfig(**config), ROWS)
    return folder


def contents(directory):
    with open_weights(directory) as reader:
        names = reader.keys()
        tensors = {name: reader.get(name) for name in names}
    return tensors, {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".safetensors"}


def assert_same(a, b):
    (tensors, others), (expected, expected_others) = contents(a), contents(b)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert torch.equal(tensors[name], tensor), name
    assert others == expected_others


def in_memory(model, source, out, packed, **more):
    (save_packed if packed else save_master)(model, out, load_tokenizer(source), provenance="random weights", **more)


METHODS = [("absmean", False), ("least_squares", False), ("least_squares", True), ("gptq", True), ("gptq_act_order", True)]
CASES = [*((name, "gptq", True) for name in (*MAKERS, *FORMS)), *(("qwen3", *method) for method in METHODS if method[0] != "gptq")]


@pytest.mark.parametrize(
    ("name", "method", "calibrates"), CASES, ids=[f"{n}-{m}-{'data' if c else 'weights'}" for n, m, c in CASES]
)
def test_quantising_block_by_block_gives_what_quantising_in_memory_gives(name, method, calibrates, sources, tmp_path):
    source, rows = sources / name, ROWS if calibrates else None
    model = quantize_model(load_model(source), method, rows)
    for packed in (False, True):
        in_memory(model, source, tmp_path / "memory", packed)
        quantize_directory(source, tmp_path / "stream", method, rows, packed=packed)
        assert_same(tmp_path / "stream", tmp_path / "memory")


@pytest.mark.parametrize("granularity", ["row", "group128"])
def test_a_float_source_takes_a_granularity(granularity, sources, tmp_path):
    source = sources / "qwen3"
    converted = convert_model(load_model(source), ConversionConfig(norm="none", granularity=granularity))
    in_memory(quantize_model(converted, "gptq", ROWS), source, tmp_path / "memory", True)
    quantize_directory(source, tmp_path / "stream", "gptq", ROWS, granularity=granularity, packed=True)
    assert_same(tmp_path / "stream", tmp_path / "memory")


LRC_CASES = {
    "llama-tied": LRCConfig(rank=8, quantizer="least_squares", steps=2),
    "gemma3": LRCConfig(rank=4, quantizer="least_squares"),
    "stock-subln": LRCConfig(rank=4),
    "own-rows-rotated": LRCConfig(rank=0.1, dtype="int8", quantizer="keep"),
    "own-bitlinear": LRCConfig(rank=4, dtype="int8"),
    "own-allnorm-groups": LRCConfig(rank=0.1, quantizer="absmean"),
}


@pytest.mark.parametrize(("name", "config"), LRC_CASES.items(), ids=LRC_CASES)
def test_correcting_block_by_block_gives_what_correcting_in_memory_gives(name, config, sources, tmp_path):
    source = sources / name
    model = add_lrc(load_model(source), ROWS, config)
    for packed in (False, True):
        in_memory(model, source, tmp_path / "memory", packed)
        lrc_directory(source, tmp_path / "stream", config, ROWS, packed=packed)
        assert_same(tmp_path / "stream", tmp_path / "memory")


def test_calibration_and_the_blocks_before_decide(sources, tmp_path):
    """The control: other tokens, or another first block, give other codes in the second one."""
    name = "model.layers.1.mlp.down_proj.weight"
    state = contents(sources / "qwen3")[0]
    save_master(make("qwen3"), tmp_path / "other")
    changed = {n: -t if n == "model.layers.0.self_attn.v_proj.weight" else t for n, t in state.items()}
    save_file(changed, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    found = []
    for source, rows in ((sources / "qwen3", ROWS), (sources / "qwen3", [row.flip(1) for row in ROWS]), (tmp_path / "other", ROWS)):
        quantize_directory(source, tmp_path / "m", "gptq", rows)
        found.append(contents(tmp_path / "m")[0][name].sign())
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_scales_and_shards_are_as_asked(sources, tmp_path):
    source = sources / "llama-tied"
    in_memory(quantize_model(load_model(source), "gptq", ROWS), source, tmp_path / "memory", True, linear_class="autobitlinear")
    more = {"packed": True, "linear_class": "autobitlinear", "max_shard_size": 8_000, "provenance": "random weights"}
    done = []
    quantize_directory(source, tmp_path / "stream", "gptq", ROWS, progress=lambda *numbers: done.append(numbers), **more)
    assert done == [(1, 2), (2, 2)]
    assert len(list((tmp_path / "stream").glob("*.safetensors"))) > 2
    (tmp_path / "stream/model.safetensors.index.json").unlink()
    merged = {k: v for file in (tmp_path / "stream").glob("*.safetensors") for k, v in load_file(file).items()}
    assert merged.keys() == contents(tmp_path / "memory")[0].keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in contents(tmp_path / "memory")[0].items())


def test_what_cannot_be_done_is_refused_and_leaves_nothing(sources, tmp_path):
    out, source = tmp_path / "out", sources / "qwen3"
    for arguments, more, words in (
        ((source, out, "gptq"), {}, "gptq needs calibration"),
        ((source, out, "absmean", ROWS), {}, "no effect"),
        ((source, out, "best"), {}, "unknown quantiser"),
        ((source, out, "gptq", []), {}, "no tokens"),
        ((source, out, "gptq", [torch.tensor([[5, 128]])]), {}, "outside the vocabulary of 128"),
        ((source, out, "gptq", ROWS), {"epsilon": -1.0}, "epsilon must be"),
        ((source, out, "absmean"), {"granularity": "column"}, "unknown granularity"),
        ((source, source, "absmean"), {}, "is the source itself"),
        ((source, out, "absmean"), {"linear_class": "autobitlinear"}, "has no effect on float masters"),
        ((sources / "stock-subln", out, "absmean"), {"granularity": "row"}, "leave granularity out"),
    ):
        with pytest.raises(UserError, match=words):
            quantize_directory(*arguments, **more)
    quantize_directory(source, tmp_path / "packed", "absmean", packed=True)
    with pytest.raises(UserError, match="is packed and has no float weights"):
        quantize_directory(tmp_path / "packed", out, "absmean")
    lrc_directory(source, tmp_path / "lrc", LRCConfig(rank=2), ROWS)
    with pytest.raises(UserError, match="has a low-rank correction already"):
        lrc_directory(tmp_path / "lrc", out, LRCConfig(rank=2), ROWS)
    damaged = contents(source)[0]
    damaged["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_master(make("qwen3"), tmp_path / "nan")
    save_file(damaged, tmp_path / "nan/model.safetensors", metadata={"format": "pt"})
    for run in (
        lambda: quantize_directory(tmp_path / "nan", out, "gptq", ROWS),
        lambda: lrc_directory(tmp_path / "nan", out, LRCConfig(rank=2), ROWS),
    ):
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 values that are NaN"):
            run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lrc", "nan", "packed"]


def test_a_master_that_was_saved_on_its_way_is_not_corrected(sources, tmp_path):
    model = convert_model(load_model(sources / "qwen3"), ConversionConfig(norm="none", granularity="row"))
    set_lambda(model, 0.5)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"was saved at lambda 0\.5"):
        lrc_directory(tmp_path / "m", tmp_path / "out", LRCConfig(rank=2), ROWS)


# ------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A float directory whose tokenizer fits it, and a text."""
    folder = tmp_path_factory.mktemp("spoken")
    save_master(tiny_llama(hidden=64, ffn=96), folder / "m", tiny_tokenizer(512), provenance="random weights")
    (folder / "text").write_text("A short text that is long enough to be cut into more than sixteen tokens. " * 4)
    return folder


def run(*words):
    return main([str(word) for word in words])


def test_the_commands_write_what_the_functions_write(spoken, tmp_path, capsys):
    rows = calibration_rows(load_tokenizer(spoken / "m"), (spoken / "text").read_text())
    text = ["--calibration", spoken / "text"]
    assert run("quantize", spoken / "m", "--out", tmp_path / "q", "--method", "gptq", "--granularity", "row", *text, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"out": str(tmp_path / "q"), "form": "master", "source": json.loads(out)["source"]}
    assert err.splitlines()[1:] == ["block 1 of 2", "block 2 of 2"]
    quantize_directory(spoken / "m", tmp_path / "expected", "gptq", rows, granularity="row")
    assert_same(tmp_path / "q", tmp_path / "expected")
    again = ["quantize", spoken / "m", "--out", tmp_path / "q", "--method", "least_squares", "--packed"]
    assert run(*again) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run(*again, "--force") == 0
    assert "wrote packed model" in capsys.readouterr().out
    quantize_directory(spoken / "m", tmp_path / "expected", "least_squares", packed=True)
    assert_same(tmp_path / "q", tmp_path / "expected")
    assert run("lrc", spoken / "m", "--out", tmp_path / "l", "--rank", "0.05", "--dtype", "int8", "--packed", *text) == 0
    lrc_directory(spoken / "m", tmp_path / "expected", LRCConfig(rank=0.05, dtype="int8"), rows, packed=True)
    assert_same(tmp_path / "l", tmp_path / "expected")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["quantize", "--method", "absmean", "--calibration", "text"], "no effect"),
        (["quantize", "--method", "gptq", "--calibration", "nowhere"], "cannot be read"),
        (["lrc", "--rank", "0"], "lrc_rank must be"),
        (["lrc", "--rank", "1.5"], "lrc_rank must be"),
        (["lrc", "--rank", "4", "--steps", "0"], "steps must be"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_a_mistake_is_one_sentence(words, sentence, spoken, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(spoken)
    assert run(words[0], "m", "--out", tmp_path / "out", *words[1:]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert sentence in error
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- memory

PEAK = """
import sys
from pathlib import Path
import torch
from bitnet_arch.lrc.directory import lrc_directory
from bitnet_arch.lrc.model import LRCConfig
from bitnet_arch.ptq.directory import quantize_directory
def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) / 1024
torch.set_num_threads(1)
rows = [torch.arange(64)[None]]
before = peak()
if sys.argv[3] == "lrc":
    lrc_directory(sys.argv[1], sys.argv[2], LRCConfig(rank=8, quantizer="keep", decomposition="randomized"), rows, packed=True)
else:
    quantize_directory(sys.argv[1], sys.argv[2], "least_squares", rows, packed=True)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("method", ["least_squares", "lrc"])
def test_calibration_holds_a_block_of_the_model(method, tmp_path):
    """A model of 670 MB in float32, half of it blocks of 13 MB, whose covariances take 24 or 72 MB: in memory it takes its size."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=160_000, num_key_value_heads=4, tie_word_embeddings=True, **shape))
    blocks = sum(p.nbytes for p in model.model.layers.parameters()) / 2**20
    assert blocks > 330
    save_master(model, tmp_path / "float")
    del model
    command = [sys.executable, "-c", PEAK, str(tmp_path / "float"), str(tmp_path / "out"), method]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    covariances = 8 * (3 * 512**2 + 1536**2) * (3 if method == "lrc" else 1) / 2**20
    assert float(done.stdout) < blocks / 28 + covariances + 300
