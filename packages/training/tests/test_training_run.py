"""Whole runs through the command line, in this process."""

import inspect
import json
import shlex
import shutil
import sys

import pytest
import torch
import yaml
from bitnet_arch import (
    ConversionConfig,
    UserError,
    bitlinear_layers,
    convert_model,
    load_model,
    load_tokenizer,
    save_master,
    save_packed,
)
from bitnet_arch.modeling import form_of
from bitnet_arch.testing import tiny_llama, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM
from wrinklefree import exporting
from wrinklefree.callbacks import read_metrics
from wrinklefree.cli import load_run_config, main, report
from wrinklefree.run import name_frozen_files


@pytest.fixture(autouse=True)
def without_engine(monkeypatch):
    """Export runs in its own tests; here it only takes time."""
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)


def run(overrides, *more):
    assert main([*overrides, *more]) == 0
    directory = next(o for o in reversed([*overrides, *more]) if o.startswith("output_dir=")).split("=", 1)[1]
    from pathlib import Path

    return Path(directory)


@pytest.mark.parametrize(("installed", "shown"), [(True, "model.gguf"), (False, "model")], ids=["native engine", "without"])
@pytest.mark.parametrize("runs", [True, False], ids=["llama.cpp", "ours"])
def test_what_comes_next_can_be_typed_as_it_is_printed(installed, shown, runs, overrides, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "my run"
    config = load_run_config([*overrides, f"output_dir={directory}"])
    gguf = {"status": "proven", "note": "see model.gguf.parity.json", "runs": runs}
    summary = {"ppl_ternary": 2.0, "ppl_fp": None, "likelihood": "exact", "fp": "", "sample": "", "gguf": gguf}
    monkeypatch.setattr("bitnet_arch.parity.has_native_engine", lambda: installed)
    report(config, summary)
    lines = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    words = [shlex.split(line) for line in lines]
    assert all(line[:3] == ["uv", "run", "wf"] for line in words)
    found = {line[3]: line[4] for line in words}
    file = {"serve": str(directory / "model.gguf")} if runs else {}
    assert found == {"generate": str(directory / shown), "eval": str(directory / "model"), **file}


def losses(directory):
    return [line["loss"] for line in read_metrics(directory / "metrics.jsonl")]


def test_a_run_leaves_what_the_conventions_promise(overrides, capsys):
    directory = run(overrides)
    printed = capsys.readouterr()
    summary = json.loads((directory / "summary.json").read_text())
    assert {"ppl_ternary", "ppl_fp", "tokens", "seconds"} <= set(summary)
    assert summary["tokens"] == 6 * 4 * 32
    assert 1 < summary["ppl_ternary"] < 512 * 2
    assert summary["fp"] == "trained on the same tokens"
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((directory / "config.yaml").read_text())["training"]["max_steps"] == 6
    lines = read_metrics(directory / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"tokens", "loss", "tokens_per_s", "learning_rate", "lambda", "grad_norm"} <= set(lines[0])
    assert "heldout_loss" in lines[2]
    assert [line["lambda"] for line in read_metrics(directory / "fp" / "metrics.jsonl")] == [0.0] * 6
    assert len(list(bitlinear_layers(load_model(directory / "model")))) == 14
    assert len(load_tokenizer(directory / "model")) == 512
    assert json.loads((directory / "model.gguf.parity.json").read_text())["status"] == "unproven"
    assert (directory / "model.gguf").is_file()
    assert not list(directory.glob("**/*.partial"))
    assert "held-out perplexity" in printed.out
    assert "uv run wf serve" in printed.out
    assert "step 6/6" in printed.err
    # A finished run is never overwritten.
    assert main(overrides) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_training_lowers_the_heldout_loss_and_a_rate_of_almost_nothing_does_not(overrides, tmp_path):
    more = ["training.compare_fp=false", "training.max_steps=30", "training.eval_every=30"]
    trained = run(overrides, *more, "training.learning_rate=4e-3")
    still = run(overrides, *more, "training.learning_rate=1e-12", f"output_dir={tmp_path / 'still'}")
    a, b = (read_metrics(d / "metrics.jsonl")[-1]["heldout_loss"] for d in (trained, still))
    assert a < b - 0.5
    assert json.loads((trained / "summary.json").read_text())["ppl_fp"] is None


def test_the_share_of_evaluations_bounds_them_and_changes_no_step(overrides, tmp_path, capsys):
    """And a share that leaves all held-out tokens is as none at all."""
    found = {}
    for share in ("0.25", "2", "null"):
        directory = run(overrides, "training.compare_fp=false", f"training.eval_share={share}", f"output_dir={tmp_path / share}")
        lines = read_metrics(directory / "metrics.jsonl")
        perplexity = json.loads((directory / "summary.json").read_text())["ppl_ternary"]
        found[share] = [line["loss"] for line in lines], perplexity, lines[2]["heldout_loss"]
        said = "held-out: 192 of 1,024 tokens, as training.eval_share=0.25 allows a run of 768" in capsys.readouterr().err
        assert said == (share == "0.25")
    assert found["2"] == found["null"]
    assert found["0.25"][0] == found["null"][0]
    assert all(a != b for a, b in zip(found["0.25"][1:], found["null"][1:], strict=True))


def test_the_tokens_of_every_source_are_counted_logged_and_kept(overrides, tmp_path):
    """And workers change no loss; a run goes on from the place in the data that the checkpoint holds, not from a replay."""
    more = ["training.compare_fp=false", "training.checkpoint_every=3"]
    here = run(overrides, *more)
    there = run(overrides, *more, "training.data_workers=2", f"output_dir={tmp_path / 'workers'}")
    assert losses(here) == losses(there)
    counts = [(line["tokens/salad"], line["tokens/count"]) for line in read_metrics(here / "metrics.jsonl")]
    assert counts == sorted(counts)
    assert abs(counts[-1][0] - counts[-1][1]) <= 64
    assert sum(counts[-1]) > 0.8 * 6 * 4 * 32
    kept = torch.load(here / "checkpoints" / "step-6.ckpt", weights_only=True)["wrinklefree"]
    state = json.loads(kept["loader"])
    assert tuple(kept["domain_tokens"]) == counts[-1] == (state["tokens"]["salad"], state["tokens"]["count"])
    assert state["rows"] == kept["rows_seen"] == 24
    assert len(kept["loader"]) < 1000


def test_micro_batches_change_memory_and_not_the_outcome(overrides, tmp_path):
    more = ["training.compare_fp=false"]
    whole = losses(run(overrides, *more))
    parts = losses(run(overrides, *more, "training.micro_batch_rows=1", f"output_dir={tmp_path / 'parts'}"))
    assert parts == pytest.approx(whole, abs=2e-4)


def test_the_seed_decides_the_outcome(overrides, tmp_path):
    more = ["training.compare_fp=false", "training.max_steps=2"]
    first = losses(run(overrides, *more))
    same = losses(run(overrides, *more, f"output_dir={tmp_path / 'same'}"))
    other = losses(run(overrides, *more, "training.seed=1", f"output_dir={tmp_path / 'other'}"))
    assert same == first
    assert other != first


def test_lambda_rises_over_its_share_of_the_run_and_changes_the_outcome(overrides, tmp_path):
    more = ["training.compare_fp=false"]
    constant = run(overrides, *more)
    warm = run(
        overrides, *more, "training.lambda_schedule=linear", "training.lambda_warmup_share=0.5", f"output_dir={tmp_path / 'warm'}"
    )
    strengths = [line["lambda"] for line in read_metrics(warm / "metrics.jsonl")]
    assert strengths == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])
    assert losses(warm) != losses(constant)
    assert all(float(layer.quant_lambda) == 1.0 for _, layer in bitlinear_layers(load_model(warm / "model")))


