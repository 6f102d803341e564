"""Objectives, teachers and curricula in whole runs, through the command line, in this process."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitnet_arch import bitlinear_layers, load_model, save_master
from bitnet_arch.testing import tiny_bitnet, tiny_llama, tiny_tokenizer
from safetensors.torch import load_file
from transformers.models.bitnet.modeling_bitnet import BitNetMLP
from wrinklefree import exporting, models, run
from wrinklefree.callbacks import read_metrics
from wrinklefree.cli import load_run_config, main
from wrinklefree.models import build_start

PRESETS = (
    "base",
    "smoke",
    "stage1_subln",
    "stage1_9_layerwise",
    "stage2_pretrain",
    "stage3_distill",
    "bitdistill_full",
    "bitdistill_official",
    "lrc_calibration",
    "sft",
)
TAUGHT = {"stage1_9_layerwise", "stage3_distill", "bitdistill_full", "bitdistill_official", "lrc_calibration"}
BOTH = "objectives={ce: {weight: 1.0}, logits: {weight: 1.0, temperature: 2.0}}"
ALL_THREE = "objectives={ce: {}, logits: {temperature: 2.0}, relations: {weight: auto, layer: -1, heads: 4}}"


@pytest.fixture(autouse=True)
def without_engine(monkeypatch):
    """Export runs in its own tests; here it only takes time."""
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)


@pytest.fixture
def quick(overrides):
    """Overrides of a run of the ternary arm alone, in this process."""
    return [*overrides, "training.compare_fp=false", "training.eval_every=0"]


def directory_of(overrides):
    return Path(next(o for o in reversed(overrides) if o.startswith("output_dir=")).split("=", 1)[1])


def ran(overrides, *more):
    assert main([*overrides, *more]) == 0
    directory = directory_of([*overrides, *more])
    return directory, read_metrics(directory / "metrics.jsonl")


def weights(directory):
    return load_file(directory / "model" / "model.safetensors")


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_on_the_tiny_model(preset, overrides, capsys):
    kept = [o for o in overrides if not o.startswith(("model.", "training="))]
    directory, lines = ran(kept, "model=tiny", f"training={preset}", "training.max_steps=3", "training.wandb=off")
    assert [line["step"] for line in lines] == [1, 2, 3]
    summary = json.loads((directory / "summary.json").read_text())
    said = capsys.readouterr().err
    if preset in TAUGHT:
        assert "made on the spot in 3 steps" in said
        assert "stand-in" in summary["teacher"]
        assert (directory / "teacher" / "model.safetensors").is_file()
        assert "stand-in" in json.loads((directory / "model" / "provenance.json").read_text())["source"]
    else:
        assert summary["teacher"] is None
        assert not (directory / "teacher").exists()
    assert load_model(directory / "model") is not None
    if preset == "stage1_subln":
        assert [line["lambda"] for line in lines] == [0.0] * 3
    if preset == "lrc_calibration":
        assert any("lrc_u" in name for name in weights(directory))


def test_of_conversations_only_the_answers_are_learnt(quick, tmp_path):
    """Users say random words, which nothing can learn, and the assistant always the same; the control reads the same text whole."""
    draw, folder = random.Random(0), tmp_path / "talks"
    folder.mkdir()
    questions = [" ".join(draw.choice(("red", "green", "blue", "black")) for _ in range(12)) for _ in range(300)]
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": "yes it is"}] for q in questions]
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    plain = [f"user: {question}\nassistant: yes it is\n" for question in questions]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in plain))
    kept = [o for o in quick if not o.startswith(("training=", "data=", "data.sources"))]
    kept += ["training=sft", "training.max_steps=60", "training.wandb=off", "training.learning_rate=5e-3"]
    directory, lines = ran(kept, "data=chat", f"data.sources.0.path={folder / 'talks.jsonl'}")
    whole = ["data=jsonl", f"data.sources.0.path={folder / 'texts.jsonl'}", f"output_dir={tmp_path / 'whole'}"]
    _, control = ran(kept, *whole)
    assert lines[-1]["loss"] < 0.3 < 0.8 < control[-1]["loss"]
    assert load_model(directory / "model") is not None


def test_four_steps_are_enough_for_three_phases(quick, capsys):
    """By its share alone the second would have none of them."""
    kept = [o for o in quick if not o.startswith("training=")]
    _, lines = ran(kept, "training=stage1_9_layerwise", "training.max_steps=4", "training.wandb=off", "teacher.made_steps=1")
    weight = {name: [line.get(f"objective_weight/{name}", 0.0) for line in lines] for name in ("forced", "free", "ce")}
    assert weight["forced"][0] == 1 > weight["forced"][1] > 0 == weight["forced"][2] == weight["forced"][3]
    assert weight["free"][0] == 0 < weight["free"][1] < weight["free"][2]
    assert weight["ce"][1] == 0 < weight["ce"][3]
    assert "at least one of so few steps: 1, 1, 2" in capsys.readouterr().err


def test_the_default_objective_alone_logs_what_it_always_did(quick):
    _, lines = ran(quick)
    assert not any(key.startswith("objective") for key in lines[0])


def test_losses_and_gradient_norms_are_logged_by_name(quick, tmp_path):
    _, lines = ran(quick, ALL_THREE, "training.gradient_norms_every=4")
    for line in lines:
        total = sum(line[f"objective/{n}"] * line[f"objective_weight/{n}"] for n in ("ce", "logits", "relations"))
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert line["objective/relations"] == pytest.approx(sum(line[f"objective/relations/{x}"] for x in "qkv"), rel=1e-5)
    assert ["objective_gradient/logits" in line for line in lines] == [True, False, False, False, True, False]
    # Measuring changes no result where no weight is auto.
    a, _ = ran(quick, BOTH, f"output_dir={tmp_path / 'measured'}", "training.gradient_norms_every=2")
    b, _ = ran(quick, BOTH, f"output_dir={tmp_path / 'not'}")
    assert same(weights(a), weights(b))


@pytest.mark.parametrize(
    ("values", "weight"),
    [
        ("ce: {weight: 1.0}", 1.0),
        ("logits: {weight: 3.0, temperature: 2.0}", 3.0),
        ("relations: {weight: 0.5, layer: 0, heads: 4}", 0.5),
    ],
)
def test_a_logged_gradient_norm_is_that_which_the_optimiser_meets(quick, values, weight):
    """With one objective alone, what clipping measures after the step's backward pass is the weight times its norm."""
    _, lines = ran(quick, f"objectives={{{values}}}", "training.gradient_norms_every=1", "training.micro_batch_rows=1")
    name = values.partition(":")[0]
    assert len(lines) == 6
    for line in lines:
        assert weight * line[f"objective_gradient/{name}"] == pytest.approx(line["grad_norm"], rel=1e-3)
    assert len({line["grad_norm"] for line in lines}) == 6


