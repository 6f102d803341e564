import gzip
import json
from importlib.metadata import files

import pyarrow
import pyarrow.parquet
import pytest
from data_handler import DataConfig, PackedStream, SourceConfig, UserError, documents, is_heldout
from data_handler.sources.files import cut_text

TEXTS = ["one", "two\n\nthree", "   ", "four"]
KEPT = ["one", "two\n\nthree", "four"]


def write_parquet(path, texts, column="text"):
    path.parent.mkdir(exist_ok=True)
    table = {"id": [str(i) for i in range(len(texts))], column: texts, "score": [1.5] * len(texts)}
    pyarrow.parquet.write_table(pyarrow.table(table), path)


@pytest.fixture
def files_of_every_kind(tmp_path):
    lines = "".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate([*TEXTS, None]))
    (tmp_path / "d.jsonl").write_text(lines + "\n")
    with gzip.open(tmp_path / "z.jsonl.gz", "wt") as file:
        file.write(lines)
    write_parquet(tmp_path / "d.parquet", [*TEXTS, None])
    (tmp_path / "text").mkdir()
    for name, text in zip("cab", ["four", "one", "two\n\nthree"], strict=True):
        (tmp_path / "text" / f"{name}.txt").write_text(text)
    (tmp_path / "text" / "d.md").write_text(" \n")
    (tmp_path / "text" / "e.bin").write_bytes(b"\xff\xfe")
    return tmp_path


def test_each_kind_of_file_gives_its_documents_in_order(files_of_every_kind):
    at = files_of_every_kind
    for kind, path in [("jsonl", "d.jsonl"), ("jsonl", "z.jsonl.gz"), ("parquet", "d.parquet"), ("parquet", "*.parquet")]:
        assert list(documents(SourceConfig(name="s", kind=kind, path=str(at / path)))) == KEPT, path
    assert list(documents(SourceConfig(name="s", kind="jsonl", path=str(at)))) == KEPT * 2  # d.jsonl, then z.jsonl.gz
    assert list(documents(SourceConfig(name="s", kind="text", path=str(at / "text")))) == ["one", "two\n\nthree", "four"]
    assert list(documents(SourceConfig(name="s", kind="text", path=str(at / "**" / "[ab].txt")))) == ["one", "two\n\nthree"]


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("jsonl", "d.jsonl", "has no column 'body': set text_column to one of id, text"),
        ("parquet", "d.parquet", "has no column 'body': set text_column to one of id, text, score"),
    ],
)
def test_a_missing_column_names_those_that_exist(kind, path, message, files_of_every_kind):
    with pytest.raises(UserError, match=message):
        list(documents(SourceConfig(name="s", kind=kind, path=str(files_of_every_kind / path), text_column="body")))


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("jsonl", "x.jsonl", b'{"text": "a"}\n{"text": ', r"x\.jsonl:2 \(byte 14\) is not JSON"),
        ("jsonl", "x.jsonl", b'["a"]\n', r"x.jsonl:1 \(byte 0\) is not a JSON object"),
        ("jsonl", "x.jsonl", b'{"text": 5}\n', r"'text' in .*:1 \(byte 0\) is not text but int"),
        ("jsonl", "x.jsonl", b'{"text": "ab"}\n{"text": "\xff"}\n', r"x.jsonl:2 \(byte 15\) is not UTF-8"),
        (
            "jsonl",
            "x.jsonl.gz",
            gzip.compress(b'{"text": "abc"}\n' * 99, mtime=0)[:-20],
            "cannot be read after byte 272 .*end-of-stream",
        ),
        ("parquet", "x.parquet", b"PAR1 not really", "cannot be read as Parquet"),
        ("text", "x.txt", b"ab\xff\xfe", r"x\.txt cannot be read as UTF-8 text after byte 2"),
    ],
)
def test_a_damaged_file_is_named(kind, name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(documents(SourceConfig(name="s", kind=kind, path=str(tmp_path / name))))
    assert "\n" not in str(caught.value)


def test_a_path_without_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="missing names no file"):
        list(documents(SourceConfig(name="s", kind="text", path=str(tmp_path / "missing"))))
    with pytest.raises(UserError, match=r"has no \.parquet file"):
        list(documents(SourceConfig(name="s", kind="parquet", path=str(tmp_path))))


