"""The benchmarks of distillation run end to end on a moment's training, and their arithmetic is right."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a benchmark as its own command does, and leave no trace of it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_world_hides_speakers_from_counts_and_not_from_pairs(load):
    speakers = load("speakers")
    world = speakers.World.of(0)
    torch.testing.assert_close(world.chain.sum(-1), torch.ones(3, 32))
    torch.testing.assert_close(world.chain.sum(-2), torch.ones(3, 32))  # so every symbol is as likely as any other
    data = world.labelled(1, 2000)
    assert data["labels"].ne(-100).sum(1).eq(1).all()
    assert 0.93 < world.best_guess(data) < 0.99
    assert 0.28 < world.best_guess(world.labelled(1, 2000, shuffled=True)) < 0.39
    assert speakers.World.of(1).best_guess(data) < 0.5  # another world's habits tell nothing


def test_epochs_go_through_the_whole_set_in_another_order_each_time(load):
    speakers = load("speakers")
    data = {"input_ids": torch.arange(64)[:, None]}
    first, second, third, _ = (batch["input_ids"][:, 0].tolist() for batch in speakers.epochs(data, 0, 4))
    assert sorted(first + second) == list(range(64))
    assert first != third


def test_the_ladder_counts_what_is_recovered_and_who_is_better(load):
    ladder = load("bitdistill_ladder")
    arms = {name: ladder.ARMS[name] for name in (ladder.TERNARY, "+ SubLN", "+ CPT")}
    found = [
        {ladder.FLOAT: 0.9, ladder.TERNARY: 0.5, "+ SubLN": 0.4, "+ CPT": 0.7},
        {ladder.FLOAT: 0.9, ladder.TERNARY: 0.7, "+ SubLN": 0.8, "+ CPT": 0.9},
    ]
    rows = {row["arm"]: row for row in ladder.table(found, arms)}
    assert rows[ladder.FLOAT]["recovered"] == pytest.approx(1.0)
    assert rows[ladder.TERNARY]["recovered"] == 0.0
    assert rows["+ CPT"]["recovered"] == pytest.approx(0.4 / 0.6)
    assert rows["+ CPT"]["recovered (seeds)"] == "0.50 1.00"
    assert (rows["+ SubLN"]["against"], rows["+ SubLN"]["better on"]) == (ladder.TERNARY, "1 of 2")
    assert rows["+ CPT"]["better on"] == "2 of 2"


def test_the_ladder_runs(load, tmp_path):
    ladder = load("bitdistill_ladder")
    plan = ladder.Plan(layers=3, base_steps=4, rows=32, steps=2, test_rows=50)
    arms = {name: replace(arm, cpt=min(arm.cpt, 2)) for name, arm in ladder.ARMS.items()}
    one = dict(ladder.of_seed(0, plan, arms))
    assert set(arms) | {ladder.FLOAT} <= set(one)
    assert all(0.0 <= one[name] <= 1.0 for name in arms)
    ladder.plot([one], arms, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_the_layerwise_stage_runs_on_equal_budgets(load, tmp_path):
    layerwise = load("layerwise")
    shared = layerwise.Seed(0, layerwise.Plan(base_steps=4, budget=8, held_out=16))
    assert min(shared.measure(shared.base)["nmse"]) == 0.0
    one = {name: shared.run(name, 1e-3) for name in layerwise.ARMS}
    assert {name: len(found) for name, found in one.items()} == {name: len(parts) for name, parts in layerwise.ARMS.items()}
    assert [row["arm"] for row in layerwise.table([one])] == list(layerwise.ARMS)
    layerwise.plot([one], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