@pytest.mark.parametrize("ce", [1.0, 2.5])
def test_an_auto_weight_gives_a_gradient_the_norm_of_the_weighted_cross_entropys(quick, ce):
    _, lines = ran(quick, ALL_THREE.replace("ce: {}", f"ce: {{weight: {ce}}}"), "training.gradient_norms_every=3")
    for line in (lines[0], lines[3]):
        weighted = line["objective_weight/relations"] * line["objective_gradient/relations"]
        assert weighted == pytest.approx(ce * line["objective_gradient/ce"], rel=1e-4)
    assert (
        lines[1]["objective_weight/relations"] == lines[0]["objective_weight/relations"] != lines[3]["objective_weight/relations"]
    )


def test_a_weight_of_nothing_loads_no_teacher_and_changes_no_bit(quick, tmp_path, monkeypatch):
    plain, _ = ran(quick)
    monkeypatch.setattr(run, "load_teacher", lambda *args: pytest.fail("a teacher was loaded"))
    zero = "objectives={ce: {weight: 1.0}, logits: {weight: 0.0, temperature: 2.0}}"
    silent, _ = ran(quick, zero, f"output_dir={tmp_path / 'zero'}")
    phases = "curriculum.phases=[{until: 1.0, objectives: {logits: 0.0}}]"
    never, _ = ran(quick, BOTH, phases, f"output_dir={tmp_path / 'never'}")
    assert same(weights(plain), weights(silent))
    assert same(weights(plain), weights(never))


def test_micro_batches_change_no_objective(quick, tmp_path):
    _, whole = ran(quick, ALL_THREE)
    _, parts = ran(quick, ALL_THREE, "training.micro_batch_rows=1", f"output_dir={tmp_path / 'parts'}")
    for name in ("ce", "logits", "relations"):
        assert [line[f"objective/{name}"] for line in parts] == pytest.approx(
            [line[f"objective/{name}"] for line in whole], rel=2e-3
        )


