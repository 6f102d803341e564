"""Tokenised sources on disk: complete or not there, and never made twice."""

import json
import os
import zlib
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_handler import PackedStream, SourceConfig, UserError, documents, load_config
from data_handler.cache import cache_directory, tokenised
from data_handler.encoding import Encoder, encode
from data_handler.tokenizer import train_tokenizer


@pytest.fixture
def encoder(byte_tokenizer, monkeypatch):
    """An encoder that counts the texts it is given."""
    texts, original = [], Encoder._texts
    monkeypatch.setattr(Encoder, "_texts", lambda self, batch: (texts.extend(batch), original(self, batch))[1])
    result = Encoder(byte_tokenizer)
    result.seen = texts
    return result


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def tokens(corpus):
    _, start, length = corpus.spans(np.arange(len(corpus)))
    part = np.searchsorted(corpus._firsts, np.arange(len(corpus)), side="right") - 1
    return [corpus.parts[p].store.tokens[s : s + n].tolist() for p, s, n in zip(part, start, length, strict=True)]


def test_the_cache_holds_what_the_tokenizer_gives(encoder, words, tmp_path, byte_tokenizer):
    write(tmp_path / "a.jsonl", words["a"])
    source = SourceConfig(name="s", kind="jsonl", path=str(tmp_path))
    corpus, digest = tokenised(source, encoder, tmp_path / "cache")
    assert tokens(corpus) == [ids.tolist() for ids in encode(words["a"], byte_tokenizer)]
    assert corpus.parts[0].store.tokens.dtype == np.uint16
    encoder.seen.clear()
    again, same = tokenised(replace(source, name="other", weight=7.0), encoder, tmp_path / "cache")
    assert (tokens(again), same, encoder.seen) == (tokens(corpus), digest, [])


def test_only_what_changed_is_tokenised_again(encoder, words, tmp_path, monkeypatch):
    monkeypatch.setattr("data_handler.cache.PART_BYTES", 1)  # each file a part
    for name, texts in (("a", words["a"]), ("b", words["b"])):
        write(tmp_path / f"{name}.jsonl", texts)
    source = SourceConfig(name="s", kind="jsonl", path=str(tmp_path))
    _, digest = tokenised(source, encoder, tmp_path / "cache")
    encoder.seen.clear()
    write(tmp_path / "b.jsonl", [*words["b"], "new"])
    corpus, other = tokenised(source, encoder, tmp_path / "cache")
    assert len(corpus) == len(words["a"]) + len(words["b"]) + 1
    assert encoder.seen == [*words["b"], "new"]
    assert other != digest
    encoder.seen.clear()
    os.utime(tmp_path / "a.jsonl", (1, 1))  # touched, not changed: made again, the digest is of the tokens
    assert tokenised(source, encoder, tmp_path / "cache")[1] == other
    assert encoder.seen == words["a"]


def test_another_tokenizer_or_column_is_another_entry(encoder, words, tmp_path, byte_tokenizer):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "title": t[:4] or "x"}) + "\n" for t in words["a"]))
    source = SourceConfig(name="s", kind="jsonl", path=str(tmp_path / "a.jsonl"))
    found = [
        tokenised(source, encoder, tmp_path / "cache")[1],
        tokenised(replace(source, text_column="title"), encoder, tmp_path / "cache")[1],
        tokenised(source, Encoder(train_tokenizer(words["a"], 300)), tmp_path / "cache")[1],
    ]
    assert len(set(found)) == 3
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 3


def test_large_vocabularies_take_four_bytes(encoder, words, tmp_path):
    write(tmp_path / "a.jsonl", words["a"])
    source = SourceConfig(name="s", kind="jsonl", path=str(tmp_path / "a.jsonl"))
    small = tokens(tokenised(source, encoder, tmp_path / "cache")[0])
    encoder.dtype = np.uint32
    corpus, _ = tokenised(source, encoder, tmp_path / "cache")
    assert corpus.parts[0].store.tokens.dtype == np.uint32
    assert tokens(corpus) == small


