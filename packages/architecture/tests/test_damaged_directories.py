"""Whatever a model directory's JSON files hold, a command works or says in one sentence what to mend."""

import json
import shutil

import pytest
import torch
from bitnet_arch import (
    UserError,
    check_family,
    convert_model,
    load_config,
    load_model,
    load_tokenizer,
    open_weights,
    save_master,
    save_packed,
)
from bitnet_arch.__main__ import main
from bitnet_arch.gguf import export_gguf
from bitnet_arch.testing import tiny_bitnet, tiny_llama, tiny_tokenizer
from transformers import BitNetConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SHAPE = {"hidden": 32, "ffn": 64, "layers": 1, "vocab": 300}

READERS = {
    "config.json": {"load_model", "open_weights", "export_gguf", "convert", "info"},
    "generation_config.json": {"load_model", "convert"},
    "model.safetensors.index.json": {"load_model", "open_weights", "export_gguf", "convert", "info"},
    "provenance.json": {"export_gguf", "convert"},
    "tokenizer.json": {"load_tokenizer", "export_gguf", "convert"},
    "tokenizer_config.json": {"load_tokenizer", "export_gguf", "convert"},
}
"""Who reads which file, and must say so when it is damaged."""

DAMAGES = {
    "half": lambda text: text[: len(text) // 2].encode(),
    "empty": lambda text: b"",
    "list": lambda text: b"[]",
    "null": lambda text: b"null",
    "number": lambda text: b"3",
    "object": lambda text: b"{}",
    "deep": lambda text: b'{"a":' * 100_000,
    "no-text": lambda text: b"\xff\xfe{",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    for name, model in {"ternary": tiny_bitnet(**SHAPE), "float": tiny_llama(**SHAPE)}.items():
        save_master(model, folder / name, tiny_tokenizer(300), provenance="a 4-bit copy")
        with open_weights(folder / name) as reader:
            index = {"weight_map": dict.fromkeys(reader.keys(), "model.safetensors")}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
    save_packed(tiny_bitnet(**SHAPE), folder / "packed", tiny_tokenizer(300))
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """Return a function that copies a directory."""
    return lambda name: shutil.copytree(folder / name, tmp_path / name)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def complaints(tmp_path, capsys):
    """Return a function that uses a ternary and a float directory in every way and returns the sentences, by action."""

    def command(*words):
        code = main([str(word) for word in words])
        error = capsys.readouterr().err.removeprefix(f"source: {words[1]}, from a 4-bit copy\n")
        assert (code, error) == (0, "") or (code == 2 and error.startswith("error: ") and error.endswith("\n"))
        if error:
            raise UserError(error.removesuffix("\n"))

    def use(ternary, floats):
        found = {}
        for name, action in {
            "load_model": lambda: load_model(ternary),
            "load_tokenizer": lambda: load_tokenizer(ternary),
            "open_weights": lambda: open_weights(ternary),
            "export_gguf": lambda: export_gguf(ternary, tmp_path / "out.gguf"),
            "convert": lambda: command("convert", floats, "--out", tmp_path / "out", "--gain", "one"),
            "info": lambda: command("info", ternary),
        }.items():
            try:
                action()
            except UserError as error:
                found[name] = str(error)
        for sentence in found.values():
            assert "\n" not in sentence
            assert len(sentence) < 700
        return found

    return use


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", READERS)
def test_every_reader_names_a_damaged_file(file, damage, copy, complaints):
    directories = [copy("ternary"), copy("float")]
    for directory in directories:
        text = (directory / file).read_text()
        (directory / file).write_bytes(DAMAGES[damage](text))
    found = complaints(*directories)
    if damage == "object" and file in ("generation_config.json", "tokenizer_config.json"):
        assert found == {}  # nothing is said, and all of it has a default
    else:
        assert set(found) == READERS[file]
        assert all(file in sentence for sentence in found.values())


@pytest.mark.parametrize(
    "weight_map",
    [[], None, "model.safetensors", {"a": 3}, {"a": ["b"]}, {"a": "../x"}, {"a": "x" * 400}, {"a": "a\0b"}, {"a": ""}],
    ids=["list", "null", "text", "number", "list-of-files", "outside", "long", "nul", "no-name"],
)
def test_a_wrong_index_is_named(weight_map, copy, complaints):
    directories = [copy("ternary"), copy("float")]
    for directory in directories:
        edit_json(directory / "model.safetensors.index.json", weight_map=weight_map)
    assert set(complaints(*directories)) == READERS["model.safetensors.index.json"]


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]


@pytest.mark.parametrize("value", [-1, 0, 2**31 - 1, 10**12, 1.5, "x", [], True], ids=str)
@pytest.mark.parametrize("key", [*SIZES, "head_dim", "max_position_embeddings"])
def test_a_size_that_no_model_has_is_named(key, value, copy, complaints):
    directories = [copy("ternary"), copy("float")]
    for directory in directories:
        edit_json(directory / "config.json", **{key: value})
    found = complaints(*directories)
    if (key, value) == ("max_position_embeddings", 2**31 - 1):
        assert found == {}
    else:
        assert set(found) == {"load_model", "export_gguf", "convert"}
        assert all("config.json" in sentence for sentence in found.values())


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_theta": "x", "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": -1.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "martian"}},
        {"rope_parameters": [1]},
        {"hidden_act": "martian"},
        {"rms_norm_eps": "x"},
        {"model_type": "t5"},
        {"model_type": "bert"},
    ],
    ids=lambda change: json.dumps(change),
)
def test_a_config_that_no_model_can_be_built_from_is_named(change, copy, complaints):
    directories = [copy("ternary"), copy("float")]
    for directory in directories:
        edit_json(directory / "config.json", **change)
    found = complaints(*directories)
    assert set(found) == {"load_model", "export_gguf", "convert"}


