"""The first 50 losses of a fixed run on synthetic text, through the command line, against recorded ones.

The tolerance covers other processors and thread counts: float32 sums in another order, and the codes they flip. To record anew
after a change that is meant to move the numbers: `uv run python packages/training/tests/test_training_golden.py`.
"""

import json
import tempfile
from pathlib import Path

import pytest
from wrinklefree import exporting
from wrinklefree.callbacks import read_metrics
from wrinklefree.cli import main

GOLDEN = Path(__file__).parent / "golden" / "loss_curve.json"
TOLERANCE = 0.05
STEPS = 50


def write_corpus(folder):
    """Counting in steps of 1 to 5, modulo 61, in words: learnable, and the same everywhere."""
    for document in range(80):
        start, stride = document * 7 % 61, 1 + document % 5
        words = " ".join(f"n{(start + stride * i) % 61}" for i in range(40 + document % 17))
        (folder / f"{document:02d}.txt").write_text(words)


def curve(folder, *more):
    """Train in a folder and return the losses."""
    write_corpus(folder)
    overrides = [
        "data=text",
        f"data.sources=[{{name: counting, kind: text, path: '{folder}/*.txt'}}]",
        "data.sequence_length=32",
        "data.heldout_share=0.1",
        "data.heldout_tokens=256",
        "training=smoke",
        "training.threads=1",
        f"training.max_steps={STEPS}",
        "training.rows_per_step=8",
        "training.learning_rate=4e-3",
        "training.compare_fp=false",
        f"training.eval_every={STEPS}",
        "model.shape.hidden_size=64",
        "model.shape.intermediate_size=128",
        "model.shape.num_hidden_layers=2",
        "model.shape.vocab_size=384",
        f"output_dir={folder / 'run'}",
        *more,
    ]
    assert main(overrides) == 0
    return [line["loss"] for line in read_metrics(folder / "run" / "metrics.jsonl")]


@pytest.fixture(autouse=True)
def without_engine(monkeypatch):
    """Export has tests of its own; here it only takes time."""
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)


def test_the_curve_is_the_recorded_one(tmp_path):
    recorded = json.loads(GOLDEN.read_text())
    losses = curve(tmp_path)
    assert len(losses) == len(recorded) == STEPS
    assert losses[0] == pytest.approx(recorded[0], abs=1e-3)
    assert losses == pytest.approx(recorded, abs=TOLERANCE)
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("setting", ["training.learning_rate=5e-3", "training.schedule=constant", "training.seed=1"])
def test_a_setting_that_matters_leaves_the_recorded_curve(tmp_path, setting):
    recorded = json.loads(GOLDEN.read_text())
    assert max(abs(a - b) for a, b in zip(curve(tmp_path, setting), recorded, strict=True)) > TOLERANCE


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps([round(loss, 4) for loss in curve(Path(folder))]) + "\n")
