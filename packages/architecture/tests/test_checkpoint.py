import json
import os
import subprocess
import sys

import pytest
import torch
from bitnet_arch import (
    BitLinear,
    ConversionConfig,
    PackedBitLinear,
    UserError,
    bitlinear_layers,
    convert_model,
    load_model,
    load_tokenizer,
    open_weights,
    save_master,
    save_packed,
    set_lambda,
)
from bitnet_arch.__main__ import main
from bitnet_arch.testing import assert_equal_up_to_edges, tiny_bitnet, tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import BitNetForCausalLM

IDS = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, sys.argv[3])
assert "bitnet_arch" not in sys.modules
"""


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def stock_logits(directory, tmp_path):
    torch.save(IDS, tmp_path / "ids.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-c", STOCK, str(directory), str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
    return torch.load(tmp_path / "logits.pt", weights_only=True)


@pytest.mark.parametrize(
    ("form", "tied"),
    [
        pytest.param(
            form, tied, id=f"{form}-{'tied' if tied else 'untied'}", marks=[] if (form != "bitlinear") == tied else pytest.mark.slow
        )
        for form in ("master", "bitlinear", "autobitlinear")
        for tied in (True, False)
    ],
)
def test_every_form_gives_equal_logits_here_and_in_stock_transformers(form, tied, tmp_path):
    model = tiny_bitnet(tied=tied, hidden=128, ffn=384)
    expected = logits(model)
    if form == "master":
        save_master(model, tmp_path / "m")
    else:
        save_packed(model, tmp_path / "m", linear_class=form)
    assert_equal_up_to_edges(logits(load_model(tmp_path / "m")), expected)
    # transformers 5.12.1 leaves a packed autobitlinear weight as uint8 and cannot run its own checkpoints of that form.
    if form != "autobitlinear":
        assert_equal_up_to_edges(stock_logits(tmp_path / "m", tmp_path), expected)


def test_the_two_scale_conventions_are_inverse_and_told_apart_by_name(tmp_path):
    model = tiny_bitnet(hidden=64, ffn=128)
    save_packed(model, tmp_path / "a", linear_class="bitlinear")
    save_packed(model, tmp_path / "b", linear_class="autobitlinear")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    a, b = (open_weights(tmp_path / d).get(name) for d in "ab")
    torch.testing.assert_close(a * b, torch.ones(1))
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["quantization_config"]["linear_class"] = "autobitlinear"
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    wrong = logits(load_model(tmp_path / "a"))
    assert (wrong - logits(model)).abs().max() > 0.01


def test_ternary_reader_agrees_between_master_and_packed(tmp_path):
    model = tiny_bitnet(hidden=64, ffn=128)
    save_master(model, tmp_path / "m")
    save_packed(model, tmp_path / "p")
    with open_weights(tmp_path / "m") as master, open_weights(tmp_path / "p") as packed:
        for name, _ in bitlinear_layers(model):
            (a, s), (b, t) = master.ternary(f"{name}.weight"), packed.ternary(f"{name}.weight")
            assert torch.equal(a, b)
            torch.testing.assert_close(s, t, rtol=1e-6, atol=0)


def test_packed_model_has_integer_layers_and_saves_again(tmp_path):
    model = tiny_bitnet(hidden=64, ffn=128)
    save_packed(model, tmp_path / "p", tiny_tokenizer())
    packed = load_model(tmp_path / "p")
    assert isinstance(packed.model.layers[0].mlp.up_proj, PackedBitLinear)
    save_packed(packed, tmp_path / "q", linear_class="autobitlinear")
    assert torch.equal(logits(load_model(tmp_path / "q")), logits(packed))
    assert load_tokenizer(tmp_path / "p")("a fox").input_ids == tiny_tokenizer()("a fox").input_ids


def test_soft_norms_keep_a_model_and_plain_ones_do_not():
    gains = {}
    for softness in (0.0, 0.1, 1e4):
        source = tiny_llama(seed=3)
        reference = logits(source)
        converted = convert_model(source, ConversionConfig(softness=softness), [IDS])
        set_lambda(converted, 0.0)
        assert isinstance(converted, BitNetForCausalLM)
        gains[softness] = ((logits(converted) - reference).norm() / reference.norm()).item()
    assert gains[1e4] < 1e-3 < gains[0.1] < gains[0.0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_residual_scale_does_not_change_the_function(tied):
    source = tiny_llama(tied=tied, seed=1)
    with torch.no_grad():
        for layer in source.model.layers:
            layer.mlp.up_proj.weight.mul_(1e-3)
            layer.mlp.gate_proj.weight.mul_(300)
    reference = logits(source)
    converted = convert_model(source, ConversionConfig(softness=1e4), [IDS])
    assert converted.config.rms_norm_eps > 1e-4
    set_lambda(converted, 0.0)
    assert ((logits(converted) - reference).norm() / reference.norm()) < 2e-2


def test_norm_none_keeps_the_architecture_and_conversion_twice_is_refused():
    model = convert_model(tiny_llama(), ConversionConfig(norm="none"))
    assert model.config.model_type == "llama"
    assert all(isinstance(layer, BitLinear) for _, layer in bitlinear_layers(model))
    with pytest.raises(UserError, match="converted already"):
        convert_model(model)


def test_a_model_with_lambda_below_one_is_refused(tmp_path):
    model = tiny_bitnet(hidden=64, ffn=128)
    set_lambda(model, 0.5)
    for save in (save_master, save_packed):
        with pytest.raises(UserError, match=r"lambda is 0\.5"):
            save(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def _truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _edit_config(**changes):
    def edit(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _drop_tensor(directory):
    path = directory / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "truncated or damaged"),
        (lambda d: (d / "model.safetensors").unlink(), "is missing"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (_edit_config(model_type="martian"), "no model that transformers knows"),
        (_edit_config(hidden_size=128), "config.json asks for"),
        (_drop_tensor, "no tensor 'model.layers.1.mlp.up_proj.weight'"),
        (_edit_config(quantization_config={"quant_method": "gptq"}), "gptq"),
    ],
    ids=[
        "truncated",
        "missing",
        "no-config",
        "unknown-family",
        "other-shape",
        "dropped-tensor",
        "foreign-quantisation",
    ],
)
def test_a_damaged_directory_ends_in_one_sentence(damage, message, tmp_path):
    save_master(tiny_bitnet(hidden=64, ffn=128), tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "m")


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    model = tiny_bitnet(hidden=64, ffn=128)
    save_master(model, tmp_path / "m")
    before = (tmp_path / "m/model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bitnet_arch.shards.os.pwrite", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_master(model, tmp_path / "m")
    assert (tmp_path / "m/model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_folder_of_other_things_is_not_replaced(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a model directory"):
        save_master(tiny_bitnet(hidden=64, ffn=128), tmp_path / "m")
    assert (tmp_path / "m/thesis.tex").exists()


def test_convert_command(tmp_path, capsys):
    save_master(tiny_llama(hidden=64, ffn=128), tmp_path / "float", tiny_tokenizer())
    assert main(["convert", str(tmp_path / "float"), "--out", str(tmp_path / "ternary"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "master"
    assert isinstance(load_model(tmp_path / "ternary").model.layers[0].mlp.up_proj, BitLinear)
    assert not (tmp_path / "ternary/provenance.json").exists()
    assert main(["info", str(tmp_path / "ternary"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model_type"] == "bitnet"
    assert main(["convert", str(tmp_path / "ternary"), "--out", str(tmp_path / "again")]) == 2
    assert "ternary already" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--norm", "none", "--softness", "0.1"], "--softness has no effect with --norm none"),
        (["--norm", "none", "--calibration", "x.txt"], "--calibration has no effect with --norm none"),
        (["--norm", "none", "--gain", "calibrated"], "--gain has no effect with --norm none"),
        (["--gain", "one", "--softness", "0.1"], "--softness has no effect with --gain one"),
        (["--gain", "one", "--calibration", "x.txt"], "--calibration has no effect with --gain one"),
    ],
    ids=["none-softness", "none-calibration", "none-gain", "one-softness", "one-calibration"],
)
def test_an_option_without_effect_is_refused_before_anything_is_read(options, words, tmp_path, capsys):
    assert main(["convert", "owner/unreachable", "--out", str(tmp_path / "x"), *options]) == 2
    assert capsys.readouterr().err == f"error: {words}: leave one of them out\n"


@pytest.mark.parametrize("size", ["nan", "inf", "-1", "0"])
def test_a_shard_size_that_is_none_is_refused(size, tmp_path, capsys):
    assert main(["convert", "owner/unreachable", "--out", str(tmp_path / "x"), f"--max-shard-gib={size}"]) == 2
    assert capsys.readouterr().err.startswith("error: --max-shard-gib must be a number of GiB above 0, not ")


def test_options_left_out_take_the_defaults_of_the_library(tmp_path):
    save_master(tiny_llama(hidden=64, ffn=128), tmp_path / "float", tiny_tokenizer())
    given = {
        "left-out": [],
        "given": ["--norm", "subln", "--gain", "calibrated", "--softness", "0.1"],
        "other": ["--softness", "9"],
    }
    weights = {}
    for name, options in given.items():
        assert main(["convert", str(tmp_path / "float"), "--out", str(tmp_path / name), *options]) == 0
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["left-out"] == weights["given"] != weights["other"]
    assert ConversionConfig() == ConversionConfig(norm="subln", gain="calibrated", softness=0.1)


@pytest.mark.parametrize("around", [None, "<|begin|> $A", "<|begin|> $A <|endoftext|>"], ids=["nothing", "begin", "both"])
def test_a_tokenizer_that_adds_tokens_outlives_conversion(around, tmp_path):
    tokenizer = tiny_tokenizer(around=around)
    save_master(tiny_llama(hidden=64, ffn=128), tmp_path / "float", tokenizer)
    assert main(["convert", str(tmp_path / "float"), "--out", str(tmp_path / "ternary")]) == 0
    for text in ("", "a fox"):
        assert load_tokenizer(tmp_path / "ternary")(text).input_ids == tokenizer(text).input_ids


@pytest.mark.parametrize(
    "values",
    [{"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "do_sample": False}, {"num_beams": 1, "early_stopping": True}],
    ids=["sampling", "no-sampling", "beams"],
)
def test_generation_settings_that_transformers_refuses_to_save_lose_nothing(values, tmp_path):
    save_master(tiny_llama(hidden=64, ffn=128), tmp_path / "float", tiny_tokenizer())
    (tmp_path / "float/generation_config.json").write_text(json.dumps(values | {"eos_token_id": 0}))
    with pytest.raises(ValueError, match="Fix these issues"):
        load_model(tmp_path / "float").generation_config.save_pretrained(str(tmp_path / "refused"))
    model = convert_model(load_model(tmp_path / "float"), ConversionConfig(gain="one"))
    save_master(model, tmp_path / "m")
    save_packed(model, tmp_path / "p")
    for name in ("m", "p"):
        found = load_model(tmp_path / name).generation_config
        assert {key: getattr(found, key) for key in values} == values
        assert found.eos_token_id == 0
    save_master(load_model(tmp_path / "m"), tmp_path / "again")
    assert (tmp_path / "again/generation_config.json").read_text() == (tmp_path / "m/generation_config.json").read_text()


IMPORT = """
import json, socket, sys
def refuse(*a, **k): raise RuntimeError("network at import")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import bitnet_arch, torch
names = ("lightning", "pytorch_lightning", "hydra", "omegaconf", "wandb", "xllamacpp", "data_handler", "wrinklefree")
print(json.dumps([[n for n in names if n in sys.modules], torch.cuda.is_initialized(), bitnet_arch.BitLinear.__name__]))
"""


def test_import_is_light():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], False, "BitLinear"]


def test_where_weights_come_from_outlives_conversion(tmp_path):
    save_master(tiny_llama(hidden=64, ffn=128), tmp_path / "float", tiny_tokenizer(), provenance="a 4-bit copy")
    for more in ([], ["--packed", "--force"]):
        assert main(["convert", str(tmp_path / "float"), "--out", str(tmp_path / "ternary"), *more]) == 0
        assert json.loads((tmp_path / "ternary/provenance.json").read_text()) == {"source": "a 4-bit copy"}


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named_when_they_are_loaded(name, tmp_path):
    save_master(tiny_bitnet(hidden=64, ffn=128, layers=1), tmp_path / "m")
    held = load_file(tmp_path / "m/model.safetensors")
    held[name].view(-1)[3] = float("nan")
    save_file(held, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} has 1 values that are NaN"):
        load_model(tmp_path / "m")
