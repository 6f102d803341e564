"""Interrupted runs: real processes, real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from wrinklefree.callbacks import newest_checkpoint, read_metrics

STEPS = 24


def command(overrides, *more):
    common = [f"training.max_steps={STEPS}", "training.eval_every=5", "training.checkpoint_every=4"]
    return [sys.executable, "-m", "wrinklefree", *overrides, *common, *more]


def start(overrides, *more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command(overrides, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for_lines(path, count, process):
    deadline = time.monotonic() + 240
    while len(read_metrics(path)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(process, code):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def weights(directory):
    return load_file(directory / "model" / "model.safetensors")


def comparable(directory):
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in read_metrics(directory / "metrics.jsonl")]


@pytest.mark.timeout(1200)
def test_interrupted_runs_continue_to_the_same_bits(overrides, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    reference = start(overrides, f"output_dir={whole}")
    process = start(overrides, f"output_dir={broken}")
    # In the first arm, at a step that has no regular checkpoint.
    wait_for_lines(broken / "metrics.jsonl", 2, process)
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 75)
    assert "interrupted: saved" in err
    assert not (broken / "model").exists()
    first_stop = read_metrics(broken / "metrics.jsonl")[-1]["step"]
    assert newest_checkpoint(broken / "checkpoints").name == f"step-{first_stop}.ckpt"
    # A line that a crash left behind the checkpoint, and half of another, must not survive.
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "loss": 0.0}\n{"step": 100, "lo')
    # Again by SIGTERM, in the second arm.
    process = start(overrides, f"output_dir={broken}")
    wait_for_lines(broken / "fp" / "metrics.jsonl", 1, process)
    process.send_signal(signal.SIGTERM)
    finish(process, 75)
    assert (broken / "model").exists()
    finish(start(overrides, f"output_dir={broken}"), 0)
    finish(reference, 0)
    assert comparable(broken) == comparable(whole)
    assert comparable(broken / "fp") == comparable(whole / "fp")
    a, b = weights(whole), weights(broken)
    assert all(torch.equal(a[name], b[name]) for name in a)
    # Other settings do not silently continue it.
    (broken / "summary.json").unlink()
    process = start(overrides, f"output_dir={broken}", "training.learning_rate=1e-5")
    assert "training.learning_rate=0.002, and this run has training.learning_rate=1e-05" in finish(process, 2)[1]
    process = start(overrides, f"output_dir={broken}", "resume=none")
    assert "holds checkpoints of a run" in finish(process, 2)[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(overrides, tmp_path):
    run = tmp_path / "run"
    finish(start(overrides, "training.compare_fp=false"), 0)
    (run / "summary.json").unlink()
    for checkpoint in Path(run / "checkpoints").iterdir():
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    _, err = finish(start(overrides, "training.compare_fp=false"), 2)
    assert "is damaged or no checkpoint" in err.splitlines()[-1]
    assert (run / "model" / "model.safetensors").is_file()
    assert len(read_metrics(run / "metrics.jsonl")) == STEPS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_with_micro_batches_train_as_one_does(overrides, tmp_path):
    finish(start(overrides, f"output_dir={tmp_path / 'one'}"), 0)
    ddp = ["distributed=ddp", "distributed.accelerator=cpu", "training.micro_batch_rows=1", f"output_dir={tmp_path / 'two'}"]
    finish(start(overrides, *ddp), 0)
    # Without quantisation sums in another order differ in the last place and stay there; a ternary code at a rounding edge
    # turns that into a visible step sooner or later, so there only the beginning can be held to it.
    for arm, tolerances in (("fp", [1e-5] * STEPS), (".", [1e-5] * 4 + [5e-2] * (STEPS - 4))):
        single, double = (read_metrics(tmp_path / name / arm / "metrics.jsonl") for name in ("one", "two"))
        assert [x["step"] for x in single] == [x["step"] for x in double] == list(range(1, STEPS + 1))
        for one, two, tolerance in zip(single, double, tolerances, strict=True):
            assert two["loss"] == pytest.approx(one["loss"], abs=tolerance)


@pytest.mark.timeout(1200)
@pytest.mark.slow
def test_a_full_disk_loses_no_earlier_checkpoint(overrides, tmp_path):
    run = tmp_path / "run"
    process = start(overrides, "training.compare_fp=false")
    wait_for_lines(run / "metrics.jsonl", 5, process)
    process.send_signal(signal.SIGINT)
    finish(process, 75)
    before = newest_checkpoint(run / "checkpoints")
    content = before.read_bytes()
    limit = [sys.executable, "-c", FULL_DISK, str(len(content) // 2), *command(overrides, "training.compare_fp=false")[3:]]
    done = subprocess.run(
        limit, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "free some space and resume" in done.stderr.splitlines()[-1]
    assert before.read_bytes() == content
    assert not list(run.glob("**/*.partial"))
    finish(start(overrides, "training.compare_fp=false"), 0)


FULL_DISK = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from wrinklefree.cli import main
sys.exit(main())
"""
