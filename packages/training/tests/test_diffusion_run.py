"""Diffusion models from whole runs, through the command line, in this process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitnet_arch import load_model, load_tokenizer, save_master
from bitnet_arch.diffusion import add_mask_token, diffusion_of
from bitnet_arch.generation import DecodeOptions, decode
from bitnet_arch.testing import tiny_llama, tiny_tokenizer, train_tiny
from safetensors.torch import load_file
from wrinklefree import exporting
from wrinklefree.callbacks import read_metrics
from wrinklefree.cli import main
from wrinklefree.objectives import diffusion

DLM = "objectives={dlm: {block_size: 8}}"
TCS = "objectives={tcs: {block_size: 8, top_k: 3, window: 2, hard: 0.5}}"


@pytest.fixture(autouse=True)
def without_engine(monkeypatch):
    """Export runs in its own tests; here it only takes time."""
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def quick(overrides):
    """Overrides of a run of the ternary arm alone, in this process."""
    return [*overrides, "training.compare_fp=false"]


def ran(overrides, *more):
    assert main([*overrides, *more]) == 0
    directory = Path(next(o for o in reversed([*overrides, *more]) if o.startswith("output_dir=")).split("=", 1)[1])
    return directory, read_metrics(directory / "metrics.jsonl")


def weights(directory):
    return load_file(directory / "model" / "model.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("preset", ["dlm", "tcs_distill"])
def test_the_presets_run_on_the_tiny_model(preset, overrides, capsys):
    kept = [o for o in overrides if not o.startswith(("model.", "training="))]
    directory, lines = ran(kept, "model=tiny", f"training={preset}", "training.max_steps=3", "training.wandb=off")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert ("made on the spot in 3 steps" in capsys.readouterr().err) == (preset == "tcs_distill")
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["likelihood"].startswith("estimated: a block's first token")
    assert summary["gguf"]["status"] == "unproven"
    model, tokenizer = load_model(directory / "model"), load_tokenizer(directory / "model")
    form = diffusion_of(model.config)
    assert (form.block_size, form.token_shift, form.mask_token_id) == (32, True, tokenizer.mask_token_id)
    ids = torch.tensor(tokenizer("the model").input_ids)
    assert len(decode(model, ids, DecodeOptions(max_tokens=5)).tokens) == 5


@pytest.mark.parametrize(
    ("method", "word", "said"),
    [
        ("bd3lm", "bounded", "(an upper bound)"),
        ("mdlm", "bounded", "(an upper bound)"),
        ("fast_dllm_v2", "estimated", "(an estimate)"),
    ],
)
def test_a_shifted_models_perplexity_is_called_an_estimate_and_others_a_bound(quick, method, word, said, capsys):
    directory, _ = ran(quick, f"objectives={{dlm: {{method: {method}}}}}", "training.max_steps=1")
    assert json.loads((directory / "summary.json").read_text())["likelihood"].startswith(word)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("objectives", [DLM, TCS], ids=["dlm", "tcs"])
def test_micro_batches_and_resuming_change_nothing(quick, tmp_path, objectives):
    whole, lines = ran(quick, objectives, "training.keep_checkpoints=9")
    _, parts = ran(quick, objectives, "training.micro_batch_rows=1", f"output_dir={tmp_path / 'parts'}")
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in lines], rel=2e-3)
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken, ignore=shutil.ignore_patterns("summary.json", "step-6.ckpt"))
    shutil.rmtree(broken / "model")
    ran(quick, objectives, "training.keep_checkpoints=9", f"output_dir={broken}")
    assert same(weights(whole), weights(broken))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_mask_and_train_as_one_does(quick, tmp_path):
    command = [sys.executable, "-m", "wrinklefree", *quick, DLM]
    ddp = ["distributed=ddp", "distributed.accelerator=cpu", "training.micro_batch_rows=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    losses = {}
    for name, more in (("one", []), ("two", ddp)):
        done = subprocess.run(
            [*command, *more, f"output_dir={tmp_path / name}"], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert losses["two"][:4] == pytest.approx(losses["one"][:4], abs=1e-4)  # later, a ternary code at an edge may turn
    assert losses["two"] == pytest.approx(losses["one"], abs=5e-2)


@pytest.mark.parametrize("estimator", ["causal", "gradient"])
def test_the_biased_baseline_is_called_that(quick, estimator, capsys):
    ran(quick, f"objectives={{tcs: {{block_size: 8, estimator: {estimator}}}}}", "training.max_steps=1")
    assert ("objectives.tcs: estimator=causal is biased" in capsys.readouterr().err) == (estimator == "causal")


def test_no_row_is_masked_as_one_before_it(quick, monkeypatch):
    """Masks are of the seed and a row's place in the data: the same place twice would be the same masks in every step."""
    seen, step = [], diffusion.diffusion_step

    def watched(model, batch, settings):
        seen.append(batch["sample_index"].tolist())
        return step(model, batch, settings)

    monkeypatch.setattr(diffusion, "diffusion_step", watched)
    _, lines = ran(quick, DLM, "training.rows_per_step=4", "training.micro_batch_rows=2")
    assert seen == [[2 * i, 2 * i + 1] for i in range(2 * len(lines))]


