import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
from data_handler import DataConfig, PackedStream, SourceConfig, UserError, is_heldout, probe_rows, train_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SLOW_OK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pieces(rows):
    """(domain, token ids) of every piece in the rows."""
    for row in rows:
        for document in range(1, int(row["document_ids"].max()) + 1):
            yield int(row["domain"]), tuple(row["input_ids"][row["document_ids"] == document].tolist())


def expected(texts, tokenizer, length, domain=0):
    for text in texts:
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        yield from ((domain, tuple(ids[i : i + length])) for i in range(0, len(ids), length))


def epochs(stream, texts, number):
    """The rows of the first epochs of a single-source stream."""
    total = sum(len(text.encode()) + 1 for text in texts)
    rows, result = stream.rows(), []
    for _ in range(number):
        epoch, seen = [], 0
        while seen < total:
            epoch.append(next(rows))
            seen += int((epoch[-1]["document_ids"] > 0).sum())
        result.append(epoch)
    return result


def same(one, two):
    assert one.keys() == two.keys()
    return all(one[name].equal(two[name]) for name in one)


@SLOW_OK
@given(
    texts=st.lists(st.text(st.sampled_from("abc \né"), min_size=1, max_size=90).filter(str.strip), min_size=1, max_size=30),
    length=st.integers(2, 40),
    buffer=st.integers(1, 9),
    seed=st.integers(-3, 3),
)
def test_every_token_of_every_document_occurs_once_an_epoch(texts, length, buffer, seed, byte_tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = SourceConfig(name="s", kind="jsonl", path=str(path))
    config = DataConfig(sources=(source,), sequence_length=length, heldout_share=0, packing_buffer=buffer)
    wanted = Counter(expected(texts, byte_tokenizer, length))
    for epoch in epochs(PackedStream(config, byte_tokenizer, seed=seed), texts, 3):
        assert Counter(pieces(epoch)) == wanted


def test_the_contract_of_every_field_holds_in_real_rows(config, byte_tokenizer):
    for row in islice(PackedStream(config, byte_tokenizer).rows(), 200):
        ids, documents, positions, labels = (row[k] for k in ("input_ids", "document_ids", "position_ids", "labels"))
        starts = documents.diff(prepend=documents.new_zeros(1)) != 0
        real = documents > 0
        assert positions[starts].sum() == 0
        assert ((positions[1:] == positions[:-1] + 1) | starts[1:] | ~real[1:]).all()
        assert (labels == ids.where(real & ~starts, ids.new_tensor(-100))).all()
        assert (ids[~real] == byte_tokenizer.eos_token_id).all()
        assert documents.diff().clamp(min=0).max() <= 1


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_row_k_is_the_same_whatever_the_start(packing, split, config, byte_tokenizer):
    config = replace(config, packing=packing, packing_buffer=8 if packing else 64)
    stream = PackedStream(config, byte_tokenizer, seed=3, split=split)
    rows = list(islice(stream.rows(), 120))
    assert len(rows) > 10
    for start in (0, 1, 7, len(rows) - 1):
        fresh = PackedStream(config, byte_tokenizer, seed=3, split=split)
        for s in (stream, fresh):
            assert all(same(a, b) for a, b in zip(rows[start:], s.rows(start), strict=False))
            assert same(rows[start], next(s.rows(start)))


def test_seed_and_epoch_change_the_order_and_nothing_else(config, byte_tokenizer, words):
    config = replace(config, sources=config.sources[:1], heldout_share=0)
    orders = [
        [list(pieces(epoch)) for epoch in epochs(PackedStream(config, byte_tokenizer, seed=s), words["a"], 2)] for s in (0, 1)
    ]
    flat = [order for pair in orders for order in pair]
    assert all(Counter(order) == Counter(flat[0]) for order in flat)
    assert len({tuple(order) for order in flat}) == 4
    again = epochs(PackedStream(config, byte_tokenizer, seed=0), words["a"], 2)
    assert [list(pieces(epoch)) for epoch in again] == orders[0]


def test_another_source_does_not_change_the_order_of_the_first(config, byte_tokenizer):
    alone = PackedStream(replace(config, sources=config.sources[:1]), byte_tokenizer).rows()
    mixed = (row for row in PackedStream(config, byte_tokenizer).rows() if row["domain"] == 0)
    assert all(same(a, b) for a, b in islice(zip(alone, mixed, strict=False), 100))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.1, 0.9)])
def test_realised_token_shares_follow_the_weights(weights, config, byte_tokenizer):
    sources = tuple(replace(s, weight=w) for s, w in zip(config.sources, weights, strict=True))
    stream = PackedStream(replace(config, sources=sources), byte_tokenizer)
    assert stream.domains == ("a", "b")
    drawn = [0, 0]
    for row in islice(stream.rows(), 400):
        drawn[int(row["domain"])] += int((row["document_ids"] > 0).sum())
    assert abs(drawn[0] / sum(drawn) - weights[0] / sum(weights)) < 0.005


