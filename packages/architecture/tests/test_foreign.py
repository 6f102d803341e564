"""Directories as other tools write them: onebitllms' and BitNet b1.58 2B4T's, made by hand; what contradicts itself is refused."""

import json

import pytest
import torch
from bitnet_arch import (
    BitLinear,
    ConversionConfig,
    PackedBitLinear,
    UserError,
    convert_model,
    load_model,
    open_weights,
    save_master,
    save_packed,
)
from bitnet_arch.__main__ import main
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
ONEBITLLMS = {"is_bitnet_config": True, "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "bitnet"}}
MICROSOFT = {
    "auto_map": {"AutoConfig": "configuration_bitnet.BitNetConfig", "AutoModelForCausalLM": "modeling_bitnet.BitNetForCausalLM"},
    "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"},
}
IDS = torch.randint(0, 96, (2, 17), generator=torch.Generator().manual_seed(0))


class Reference(nn.Module):
    """A ternary layer as its papers have it: integer codes, and one multiplication at the end."""

    def __init__(self, codes, beta):
        super().__init__()
        self.codes, self.beta = codes, beta

    def forward(self, x):
        alpha = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
        q = (x * (127 / alpha)).round().clamp(-128, 127)
        return (q.double() @ self.codes.double().T).float() * (alpha / 127) * self.beta


def pack(codes):
    """Pack with plain loops: byte (r, c) has rows r, r + R, r + 2R, r + 3R from the lowest bits on."""
    rows = codes.shape[0] // 4
    packed = torch.zeros(rows, codes.shape[1], dtype=torch.uint8)
    for plane in range(4):
        for row in range(rows):
            packed[row] += ((codes[row + plane * rows] + 1) * 4**plane).to(torch.uint8)
    return packed


def is_layer(name):
    return name.endswith("_proj.weight")


@torch.no_grad()
def logits(model):
    with torch.compiler.set_stance("force_eager"):
        return model(input_ids=IDS).logits.float()


