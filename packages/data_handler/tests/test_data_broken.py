"""What goes wrong while rows are drawn: named with source and offset, and no document comes twice after the repair."""

import gzip
import json
import zlib
from collections import Counter
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest
from data_handler import BatchLoader, DataConfig, PackedStream, SourceConfig, UserError, documents
from data_handler.sources import open_source

TEXTS = [f"document {i} " + "x" * (i % 30) for i in range(120)]


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch):
    monkeypatch.setattr("data_handler.order.STREAM_ROWS", 4)


@pytest.fixture
def loader(byte_tokenizer):
    def make(source, workers=0):
        config = DataConfig(sources=(source,), sequence_length=64, heldout_share=0)
        return BatchLoader(PackedStream(config, byte_tokenizer), rows_per_step=2, num_workers=workers)

    return make


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def write(path, texts):
    path.parent.mkdir(exist_ok=True)
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes({".gz": gzip.compress, ".zst": zstd}.get(path.suffix, bytes)(content))


def write_parquet(path, texts):
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=8)


def damage_jsonl(path):
    path.write_bytes(path.read_bytes().replace(b"document 45 ", b"document \xff "))


def wrong_column(path):
    path.write_bytes(path.read_bytes().replace(b'"text": "document 45 ', b'"body": "document 45 '))


def damage_gz(path):
    path.write_bytes(path.read_bytes()[:-60])