def test_activation_checkpointing_computes_blocks_twice_and_changes_no_bit(quick, tmp_path, monkeypatch):
    calls, forward = [], BitNetMLP.forward

    def counted(module, x):
        calls.append(module.training)
        return forward(module, x)

    monkeypatch.setattr(BitNetMLP, "forward", counted)
    settings = [*quick, ALL_THREE.replace("auto", "3.0")]
    plain, before = ran(settings)
    once = sum(calls)
    calls.clear()
    saving, after = ran(settings, "training.activation_checkpointing=true", f"output_dir={tmp_path / 'saving'}")
    assert sum(calls) == 2 * once > 0
    assert same(weights(plain), weights(saving))
    assert [line["loss"] for line in before] == [line["loss"] for line in after]


@pytest.mark.parametrize("at", [2, 4])
def test_a_run_continues_in_the_middle_of_a_phase_to_the_same_bits(quick, tmp_path, at):
    phases = (
        "curriculum.phases=[{until: 0.2, objectives: {logits: 0.0}, lambda_value: 0.0}, "
        "{until: 0.9, interpolation: cosine, objectives: {logits: 1.0}, learning_rate: 0.5, lambda_value: 1.0, "
        "data: {salad: 0.8, count: 0.2}}]"
    )
    settings = [*quick, ALL_THREE, phases, "training.gradient_norms_every=3", "training.checkpoint_every=2"]
    whole, lines = ran(settings, "training.keep_checkpoints=9")
    strengths = [line["lambda"] for line in lines]
    assert strengths[:2] == [0.0, 0.0]
    assert strengths[2:] == sorted(set(strengths[2:]))
    assert 0 < strengths[2] < strengths[-1] < 1
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken, ignore=shutil.ignore_patterns("summary.json", "step-6.ckpt"))
    shutil.rmtree(broken / "model")
    for path in (broken / "checkpoints").glob("step-*.ckpt"):
        if int(path.stem.partition("-")[2]) > at:
            path.unlink()
    _, again = ran(settings, "training.keep_checkpoints=9", f"output_dir={broken}")
    assert [{k: v for k, v in x.items() if k != "tokens_per_s"} for x in again] == [
        {k: v for k, v in x.items() if k != "tokens_per_s"} for x in lines
    ]
    assert same(weights(whole), weights(broken))


def test_shares_of_sources_follow_their_phase(quick):
    phases = "curriculum.phases=[{until: 0.5, learning_rate: 1.0}, {until: 1.0, data: {salad: 0.95, count: 0.05}}]"
    _, lines = ran(quick, phases, "training.max_steps=12")
    first = lines[5]["tokens/salad"] / (lines[5]["tokens/salad"] + lines[5]["tokens/count"])
    gained = {name: lines[11][f"tokens/{name}"] - lines[5][f"tokens/{name}"] for name in ("salad", "count")}
    assert first == pytest.approx(0.5, abs=0.1)
    assert gained["salad"] / sum(gained.values()) > 0.85


@pytest.fixture
def pretrained(tmp_path):
    directory = tmp_path / "llama"
    save_master(tiny_llama(hidden=64, ffn=128), directory, tiny_tokenizer())
    return directory


def from_directory(quick, directory, *more):
    return [*(o for o in quick if not o.startswith("model.")), "model=smollm2_135m", f"model.pretrained={directory}", *more]


def test_the_original_teaches_and_another_model_teaches_something_else(quick, pretrained, tmp_path):
    """The control: with shuffled teachers the student goes elsewhere, and its distance from the original falls less."""
    other = tmp_path / "other"
    save_master(tiny_llama(hidden=64, ffn=128, seed=5), other, tiny_tokenizer())
    settings = from_directory(quick, pretrained, "training.max_steps=30", "objectives={logits: {weight: 1.0}}")
    settings.append("training.learning_rate=3e-3")
    mine, lines = ran(settings)
    wrong, away = ran(settings, f"teacher.model={other}", f"output_dir={tmp_path / 'wrong'}")
    assert lines[-1]["objective/logits"] < 0.8 * max(line["objective/logits"] for line in lines)
    assert not same(weights(mine), weights(wrong))
    assert away[-1]["objective/logits"] > 2 * lines[-1]["objective/logits"]
    assert str(other) in json.loads((wrong / "summary.json").read_text())["teacher"]


