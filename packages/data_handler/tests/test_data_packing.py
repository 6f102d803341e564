import numpy as np
import torch
from data_handler.mixing import interleave, permutation
from data_handler.packing import Row, best_fit, cut, row_tensors
from hypothesis import given
from hypothesis import strategies as st

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
        if row[0] == 0:
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


def test_a_row_is_laid_out_as_the_contract_says():
    row = row_tensors([np.array([5, 6, 7], np.int32), np.array([8, 9], np.int32)], 7, 3, padding=2)
    assert {name: value.tolist() for name, value in row.items()} == {
        "input_ids": [5, 6, 7, 8, 9, 2, 2],
        "labels": [-100, 6, 7, -100, 9, -100, -100],
        "position_ids": [0, 1, 2, 0, 1, 0, 0],
        "document_ids": [1, 1, 1, 2, 2, 0, 0],
        "domain": 3,
    }
    assert all(value.dtype == torch.int64 for value in row.values())


def test_a_permutation_is_a_function_of_its_key():
    one = permutation(50, 0, 1, "a")
    assert sorted(one.tolist()) == list(range(50))
    assert one.tolist() == permutation(50, 0, 1, "a").tolist()
    others = [permutation(50, *key).tolist() for key in [(1, 1, "a"), (0, 2, "a"), (0, 1, "b"), (0, "1", "a"), (-1, 1, "a")]]
    assert len({tuple(o) for o in [one.tolist(), *others]}) == 6
    assert permutation(5, "golden").tolist() == [2, 1, 3, 0, 4]


def endless(used):
    while True:
        yield Row(used, [])


@given(st.lists(st.tuples(st.integers(1, 128), st.floats(0.05, 20)), min_size=1, max_size=4))
def test_token_shares_follow_the_weights(sources):
    merged = interleave([endless(used) for used, _ in sources], [weight for _, weight in sources])
    drawn, total = [0] * len(sources), sum(weight for _, weight in sources)
    for _ in range(300):
        index, row = next(merged)
        drawn[index] += row.used
        for tokens, (_, weight) in zip(drawn, sources, strict=True):
            assert abs(tokens - weight / total * sum(drawn)) <= 128 * len(sources)
