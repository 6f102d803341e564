"""Norm "none": a model stays in its stock architecture."""

from contextlib import nullcontext

import pytest
import torch
from bitnet_arch import ConversionConfig, UserError, convert_model, load_model, save_master, save_packed
from bitnet_arch.testing import assert_equal_up_to_edges
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
MAKERS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=32)),
    "llama-with-biases": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True)),
}
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    with torch.compiler.set_stance("force_eager"):  # stock packed layers compile their unpacking, which takes longer than the test
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("save", [save_master, save_packed], ids=["master", "packed"])
def test_saved_and_loaded_logits_are_equal_here_and_in_stock_transformers(family, save, tmp_path):
    torch.manual_seed(0)
    model = MAKERS[family]().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    plain = logits(model)
    converted = convert_model(model, ConversionConfig(norm="none"))
    expected = logits(converted)
    assert (expected - plain).abs().max() > 1e-3
    save(converted, tmp_path / "m")
    for loaded in (load_model(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()):
        assert_equal_up_to_edges(logits(loaded), expected)


@pytest.mark.parametrize(("texts", "spoiled", "holds"), [(3, 1, True), (2, 1, True), (1, 0, False), (2, 2, False), (6, 3, False)])
def test_forwards_are_equal_up_to_edges_in_a_third_of_several_texts(texts, spoiled, holds):
    """One position of each spoiled text is 1% off."""
    expected = torch.ones(texts, 12, 4)
    found = expected.clone()
    found[:spoiled, -1] += 0.01
    with nullcontext() if holds else pytest.raises(AssertionError, match="text"):
        assert_equal_up_to_edges(found, expected)


def test_an_unknown_family_is_refused_under_either_norm():
    model = MistralForCausalLM(MistralConfig(**SHAPE))
    for norm in ("none", "subln"):
        with pytest.raises(UserError, match="'mistral' cannot be converted"):
            convert_model(model, ConversionConfig(norm=norm))
