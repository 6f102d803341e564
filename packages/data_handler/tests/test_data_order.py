"""The order of rows: the same for every number of processes and workers, and after every interruption."""

import gzip
import json
import multiprocessing
import os
import signal
from collections import Counter
from dataclasses import replace
from itertools import islice

import pyarrow
import pyarrow.parquet
import pytest
import torch
from data_handler import BatchLoader, DataConfig, PackedStream, SourceConfig, UserError, is_heldout, merge_states
from data_handler.order import IndexedRows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HELDOUT = 0.2
STEP = 12  # divisible by 1, 2, 3 and 4 ranks
KINDS = ["cached", "jsonl", "gz", "parquet", "hub"]


@pytest.fixture(scope="module")
def texts():
    return [f"{i} " + "word " * (i * 7 % 23) for i in range(90)] + ["long " * 60]


@pytest.fixture(scope="module")
def configs(texts, tmp_path_factory):
    """Kind to configuration: the same 91 documents in five shards, beside a second source that is cached."""
    folder = tmp_path_factory.mktemp("shards")
    shards = [texts[i::5] for i in range(5)]
    for name in ("jsonl", "gz", "parquet", "hub"):
        (folder / name).mkdir()
    for number, shard in enumerate(shards):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in shard)
        (folder / "jsonl" / f"{number}.jsonl").write_text(lines)
        (folder / "gz" / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        for kind in ("parquet", "hub"):
            table = pyarrow.table({"text": shard})
            pyarrow.parquet.write_table(table, folder / kind / f"train-{number}.parquet", row_group_size=4)
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": f"b{i} " + "beta " * (i % 9)}) + "\n" for i in range(30)))
    other = SourceConfig(name="b", kind="jsonl", path=str(folder / "other.jsonl"), weight=0.5)
    common = {"streaming": True, "shuffle_buffer": 9}
    sources = {
        "cached": SourceConfig(name="a", kind="jsonl", path=str(folder / "jsonl")),
        "jsonl": SourceConfig(name="a", kind="jsonl", path=str(folder / "jsonl"), **common),
        "gz": SourceConfig(name="a", kind="jsonl", path=str(folder / "gz"), **common),
        "parquet": SourceConfig(name="a", kind="parquet", path=str(folder / "parquet"), **common),
        "hub": SourceConfig(name="a", kind="hub", dataset=str(folder / "hub"), shuffle_buffer=9),
    }
    shape = {"sequence_length": 32, "heldout_share": HELDOUT, "packing_buffer": 4}
    return {kind: DataConfig(sources=(source, other), **shape) for kind, source in sources.items()}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """So that a few hundred rows cross many blocks, buffers and epochs."""
    monkeypatch.setattr("data_handler.order.BLOCK_ROWS", 12)
    monkeypatch.setattr("data_handler.order.STREAM_ROWS", 6)


def stream_of(config, tokenizer, lanes=1, seed=1):
    return PackedStream(replace(config, lanes=lanes), tokenizer, seed=seed)


def equal(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def pieces(batch):
    for row in range(len(batch["domain"])):
        ids, documents = batch["input_ids"][row], batch["document_ids"][row]
        for number in range(1, int(documents.max()) + 1):
            yield int(batch["domain"][row]), tuple(ids[documents == number].tolist())


def expected(texts, tokenizer, domain=0):
    """The pieces of the training documents."""
    for text in texts:
        if not is_heldout(text, HELDOUT):
            ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
            yield from ((domain, tuple(ids[i : i + 32])) for i in range(0, len(ids), 32))


_REFERENCE = {}


@pytest.fixture
def reference(configs, byte_tokenizer):
    """The first 40 batches of a kind, made in one process: several epochs of both sources."""

    def batches(kind, lanes=1):
        if (kind, lanes) not in _REFERENCE:
            stream = stream_of(configs[kind], byte_tokenizer, lanes)
            _REFERENCE[kind, lanes] = list(islice(BatchLoader(stream, rows_per_step=STEP), 40))
        return _REFERENCE[kind, lanes]

    return batches


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_the_rows_of_the_stream_whatever_fetches_them(kind, configs, byte_tokenizer, reference):
    for lanes in (1, 3):
        rows = stream_of(configs[kind], byte_tokenizer, lanes).rows(STEP)
        for batch in reference(kind, lanes)[1:6]:
            for number in range(STEP):
                one = next(rows)
                assert all(torch.equal(one[name], batch[name][number]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 7])
def test_the_lanes_together_give_every_document_once_an_epoch(kind, lanes, configs, byte_tokenizer, texts):
    """Seven lanes are more than the five shards."""
    config = replace(configs[kind], sources=configs[kind].sources[:1])
    stream = stream_of(config, byte_tokenizer, lanes)
    stream.open()
    found = {0: Counter(), 1: Counter()}
    for number in range(lanes):
        lane = stream.lane(number, stream.weights())
        while True:
            _, row = lane.next()
            if (epoch := lane.state()["sources"][0]["epoch"]) > 1:
                break
            for store, start, size in row.pieces:
                found[epoch][0, tuple(store.tokens[start : start + size].tolist())] += 1
    wanted = Counter(expected(texts, byte_tokenizer))
    assert found[0] == wanted
    assert found[1] == wanted


@pytest.mark.parametrize("kind", ["cached", "jsonl"])
@QUICK
@given(
    lanes=st.integers(1, 5),
    stops=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    worlds=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=4, max_size=4),
)
def test_resuming_again_and_again_with_other_ranks_changes_nothing(kind, lanes, stops, worlds, configs, byte_tokenizer, reference):
    """Each leg runs some steps on some ranks; their joined states go on with another number of ranks."""
    state, done = None, 0
    whole = reference(kind, lanes)
    for stop, world in zip([*stops, 3], worlds, strict=False):
        loaders = []
        for rank in range(world):
            stream = stream_of(configs[kind], byte_tokenizer, lanes)
            loader = BatchLoader(stream, rows_per_step=STEP, rank=rank, world_size=world)
            if state:
                loader.load_state_dict(state)
            loaders.append(loader)
        ranks = [list(islice(loader, stop)) for loader in loaders]
        for step in range(stop):
            joined = {name: torch.cat([rank[step][name] for rank in ranks]) for name in whole[0]}
            assert equal(joined, whole[done + step])
        done += stop
        state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in loaders])))
        assert state["rows"] == done * STEP
        assert len(json.dumps(state)) < 1024 * (1 + lanes)
    tokens = [0, 0]
    for batch in whole[:done]:
        for domain in (0, 1):
            tokens[domain] += int((batch["document_ids"][batch["domain"] == domain] > 0).sum())
    assert state["tokens"] == {"a": tokens[0], "b": tokens[1]}