@pytest.mark.parametrize("block", [3, "x", [1], {"quant_method": "bitnet", "linear_class": []}, {"quant_method": 3}], ids=str)
def test_a_wrong_quantisation_block_is_named(block, copy, complaints):
    directories = [copy("ternary"), copy("float")]
    for directory in directories:
        edit_json(directory / "config.json", quantization_config=block)
    assert set(complaints(*directories)) == READERS["config.json"]


def test_packed_bytes_are_not_taken_for_floats(copy):
    directory = copy("packed")
    edit_json(directory / "config.json", quantization_config={})
    with pytest.raises(UserError, match=r"q_proj\.weight' is \[8, 32\], but config\.json asks for \[32, 32\]"):
        load_model(directory)


def test_defaults_that_a_config_leaves_out_are_filled_in(copy, tmp_path):
    """Stock `save_pretrained` writes differences from the defaults only, and older files have `rope_theta` at the top."""
    directory = copy("ternary")
    export_gguf(directory, tmp_path / "full.gguf")
    config = json.loads((directory / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    defaults = BitNetConfig().to_dict()
    short = {key: value for key, value in config.items() if key == "model_type" or defaults.get(key) != value}
    assert "max_position_embeddings" not in short or config["max_position_embeddings"] != defaults["max_position_embeddings"]
    (directory / "config.json").write_text(json.dumps(short | {"rope_theta": theta}))
    export_gguf(directory, tmp_path / "short.gguf")
    assert (tmp_path / "short.gguf").read_bytes() == (tmp_path / "full.gguf").read_bytes()


@pytest.mark.parametrize("values", [{"max_new_tokens": -1}, {"cache_implementation": "foo"}, {"watermarking_config": 3}], ids=str)
def test_invalid_generation_settings_are_named(values, copy):
    directory = copy("ternary")
    (directory / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"generation_config\.json is not valid .*: mend it or delete it"):
        load_model(directory)


# ---- heads that rotary positions cannot turn


ODD = {"vocab_size": 300, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(**ODD, hidden_size=36), "makes heads 9 wide"),
        (LlamaConfig(**ODD, hidden_size=32, head_dim=7), "makes heads 7 wide"),
        (BitNetConfig(**ODD, hidden_size=36), "makes heads 9 wide"),
        (BitNetConfig(**ODD, hidden_size=34), r"divides a width \(hidden_size\) of 34 among 4 heads"),
        (LlamaConfig(**ODD | {"num_key_value_heads": 3}, hidden_size=32), "has 3 key and value heads for 4 heads"),
    ],
    ids=["odd", "odd-head-dim", "odd-bitnet", "no-multiple", "uneven-groups"],
)
def test_heads_that_do_not_fit_are_refused(config, words, tmp_path):
    with pytest.raises(UserError, match=words):
        check_family(config, "none")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    with pytest.raises(UserError, match=rf"config\.json {words}"):
        load_config(tmp_path)


def test_a_llama_of_a_width_that_is_no_multiple_of_its_heads_is_refused(copy, capsys, tmp_path):
    directory = copy("float")
    edit_json(directory / "config.json", hidden_size=34, head_dim=None)
    assert main(["convert", str(directory), "--out", str(tmp_path / "out")]) == 2
    assert "not a multiple of the number of attention heads" in capsys.readouterr().err


def test_an_odd_llama_is_refused_before_it_is_calibrated():
    model = LlamaForCausalLM(LlamaConfig(**ODD, hidden_size=36))
    with pytest.raises(UserError, match="rotary positions need an even width"):
        convert_model(model, calibration=[torch.zeros(1, 8, dtype=torch.int64)])


# ---- a family that exists and is none of ours


@pytest.fixture
def gpt2(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer(300).save_pretrained(str(tmp_path / "gpt2"))
    return tmp_path / "gpt2"


def test_another_family_is_refused_before_its_weights_are_read(gpt2, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match=r"model_type 'gpt2' cannot be converted: the known families are bitnet, gemma3"):
        load_model(gpt2)
    monkeypatch.setattr("bitnet_arch.__main__.convert_directory", None)
    for norm in ("subln", "none"):
        assert main(["convert", str(gpt2), "--out", str(tmp_path / "out"), "--norm", norm]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: model_type 'gpt2' cannot be converted: the known families are bitnet, gemma3_text, llama")