def test_training_and_held_out_documents_are_disjoint_and_complete(config, byte_tokenizer, words):
    config = replace(config, sources=config.sources[:1], heldout_tokens=100_000)
    training = [t for t in words["a"] if not is_heldout(t, 0.2)]
    heldout = [t for t in words["a"] if is_heldout(t, 0.2)]
    assert training
    assert heldout
    (epoch,) = epochs(PackedStream(config, byte_tokenizer), training, 1)
    assert Counter(pieces(epoch)) == Counter(expected(training, byte_tokenizer, 32))
    rows = list(PackedStream(config, byte_tokenizer, split="heldout").rows())
    assert Counter(pieces(rows)) == Counter(expected(heldout, byte_tokenizer, 32))
    other_seed = list(PackedStream(config, byte_tokenizer, split="heldout", seed=9).rows())
    assert all(same(a, b) for a, b in zip(rows, other_seed, strict=True))


def test_held_out_tokens_are_limited_by_weight_and_taken_from_many_documents(write_jsonl, byte_tokenizer):
    sources = [write_jsonl(name, [f"{name}{i}" + "x" * 500 for i in range(200)]) for name in "ab"]
    sources[0] = replace(sources[0], weight=3.0)
    config = DataConfig(sources=tuple(sources), sequence_length=50, heldout_share=0.2, heldout_tokens=1000)
    rows = list(PackedStream(config, byte_tokenizer, split="heldout").rows())
    used = Counter()
    for row in rows:
        used[int(row["domain"])] += int((row["document_ids"] > 0).sum())
    assert used == {0: 750, 1: 250}
    first_bytes = byte_tokenizer("ab").input_ids
    starts = [ids for domain, ids in pieces(rows) if ids[0] == first_bytes[domain]]
    # The limits are 750 and 250 tokens, the documents have about 505: depth-first would hear two and one.
    assert len(starts) == 12 + 4


def test_the_held_out_share_is_respected_and_grows_monotonically():
    texts = [f"document {i}" for i in range(4000)]
    for share in (0.0, 0.05, 0.5, 1.0):
        assert abs(sum(is_heldout(t, share) for t in texts) / 4000 - share) < 0.02
    assert all(is_heldout(t, 0.5) for t in texts if is_heldout(t, 0.05))


def test_without_packing_each_row_holds_one_document(config, byte_tokenizer):
    loose = replace(config, packing=False, packing_buffer=64)
    assert all(row["document_ids"].max() == 1 for row in islice(PackedStream(loose, byte_tokenizer).rows(), 100))
    assert any(row["document_ids"].max() > 1 for row in islice(PackedStream(config, byte_tokenizer).rows(), 100))


def test_impossible_streams_are_refused(config, write_jsonl, byte_tokenizer):
    with pytest.raises(UserError, match="split must be train or heldout, not 'test'"):
        PackedStream(config, byte_tokenizer, split="test")
    with pytest.raises(UserError, match="heldout_share is 0"):
        PackedStream(replace(config, heldout_share=0), byte_tokenizer, split="heldout")
    with pytest.raises(UserError, match="row 0 or later, not at -1"):
        PackedStream(config, byte_tokenizer).rows(-1)
    empty = replace(config, sources=(write_jsonl("none", ["  "]),))
    with pytest.raises(UserError, match="source none is empty"):
        PackedStream(empty, byte_tokenizer).rows()
    text = next(t for t in (f"t{i}" for i in range(99)) if is_heldout(t, 0.5))
    single = replace(config, sources=(write_jsonl("single", [text]),), heldout_share=0.5)
    with pytest.raises(UserError, match=r"single has no document left for training with heldout_share 0\.5: .* lower"):
        PackedStream(single, byte_tokenizer).rows()
    assert len(list(PackedStream(single, byte_tokenizer, split="heldout").rows())) == 1
    rare = replace(single, heldout_share=1e-9)
    with pytest.raises(UserError, match=r"no document held out .* raise the share"):
        PackedStream(rare, byte_tokenizer, split="heldout").rows()


def test_the_fingerprint_follows_everything_that_decides_the_rows(write_jsonl, byte_tokenizer):
    def config(texts, **more):
        return DataConfig(sources=(write_jsonl("a", texts),), **more)

    texts = [f"document number {i}" for i in range(40)]
    plain = PackedStream(config(texts), byte_tokenizer).fingerprint()
    assert PackedStream(config(texts), byte_tokenizer).fingerprint() == plain
    others = [
        PackedStream(config([*texts[:-1], "document number 4o"]), byte_tokenizer).fingerprint(),
        PackedStream(config(texts, sequence_length=64), byte_tokenizer).fingerprint(),
        PackedStream(config(texts), byte_tokenizer, seed=1).fingerprint(),
        PackedStream(config(texts), train_tokenizer(texts, 300)).fingerprint(),
    ]
    assert len({plain, *others}) == 5


def test_probes_are_held_out_rows_of_one_domain_each_in_equal_measure(config, byte_tokenizer, words):
    sources = (replace(config.sources[0], weight=9.0), config.sources[1])
    probes = probe_rows(replace(config, sources=sources), byte_tokenizer, 40)
    training = {
        piece
        for name, texts in words.items()
        for piece in expected([t for t in texts if not is_heldout(t, 0.2)], byte_tokenizer, 32, "ab".index(name))
    }
    for index, name in enumerate("ab"):
        assert {int(row["domain"]) for row in probes[name]} == {index}
        assert sum(int((row["document_ids"] > 0).sum()) for row in probes[name]) == 40
        assert not set(pieces(probes[name])) & training
    with pytest.raises(UserError, match="heldout_share is 0"):
        probe_rows(replace(config, heldout_share=0), byte_tokenizer, 60)
