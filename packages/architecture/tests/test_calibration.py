"""What a model is calibrated on and how its family is described: what cannot be is refused in a sentence that names it."""

import shutil

import pytest
import torch
from bitnet_arch import (
    BitLinear,
    ConversionConfig,
    Family,
    PackedBitLinear,
    UserError,
    convert_directory,
    convert_model,
    load_model,
    register_family,
    save_master,
)
from bitnet_arch.__main__ import calibration_rows, main
from bitnet_arch.calibration import check_calibration
from bitnet_arch.families import FAMILIES, LLAMA_LIKE
from bitnet_arch.lrc.directory import lrc_directory
from bitnet_arch.lrc.model import LRCConfig, add_lrc
from bitnet_arch.ptq.directory import quantize_directory
from bitnet_arch.ptq.model import quantize_model
from bitnet_arch.testing import convert_calibrated, tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

SHAPE = {"hidden": 32, "ffn": 64, "layers": 2, "vocab": 300}
IDS = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
LRC = LRCConfig(rank=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    source = tmp_path_factory.mktemp("calibration") / "float"
    save_master(tiny_llama(**SHAPE), source, tiny_tokenizer(300))
    return source


# ---- token ids

BAD = {
    "outside": ([torch.tensor([[300]])], "token id outside the vocabulary of 300"),
    "negative": ([torch.tensor([[3, -1]])], "token id outside the vocabulary of 300"),
    "none": ([], "calibration has no tokens"),
    "empty": ([torch.zeros(1, 0, dtype=torch.int64)], "calibration has no tokens"),
    "empty-row": ([IDS, torch.zeros(1, 0, dtype=torch.int64)], "row 1 of calibration is empty"),
    "vector": ([IDS, IDS[0]], r"row 1 of calibration is int64 \[17\]: pass a list of token ids, each int64 \[batch, time\]"),
    "no-list": (IDS, r"row 0 of calibration is int64 \[17\]"),
    "float": ([IDS.float()], r"row 0 of calibration is float32 \[2, 17\]"),
    "bool": ([IDS > 3], r"row 0 of calibration is bool \[2, 17\]"),
    "numbers": ([[1, 2, 3]], "row 0 of calibration is list"),
}

METHODS = {
    "convert_model": lambda source, out, ids: convert_model(load_model(source), ConversionConfig(), ids),
    "convert_directory": lambda source, out, ids: convert_directory(source, out, ConversionConfig(), ids),
    "quantize_model": lambda source, out, ids: quantize_model(load_model(source), "gptq", ids),
    "quantize_directory": lambda source, out, ids: quantize_directory(source, out, "gptq", ids),
    "add_lrc": lambda source, out, ids: add_lrc(load_model(source), ids, LRC),
    "lrc_directory": lambda source, out, ids: lrc_directory(source, out, LRC, ids),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("method", METHODS)
def test_calibration_that_no_model_can_be_run_on_is_named(method, case, source, tmp_path):
    ids, words = BAD[case]
    with pytest.raises(UserError, match=words):
        METHODS[method](source, tmp_path / "out", ids)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_rows_longer_than_the_models_positions_are_named(method, source, tmp_path):
    longest = load_model(source).config.max_position_embeddings
    METHODS[method](source, tmp_path / "fits", [IDS[:1, :1].expand(1, longest)])
    with pytest.raises(UserError, match=rf"row 1 of calibration has {longest + 1} tokens, and the model {longest} positions"):
        METHODS[method](source, tmp_path / "out", [IDS, IDS[:1, :1].expand(1, longest + 1)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [ConversionConfig(norm="none"), ConversionConfig(gain="one")], ids=["none", "one"])
def test_calibration_without_effect_is_refused(config, source, tmp_path):
    with pytest.raises(UserError, match=r"calibration has no effect: leave it out"):
        convert_directory(source, tmp_path / "out", config, [IDS])
    with pytest.raises(UserError, match=r"calibration has no effect: leave it out"):
        convert_model(load_model(source), config, [IDS])
    assert not (tmp_path / "out").exists()
    convert_directory(source, tmp_path / "out", config)


@pytest.mark.parametrize("method", METHODS)
def test_ids_of_either_integer_type_are_run(method, source, tmp_path):
    for ids in (IDS, IDS.int()):
        METHODS[method](source, tmp_path / str(ids.dtype), iter([ids]))
    assert check_calibration(iter([IDS]), 300)[0] is IDS


@pytest.mark.parametrize("command", [("convert",), ("quantize", "--method", "gptq"), ("lrc", "--rank", "2")], ids=lambda c: c[0])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        (b"", "has only 0 tokens"),
        (b"one two", "give a longer one"),
        (b"\xff\xfe" * 40, "cannot be read"),
        (b"A ternary weight is minus one, zero or plus one. " * 4, "token id outside the vocabulary of 300"),
    ],
    ids=["missing", "empty", "short", "no-text", "another-tokenizer"],
)
def test_a_calibration_file_is_named(command, text, words, tmp_path, capsys):
    save_master(tiny_llama(**SHAPE), tmp_path / "m", tiny_tokenizer(420))  # knows tokens that the model does not
    file = tmp_path / "sample.txt"
    if text is not None:
        file.write_bytes(text)
    assert main([command[0], str(tmp_path / "m"), "--out", str(tmp_path / "out"), "--calibration", str(file), *command[1:]]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error


def test_the_command_cuts_its_text_to_the_models_positions(tmp_path):
    model = tiny_llama(**SHAPE)
    model.config.max_position_embeddings = 40
    save_master(model, tmp_path / "m", tiny_tokenizer(300))
    text = "A ternary weight is minus one, zero or plus one. " * 40
    assert [len(ids) for ids in calibration_rows(tiny_tokenizer(300), text, 40)[0]] == [40]
    (tmp_path / "sample.txt").write_text(text)
    assert (
        main(["convert", str(tmp_path / "m"), "--out", str(tmp_path / "out"), "--calibration", str(tmp_path / "sample.txt")]) == 0
    )


# ---- weights that are no numbers, when the model is run before it is written

FORMS = {
    "bitnet": ConversionConfig(),
    "allnorm": ConversionConfig(norm="allnorm"),
    "bitlinear": ConversionConfig(norm="bitlinear", gain="one"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_that_is_no_number_is_named_before_the_model_is_run(form, name, value, source, tmp_path):
    save_master(tiny_llama(**SHAPE), tmp_path / "m")
    state = load_file(tmp_path / "m/model.safetensors")
    state[name].view(-1)[5 + 32 * (int(IDS[0, 0]) if "embed" in name else 0)] = value
    save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"^{name} has 1 values that are NaN or infinite"):
        convert_directory(tmp_path / "m", tmp_path / "out", FORMS[form], [IDS] if FORMS[form].calibrates else None)
    assert not (tmp_path / "out").exists()


# ---- families that are described wrongly

WRONG = {
    "linear": ({"linears": ("self_attn.qkv_proj", "mlp.down_proj")}, r"no 'model\.layers\.0\.self_attn\.qkv_proj'"),
    "norm": ({"pre_norms": {"pre_layernorm": ("mlp.down_proj",)}}, r"no 'model\.layers\.0\.pre_layernorm'"),
    "blocks": ({"blocks": "model.h"}, r"no 'model\.h'"),
    "embedding": ({"embedding": "model.wte"}, r"no 'model\.wte'"),
    "final-norm": ({"final_norm": "model.ln_f"}, r"no 'model\.ln_f'"),
    "head": ({"head": "embed_out"}, "no 'embed_out'"),
}
GOOD = {"linears": ("self_attn.o_proj", "mlp.down_proj"), "mixing": ("mlp.down_proj",), "pre_norms": {}}


@pytest.fixture
def described():
    """Return a function that registers families; what it registered is forgotten when the test ends."""
    names = []

    def register(name, family):
        register_family(name, family)
        names.append(name)

    yield register
    for name in names:
        del FAMILIES[name]


def uses(make, directory, out):
    """Yield everything that needs a family's description; the first loads a float directory."""
    make().save_pretrained(directory)
    yield lambda: load_model(directory)
    for config in (ConversionConfig(norm="none"), ConversionConfig(), ConversionConfig(norm="none", granularity="row")):
        yield lambda config=config: convert_calibrated(make(), config, [IDS])
        yield lambda config=config: convert_directory(directory, out, config, [IDS] if config.calibrates else None)
    yield lambda: quantize_model(make(), "gptq", [IDS])
    yield lambda: quantize_directory(directory, out, "absmean")
    yield lambda: lrc_directory(directory, out, LRC, [IDS])


def ternary_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, BitLinear | PackedBitLinear)}


def mistral():
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("case", WRONG)
def test_a_name_that_the_model_has_not_is_named(case, described, tmp_path):
    changes, words = WRONG[case]
    described("mistral", Family(**GOOD | changes))
    for use in uses(mistral, tmp_path / "m", tmp_path / "out"):
        with pytest.raises(UserError, match=rf"a \w*MistralForCausalLM has {words}: the family 'mistral' is described wrongly"):
            use()
    assert not (tmp_path / "out").exists()


def test_the_same_family_described_rightly_is_converted(described, tmp_path):
    described("mistral", LLAMA_LIKE)
    load, *changing = uses(mistral, tmp_path / "m", tmp_path / "out")
    assert not ternary_names(load())
    for use in changing:
        made = use() or load_model(tmp_path / "out")
        assert ternary_names(made) == {f"model.layers.0.{name}" for name in LLAMA_LIKE.linears}
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_layers_that_are_not_linear_are_named(described, tmp_path):
    """GPT-2's are `Conv1D`, whose weight is the transpose."""
    described(
        "gpt2",
        Family(
            linears=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
            mixing=("attn.c_proj", "mlp.c_proj"),
            pre_norms={"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
            blocks="transformer.h",
            embedding="transformer.wte",
            final_norm="transformer.ln_f",
        ),
    )

    def make():
        return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=1, n_head=2)).eval()

    load, *changing = uses(make, tmp_path / "m", tmp_path / "out")
    for use in changing:
        with pytest.raises(UserError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D, not a linear layer"):
            use()
    load()  # as a float model it is none of our business
    with pytest.raises(UserError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
        convert_model(make(), ConversionConfig(norm="none", rotation=True))