def test_a_long_text_is_cut_where_a_paragraph_ends_and_loses_nothing():
    text = "\n\n".join(f"paragraph {i}\n" + "word " * (i % 40) for i in range(300)) + "x" * 2500
    pieces = list(cut_text(text, 1000))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 1000
    assert all(piece.startswith("paragraph") for piece in pieces[:-3])
    assert list(cut_text(text, len(text))) == [text]


def test_an_installed_package_supplies_its_text_files():
    listed = [f for f in files("numpy") if f.suffix == ".md" or f.name == "LICENSE.txt"]
    assert listed
    found = list(documents(SourceConfig(name="s", kind="package", path="numpy:*LICENSE*")))
    licences = sorted(str(f) for f in files("numpy") if "LICENSE" in f.as_posix())
    assert "".join(found) == "".join(next(f for f in files("numpy") if str(f) == name).locate().read_text() for name in licences)
    with pytest.raises(UserError, match="package no-such-dist-here is not installed"):
        list(documents(SourceConfig(name="s", kind="package", path="no-such-dist-here:*")))
    with pytest.raises(UserError, match=r"package numpy lists no file that matches '\*\.nothing'"):
        list(documents(SourceConfig(name="s", kind="package", path="numpy:*.nothing")))


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_a_hub_source_streams_a_local_copy_through_the_same_path(form, tmp_path, byte_tokenizer, words):
    texts = [*words["a"], None]
    if form == "parquet":
        write_parquet(tmp_path / "copy" / "train-00000.parquet", texts)
    else:
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy" / "train.jsonl").write_text("".join(json.dumps({"text": t, "id": "x"}) + "\n" for t in texts))
    source = SourceConfig(name="web", kind="hub", dataset=str(tmp_path / "copy"), shuffle_buffer=1)
    assert list(documents(source)) == words["a"]
    config = DataConfig(sources=(source,), sequence_length=32, heldout_share=0.2)
    rows = PackedStream(config, byte_tokenizer).rows()
    training = [t for t in words["a"] if not is_heldout(t, 0.2)]
    total = sum(len(t) + 1 for t in training)
    seen, epoch = 0, []
    while seen < total:
        epoch.append(next(rows))
        seen += int((epoch[-1]["document_ids"] > 0).sum())
    assert seen == total
    assert epoch[0]["input_ids"][0] == byte_tokenizer(training[0]).input_ids[0]
    again = next(rows)  # the next epoch replays the same order
    assert again["input_ids"].equal(epoch[0]["input_ids"])
    assert next(PackedStream(config, byte_tokenizer).rows(3))["input_ids"].equal(epoch[3]["input_ids"])
    heldout = list(PackedStream(config, byte_tokenizer, split="heldout").rows())
    assert sum(int((row["document_ids"] > 0).sum()) for row in heldout) == sum(len(t) + 1 for t in words["a"]) - total


def test_a_hub_source_names_what_is_wrong(tmp_path, monkeypatch):
    write_parquet(tmp_path / "copy" / "train.parquet", ["a"], "body")
    where = str(tmp_path / "copy")
    with pytest.raises(UserError, match="has no column 'text': set text_column to one of id, body, score"):
        list(documents(SourceConfig(name="s", kind="hub", dataset=where)))
    assert list(documents(SourceConfig(name="s", kind="hub", dataset=where, text_column="body"))) == ["a"]
    with pytest.raises(UserError, match=r"'score' in .*copy, shard 0, row 1 is not text but float"):
        list(documents(SourceConfig(name="s", kind="hub", dataset=where, text_column="score")))
    with pytest.raises(UserError, match="could not be opened"):
        list(documents(SourceConfig(name="s", kind="hub", dataset=where, split="validation")))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"some-owner/some-data could not be opened .* local folder") as caught:
        list(documents(SourceConfig(name="s", kind="hub", dataset="some-owner/some-data")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"), [('{"text": "a\\ud800b"}', "half a surrogate"), ('{"text": ' + "[" * 100_000, "JSON|nested")]
)
def test_lines_that_are_no_text_are_named(line, message, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00 is fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=rf"odd\.jsonl:2.*({message})"):
        list(documents(SourceConfig(name="a", kind="jsonl", path=str(path))))