@pytest.fixture
def pretrained(tmp_path):
    directory = tmp_path / "llama"
    save_master(tiny_llama(hidden=64, ffn=128), directory, tiny_tokenizer())
    return directory


def from_directory(overrides, directory):
    kept = [o for o in overrides if not o.startswith("model.")]
    return [*kept, "model=smollm2_135m", f"model.pretrained={directory}", "training.max_steps=4"]


def test_a_pretrained_directory_is_converted_and_compared_with_its_original(overrides, pretrained):
    directory = run(from_directory(overrides, pretrained))
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["fp"] == "the original, not trained further"
    assert summary["ppl_fp"] == pytest.approx(512, rel=0.3)
    assert json.loads((directory / "model" / "config.json").read_text())["model_type"] == "bitnet"
    assert not (directory / "fp").exists()


def test_a_ternary_directory_is_trained_as_it_is(overrides, pretrained, tmp_path):
    with torch.no_grad():
        model = convert_model(tiny_llama(hidden=64, ffn=128), ConversionConfig(gain="one"))
    save_master(model, tmp_path / "ternary", tiny_tokenizer())
    directory = run(from_directory(overrides, tmp_path / "ternary"), "training.compare_fp=false", "training.learning_rate=1e-6")
    # Four steps of AdamW at this rate move a weight by no more than about 4e-6.
    found = load_model(directory / "model").state_dict()
    for name, value in load_model(tmp_path / "ternary").state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model.gain=one"], "ternary already, and nothing is inserted: leave out model.gain"),
        (["model.granularity=row"], "ternary already, with granularity tensor"),
        (["model.rotation=true"], "ternary already, with rotation False"),
        (["model.norm=none"], "ternary already, with norm subln"),
    ],
)
def test_conversion_settings_are_refused_where_nothing_is_converted(more, message, overrides, tmp_path, capsys):
    model = convert_model(tiny_llama(hidden=64, ffn=128), ConversionConfig(gain="one"))
    save_master(model, tmp_path / "ternary", tiny_tokenizer())
    assert main([*from_directory(overrides, tmp_path / "ternary"), *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    save_packed(model, tmp_path / "packed", tiny_tokenizer())
    assert main(from_directory(overrides, tmp_path / "packed")) == 2
    assert "give its master form" in capsys.readouterr().err.splitlines()[-1]


def test_a_family_that_cannot_be_converted_is_named(overrides, tmp_path, capsys):
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=512))
    model.save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    assert main(from_directory(overrides, tmp_path / "gpt2")) == 2
    assert "'gpt2' cannot be converted" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_fails_the_gate_makes_the_run_fail(overrides, monkeypatch, capsys):
    monkeypatch.setattr(exporting.Exporter, "start", lambda *_: None)
    failed = {"status": "failed", "note": "engine.mean_kl is 0.3", "runs": False}
    monkeypatch.setattr(exporting.Exporter, "result", lambda _: failed)
    assert main([*overrides, "training.compare_fp=false"]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "error: model.gguf was not written: engine.mean_kl is 0.3"
    assert "generate" in printed.out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["training.learning_rate_fp=1e-3"], "learning_rate_fp has no effect"),
        (["model.pretrained=/nowhere"], "neither a directory nor a hub id"),
        (["data=text", "data.sources.0.path=/nowhere"], "nowhere"),
        (["resume=/nowhere/step-1.ckpt"], "does not exist"),
        (["output_dir=/proc/nowhere/run"], "choose another output_dir"),
    ],
)
def test_what_cannot_be_found_ends_in_one_sentence(more, message, overrides, pretrained, capsys):
    assert main([*from_directory(overrides, pretrained), *more]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert message in error.splitlines()[-1]


def test_wandb_keeps_the_figures_offline_without_a_key(overrides, monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    directory = run(overrides, "training.wandb=auto", "training.compare_fp=false")
    assert list((directory / "wandb").glob("offline-run-*/*.wandb"))


def test_the_importers_own_frames_have_a_module_where_inspect_alone_searches_for_none(monkeypatch):
    code = compile("0", "<frozen importlib._bootstrap>", "eval")
    monkeypatch.setattr(inspect, "modulesbyfile", {})
    assert inspect.getmodule(code) is None
    monkeypatch.setattr(inspect, "modulesbyfile", {})
    name_frozen_files()
    assert inspect.getmodule(code) is sys.modules["importlib._bootstrap"]
    assert set(inspect.modulesbyfile.values()) == {"importlib._bootstrap", "importlib._bootstrap_external"}


def test_a_wrong_wandb_key_is_one_sentence(overrides, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    assert main([*overrides, "training.wandb=auto"]) == 2
    error = capsys.readouterr().err
    assert "wandb could not start" in error.splitlines()[-1]
    assert "too-short" not in error


def test_a_divergent_run_stops_and_says_what_to_lower(overrides, capsys, monkeypatch):
    monkeypatch.setattr("wrinklefree.objectives.tokens.cross_entropy", lambda logits, targets: logits.sum(1) * float("nan"))
    assert main([*overrides, "training.compare_fp=false"]) == 2
    assert "lower training.learning_rate" in capsys.readouterr().err.splitlines()[-1]


def test_nothing_in_a_folder_that_is_no_run_is_written_over(overrides, pretrained, tmp_path, capsys):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "config.yaml").write_text("mine: true\n")
    assert main([*overrides, f"output_dir={foreign}"]) == 2
    assert "holds files that are not of a run" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in foreign.iterdir()] == ["config.yaml"]
    run_with_model = tmp_path / "other"
    (run_with_model / "model").mkdir(parents=True)
    shutil.copytree(pretrained, run_with_model / "model", dirs_exist_ok=True)
    source = from_directory(overrides, run_with_model / "model")
    before = (run_with_model / "model" / "model.safetensors").read_bytes()
    (run_with_model / "config.yaml").write_text("{model: 1, training: 1, data: 1, output_dir: 1}")
    assert main([*source, f"output_dir={run_with_model}"]) == 2
    assert "would be replaced" in capsys.readouterr().err.splitlines()[-1]
    assert (run_with_model / "model" / "model.safetensors").read_bytes() == before
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("{model: 1, training: 1, data: 1, output_dir: 1}")
    (tmp_path / "run" / "model" / "thesis.tex").write_text("mine")
    assert main(overrides) == 2
    assert "is not a model directory" in capsys.readouterr().err.splitlines()[-1]


def test_rows_longer_than_the_context_are_refused(overrides, pretrained, capsys):
    assert main([*overrides, "model.shape.max_position_embeddings=16"]) == 2
    assert "longer than the model's context" in capsys.readouterr().err.splitlines()[-1]
    assert main([*from_directory(overrides, pretrained), "data.sequence_length=4096"]) == 2
    assert "longer than the model's context of 512" in capsys.readouterr().err.splitlines()[-1]
    assert main([*overrides, "output_dir="]) == 2
    assert main([*overrides, "--cfg", "training.max_stepz=3"]) == 2


def test_a_form_that_only_our_classes_hold_is_trained_and_loads_again(overrides, tmp_path, capsys):
    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=16, eos_token_id=0, bos_token_id=None))
    save_master(model, tmp_path / "qwen3", tiny_tokenizer())
    kept = [o for o in overrides if not o.startswith("model.")]
    arguments = [*kept, "model=qwen3_0.6b", "model.norm=subln", f"model.pretrained={tmp_path / 'qwen3'}", "training.max_steps=4"]
    directory = run(arguments)
    trained = load_model(directory / "model")
    assert type(trained).__name__ == "TernaryQwen3ForCausalLM"
    summary = json.loads((directory / "summary.json").read_text())
    # llama.cpp cannot run the file, and nobody is told to serve it.
    assert (summary["gguf"]["status"], summary["gguf"]["runs"]) == ("unproven", False)
    assert "wf serve" not in capsys.readouterr().out
    # And it is trained further as it is.
    again = [o for o in arguments if not o.startswith(("model.", "output_dir="))]
    more = [
        "model.norm=subln",
        f"model.pretrained={directory / 'model'}",
        f"output_dir={tmp_path / 'again'}",
        "training.compare_fp=false",
    ]
    assert losses(run([*again, *more]))[0] < losses(directory)[0] + 0.5