def corrupt(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(byte ^ 0x55 for byte in content[len(content) // 2 :])
    path.write_bytes(content)


def damage_parquet(path):
    """Pages of a late row group are overwritten; the footer is whole."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 5 : len(content) * 4 // 5] = b"\xff" * (len(content) * 4 // 5 - len(content) * 3 // 5)
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CASES = {
    "invalid UTF-8": ("jsonl", "b.jsonl", damage_jsonl, r"b\.jsonl:6 \(byte \d+\) is not UTF-8"),
    "a cut gzip file": ("jsonl", "b.jsonl.gz", damage_gz, r"b\.jsonl\.gz cannot be read after byte \d+ \(.*end-of-stream"),
    "a corrupt gzip file": ("jsonl", "b.jsonl.gz", corrupt, r"b\.jsonl\.gz cannot be read after byte \d+ \("),
    "a cut zstd file": ("jsonl", "b.jsonl.zst", damage_gz, r"b\.jsonl\.zst cannot be read after byte \d+ \("),
    "a wrong column": (
        "jsonl",
        "b.jsonl",
        wrong_column,
        r"b\.jsonl:6 \(byte \d+\) has no column 'text': set text_column to one of body",
    ),
    "a damaged shard of the hub": ("hub", "b.parquet", damage_parquet, r"d, shard 1 cannot be read after row \d+"),
    "a cut line": ("jsonl", "b.jsonl", truncate, r"b\.jsonl:\d+ \(byte \d+\) is not JSON"),
    "damaged Parquet": ("parquet", "b.parquet", damage_parquet, r"b\.parquet cannot be read as Parquet after row \d+"),
    "truncated Parquet": ("parquet", "b.parquet", truncate, r"b\.parquet cannot be read as Parquet after row 0"),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_repaired_source_goes_on_where_it_stopped(case, workers, loader, tmp_path, byte_tokenizer):
    kind, name, damage, message = CASES[case]
    put = write_parquet if name.endswith(".parquet") else write
    suffix = "".join((tmp_path / name).suffixes)
    files = {
        tmp_path / "d" / f"a{suffix}": TEXTS[:40],
        tmp_path / "d" / name: TEXTS[40:80],
        tmp_path / "d" / f"c{suffix}": TEXTS[80:],
    }
    for path, texts in files.items():
        put(path, texts)
    place = {"dataset": str(tmp_path / "d")} if kind == "hub" else {"path": str(tmp_path / "d"), "streaming": True}
    source = SourceConfig(name="s", kind=kind, shuffle_buffer=8, **place)
    whole = list(islice(loader(source), 80))
    damage(tmp_path / "d" / name)
    broken, batches = loader(source, workers), []

    def run():
        for batch in broken:
            batches.append(batch)

    for _ in range(2):
        with pytest.raises(UserError, match=rf"^source s: .*{message}") as caught:
            run()
        assert "\n" not in str(caught.value)
    assert len(batches) < 40
    put(tmp_path / "d" / name, TEXTS[40:80])
    batches += islice(broken, 80 - len(batches))
    assert all(a["input_ids"].equal(b["input_ids"]) for a, b in zip(whole, batches, strict=True))
    found = Counter()
    for batch in batches:
        for row, ids in zip(batch["document_ids"], batch["input_ids"], strict=True):
            for number in range(1, int(row.max()) + 1):
                found[byte_tokenizer.decode(ids[row == number][:-1])] += 1
    first = list(found.items())[: len(TEXTS)]
    assert {text for text, _ in first} == set(TEXTS)
    assert max(found.values()) - min(found.values()) <= 1  # the second epoch is under way


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("jsonl", "a.jsonl", r"a\.jsonl ends after \d+ bytes, before the position \d+ to continue from: restore it"),
        ("jsonl", "a.jsonl.gz", r"a\.jsonl\.gz ends after \d+ bytes, before the position \d+"),
        ("parquet", "a.parquet", r"a\.parquet ends after 10 rows, before the position \d+"),
        ("text", "a.txt", r"a\.txt ends after \d+ characters, before the position \d+"),
        ("hub", "h/train.parquet", r"h, shard 0 ends after 10 rows, before the position \d+"),
    ],
)
def test_a_source_that_ends_before_the_position_is_named(kind, name, message, loader, tmp_path, monkeypatch):
    monkeypatch.setattr("data_handler.sources.files.cut_text.__defaults__", (100,))
    puts = {
        "parquet": write_parquet,
        "hub": write_parquet,
        "jsonl": write,
        "text": lambda path, texts: path.write_text("\n\n".join(texts)),
    }
    put, path = puts[kind], tmp_path / name
    put(path, TEXTS)
    place = {"dataset": str(path.parent)} if kind == "hub" else {"path": str(path), "streaming": True}
    source = SourceConfig(name="s", kind=kind, shuffle_buffer=8, **place)
    first = loader(source)
    list(islice(first, 20))
    again = loader(source)
    again.load_state_dict(first.state_dict())
    put(path, TEXTS[:10])
    with pytest.raises(UserError, match=rf"^source s: .*{message}"):
        next(iter(again))
    put(path, TEXTS)
    assert next(iter(again))["input_ids"].equal(next(iter(first))["input_ids"])


def overwritten(path, share):
    """Destroy the content of a file up to a share of it, but for Parquet's magic number at the beginning."""
    content = bytearray(path.read_bytes())
    end = int(len(content) * share)
    content[4:end] = b"\xff" * (end - 4)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "name", "entered"),
    [
        ("jsonl", "a.jsonl", True),
        ("parquet", "a.parquet", True),
        ("hub", "train.parquet", True),
        ("jsonl", "a.jsonl.gz", False),
        ("jsonl", "a.jsonl.zst", False),
        ("hub", "train.jsonl", False),
    ],
)
def test_what_lies_before_the_position_is_not_read_where_a_shard_can_be_entered(kind, name, entered, tmp_path):
    """The file is destroyed up to its middle; what comes later is read all the same, unless it can only be reached through that."""
    path = tmp_path / "h" / name
    texts = [f"{text} {zlib.crc32(text.encode())}" for text in TEXTS * 20]
    (write_parquet if name.endswith(".parquet") else write)(path, texts)
    source = SourceConfig(name="s", kind=kind, **({"dataset": str(path.parent)} if kind == "hub" else {"path": str(path)}))
    reader = open_source(source)
    places = list(reader.read(0))
    assert [record.text for _, record in places] == texts
    for number in (0, 7, 8, 1900):
        assert list(reader.read(0, places[number][0])) == places[number + 1 :]
    overwritten(path, 0.5)
    again = reader.read(0, places[1900][0])
    if entered:
        assert list(again) == places[1901:]
    else:
        with pytest.raises(UserError, match=r"^source s: .* (cannot be read|ends) after"):
            list(again)
    with pytest.raises(UserError, match=r"^source s: "):  # control: it is destroyed
        list(reader.read(0))


@pytest.mark.parametrize(
    ("kind", "name"), [("jsonl", "a.jsonl"), ("jsonl", "a.jsonl.gz"), ("jsonl", "a.jsonl.zst"), ("parquet", "a.parquet")]
)
@pytest.mark.parametrize("streaming", [False, True])
def test_an_empty_source_is_named(kind, name, streaming, loader, tmp_path):
    (write_parquet if kind == "parquet" else write)(tmp_path / name, [" "])
    with pytest.raises(UserError, match=r"^source s (is empty|has no document for training): give it at least one document"):
        next(iter(loader(SourceConfig(name="s", kind=kind, path=str(tmp_path / name), streaming=streaming))))


def test_zstd_files_are_read_like_the_others_and_entered_in_their_middle(tmp_path):
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(content[:3000]) + zstd(content[3000:]))  # two frames, as appending gives
    source = SourceConfig(name="s", kind="jsonl", path=str(path))
    assert list(documents(source)) == TEXTS
    places = list(open_source(source).read(0))
    for number in (0, 1, 60, 118):
        rest = [record.text for _, record in open_source(source).read(0, places[number][0])]
        assert rest == TEXTS[number + 1 :]
    path.write_bytes(zstd(content)[:-30])
    with pytest.raises(UserError, match=r"source s: .*a\.jsonl\.zst cannot be read after byte \d+ .*: replace it"):
        list(documents(source))
    path.write_bytes(b"no zstd at all")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst cannot be read after byte 0"):
        list(documents(source))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_several_columns_are_joined_by_the_separator(kind, tmp_path):
    rows = [
        {"title": "One", "body": "first"},
        {"title": None, "body": "second"},
        {"title": "Three", "body": None},
        {"title": None, "body": None},
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    source = {"name": "s", "kind": kind, "path": str(path)}
    assert list(documents(SourceConfig(**source, text_columns=["title", "body"], separator=" | "))) == [
        "One | first",
        "second",
        "Three",
    ]
    assert list(documents(SourceConfig(**source, text_columns=("body", "title")))) == ["first\n\nOne", "second", "Three"]
    with pytest.raises(UserError, match=r"has no column 'text': set text_columns to one of title, body"):
        list(documents(SourceConfig(**source, text_columns=["title", "text"])))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_columns": ["a", "b"], "text_column": "c"}, "text_column and text_columns exclude each other"),
        ({"text_columns": ["a", "a"]}, "names a column twice"),
        ({"text_columns": "a"}, "text_columns must be a list of column names, not 'a'"),
        ({"separator": " "}, "separator has no effect without several text_columns"),
        ({"messages_column": "m", "text_column": "c"}, "text_column and messages_column exclude each other"),
        ({"streaming": "yes"}, "streaming must be true or false"),
        ({"shuffle_buffer": 5}, "shuffle_buffer has no effect without streaming"),
        ({"shuffle_buffer": 0, "streaming": True}, "shuffle_buffer must be a whole number of at least 1"),
        ({"kind": "text", "messages_column": "m"}, "messages_column has no effect on kind text"),
        ({"kind": "hub", "path": None, "dataset": "x/y", "streaming": True}, "streaming has no effect on kind hub"),
    ],
)
def test_options_that_would_do_nothing_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        SourceConfig(**{"name": "s", "kind": "jsonl", "path": "x", **fields})


@pytest.mark.parametrize(
    ("fields", "message"), [({"lanes": 0}, "lanes must be a whole number"), ({"cache_dir": " "}, "cache_dir must be a folder")]
)
def test_options_of_the_stream_are_checked(fields, message):
    with pytest.raises(UserError, match=message):
        DataConfig(sources=(SourceConfig(name="s", kind="text", path="x"),), **fields)