@pytest.mark.parametrize("kind", ["gz", "parquet", "hub"])
@pytest.mark.parametrize("stop", [1, 5, 17])
def test_other_streamed_formats_resume_exactly(kind, stop, configs, byte_tokenizer, reference):
    loader = BatchLoader(stream_of(configs[kind], byte_tokenizer), rows_per_step=STEP)
    list(islice(loader, stop))
    again = BatchLoader(stream_of(configs[kind], byte_tokenizer), rows_per_step=STEP)
    again.load_state_dict(loader.state_dict())
    assert all(equal(a, b) for a, b in zip(again, reference(kind)[stop : stop + 5], strict=False))


@pytest.mark.parametrize(("workers", "lanes", "world"), [(1, 1, 1), (2, 1, 2), (2, 4, 1), (4, 3, 1), (3, 4, 2)])
def test_worker_processes_make_the_same_batches_and_states(workers, lanes, world, configs, byte_tokenizer, reference):
    """Stopped twice: after 7 steps with workers, after 3 more without, and on with workers."""
    kind = "jsonl" if lanes > 1 else "cached"
    whole, state, done = reference(kind, lanes), None, 0
    for stop, count in ((7, workers), (3, 0), (6, workers)):
        loaders = [
            BatchLoader(
                stream_of(configs[kind], byte_tokenizer, lanes), rows_per_step=STEP, rank=rank, world_size=world, num_workers=count
            )
            for rank in range(world)
        ]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        ranks = [list(islice(loader, stop)) for loader in loaders]
        for step in range(stop):
            joined = {name: torch.cat([rank[step][name] for rank in ranks]) for name in whole[0]}
            assert equal(joined, whole[done + step])
        done += stop
        state = json.loads(json.dumps(merge_states([loader.state_dict() for loader in loaders])))
    assert not multiprocessing.active_children()


def test_lanes_are_shared_out_so_that_no_process_reads_another_ones_documents(configs, byte_tokenizer, monkeypatch):
    read = []
    original = PackedStream.lane
    monkeypatch.setattr(PackedStream, "lane", lambda self, lane, *rest: (read.append(lane), original(self, lane, *rest))[1])
    for rank in range(2):
        stream = stream_of(configs["jsonl"], byte_tokenizer, 4)
        next(iter(BatchLoader(stream, rows_per_step=4, rank=rank, world_size=2)))
    assert read == [0, 1, 2, 3]
    read.clear()
    next(iter(BatchLoader(stream, rows_per_step=6, rank=1, world_size=2)))  # control: 6 rows do not fall on 4 lanes evenly
    assert read == [0, 1, 2, 3]