def test_scales_and_rotation_are_those_that_the_command_asks_for(overrides, tmp_path):
    more = ["training.compare_fp=false", "training.max_steps=3", "training.lambda_schedule=constant"]
    plain = run(overrides, *more)
    other = run(overrides, *more, "model.granularity=row", "model.rotation=true", f"output_dir={tmp_path / 'other'}")
    assert form_of(load_model(plain / "model").config) is None
    form = form_of(load_model(other / "model").config)
    assert (form.norm, form.granularity, form.rotation) == ("subln", "row", True)
    assert losses(plain) != losses(other)


def test_an_empty_corpus_is_named(overrides, tmp_path, capsys):
    (tmp_path / "nothing.txt").write_text("")
    source = f"data.sources=[{{name: notes, kind: text, path: '{tmp_path}/nothing.txt'}}]"
    assert main([o for o in overrides if not o.startswith("data.sources")] + [source]) == 2
    assert "error: the data has no text to train a tokenizer on (sources: notes)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


def test_a_file_that_was_refused_ends_with_an_error_and_the_command_that_writes_it(overrides, monkeypatch, capsys):
    def full(*arguments):
        raise UserError("writing model.gguf failed (No space left on device): free some space")

    monkeypatch.setattr(exporting, "export_gguf", full)
    assert main([*overrides, "training.compare_fp=false"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in last
    assert "uv run wf export" in last


def test_an_empty_heldout_split_is_found_before_training(overrides, capsys):
    assert main([*overrides, "data.heldout_share=1e-9", "training.eval_every=0", "training.compare_fp=false"]) == 2
    printed = capsys.readouterr().err
    assert "heldout_share" in printed.splitlines()[-1]
    assert "step" not in printed
