import numpy as np
import pytest
import torch
from data_handler import UserError
from data_handler.corpus import Corpus, Part
from data_handler.mixing import Weights, permutation, permuted, whose_turn
from data_handler.packing import Piece, Row, Store, best_fit, cut, fill, row_tensors
from hypothesis import given
from hypothesis import strategies as st

GOLDEN = [413840, 3001012, 2071115, 3611300, 2740414]
SIZES = st.lists(st.integers(1, 16), max_size=80)


@given(SIZES, st.integers(0, 9))
def test_packing_loses_repeats_and_divides_nothing(sizes, buffer):
    rows = list(best_fit(((size, i) for i, size in enumerate(sizes)), 16, buffer))
    assert sorted(i for _, items in rows for i in items) == list(range(len(sizes)))
    for used, items in rows:
        assert used == sum(sizes[i] for i in items) <= 16
        assert items == sorted(items)
    if buffer == 0:
        assert [items for _, items in rows] == [[i] for i in range(len(sizes))]


@given(SIZES, st.integers(1, 9))
def test_packing_equals_the_textbook(sizes, buffer):
    """Best-fit written plainly: search all open rows for the least room that fits."""
    expected, rows = [], []
    for i, size in enumerate(sizes):
        if size == 16:
            expected.append((16, [i]))
            continue
        fitting = [row for row in rows if row[0] >= size]
        if fitting:
            row = min(fitting, key=lambda row: (row[0], row[1]))
        else:
            if len(rows) == buffer:
                fullest = min(rows, key=lambda row: (row[0], row[1]))
                rows.remove(fullest)
                expected.append((16 - fullest[0], fullest[2]))
            row = [16, i, []]  # room, age, items
            rows.append(row)
        row[0] -= size
        row[2].append(i)
        if not row[0]:
            rows.remove(row)
            expected.append((16, row[2]))
    expected += [(16 - room, items) for room, _, items in rows]
    assert list(best_fit(((size, i) for i, size in enumerate(sizes)), 16, buffer)) == expected


def test_more_open_rows_waste_less():
    sizes = np.random.default_rng(0).integers(1, 120, 2000).tolist()
    counts = [len(list(best_fit(((s, None) for s in sizes), 128, buffer))) for buffer in (0, 1, 8, 64)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == 4


@given(st.integers(0, 200), st.integers(1, 40))
def test_pieces_tile_the_document(length, capacity):
    pieces = list(cut(length, capacity))
    assert [i for start, size in pieces for i in range(start, start + size)] == list(range(length))
    assert all(size == capacity for _, size in pieces[:-1])


def row(*pieces, loss=None):
    masks = loss or [None] * len(pieces)
    stores = [Store(np.array(ids, np.uint16), mask) for ids, mask in zip(pieces, masks, strict=True)]
    return Row(sum(map(len, pieces)), [Piece(store, 0, len(store.tokens)) for store in stores])


def test_a_row_is_laid_out_as_the_contract_says():
    one = row_tensors(row([5, 6, 7], [8, 9]), 7, 3, padding=2)
    assert {name: value.tolist() for name, value in one.items()} == {
        "input_ids": [5, 6, 7, 8, 9, 2, 2],
        "labels": [-100, 6, 7, -100, 9, -100, -100],
        "position_ids": [0, 1, 2, 0, 1, 0, 0],
        "document_ids": [1, 1, 1, 2, 2, 0, 0],
        "domain": 3,
    }
    assert all(value.dtype == torch.int64 for value in one.values())


def test_what_is_not_to_be_learnt_is_no_label():
    masks = [np.array([True, False, True]), None]
    one = row_tensors(row([5, 6, 7], [8, 9], loss=masks), 6, 0, padding=2)
    assert one["labels"].tolist() == [-100, -100, 7, -100, 9, -100]
    assert one["input_ids"].tolist() == [5, 6, 7, 8, 9, 2]


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=5))
def test_many_rows_are_laid_out_as_each_alone(shapes):
    rows = [row(*([i + j] * size for j, size in enumerate(sizes))) for i, sizes in enumerate(shapes)]
    together = fill(rows, 20, 9)
    for i, one in enumerate(rows):
        assert (together[:, i] == fill([one], 20, 9)[:, 0]).all()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.integers(1, 8), st.integers(1, 5))
def test_pieces_of_many_documents_are_those_of_each(lengths, capacity, parts):
    """Over parts of a corpus, in any order of documents, against the plain loop."""
    documents = [np.arange(100 * i, 100 * i + length) for i, length in enumerate(lengths)]
    groups = [documents[i::parts] for i in range(parts)]
    corpus = Corpus(
        [
            Part(Store(np.concatenate([np.empty(0, int), *g])), np.cumsum([0, *map(len, g)]), np.arange(len(g), dtype=np.uint64))
            for g in groups
        ]
    )
    flat = [document for group in groups for document in group]
    assert len(corpus) == len(flat)
    assert corpus.tokens == sum(lengths)
    order = permutation(len(flat), capacity)
    found = [p.store.tokens[p.start : p.start + size].tolist() for size, p in corpus.pieces(order, capacity)]
    assert found == [flat[d][at : at + size].tolist() for d in order for at, size in cut(len(flat[d]), capacity)]


