"""A directory that says one thing and holds another, or what no model can compute with, is refused by whoever reads it."""

import json
import shutil
import struct

import pytest
import torch
from bitnet_arch import (
    ConversionConfig,
    Family,
    UserError,
    convert_directory,
    convert_model,
    load_model,
    open_weights,
    register_family,
    save_master,
    save_packed,
)
from bitnet_arch.__main__ import main
from bitnet_arch.families import FAMILIES
from bitnet_arch.gguf import export_gguf, from_gguf, read_gguf
from bitnet_arch.hub import write_model_card
from bitnet_arch.lrc.directory import lrc_directory
from bitnet_arch.lrc.model import LRCConfig, start_lrc
from bitnet_arch.ptq.directory import quantize_directory
from bitnet_arch.ptq.model import quantize_model
from bitnet_arch.testing import assert_equal_up_to_edges, tiny_bitnet, tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

SHAPE = {"hidden": 32, "ffn": 64, "layers": 1, "vocab": 300}
IDS = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(0))
OURS = ConversionConfig(norm="allnorm", gain="one")
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strict")
    save_master(tiny_llama(**SHAPE), folder / "float", tiny_tokenizer(300))
    save_master(tiny_bitnet(**SHAPE), folder / "master", tiny_tokenizer(300))
    save_packed(tiny_bitnet(**SHAPE), folder / "packed", tiny_tokenizer(300))
    save_master(convert_model(tiny_llama(**SHAPE), OURS), folder / "ours", tiny_tokenizer(300))
    save_packed(convert_model(tiny_llama(**SHAPE), OURS), folder / "ours-packed", tiny_tokenizer(300))
    return folder


@pytest.fixture
def edited(folder, tmp_path):
    """Return a function that copies a directory with some tensors and keys of its configuration changed."""

    def edit(name, tensors=None, **config):
        copy = tmp_path / name
        shutil.copytree(folder / name, copy)
        state = load_file(copy / "model.safetensors")
        for key, value in (tensors or {}).items():
            state[key] = value(state[key]) if callable(value) else value
        save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
        path = copy / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return copy

    return edit


def refusals(directory, tmp_path, ways=("load", "convert", "quantize", "export", "card")):
    """Use a directory in every way, or in some; return the sentences, by what was asked for."""
    actions = {
        "load": lambda: load_model(directory),
        "convert": lambda: convert_directory(directory, tmp_path / "c", ConversionConfig(norm="none")),
        "quantize": lambda: quantize_directory(directory, tmp_path / "q", "absmean"),
        "export": lambda: export_gguf(directory, tmp_path / "x.gguf"),
        "card": lambda: write_model_card(directory),
    }
    found = {}
    for what in ways:
        try:
            actions[what]()
        except UserError as error:
            found[what] = str(error)
            assert "\n" not in found[what]
    return found


READS = {
    "float": {"load", "convert", "quantize"},
    "master": {"load", "quantize", "export", "card"},
    "packed": {"load", "export", "card"},
    "ours": {"load", "quantize", "export", "card"},
    "ours-packed": {"load", "export", "card"},
}
"""What a form is good for: the rest is refused for another reason."""


@pytest.mark.parametrize("form", READS)
def test_whole_directories_are_read_in_every_way(form, edited, tmp_path):
    assert set(refusals(edited(form), tmp_path)) == {"load", "convert", "quantize", "export", "card"} - READS[form]


# ---- tensors that nothing asks for


@pytest.mark.parametrize("form", READS)
@pytest.mark.parametrize("name", [f"{UP}.bias", f"{UP}.lrc_u", "model.layers.1.mlp.up_proj.weight", f"{Q}_norm.weight"])
def test_a_tensor_that_nothing_asks_for_is_named(name, form, edited, tmp_path):
    found = refusals(edited(form, {name: torch.ones(64)}), tmp_path, READS[form])
    assert set(found) == READS[form]
    assert all(f"{name!r}, which its config.json does not ask for" in sentence for sentence in found.values())


@pytest.mark.parametrize("form", READS)
def test_what_stock_transformers_skips_is_skipped(form, edited, tmp_path):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "model.rotary_emb.inv_freq": torch.ones(4)}
    directory = edited(form, old)
    assert refusals(directory, tmp_path, READS[form]) == {}