def test_gains_alone_are_trained_and_the_model_is_ternary_afterwards(quick, pretrained):
    settings = from_directory(quick, pretrained, "training=stage1_subln", "training.max_steps=4", "training.wandb=off")
    directory, lines = ran([o for o in settings if o != "training=smoke"])
    before = load_file(pretrained / "model.safetensors")
    after = weights(directory)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Softened SubLN moves some scale of a norm into v_proj and up_proj at conversion.
    assert all("norm" in name or "v_proj" in name or "up_proj" in name for name in changed)
    assert any("sub_norm" in name for name in after)
    assert [line["lambda"] for line in lines] == [0.0] * 4
    assert all(float(layer.quant_lambda) == 1.0 for _, layer in bitlinear_layers(load_model(directory / "model")))


def test_of_a_correction_the_adapters_alone_are_trained(quick, pretrained, tmp_path):
    settings = [o for o in from_directory(quick, pretrained, "training=lrc_calibration") if o != "training=smoke"]
    settings += ["model.lrc.rank=4", "model.lrc.calibration_rows=2", "training.wandb=off"]
    less, _ = ran(settings, "training.max_steps=2", "training.learning_rate=1e-12", f"output_dir={tmp_path / 'less'}")
    more, lines = ran(settings, "training.max_steps=20", "training.learning_rate=3e-3", f"output_dir={tmp_path / 'more'}")
    a, b = weights(less), weights(more)
    assert {name.rsplit(".", 1)[-1] for name in a if not torch.equal(a[name], b[name])} == {"lrc_u", "lrc_v"}
    assert lines[-1]["objective/logits"] < lines[0]["objective/logits"]
    started = ["model.lrc.start=random", "model.lrc.calibration_rows=null"]
    random, first = ran(settings, *started, "training.max_steps=2", f"output_dir={tmp_path / 'random'}")
    assert first[0]["objective/logits"] > lines[0]["objective/logits"]  # solving first helps
    assert not same(weights(random), weights(less))


RISING = ["training.lambda_schedule=linear", "training.lambda_warmup_share=0.5", "training.relative_learning_rate=false"]


@pytest.mark.parametrize("every", [0, 4])
def test_rounding_noise_measures_no_auto_weight(quick, pretrained, every):
    """Without norms and at lambda 0 the student is its teacher: what is left of a gradient says nothing of its size."""
    settings = [*RISING, "model.norm=none", "training.max_steps=6", f"training.gradient_norms_every={every}"]
    _, lines = ran(from_directory(quick, pretrained, ALL_THREE, *settings))
    first, second = lines[:2]
    assert first["lambda"] == 0 < second["lambda"]
    assert first["objective_gradient/relations"] < 1e-6 * first["objective_gradient/ce"]
    assert "objective_weight/relations" not in first
    weighted = second["objective_weight/relations"] * second["objective_gradient/relations"]
    assert weighted == pytest.approx(second["objective_gradient/ce"], rel=1e-4)
    assert lines[2]["objective_weight/relations"] == second["objective_weight/relations"] < 1e5
    assert max(line["grad_norm"] for line in lines) < 10 * first["grad_norm"]


def test_an_auto_weight_is_measured_at_once_where_the_student_differs(quick, pretrained):
    """The control: norms that were put in move the relations already at lambda 0."""
    _, lines = ran(from_directory(quick, pretrained, ALL_THREE, *RISING, "model.norm=subln", "training.max_steps=2"))
    assert lines[0]["lambda"] == 0
    weighted = lines[0]["objective_weight/relations"] * lines[0]["objective_gradient/relations"]
    assert weighted == pytest.approx(lines[0]["objective_gradient/ce"], rel=1e-4)
    assert "objective_gradient/relations" not in lines[1]