@pytest.fixture(params=["onebitllms", "2b4t"])
def maker(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


def make(maker, tied, folder):
    """Write a directory as its maker does; return the reference model in float32."""
    torch.manual_seed(1)
    if maker == "onebitllms":
        model, extra = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).eval(), ONEBITLLMS
    else:
        config = BitNetConfig(**SHAPE, tie_word_embeddings=tied, hidden_act="relu2")
        config.rope_parameters["rope_theta"] = 500_000.0
        model, extra = BitNetForCausalLM(config).eval(), MICROSOFT
    state = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
            state[name] = parameter.bfloat16()
        for name in [name for name in state if is_layer(name)]:
            weight = state[name].float() * (1 + torch.rand(()))
            mean = weight.abs().mean().bfloat16().float()
            inverse = (1 / mean).bfloat16()
            codes = (weight / mean).round().clamp(-1, 1)
            beta = 1 / inverse.float() if maker == "onebitllms" else mean
            stored = inverse if maker == "onebitllms" else mean.bfloat16()
            state[name] = pack(codes)
            state[name.replace("weight", "weight_scale")] = stored.view(1)
            model.set_submodule(name.removesuffix(".weight"), Reference(codes, beta))
    config = model.config.to_dict() | extra
    theta = config.pop("rope_parameters")["rope_theta"]
    config |= {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "bfloat16", "architectures": [type(model).__name__]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def close(a, b):
    return bool((a - b).abs().max() <= 2e-5 * b.abs().max())


def test_a_packed_directory_computes_what_its_maker_means(maker, tied, tmp_path):
    expected = logits(make(maker, tied, tmp_path / "m"))
    loaded = load_model(tmp_path / "m")
    assert sum(isinstance(layer, PackedBitLinear) for layer in loaded.modules()) == 14
    assert close(logits(loaded), expected)
    if maker == "onebitllms":  # transformers 5.12.1 cannot run its own packed autobitlinear checkpoints
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
        assert close(logits(stock), expected)


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_a_packed_directory_goes_over_into_either_convention(linear_class, maker, tied, tmp_path):
    expected = logits(make(maker, tied, tmp_path / "m"))
    save_packed(load_model(tmp_path / "m"), tmp_path / "again", linear_class=linear_class)
    assert close(logits(load_model(tmp_path / "again")), expected)


def test_the_other_convention_would_be_wrong(maker, tmp_path):
    """The control: with the scale taken the other way round the logits are another model's."""
    expected = logits(make(maker, True, tmp_path / "m"))
    edit(tmp_path / "m", linear_class="autobitlinear" if maker == "onebitllms" else "bitlinear")
    assert not close(logits(load_model(tmp_path / "m")), expected)


def test_the_activation_is_the_configurations(tmp_path):
    expected = logits(make("2b4t", True, tmp_path / "m"))
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"hidden_act": "silu"}))
    assert not close(logits(load_model(tmp_path / "m")), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_codes_that_are_not_packed_are_read(dtype, tmp_path):
    """Stock `AutoBitLinear` unpacks on loading and saves what it has."""
    expected = logits(make("2b4t", True, tmp_path / "m"))
    with open_weights(tmp_path / "m") as reader:
        names = reader.keys()
        state = {name: reader.ternary(name)[0].to(dtype) if is_layer(name) else reader.get(name) for name in names}
    save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    assert close(logits(load_model(tmp_path / "m")), expected)
    state["model.layers.0.mlp.up_proj.weight"][3, 4] = 2
    save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"mlp\.up_proj\.weight holds other values than -1, 0 and 1"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("kind", ["prequantized", "bf16"])
def test_masters_of_others_are_trained_on(kind, tmp_path):
    """onebitllms' masters are float Llamas that say nothing; Microsoft's say `online`."""
    torch.manual_seed(2)
    if kind == "prequantized":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16()
        model.save_pretrained(tmp_path / "m")
        loaded = convert_model(load_model(tmp_path / "m"), ConversionConfig(norm="none"))
    else:
        model = BitNetForCausalLM(BitNetConfig(**SHAPE, hidden_act="relu2")).bfloat16()
        model.save_pretrained(tmp_path / "m")
        config = json.loads((tmp_path / "m/config.json").read_text())
        block = MICROSOFT["quantization_config"] | {"quantization_mode": "online"}
        (tmp_path / "m/config.json").write_text(json.dumps(config | {"quantization_config": block}))
        loaded = load_model(tmp_path / "m")
    assert sum(isinstance(layer, BitLinear) for layer in loaded.modules()) == 14
    model.float().eval()
    with torch.no_grad():
        for name, parameter in list(model.named_parameters()):
            if is_layer(name):
                beta = parameter.abs().mean()
                model.set_submodule(name.removesuffix(".weight"), Reference((parameter / beta).round().clamp(-1, 1), beta))
    assert close(logits(loaded), logits(model))
    save_master(loaded, tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(loaded))


# ----------------------------------------------------------------------------------------------------- contradictions


def edit(folder, drop=(), **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    for key in drop:
        config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensor(folder, name, change):
    state = load_file(folder / "model.safetensors")
    tensor = change(state.get(name))
    state = {key: value for key, value in state.items() if key != name} | ({} if tensor is None else {name: tensor})
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
SCALE = f"{UP}_scale"
ONLINE = {"quantization_mode": "online"}
CONTRADICTIONS = {
    "online-bytes": (lambda d: edit(d, linear_class="autobitlinear", **ONLINE), r"config\.json asks for"),
    "bitlinear-online": (lambda d: edit(d, linear_class="bitlinear", **ONLINE), "contradicts itself: linear_class"),
    "float-bytes": (lambda d: edit(d, drop=["quantization_config"]), r"config\.json asks for"),
    "float-in-packed": (lambda d: edit_tensor(d, UP, lambda t: torch.randn(96, 64)), f"contradicts itself: .*{UP} holds other"),
    "no-scale": (lambda d: edit_tensor(d, SCALE, lambda t: None), "packed, and .*up_proj has no weight_scale"),
    "scale-zero": (lambda d: edit_tensor(d, SCALE, torch.zeros_like), f"scale of {UP} is not a positive number"),
    "scale-negative": (lambda d: edit_tensor(d, SCALE, torch.neg), f"scale of {UP} is not a positive number"),
    "scale-nan": (lambda d: edit_tensor(d, SCALE, lambda t: t * float("nan")), f"scale of {UP} is not a positive number"),
    "scale-rows": (lambda d: edit_tensor(d, SCALE, lambda t: t.expand(96, 1).contiguous()), f"scale of {UP} is not a positive"),
    "scale-bytes": (lambda d: edit_tensor(d, SCALE, lambda t: torch.ones(1, dtype=torch.uint8)), "is not a positive number"),
    "code-3": (lambda d: edit_tensor(d, UP, lambda t: t | 3), "code outside"),
    "rms-norm": (lambda d: edit(d, use_rms_norm=True), "use_rms_norm"),
    "mode": (lambda d: edit(d, quantization_mode="sometimes"), "unknown quantization_mode 'sometimes'"),
    "class": (lambda d: edit(d, linear_class="trilinear"), "unknown linear_class 'trilinear'"),
    "ternary-head": (lambda d: edit(d, modules_to_not_convert=[]), "asks for a ternary lm_head, which is the embedding, too, and"),
    "float-layer": (lambda d: edit(d, modules_to_not_convert=["lm_head", "up_proj"]), "leaves .*up_proj float"),
    "not-a-list": (lambda d: edit(d, modules_to_not_convert="lm_head"), "modules_to_not_convert that is no list"),
    "not-a-pattern": (lambda d: edit(d, modules_to_not_convert=["lm_head", "(x"]), "modules_to_not_convert that cannot be read"),
    "packed-head": (
        lambda d: edit_tensor(d, "lm_head.weight", lambda t: torch.zeros(24, 64, dtype=torch.uint8)),
        "has a ternary lm_head, and heads stay float",
    ),
    "other-head": (lambda d: edit_tensor(d, "lm_head.weight", lambda t: torch.randn(96, 64)), "ties the head to the embedding"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_itself_is_refused_in_one_sentence(case, tmp_path):
    damage, words = CONTRADICTIONS[case]
    make("2b4t", True, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=words) as caught:
        load_model(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_a_tied_head_that_is_stored_and_equal_is_read(tmp_path):
    expected = logits(make("2b4t", True, tmp_path / "m"))
    embedding = load_file(tmp_path / "m/model.safetensors")["model.embed_tokens.weight"]
    edit_tensor(tmp_path / "m", "lm_head.weight", lambda t: embedding.clone())
    assert close(logits(load_model(tmp_path / "m")), expected)


def test_a_float_master_with_a_scale_is_refused_by_the_command_too(tmp_path, capsys):
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "m")
    edit_tensor(tmp_path / "m", SCALE, lambda t: torch.ones(1))
    with pytest.raises(UserError, match=r"float, and .*up_proj has a weight_scale"):
        load_model(tmp_path / "m")
    edit_tensor(tmp_path / "m", SCALE, lambda t: None)
    edit_tensor(tmp_path / "m", UP, lambda t: torch.ones(96, 64, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"float, and .*up_proj has packed bytes"):
        load_model(tmp_path / "m")
    make("2b4t", True, tmp_path / "p")
    assert main(["convert", str(tmp_path / "p"), "--out", str(tmp_path / "o"), "--gain", "one"]) == 2
    assert "is ternary already (packed)" in capsys.readouterr().err