def test_a_stored_strength_is_a_masters_alone(edited, tmp_path):
    one = {f"{UP}.quant_lambda": torch.ones(())}
    assert refusals(edited("master", one), tmp_path, READS["master"]) == {}
    assert "quant_lambda" in refusals(edited("float", one), tmp_path)["load"]


def test_a_bias_that_is_asked_for_is_read(tmp_path):
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, mlp_bias=True
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.layers[0].mlp.up_proj.bias)
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m").model.layers[0].mlp.up_proj.bias, model.model.layers[0].mlp.up_proj.bias)
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_bias": False}))
    with pytest.raises(UserError, match=r"_proj\.bias', which its config\.json does not ask for"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("key", ["attention.bias", "attention.masked_bias"])
def test_what_a_class_of_transformers_skips_is_skipped(key, neox, tmp_path):
    """GPT-NeoX's own checkpoints hold its causal masks."""
    neox.save_pretrained(tmp_path / "m")
    state = load_file(tmp_path / "m/model.safetensors")
    save_file(state | {f"gpt_neox.layers.0.{key}": torch.ones(4)}, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "m")(IDS).logits, neox(IDS).logits)


# ---- types that are no floats


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("name", [f"{UP}.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_float_source_of_another_type_is_named(name, dtype, edited, tmp_path):
    found = refusals(edited("float", {name: lambda t: t.to(dtype)}), tmp_path, READS["float"])
    kind = str(dtype).removeprefix("torch.")
    assert set(found) == READS["float"]
    assert all(f"tensor {name!r} is {kind}, and floats are" in sentence for sentence in found.values())


@pytest.mark.parametrize("form", ["master", "packed", "ours", "ours-packed"])
def test_a_norm_of_another_type_is_named(form, edited, tmp_path):
    found = refusals(edited(form, {"model.norm.weight": lambda t: t.to(torch.float8_e4m3fn)}), tmp_path, READS[form])
    assert all("'model.norm.weight' is float8_e4m3fn" in found[what] for what in READS[form])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_floats_are_read(dtype, folder, edited):
    directory = edited("float", {f"{UP}.weight": lambda t: t.to(dtype)})
    expected = load_model(folder / "float").get_parameter(f"{UP}.weight").to(dtype).float()
    assert torch.equal(load_model(directory).get_parameter(f"{UP}.weight"), expected)


# ---- epsilons


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("form", READS)
def test_an_epsilon_that_no_norm_has_is_refused(form, value, edited, tmp_path):
    found = refusals(edited(form, rms_norm_eps=value), tmp_path, READS[form])
    assert all("config.json gives rms_norm_eps as" in found[what] for what in READS[form])


@pytest.mark.parametrize("value", [-1.0, float("nan")], ids=str)
def test_a_model_in_memory_with_such_an_epsilon_is_not_converted(value):
    model = tiny_llama(**SHAPE)
    model.config.rms_norm_eps = value
    with pytest.raises(UserError, match="gives rms_norm_eps as"):
        convert_model(model, ConversionConfig(gain="one"))


@pytest.mark.parametrize("value", [-1.0, float("nan")], ids=str)
@pytest.mark.parametrize("form", ["ours", "ours-packed"])
def test_an_inserted_norms_epsilon_is_refused(form, value, edited, tmp_path):
    directory = edited(form, {f"{UP}.in_norm.eps": torch.tensor(value)})
    found = refusals(directory, tmp_path, READS[form])
    assert all(f"{UP}.in_norm.eps is {value:g}, and a norm's epsilon" in found[what] for what in READS[form])
    with pytest.raises(UserError, match=r"up_proj\.in_norm\.eps is"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_files_epsilon_is_refused(folder, tmp_path):
    path = tmp_path / "m.gguf"
    export_gguf(folder / "ours", path)
    from_gguf(path)
    data = bytearray(path.read_bytes())
    start = read_gguf(path).tensors["blk.0.ffn_up.in_norm.eps"].offset
    assert struct.unpack_from("<f", data, start) == (pytest.approx(1e-5),)
    struct.pack_into("<f", data, start, -1.0)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"m\.gguf: tensor blk\.0\.ffn_up\.in_norm\.eps is -1, and a norm's epsilon"):
        from_gguf(path)


def test_an_epsilon_of_zero_is_one(edited):
    directory = edited("float", rms_norm_eps=0.0)
    assert load_model(directory).config.rms_norm_eps == 0
    with pytest.raises(UserError, match="rms_norm_eps is 0, which no gain softens"):
        convert_model(load_model(directory), ConversionConfig(), [IDS])
    convert_model(load_model(directory), ConversionConfig(gain="one"))


# ---- heads


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {"lm_head.weight": torch.zeros(75, 32, dtype=torch.uint8), "lm_head.weight_scale": torch.ones(1)}},
        {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": []}},
    ],
    ids=["tensor", "words"],
)
def test_info_and_card_refuse_a_ternary_head_as_loading_does(change, edited, tmp_path, capsys):
    directory = edited("packed", **change)
    found = refusals(directory, tmp_path, READS["packed"])
    assert found["load"] == found["card"]
    assert "ternary lm_head" in found["load"]
    for command in ("info", "card"):
        assert main([command, str(directory)]) == 2
        assert capsys.readouterr().err == f"error: {found['load']}\n"