def test_what_cannot_be_measured_yet_counts_where_nothing_else_does(quick, pretrained):
    phases = "curriculum.phases=[{until: 0.5, objectives: {ce: 0.0}}, {until: 1.0, objectives: {ce: 1.0}}]"
    values = "objectives={ce: {weight: 2.0}, relations: {weight: auto, layer: -1, heads: 4}}"
    _, lines = ran(from_directory(quick, pretrained, values, phases, *RISING, "model.norm=none", "training.max_steps=4"))
    assert lines[0]["objective_weight/relations"] == 2.0
    assert lines[1]["objective_weight/relations"] > 2.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["objectives={logits: {}, ce: {}}", "teacher.model=nowhere"], "nowhere is neither a directory nor a hub id"),
        (["teacher.model=somewhere"], "none of the objectives compares with a teacher"),
        (["teacher.dtype=bfloat16"], "teacher.dtype has no effect: none of the objectives"),
        (["teacher.device=cpu"], "teacher.device has no effect: none of the objectives"),
        (["teacher.offload=true"], "teacher.offload has no effect: none of the objectives"),
        (["teacher.compiled=true"], "teacher.compiled has no effect: none of the objectives"),
        (["teacher.cache_dir=x"], "teacher.cache_dir has no effect: none of the objectives"),
        (["teacher.made_steps=3"], "teacher.made_steps has no effect where no model is made on the spot"),
        (
            ["model=smollm2_135m", "objectives={logits: {}}", "teacher.made_steps=3"],
            "teacher.made_steps has no effect where no model",
        ),
        (["objectives={a/b: {kind: ce}}"], "objectives.a/b must have a name without '/'"),
        (
            [ALL_THREE, "curriculum.phases=[{until: 1.0, objectives: {ce: 0.0}}]"],
            "objectives.relations.weight=auto matches its gradient to that of the cross-entropy, whose factor the curriculum never",
        ),
        (
            ["model.lrc={rank: 0.1, start: random, calibration_rows: 4}"],
            "model.lrc.calibration_rows has no effect with start=random",
        ),
        (["objectives={relations: {layer: 7, heads: 4}}"], "layer=7 is out of range"),
        (["objectives={relations: {layer: 0, heads: 4}}", "teacher.compiled=true"], "teacher.compiled serves distributions alone"),
        (["objectives={logits: {}}", "teacher.offload=true"], "teacher.offload has no effect on a CPU"),
        (["objectives={logits: {}}", "teacher.device=gpu7"], "is no device of this machine"),
        (["objectives={logits: {}}", "mixture=odm", "training.max_steps=20"], "give objectives.ce a weight"),
        (["model.lrc={rank: 0.1}", "training.trainable=gains"], "training.trainable has no effect with model.lrc"),
        (["model.lrc={rank: 0.1}", "model.norm=subln"], "model.norm has no effect with model.lrc"),
        (["model.lrc={rank: 0}"], "model.lrc.rank must be a whole number of at least 1"),
        (["model.lrc={rank: true}"], "model.lrc.rank must be a number, not true"),
        (["model.lrc={rank: 4, alternations: 0}"], "model.lrc.alternations must be positive, not 0"),
        (["model.lrc={rank: 9999}"], "a rank of 9999 is above what"),
    ],
    ids=str,
)
def test_mistakes_end_in_one_sentence_before_the_first_step(quick, more, message, capsys):
    kept = [o for o in quick if not o.startswith("model.")] if "model=smollm2_135m" in more else quick
    assert main([*kept, *more]) == 2
    captured = capsys.readouterr()
    assert message in captured.err.splitlines()[-1]
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert not (directory_of(quick) / "metrics.jsonl").exists()


def test_a_teacher_that_reads_other_tokens_is_refused(quick, pretrained, tmp_path, capsys):
    other = tmp_path / "other"
    save_master(tiny_llama(hidden=64, ffn=128, vocab=640), other, tiny_tokenizer(640))
    assert main([*from_directory(quick, pretrained), BOTH, f"teacher.model={other}"]) == 2
    assert "has another tokenizer than the model (it has 640 tokens, the model's 512)" in capsys.readouterr().err


def test_a_model_that_was_always_ternary_has_no_original_to_learn_from(quick, tmp_path, capsys):
    directory = tmp_path / "ternary"
    save_master(tiny_bitnet(hidden=64, ffn=128), directory, tiny_tokenizer())
    settings = [o for o in from_directory(quick, directory) if not o.startswith("model=")]
    assert main([*settings, "model=bitnet_2b", f"model.pretrained={directory}", BOTH]) == 2
    assert "name one as teacher.model=DIR" in capsys.readouterr().err


def test_a_ternary_model_is_not_corrected(quick, tmp_path, capsys):
    directory = tmp_path / "ternary"
    save_master(tiny_bitnet(hidden=64, ffn=128), directory, tiny_tokenizer())
    settings = [o for o in from_directory(quick, directory) if not o.startswith("model=")]
    assert main([*settings, "model=bitnet_2b", f"model.pretrained={directory}", "model.lrc={rank: 4}"]) == 2
    assert "model.lrc corrects a float model" in capsys.readouterr().err