def test_another_number_of_lanes_is_another_order_and_a_state_says_so(configs, byte_tokenizer, reference):
    assert not equal(reference("cached", 1)[0], reference("cached", 2)[0])
    loader = BatchLoader(stream_of(configs["cached"], byte_tokenizer, 3), rows_per_step=STEP)
    list(islice(loader, 2))
    with pytest.raises(UserError, match="has lane 2, and the data 1 lanes"):
        BatchLoader(stream_of(configs["cached"], byte_tokenizer), rows_per_step=STEP).load_state_dict(loader.state_dict())
    rank = BatchLoader(stream_of(configs["jsonl"], byte_tokenizer, 4), rows_per_step=STEP, rank=0, world_size=6)
    list(islice(rank, 2))
    with pytest.raises(UserError, match="knows lane 2 at row 0, not 6: join all ranks' states by merge_states"):
        BatchLoader(stream_of(configs["jsonl"], byte_tokenizer, 4), rows_per_step=STEP).load_state_dict(rank.state_dict())
    with pytest.raises(UserError, match="states of different rows"):
        merge_states([rank.state_dict(), rank.state_dict(STEP)])


def test_the_state_of_an_earlier_batch_can_be_asked_for(configs, byte_tokenizer, reference):
    loader = BatchLoader(stream_of(configs["cached"], byte_tokenizer), rows_per_step=STEP)
    list(islice(loader, 9))
    again = BatchLoader(stream_of(configs["cached"], byte_tokenizer), rows_per_step=STEP)
    again.load_state_dict(loader.state_dict(4 * STEP))
    assert equal(next(iter(again)), reference("cached")[4])
    with pytest.raises(UserError, match="state at row 5 is not known"):
        loader.state_dict(5)
    # A bare number of rows does, too: the order is made again from the beginning.
    again.load_state_dict({"rows": 4 * STEP})
    assert again.state_dict() == {"rows": 4 * STEP}
    assert equal(next(iter(again)), reference("cached")[4])
    assert again.state_dict() == loader.state_dict(5 * STEP)


def test_resuming_costs_one_block_and_one_buffer_however_late(configs, byte_tokenizer, monkeypatch):
    plans, plan = [], IndexedRows._plan
    monkeypatch.setattr(IndexedRows, "_plan", lambda self: (plans.append(1), plan(self))[1])
    late = BatchLoader(stream_of(configs["jsonl"], byte_tokenizer), rows_per_step=STEP)
    list(islice(late, 200))
    assert len(plans) > 20
    again = BatchLoader(stream_of(configs["jsonl"], byte_tokenizer), rows_per_step=STEP)
    again.load_state_dict(late.state_dict())
    plans.clear()
    reader = again.stream._reader(configs["jsonl"].sources[0])
    read, records = [], reader.read
    monkeypatch.setattr(reader, "read", lambda *a: (r for r in records(*a) if not read.append(r)))
    next(iter(again))
    assert len(plans) <= 2
    assert len(read) < 91


def test_a_shuffle_buffer_of_one_keeps_the_order_and_a_larger_one_does_not(configs, byte_tokenizer, texts):
    training = [text for shard in range(5) for text in texts[shard::5] if not is_heldout(text, HELDOUT)]

    def first_epoch(buffer):
        source = replace(configs["jsonl"].sources[0], shuffle_buffer=buffer)
        stream = stream_of(replace(configs["jsonl"], sources=(source,), packing=False, packing_buffer=64), byte_tokenizer)
        return [int(byte_tokenizer.decode(ids).split()[0]) for ids in starts(stream) if byte_tokenizer.decode(ids)[0].isdigit()]

    def starts(stream):
        lane = stream.lane(0, stream.weights())
        while True:
            _, row = lane.next()
            if lane.state()["sources"][0]["epoch"]:
                return
            yield row.pieces[0].store.tokens

    in_order = [int(text.split()[0]) for text in training if text[0].isdigit()]
    assert list(dict.fromkeys(first_epoch(1))) == in_order
    few, many = (list(dict.fromkeys(first_epoch(size))) for size in (9, 91))
    assert sorted(few) == sorted(many) == sorted(in_order)
    assert len({tuple(order) for order in (few, many, in_order)}) == 3


WEIGHTS = {"a": 0.1, "b": 0.9}


def recount(batches):
    drawn = [0, 0]
    for batch in batches:
        for domain in (0, 1):
            drawn[domain] += int((batch["document_ids"][batch["domain"] == domain] > 0).sum())
    return drawn[1] / sum(drawn)