def test_info_of_a_family_that_is_not_known_says_what_it_holds(edited, capsys):
    directory = edited("float", model_type="mistral")
    assert main(["info", str(directory)]) == 0
    assert "model_type: mistral\nform: float" in capsys.readouterr().out


@pytest.fixture
def neox():
    """GPT-NeoX, whose parts have names of their own, for as long as a test runs."""
    family = Family(
        linears=("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        mixing=("attention.dense", "mlp.dense_4h_to_h"),
        pre_norms={
            "input_layernorm": ("attention.query_key_value",),
            "post_attention_layernorm": ("mlp.dense_h_to_4h",),
        },
        blocks="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        head="embed_out",
    )
    register_family("gpt_neox", family)
    config = GPTNeoXConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield GPTNeoXForCausalLM(config).eval()
    del FAMILIES["gpt_neox"]


@torch.no_grad()
def logits(model):
    with torch.compiler.set_stance("force_eager"):
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("packed", [False, True], ids=["master", "packed"])
def test_a_head_of_another_name_stays_float(packed, neox, tmp_path):
    neox.save_pretrained(tmp_path / "float")
    convert_directory(tmp_path / "float", tmp_path / "stream", ConversionConfig(norm="none"), packed=packed)
    converted = convert_model(neox, ConversionConfig(norm="none"))
    (save_packed if packed else save_master)(converted, tmp_path / "memory")
    expected = logits(converted)
    for name in ("stream", "memory"):
        block = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert block["modules_to_not_convert"] == ["embed_out"]
        for loaded in (
            load_model(tmp_path / name),
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval(),
        ):
            assert_equal_up_to_edges(logits(loaded), expected)
    loaded = load_model(tmp_path / "memory")
    loaded.save_pretrained(tmp_path / "again")  # as other trainers do
    block = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert block["modules_to_not_convert"] == ["embed_out"]


# ---- what has a correction is not quantised


@pytest.mark.parametrize("method", ["absmean", "least_squares", "gptq"])
def test_a_model_with_a_correction_is_not_quantised(method, folder, tmp_path):
    rows = [IDS] if method == "gptq" else None
    lrc_directory(folder / "float", tmp_path / "lrc", LRCConfig(rank=2), [IDS])
    assert open_weights(tmp_path / "lrc").form == "master"
    with pytest.raises(UserError, match=r"lrc has a low-rank correction, .*: quantise the model without it"):
        quantize_directory(tmp_path / "lrc", tmp_path / "out", method, rows)
    assert not (tmp_path / "out").exists()
    for model in (load_model(tmp_path / "lrc"), start_lrc(tiny_bitnet(**SHAPE), 2)):
        with pytest.raises(UserError, match="the model has a low-rank correction"):
            quantize_model(model, method, rows)


# ---- what has no effect


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "none", "gain": "one"}, "gain='one' has no effect with norm='none'"),
        ({"norm": "none", "softness": 0.2}, r"softness=0\.2 has no effect with norm='none'"),
        ({"gain": "one", "softness": 0.2}, r"softness=0\.2 has no effect with gain='one'"),
    ],
    ids=["gain", "softness", "softness-of-one"],
)
def test_a_conversion_that_calibrates_nothing_has_no_choice_of_gains(options, words):
    with pytest.raises(UserError, match=words):
        ConversionConfig(**options)
    ConversionConfig(**{"norm": options.get("norm", "subln")})