def test_a_model_made_on_the_spot_is_made_again_for_other_settings_and_only_then(quick, corpus, tmp_path, monkeypatch):
    made, train = [], models.train_float
    monkeypatch.setattr(models, "train_float", lambda *args, **options: made.append(options["steps"]) or train(*args, **options))
    folder = tmp_path / "corpus"
    shutil.copytree(corpus, folder)
    settings = [option.replace(f"{corpus}/", f"{folder}/") for option in quick] + [
        "objectives={logits: {}}",
        "teacher.made_steps=2",
    ]
    for more in ([], [], ["training.learning_rate=1e-3"]):
        build_start(load_run_config([*settings, *more]))
        assert made == [2]
    for more in (["teacher.made_steps=3"], ["training.seed=1"], ["model.shape.num_hidden_layers=3"], ["data.sequence_length=48"]):
        before = len(made)
        build_start(load_run_config([*settings, *more]))
        assert len(made) == before + 1
    build_start(load_run_config(settings))
    before = len(made)
    (folder / "count-00.txt").write_text("another text of the same name, in which nothing is counted at all")
    build_start(load_run_config(settings))
    assert len(made) == before + 1


def test_another_process_waits_for_the_model_and_makes_none(quick, monkeypatch):
    """The others wait until the first has made it; here it is made while one of them sleeps."""
    config = load_run_config([*quick, "objectives={logits: {}}", "teacher.made_steps=2"])
    made, slept, make = [], [], models._make
    monkeypatch.setattr(models, "_make", lambda *args: made.append(1) or make(*args))
    note = "by the first"
    monkeypatch.setattr(
        models.time, "sleep", lambda s: slept.append(s) or make(config, None, Path(config.output_dir) / "teacher", note)
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    start = build_start(config)
    assert (made, len(slept)) == ([], 1)
    assert start.original == Path(config.output_dir) / "teacher"


def test_a_layer_that_is_not_there_is_refused_before_a_model_is_made(quick, monkeypatch, capsys):
    monkeypatch.setattr(models, "train_float", lambda *args, **options: pytest.fail("a model was made"))
    assert main([*quick, "objectives={relations: {layer: 7, heads: 4}}"]) == 2
    assert "layer=7 is out of range" in capsys.readouterr().err


def test_random_adapters_are_of_the_runs_seed_and_of_nothing_else(quick, pretrained):
    settings = from_directory(quick, pretrained, "model.lrc={rank: 4, start: random}", "objectives={logits: {}}")

    def adapter(seed):
        return build_start(load_run_config([*settings, f"training.seed={seed}"])).model.model.layers[0].mlp.up_proj.lrc_v

    before, state = adapter(0), torch.random.get_rng_state()
    torch.rand(7)
    assert torch.equal(before, adapter(0))
    assert not torch.equal(before, adapter(1))
    torch.random.set_rng_state(state)
    follows = torch.rand(3)
    torch.random.set_rng_state(state)
    adapter(0)
    assert torch.equal(follows, torch.rand(3))


def test_a_rank_above_a_matrix_is_refused_before_a_model_is_made(quick, monkeypatch, capsys):
    monkeypatch.setattr(models, "train_float", lambda *args, **options: pytest.fail("a model was made"))
    assert main([*quick, "model.lrc={rank: 33}"]) == 2
    assert "a rank of 33 is above what model.layers.0.self_attn.k_proj can have, a matrix of 32 x 64" in capsys.readouterr().err
    assert main([*quick, "model.lrc={rank: 1.5}"]) == 2
    assert "a share between 0 and 1, not 1.5" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("values", [ALL_THREE, "objectives={layerwise: {}}"], ids=["all", "no logits"])
def test_two_processes_take_the_same_steps(quick, tmp_path, values):
    """Also where the head and the last norm get no gradient."""
    _, one = ran(quick, values, "training.gradient_norms_every=3", f"output_dir={tmp_path / 'one'}")
    ddp = ["distributed=ddp", "distributed.accelerator=cpu", f"output_dir={tmp_path / 'two'}"]
    command = [sys.executable, "-m", "wrinklefree", *quick, values, "training.gradient_norms_every=3", *ddp]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    two = read_metrics(tmp_path / "two" / "metrics.jsonl")
    for key in (key for key in one[0] if key.startswith(("objective/", "loss"))):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=5e-3)
