import dataclasses
import json
from itertools import islice
from pathlib import Path

import pytest
from bitnet_arch import save_master
from bitnet_arch.gguf.tokenizer import read_tokenizer
from bitnet_arch.testing import tiny_bitnet, tiny_tokenizer
from data_handler import UserError, own_tokenizer, restore_tokenizer, train_tokenizer, training_documents
from data_handler.encoding import encode

TEXTS = ["the cat sat on the mat. " * 5, "def add(a, b):\n    return a + b\n", "naïve café, 12345 and 日本語"]


def test_it_has_the_exact_size_and_every_byte_round_trips():
    for size in (257, 300, 1000):
        tokenizer = train_tokenizer(TEXTS, size)
        assert len(tokenizer) == size
        for text in [*TEXTS, "\x00\t 🎉 <|other|>"]:
            assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert len(train_tokenizer(TEXTS, 300)(TEXTS[0]).input_ids) < len(train_tokenizer(TEXTS, 257)(TEXTS[0]).input_ids)


def test_training_twice_gives_the_same_tokenizer():
    one, two = (train_tokenizer(iter(TEXTS * 20), 320) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()


def test_a_restored_tokenizer_equals_the_one_it_was_made_from():
    tokenizer = train_tokenizer(TEXTS, 300)
    restored = restore_tokenizer(tokenizer.backend_tokenizer.to_str())
    assert restored.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (restored.eos_token_id, restored.chat_template) == (tokenizer.eos_token_id, tokenizer.chat_template)


def test_a_model_directory_with_it_can_be_exported(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 512)
    save_master(tiny_bitnet(vocab=512, layers=1), tmp_path / "m", tokenizer)
    metadata = read_tokenizer(tmp_path / "m", 512)
    assert (metadata.pre, metadata.eos_id, len(metadata.tokens)) == ("gpt-2", 0, 512)
    assert metadata.chat_template == tokenizer.chat_template
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False) == (
        "user: hi\nassistant: "
    )
    parts = [json.loads(t.backend_tokenizer.to_str()) for t in (tokenizer, tiny_tokenizer())]
    assert parts[0]["pre_tokenizer"] == parts[1]["pre_tokenizer"]
    assert parts[0]["decoder"] == parts[1]["decoder"]


def test_text_that_looks_like_a_special_token_stays_text():
    tokenizer = train_tokenizer(TEXTS, 300)
    (ids,) = encode(["a <|endoftext|> b"], tokenizer)
    assert (ids == 0).sum() == 1
    assert ids[-1] == 0
    assert tokenizer.decode(ids[:-1]) == "a <|endoftext|> b"
    assert 0 in tokenizer("a <|endoftext|> b").input_ids  # control: a plain call does take it for the token


def test_impossible_requests_are_refused():
    with pytest.raises(UserError, match=r"vocab_size must be at least 257 .*, not 256"):
        train_tokenizer(TEXTS, 256)
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_tokenizer([""], 300)


@pytest.mark.parametrize(("around", "begins"), [(None, False), ("<|begin|> $A", True)])
def test_a_document_begins_as_the_tokenizer_begins_a_prompt(around, begins):
    tokenizer = tiny_tokenizer(around=around)
    (ids,) = encode(["a fox"], tokenizer)
    assert ids.tolist() == [*tokenizer("a fox").input_ids, tokenizer.eos_token_id]
    assert (ids[0] == tokenizer.bos_token_id) == begins


@pytest.fixture
def kept(config, tmp_path):
    """A configuration with a cache of its own, and its cache's tokenizers."""
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "kept"))
    return config, lambda: sorted((tmp_path / "kept").iterdir())


def forbid_training(monkeypatch):
    monkeypatch.setattr("data_handler.tokenizer_cache.train_tokenizer", lambda *_: pytest.fail("it was trained again"))


def test_a_configurations_tokenizer_is_trained_once(kept, monkeypatch):
    config, files = kept
    one = own_tokenizer(config, 280, 10)
    assert [path.name.startswith("tokenizer-") for path in files()] == [True]
    forbid_training(monkeypatch)
    monkeypatch.setattr("data_handler.tokenizer_cache.documents", lambda *_: pytest.fail("the text was read again"))
    again = own_tokenizer(config, 280, 10)
    assert again.backend_tokenizer.to_str() == one.backend_tokenizer.to_str()
    assert (again.eos_token_id, again.chat_template) == (one.eos_token_id, one.chat_template)


def test_it_is_that_of_the_first_training_documents(kept):
    config, _ = kept
    chosen = [list(training_documents(config, source))[:10] for source in range(2)]
    expected = train_tokenizer([text for texts in chosen for text in texts], 280)
    assert own_tokenizer(config, 280, 10).backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()


@pytest.mark.parametrize("change", ["text", "size", "documents", "share", "damage"])
def test_other_text_or_settings_give_another_tokenizer(kept, change):
    config, files = kept
    own_tokenizer(config, 280, 10)
    size, documents = 280 + (change == "size"), 10 + (change == "documents")
    if change == "text":
        with Path(config.sources[0].path).open("a") as file:
            file.write(json.dumps({config.sources[0].text_column: "zq zq zq"}) + "\n")
    if change == "share":
        config = dataclasses.replace(config, heldout_share=0.5)
    if change == "damage":
        files()[0].write_text("{")
    again = own_tokenizer(config, size, documents)
    fresh = train_tokenizer(
        [text for source in range(2) for text in islice(training_documents(config, source), documents)], size
    ).backend_tokenizer.to_str()
    assert again.backend_tokenizer.to_str() == fresh
    assert len(files()) == (1 if change == "damage" else 2)
    assert files()[0].read_text() != "{"


def test_where_nothing_can_be_kept_it_is_trained_all_the_same(config, tmp_path):
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(config, cache_dir=str(tmp_path / "file"))
    assert len(own_tokenizer(config, 280, 10)) == 280


def test_a_streamed_source_is_read_each_time(kept):
    config, files = kept
    config = dataclasses.replace(config, sources=tuple(dataclasses.replace(s, streaming=True) for s in config.sources))
    assert len(own_tokenizer(config, 280, 10)) == 280
    with pytest.raises(FileNotFoundError):
        files()