def test_a_damaged_or_half_written_entry_is_made_again(encoder, words, tmp_path):
    write(tmp_path / "a.jsonl", words["a"])
    source = SourceConfig(name="s", kind="jsonl", path=str(tmp_path / "a.jsonl"))
    whole = tokens(tokenised(source, encoder, tmp_path / "cache")[0])
    (entry,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    for damage in (
        lambda: (entry / "tokens").write_bytes((entry / "tokens").read_bytes()[:-2]),
        lambda: (entry / "meta.json").unlink(),
        lambda: (entry / "meta.json").write_text("{"),
        lambda: os.replace(entry, tmp_path / "cache" / next(p.name for p in (tmp_path / "cache").glob("*.lock"))[:-5]),
    ):
        damage()
        assert tokens(tokenised(source, encoder, tmp_path / "cache")[0]) == whole
        assert entry.is_dir()


def test_two_processes_make_one_entry(words, tmp_path, byte_tokenizer):
    write(tmp_path / "a.jsonl", words["a"] * 20)
    source = SourceConfig(name="s", kind="jsonl", path=str(tmp_path / "a.jsonl"))
    context = get_context("fork")
    queue = context.Queue()

    def make():
        queue.put(tokenised(source, Encoder(byte_tokenizer), tmp_path / "cache")[1])

    processes = [context.Process(target=make) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({queue.get(timeout=60) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_a_cache_that_cannot_be_written_is_named(encoder, words, tmp_path):
    write(tmp_path / "a.jsonl", words["a"])
    (tmp_path / "file").write_text("")
    source = SourceConfig(name="s", kind="jsonl", path=str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=r"source s: its tokens cannot be kept in .* set cache_dir or WF_CACHE"):
        tokenised(source, encoder, tmp_path / "file" / "cache")


def test_the_folder_is_the_configured_or_the_users_one(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("WF_CACHE", raising=False)
    assert str(cache_directory(None)) == "/x/wrinklefree/data"
    monkeypatch.setenv("WF_CACHE", "/w")
    assert str(cache_directory(None)) == "/w/data"
    assert cache_directory(str(tmp_path)) == tmp_path


def test_the_library_is_taken_from_the_cache_without_parsing_it(byte_tokenizer, tmp_path, monkeypatch):
    modules = tuple((f"x = {i}\n", (f"Text {i}.",)) for i in range(9))
    monkeypatch.setattr("data_handler.sources.stdlib._modules", lambda: modules)
    config = replace(load_config("demo"), sources=load_config("demo").sources[:1], cache_dir=str(tmp_path / "one"))
    fingerprint = PackedStream(config, byte_tokenizer).fingerprint()

    def forbidden():
        raise AssertionError

    monkeypatch.setattr("data_handler.sources.stdlib._modules", forbidden)
    assert PackedStream(config, byte_tokenizer).fingerprint() == fingerprint
    # The same text is the same data wherever its tokens are kept.
    monkeypatch.setattr("data_handler.sources.stdlib._modules", lambda: modules)
    moved = replace(config, cache_dir=str(tmp_path / "two"))
    assert PackedStream(moved, byte_tokenizer).fingerprint() == fingerprint
    monkeypatch.setattr("data_handler.sources.stdlib._modules", lambda: modules[:8])
    changed = replace(config, cache_dir=str(tmp_path / "three"))
    assert PackedStream(changed, byte_tokenizer).fingerprint() != fingerprint


def damaged_gzip(data, keep):
    """A gzip file whose compressed data are damaged behind about `keep` bytes of content, and the whole one."""
    packer = zlib.compressobj(wbits=31)
    first = packer.compress(data[:keep]) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = packer.compress(data[keep:]) + packer.flush()
    return first + b"\xff" * len(rest), first + rest


@pytest.mark.parametrize("batch", [1, 1024], ids=["one by one", "in batches"])
def test_after_a_repair_nothing_is_read_again(batch, encoder, tmp_path, monkeypatch):
    """A sound file, and a gzip file with a damaged middle: its first documents are tokenised once, too."""
    monkeypatch.setattr("data_handler.cache.PART_BYTES", 1)
    monkeypatch.setattr("data_handler.cache.BATCH_DOCUMENTS", batch)
    texts = [f"document {i} " + "x" * (i % 50) for i in range(4000)]
    write(tmp_path / "a.jsonl", texts[:1000])
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts[1000:]).encode()
    damaged, whole = damaged_gzip(data, len(data) // 2)
    (tmp_path / "b.jsonl.gz").write_bytes(damaged)
    source = SourceConfig(name="s", kind="jsonl", path=str(tmp_path))
    for _ in range(2):  # a second try without a repair reads nothing twice either
        with pytest.raises(UserError, match=r"source s: .*b\.jsonl\.gz cannot be read after byte \d+ \(.*\): replace it"):
            tokenised(source, encoder, tmp_path / "cache")
    before = len(encoder.seen)
    assert 2000 < before < 3000
    (tmp_path / "b.jsonl.gz").write_bytes(whole)
    corpus, _ = tokenised(source, encoder, tmp_path / "cache")
    assert encoder.seen == texts
    assert tokens(corpus) == [ids.tolist() for ids in encode(texts, encoder.tokenizer)]
    assert not list((tmp_path / "cache").glob("*.partial"))


def write_parquet(path, texts):
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=50)


def overwritten(content):
    return content[: len(content) // 2] + b"\xff" * (len(content) // 4) + content[len(content) * 3 // 4 :]


def cut(content):
    return content[: len(content) // 2]


def no_utf8(content):
    return content.replace(b"document 150", b"document \xff")


@pytest.mark.parametrize(
    ("kind", "damage", "message", "least"),
    [
        pytest.param("parquet", overwritten, r"b\.parquet cannot be read as Parquet after row \d+", 150, id="damaged row group"),
        pytest.param("parquet", cut, r"b\.parquet cannot be read as Parquet after row 0", 100, id="truncated Parquet"),
        pytest.param("text", no_utf8, r"b\.txt cannot be read as UTF-8 text after byte \d+", 1, id="text"),
    ],
)
def test_after_a_repair_of_another_kind_of_file_nothing_is_read_again(kind, damage, message, least, encoder, tmp_path, monkeypatch):
    """All files share a part of the cache; what was read of the damaged one, and of the sound one before it, is kept."""
    monkeypatch.setattr("data_handler.sources.files.PARQUET_ROWS", 16)
    texts = [f"document {i} " + str(zlib.crc32(b"%d" % i)) * (i % 5) for i in range(300)]
    suffix = {"parquet": ".parquet", "text": ".txt"}[kind]
    for name, part in (("a", texts[:100]), ("b", texts[100:])):
        path = tmp_path / f"{name}{suffix}"
        write_parquet(path, part) if kind == "parquet" else path.write_text("\n\n".join(part))
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    source = SourceConfig(name="s", kind=kind, path=str(tmp_path))
    for _ in range(2):
        with pytest.raises(UserError, match=rf"source s: .*{message}"):
            tokenised(source, encoder, tmp_path / "cache")
    assert least <= len(encoder.seen) < 300
    path.write_bytes(sound)
    tokenised(source, encoder, tmp_path / "cache")
    assert encoder.seen == list(documents(source))


def test_a_repaired_table_that_begins_otherwise_is_read_anew(encoder, tmp_path):
    texts = [f"document {i} " + str(zlib.crc32(b"%d" % i)) * (i % 5) for i in range(300)]
    path = tmp_path / "a.parquet"
    write_parquet(path, texts)
    path.write_bytes(overwritten(path.read_bytes()))
    source = SourceConfig(name="s", kind="parquet", path=str(path))
    with pytest.raises(UserError, match="after row"):
        tokenised(source, encoder, tmp_path / "cache")
    before = len(encoder.seen)
    assert before >= 50
    changed = ["another beginning", *texts[1:]]
    write_parquet(path, changed)
    tokenised(source, encoder, tmp_path / "cache")
    assert encoder.seen[before:] == changed


def test_a_repair_that_changes_the_beginning_reads_it_anew(encoder, tmp_path):
    texts = [f"document {i}" for i in range(50)]
    path = tmp_path / "a.jsonl"
    write(path, texts)
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b"document 30", b"document \xff"))
    source = SourceConfig(name="s", kind="jsonl", path=str(path))
    with pytest.raises(UserError, match=r"a\.jsonl:31 \(byte \d+\) is not UTF-8"):
        tokenised(source, encoder, tmp_path / "cache")
    path.write_bytes(sound.replace(b'document 3"', b'document III"'))
    corpus, _ = tokenised(source, encoder, tmp_path / "cache")
    changed = [text if text != "document 3" else "document III" for text in texts]
    assert tokens(corpus) == [ids.tolist() for ids in encode(changed, encoder.tokenizer)]