def test_a_permutation_is_a_function_of_its_key():
    one = permutation(50, 0, 1, "a")
    assert sorted(one.tolist()) == list(range(50))
    assert one.tolist() == permutation(50, 0, 1, "a").tolist()
    others = [permutation(50, *key).tolist() for key in [(1, 1, "a"), (0, 2, "a"), (0, 1, "b"), (0, "1", "a"), (-1, 1, "a")]]
    assert len({tuple(o) for o in [one.tolist(), *others]}) == 6
    assert permutation(5, "golden").tolist() == [2, 1, 3, 0, 4]


@pytest.mark.parametrize("count", [1, 2, 1000, 65_536, 65_537, 100_003, 262_144])
def test_a_permutation_can_be_asked_for_anywhere(count):
    whole = permuted(np.arange(count), count, "key")
    assert (np.sort(whole) == np.arange(count)).all()
    some = np.arange(0, count, 7)
    assert (permuted(some, count, "key") == whole[some]).all()
    if count > 1000:
        assert (permuted(some, count, "other") != whole[some]).mean() > 0.99
        # As far from order as chance is: neighbours are a third of the range apart on average.
        assert abs(np.abs(np.diff(whole)).mean() / count - 1 / 3) < 0.01
        assert abs(np.corrcoef(np.arange(count), whole)[0, 1]) < 0.02


def test_the_order_of_a_large_range_is_golden():
    assert permuted(np.arange(5), 10_000_000, "golden").tolist() == GOLDEN


def drawn_with(weights, used, rows, counts=None):
    """Tokens of each source after some rows that are drawn as `Lane` does."""
    counts = [0] * len(used) if counts is None else counts
    total = sum(weights)
    for _ in range(rows):
        index = whose_turn([weight / total for weight in weights], counts)
        counts[index] += used[index]
    return counts


@given(st.lists(st.tuples(st.integers(1, 128), st.floats(0.05, 20)), min_size=1, max_size=4))
def test_token_shares_follow_the_weights(sources):
    used, weights = zip(*sources, strict=True)
    drawn = [0] * len(sources)
    for _ in range(300):
        drawn_with(weights, used, 1, drawn)
        for tokens, weight in zip(drawn, weights, strict=True):
            assert abs(tokens - weight / sum(weights) * sum(drawn)) <= 128 * len(sources)


def test_a_source_without_a_share_has_no_turn():
    assert drawn_with([0, 1, 3], [10, 10, 10], 400) == [0, 1000, 3000]


def test_a_weight_holds_from_its_row_until_the_next():
    weights = Weights.constant(("a", "b"), (1, 3))
    weights.set(10, {"a": 0.5, "b": 0.5})
    weights.set(30, {"a": 1.0, "b": 0.0})
    assert [weights.at(row) for row in (0, 9, 10, 29, 30, 99, 5)] == [
        *[(0, (0.25, 0.75))] * 2,
        *[(10, (0.5, 0.5))] * 2,
        *[(30, (1.0, 0.0))] * 2,
        (0, (0.25, 0.75)),
    ]
    state = weights.state(20)
    assert state["entries"] == [[10, 0.5, 0.5], [30, 1.0, 0.0]]
    assert state["changes"] == 1
    later = Weights.from_state(("a", "b"), state)
    assert [later.at(row) for row in (20, 30)] == [weights.at(row) for row in (20, 30)]
    # What was before is compared by its digest: the same through a state as directly, another for another past.
    assert later.state(40) == weights.state(40)
    other = Weights.constant(("a", "b"), (1, 1))
    other.set(10, {"a": 0.5, "b": 0.5})
    assert other.state(20)["entries"] == [[10, 0.5, 0.5]]
    assert other.state(20)["digest"] != state["digest"]
    weights.set(20, {"a": 0.1, "b": 0.9})  # replaces what was set for later
    assert weights.at(99) == (20, (0.1, 0.9))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"a": 0.5, "b": 0.4}, r"weights of a, b sum to 0\.9: .* sum to 1"),
        ({"a": 1.0}, "lack the source b"),
        ({"a": 0.5, "b": 0.25, "c": 0.25}, "unknown source c: the sources are a, b"),
        ({"a": -0.5, "b": 1.5}, "weight of source a must be a share of at least 0, not -0.5"),
        ({"a": float("nan"), "b": 1.0}, "weight of source a"),
        ({"a": True, "b": 0.0}, "weight of source a"),
    ],
)
def test_shares_that_are_none_are_refused(shares, message):
    with pytest.raises(UserError, match=message):
        Weights.constant(("a", "b"), (1, 1)).set(0, shares)