def test_the_seed_of_the_masks_changes_the_run(quick, tmp_path):
    _, lines = ran(quick, DLM)
    _, other = ran(quick, "objectives={dlm: {block_size: 8, seed: 1}}", f"output_dir={tmp_path / 'other'}")
    assert lines[0]["loss"] != other[0]["loss"]
    _, same_seed = ran(quick, "objectives={dlm: {block_size: 8, seed: 0}}", f"output_dir={tmp_path / 'same'}")
    assert [line["loss"] for line in same_seed] == [line["loss"] for line in lines]  # the run's own seed is 0


@pytest.fixture
def pretrained(tmp_path):
    directory = tmp_path / "llama"
    save_master(train_tiny(tiny_llama(hidden=64, ffn=128), steps=60), directory, tiny_tokenizer())
    return directory


def from_directory(quick, directory, *more):
    return [*(o for o in quick if not o.startswith("model.")), "model=smollm2_135m", f"model.pretrained={directory}", *more]


def test_a_pretrained_model_becomes_a_diffusion_model_and_its_bound_falls(quick, pretrained, tmp_path):
    settings = from_directory(quick, pretrained, "training.max_steps=24", "training.eval_every=12", "training.learning_rate=3e-3")
    directory, lines = ran(settings, "objectives={tcs: {block_size: 8, top_k: 3, window: 2, hard: 0.5}}")
    bounds = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    assert bounds[-1] < bounds[0]
    assert all(key in lines[0] for key in ("objective/tcs/scores", "objective/tcs/tokens"))
    # It goes on from where it was, with the mask token that it has.
    again, _ = ran(from_directory(quick, directory / "model", DLM, f"output_dir={tmp_path / 'again'}"))
    assert diffusion_of(load_model(again / "model").config) == diffusion_of(load_model(directory / "model").config)


@pytest.mark.parametrize(
    "objectives", ["dlm: {block_size: 8}, logits: {}", "tcs: {block_size: 8, top_k: 3, window: 2}, logits: {}"]
)
def test_logits_stand_beside_an_objective_that_adds_a_mask_token(quick, objectives):
    _, lines = ran(quick, f"objectives={{{objectives}}}", "training.max_steps=2", "teacher.made_steps=1")
    assert all(line["objective/logits"] > 0 for line in lines)


@pytest.fixture
def diffusing(tmp_path):
    """A float diffusion model, untrained."""
    model, tokenizer, directory = tiny_llama(hidden=64, ffn=128), tiny_tokenizer(), tmp_path / "diffusing"
    add_mask_token(model, tokenizer, block_size=8, token_shift=True)
    save_master(model, directory, tokenizer)
    return directory


def test_a_diffusion_model_goes_on_with_an_autoregressive_teacher(quick, pretrained, diffusing):
    _, lines = ran(from_directory(quick, diffusing, TCS, f"teacher.model={pretrained}", "training.max_steps=2"))
    assert all(line["objective/tcs/scores"] > 0 for line in lines)


@pytest.mark.parametrize("objectives", ["objectives={ce: {}}", "objectives={ce: {}, dlm: {weight: 0}}"])
def test_a_diffusion_model_is_not_trained_as_an_autoregressive_one(quick, diffusing, objectives, capsys):
    assert main(from_directory(quick, diffusing, objectives)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is a diffusion model, and the objectives train an autoregressive one" in error


def test_a_diffusion_model_is_no_teacher(quick, diffusing, capsys):
    assert main(from_directory(quick, diffusing, TCS, f"teacher.model={diffusing}")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "is a diffusion model, and a teacher is run autoregressively" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([DLM, "training.compare_fp=true"], "training.compare_fp compares likelihoods"),
        ([DLM, "mixture=odm", "training.max_steps=20"], "give objectives.ce a weight"),
        (["objectives={dlm: {block_size: 0}}"], "at least 1"),
        (["objectives={dlm: {method: mdlm, block_size: 8}}"], "has no effect with method=mdlm"),
        (["objectives={dlm: {block_size: 8}, tcs: {}}"], "ask for different diffusion models"),
        (["objectives={dlm: {block_size: 33}}"], "objectives.dlm.block_size=33 is longer than a row (data.sequence_length=32)"),
        (["objectives={tcs: {hard: 1.0}}"], "must lie in [0, 1)"),
        (["objectives={tcs: {top_k: 512}}"], "lower it"),
        (["objectives={tcs: {estimator: causal, window: 2}}"], "no effect"),
        (["objectives={tcs: {estimator: exact, top_k: 2}}"], "top_k has no effect with estimator=exact"),
        (["objectives={tcs: {}}", "teacher.compiled=true"], "teacher.compiled serves distributions alone"),
    ],
    ids=str,
)
def test_mistakes_end_in_one_sentence_before_the_first_step(quick, more, message, capsys):
    assert main([*quick, *more]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