@pytest.mark.parametrize(
    ("workers", "ahead", "lanes"),
    [(0, 0, 1), (0, 9, 3), (2, 0, 1), (2, 1, 1), (2, 9, 1), (2, 1, 3), (4, 0, 1), (4, 1, 3), (4, 9, 1)],
)
def test_a_changed_weight_reaches_every_worker_at_the_stated_step(workers, ahead, lanes, configs, byte_tokenizer, reference):
    loader = BatchLoader(stream_of(configs["cached"], byte_tokenizer, lanes), rows_per_step=STEP, num_workers=workers)
    batches = []
    for batch in loader:
        batches.append(batch)
        if len(batches) == 5:
            loader.set_weights(WEIGHTS, 5 + ahead)
        if len(batches) == 40:
            break
    change = 5 + ahead
    assert all(equal(a, b) for a, b in zip(batches[:change], reference("cached", lanes), strict=False))
    assert not equal(batches[change], reference("cached", lanes)[change]) or not equal(
        batches[change + 1], reference("cached", lanes)[change + 1]
    )
    assert abs(recount(batches[:change]) - 1 / 3) < 0.08
    assert abs(recount(batches[change:]) - 0.9) < 0.02  # at once: what was drawn before is no debt
    assert abs(recount(reference("cached", lanes)[change:]) - 1 / 3) < 0.02  # control
    state = json.loads(json.dumps(loader.state_dict()))
    # Resumed in one process, before and behind the change.
    for at in (len(batches) - 1, change - 1):
        again = BatchLoader(stream_of(configs["cached"], byte_tokenizer, lanes), rows_per_step=STEP)
        again.load_state_dict(json.loads(json.dumps(loader.state_dict(at * STEP))))
        assert all(equal(a, b) for a, b in zip(batches[at:], again, strict=False))
    assert state["weights"]["changes"] == 1
    total = sum(state["tokens"].values())
    assert state["tokens"]["b"] / total == pytest.approx(recount(batches))


def test_a_change_in_the_past_is_refused_and_the_next_step_is_the_default(configs, byte_tokenizer):
    loader = BatchLoader(stream_of(configs["cached"], byte_tokenizer), rows_per_step=STEP)
    list(islice(loader, 3))
    with pytest.raises(UserError, match="cannot change at step 2, which was handed out: the next is 3"):
        loader.set_weights(WEIGHTS, 2)
    with pytest.raises(UserError, match="sum to"):
        loader.set_weights({"a": 0.4, "b": 0.4})
    loader.set_weights(WEIGHTS)
    assert loader.weights.at(3 * STEP) == (3 * STEP, (0.1, 0.9))


def test_more_changes_than_running_workers_can_be_told_of_start_them_anew(configs, byte_tokenizer, monkeypatch):
    monkeypatch.setattr("data_handler.loader.CHANGES", 4)
    runs = []
    for workers in (0, 1):
        loader = BatchLoader(stream_of(configs["cached"], byte_tokenizer), rows_per_step=STEP, num_workers=workers)
        batches = []
        for batch in islice(loader, 12):
            batches.append(batch)
            share = len(batches) / 20
            loader.set_weights({"a": share, "b": 1 - share}, loader.next_step + 4)
        runs.append(batches)
    assert all(equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_dead_worker_is_named_and_nothing_comes_twice(configs, byte_tokenizer, reference):
    loader = BatchLoader(stream_of(configs["cached"], byte_tokenizer), rows_per_step=STEP, num_workers=2)
    batches = []

    def run():
        for batch in loader:
            batches.append(batch)
            if len(batches) == 3:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(UserError, match=r"a data worker of rank 0 died while rows \d+ to \d+ were made .*nothing .* comes again"):
        run()
    assert 3 <= len(batches) < 12
    assert loader.state_dict()["rows"] == len(batches) * STEP
    batches += islice(loader, 5)
    assert all(equal(a, b) for a, b in zip(batches, reference("cached"), strict=False))


def test_workers_are_for_training_rows_only(configs, byte_tokenizer):
    heldout = PackedStream(configs["cached"], byte_tokenizer, split="heldout")
    with pytest.raises(UserError, match="num_workers must be at least 0, and 0 for"):
        BatchLoader(heldout, rows_per_step=2, num_workers=1)
    with pytest.raises(UserError, match="num_workers must be at least 0"):
        BatchLoader(stream_of(configs["cached"], byte_tokenizer), rows_per_step=2, num_workers=-1)


@pytest.mark.parametrize("kind", ["cached", "jsonl"])
def test_too_few_documents_for_the_lanes_are_named(kind, configs, byte_tokenizer):
    source = configs[kind].sources[0]
    config = replace(configs[kind], sources=(source,), heldout_share=0, lanes=92)
    with pytest.raises(UserError, match=r"source a has too few documents for 92 lanes \(lane \d+ has none\): lower lanes"):
        list(islice(PackedStream(config, byte_tokenizer).rows(), 200))
