import json
from itertools import islice

import pytest
import torch
from data_handler import BatchLoader, PackedStream, UserError, collate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def stream(config, byte_tokenizer):
    return PackedStream(config, byte_tokenizer, seed=5)


@pytest.fixture
def heldout(config, byte_tokenizer):
    return PackedStream(config, byte_tokenizer, split="heldout")


def equal(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def test_a_batch_has_the_shapes_and_types_of_the_contract(stream):
    batch = next(iter(BatchLoader(stream, rows_per_step=4)))
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        **dict.fromkeys(("input_ids", "labels", "position_ids", "document_ids"), (4, 32)),
        "domain": (4,),
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


@QUICK
@given(stop=st.integers(0, 40), rows_per_step=st.integers(1, 5), ahead=st.booleans())
def test_resuming_after_any_batch_equals_the_uninterrupted_run(stop, rows_per_step, ahead, stream, config, byte_tokenizer):
    whole = list(islice(BatchLoader(stream, rows_per_step=rows_per_step), stop + 6))
    loader = BatchLoader(stream, rows_per_step=rows_per_step)
    for _ in islice(loader, stop):
        pass
    state = json.loads(json.dumps(loader.state_dict()))
    assert state["rows"] == stop * rows_per_step
    # In a process of its own the stream is built anew; in this one it may have been used already.
    resumed = BatchLoader(stream if ahead else PackedStream(config, byte_tokenizer, seed=5), rows_per_step=rows_per_step)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    rest = list(islice(resumed, 6))
    assert all(equal(a, b) for a, b in zip(whole[stop:], rest, strict=True))


def test_an_iterator_made_before_the_state_was_loaded_still_obeys_it(stream):
    whole = list(islice(BatchLoader(stream, rows_per_step=2), 4))
    loader = BatchLoader(stream, rows_per_step=2)
    iterator = iter(loader)
    loader.load_state_dict({"rows": 6})
    assert equal(next(iterator), whole[3])
    assert loader.state_dict()["rows"] == 8


def test_iterating_again_goes_on_in_training(stream):
    whole = list(islice(BatchLoader(stream, rows_per_step=2), 5))
    loader = BatchLoader(stream, rows_per_step=2)
    parts = [*islice(loader, 2), *islice(loader, 3)]
    assert all(equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_world_sizes_give_the_same_global_batches(split, stream, heldout):
    source = stream if split == "train" else heldout
    single = list(islice(BatchLoader(source, rows_per_step=4), 10))
    assert len(single) > 2
    for world in (2, 4):
        ranks = [list(islice(BatchLoader(source, rows_per_step=4, rank=r, world_size=world), 10)) for r in range(world)]
        for step, batch in enumerate(single):
            joined = {name: torch.cat([rank[step][name] for rank in ranks]) for name in batch}
            assert equal(joined, batch)
            assert not equal(ranks[0][step], ranks[1][step])


def test_a_state_moves_between_world_sizes(stream):
    whole = list(islice(BatchLoader(stream, rows_per_step=4), 5))
    first = BatchLoader(stream, rows_per_step=4, rank=1, world_size=2)
    list(islice(first, 3))
    second = BatchLoader(stream, rows_per_step=4)
    second.load_state_dict(first.state_dict())
    assert equal(next(iter(second)), whole[3])


def test_two_seeds_give_other_orders(config, byte_tokenizer):
    batches = [next(iter(BatchLoader(PackedStream(config, byte_tokenizer, seed=s), rows_per_step=8))) for s in (0, 0, 1)]
    assert equal(batches[0], batches[1])
    assert not equal(batches[0], batches[2])


def test_the_last_held_out_batch_is_filled_with_rows_that_count_for_nothing(heldout):
    rows = list(heldout.rows())
    per_step = next(n for n in range(2, 9) if len(rows) % n)
    loader = BatchLoader(heldout, rows_per_step=per_step)
    batches = list(loader)
    assert len(batches) == -(-len(rows) // per_step)
    assert all(len(batch["input_ids"]) == per_step for batch in batches)
    joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    assert equal({name: value[: len(rows)] for name, value in joined.items()}, collate(rows))
    assert (joined["labels"][len(rows) :] == -100).all()
    assert (joined["document_ids"][len(rows) :] == 0).all()


def test_held_out_rows_start_over_even_after_a_break_unless_a_state_was_loaded(heldout):
    loader = BatchLoader(heldout, rows_per_step=3)
    whole = list(loader)
    list(islice(loader, 2))
    assert len(list(loader)) == len(whole)
    loader.load_state_dict({"rows": 3})
    assert all(equal(a, b) for a, b in zip(loader, whole[1:], strict=True))
    assert all(equal(a, b) for a, b in zip(loader, whole, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows_per_step": 6, "world_size": 4}, "positive multiple of world_size 4, not 6"),
        ({"rows_per_step": 0}, "positive multiple of world_size 1, not 0"),
        ({"rows_per_step": 4, "rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1, not 2"),
        ({"rows_per_step": 4, "world_size": 0}, "with world_size 0"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options, message, stream):
    with pytest.raises(UserError, match=message):
        BatchLoader(stream, **options)


@pytest.mark.parametrize("state", [{}, {"rows": -1}, {"rows": "4"}, {"rows": True}])
def test_a_foreign_state_is_refused(state, stream):
    with pytest.raises(UserError, match="the loader's state must be"):
        BatchLoader(stream, rows_per_step=2).load_state_dict(state)
