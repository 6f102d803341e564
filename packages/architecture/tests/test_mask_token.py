"""A diffusion model's mask token: dedicated, mean-initialised, kept by directories and files."""

import json

import pytest
import torch
from bitnet_arch import ConversionConfig, UserError, convert_directory, convert_model, load_model, load_tokenizer, save_master
from bitnet_arch.__main__ import main
from bitnet_arch.checkpoint import save_packed
from bitnet_arch.diffusion import DiffusionForm, add_mask_token, diffusion_of
from bitnet_arch.gguf import choose_architecture, export_gguf, from_gguf, read_gguf, tokenizer_from_gguf
from bitnet_arch.testing import tiny_bitnet, tiny_llama, tiny_tokenizer
from bitnet_arch.weights import open_weights


def diffused(tied=True, vocab=512, **form):
    model, tokenizer = tiny_bitnet(tied, hidden=64, ffn=128, vocab=vocab), tiny_tokenizer()
    return model, tokenizer, add_mask_token(model, tokenizer, **{"block_size": 4, "token_shift": True} | form)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_mask_token_is_new_and_its_rows_are_means(tied):
    before = tiny_bitnet(tied, hidden=64, ffn=128).state_dict()
    model, tokenizer, form = diffused(tied)
    assert form.mask_token_id == tokenizer.mask_token_id == 512 == model.config.vocab_size - 1
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        after = model.state_dict()[name]
        assert torch.equal(after[:512], before[name])
        torch.testing.assert_close(after[512], before[name].mean(dim=0))
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 512]])).logits.shape[-1] == 513
    assert tokenizer("a model<|mask|>").input_ids[-1] == 512


def test_a_spare_row_is_used_before_the_embedding_grows():
    model, _, form = diffused(vocab=600)
    assert (form.mask_token_id, model.config.vocab_size) == (512, 600)
    weight = model.get_input_embeddings().weight
    torch.testing.assert_close(weight[512], weight[:512].mean(dim=0))


def test_a_real_token_is_refused_and_nothing_has_changed():
    model, tokenizer = tiny_bitnet(hidden=64, ffn=128), tiny_tokenizer()
    for token in ("<|endoftext|>", "<extra_0>", "e"):
        with pytest.raises(UserError, match="real token"):
            add_mask_token(model, tokenizer, block_size=4, token_shift=True, token=token)
    assert (len(tokenizer), model.config.vocab_size, diffusion_of(model.config)) == (512, 512, None)


def test_a_tokenizer_of_a_larger_model_is_refused():
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match="the model's own tokenizer"):
        add_mask_token(tiny_bitnet(hidden=64, ffn=128, vocab=400), tokenizer, block_size=4, token_shift=True)
    assert tokenizer.mask_token is None


def test_a_model_keeps_its_mask_token_and_may_change_its_blocks():
    model, tokenizer, form = diffused()
    again = add_mask_token(model, tokenizer, block_size=8, token_shift=False)
    assert again == DiffusionForm(mask_token_id=form.mask_token_id, block_size=8, token_shift=False) == diffusion_of(model.config)
    assert model.config.vocab_size == 513
    with pytest.raises(UserError, match="the model's own directory"):
        add_mask_token(model, tiny_tokenizer(), block_size=8, token_shift=False)


@pytest.mark.parametrize("save", [save_master, save_packed], ids=["master", "packed"])
@pytest.mark.parametrize("block_size", [4, None], ids=["blocks", "whole"])
def test_directories_keep_the_form(tmp_path, save, block_size, capsys):
    model, tokenizer, form = diffused(block_size=block_size)
    save(model, tmp_path / "model", tokenizer)
    loaded = load_model(tmp_path / "model")
    assert diffusion_of(loaded.config) == form
    assert load_tokenizer(tmp_path / "model").mask_token_id == form.mask_token_id
    assert main(["info", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["diffusion"]["block_size"] == block_size


def test_conversion_keeps_the_form(tmp_path):
    model, tokenizer = tiny_llama(hidden=64, ffn=128), tiny_tokenizer()
    form = add_mask_token(model, tokenizer, block_size=4, token_shift=True)
    model.save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    convert_directory(tmp_path / "float", tmp_path / "ternary", ConversionConfig(norm="none", granularity="row"))
    assert diffusion_of(load_model(tmp_path / "ternary").config) == form
    convert_directory(tmp_path / "float", tmp_path / "stock", ConversionConfig(gain="one"))
    assert diffusion_of(load_model(tmp_path / "stock").config) == form
    assert diffusion_of(convert_model(model, ConversionConfig(gain="one")).config) == form


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"mask_token_id": 513}, "the vocabulary has 513"),
        ({"mask_token_id": "512"}, "must be a token's number"),
        ({"block_size": 0}, "at least 1"),
        ({"token_shift": 1}, "true or false"),
        ({"steps": 3}, "damaged or of a newer version"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_damaged_form_is_one_sentence(tmp_path, damage, says):
    model, tokenizer, _ = diffused()
    save_master(model, tmp_path / "model", tokenizer)
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["diffusion"] |= damage
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=says) as error:
        load_model(tmp_path / "model")
    assert str(path) in str(error.value)


@pytest.mark.parametrize("block_size", [4, None], ids=["blocks", "whole"])
def test_a_gguf_file_keeps_the_form_and_no_stock_engine_is_promised(tmp_path, block_size):
    model, tokenizer, form = diffused(block_size=block_size)
    save_master(model, tmp_path / "model", tokenizer)
    with open_weights(tmp_path / "model") as reader:
        assert choose_architecture(reader) == "wrinklefree"
        with pytest.raises(UserError, match="diffusion model"):
            choose_architecture(reader, "bitnet")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert read_gguf(tmp_path / "model.gguf").metadata["wrinklefree.diffusion.mask_token_id"] == form.mask_token_id
    assert diffusion_of(from_gguf(tmp_path / "model.gguf").config) == form
    assert tokenizer_from_gguf(tmp_path / "model.gguf").mask_token_id == form.mask_token_id
