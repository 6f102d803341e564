import atexit
import gc
import sys

import pytest
from bitnet_arch import UserError
from wrinklefree.cli import compose_values, configs_directory, group_choices, load_run_config, main
from wrinklefree.config import ModelConfig, RunConfig, TrainingConfig, from_mapping


@pytest.mark.parametrize("choice", [f"{group}={name}" for group, names in group_choices().items() for name in names])
def test_every_yaml_composes_into_a_valid_run(choice):
    overrides = [choice] if "ddp" not in choice else [choice, "training.rows_per_step=4"]
    assert isinstance(load_run_config(overrides), RunConfig)


def test_the_groups_of_the_readme_exist():
    groups = group_choices()
    assert {"tiny", "smollm2_135m", "qwen3_0.6b", "qwen2_0.5b", "llama_1b", "bitnet_2b"} <= set(groups["model"])
    assert {"base", "smoke"} <= set(groups["training"])
    assert "demo" in groups["data"]
    assert configs_directory("wrinklefree").is_dir()


def test_the_command_line_wins_over_what_a_model_recommends():
    recommended = compose_values(["model=smollm2_135m"])["training"]
    chosen = compose_values(["model=smollm2_135m", "training.learning_rate=0.5"])["training"]
    assert (recommended["learning_rate"], chosen["learning_rate"]) == (2e-4, 0.5)
    assert compose_values([])["training"]["learning_rate"] != 2e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.max_stepz=3"], r"unknown key training\.max_stepz: did you mean max_steps\?"),
        (["data.sequence_lenght=3"], r"unknown key data\.sequence_lenght: did you mean sequence_length\?"),
        (["model=gpt5"], "Could not find 'model/gpt5': choose one of .*smollm2_135m"),
        (["training.learning_rate=inf"], "learning_rate must be positive, not inf"),
        (["training.max_steps=many"], r"training\.max_steps: .*'many' was given"),
        (["training.eval_share=0"], r"training\.eval_share must be positive or null, not 0"),
        (["training.eval_share=inf"], r"training\.eval_share must be positive or null, not inf"),
        (["training.eval_share=nan"], r"training\.eval_share must be positive or null, not nan"),
        (["training.max_steps=0"], r"training\.max_steps must be positive, not 0"),
        (["training.schedule=zigzag"], "must be one of constant, cosine"),
        (["training.rows_per_step=3", "distributed=ddp"], "multiple of the 2 processes"),
        (["distributed.devices=2"], "needs distributed=ddp"),
        (["training.lambda_schedule=linear"], "has no effect"),
        (["training.lambda_warmup_share=0.5"], "has no effect"),
        (["training.compare_fp=false", "training.learning_rate_fp=1e-3"], "no effect without compare_fp"),
        (["model.gain=calibrated"], "nothing to calibrate"),
        (["model.softness=0.2"], "softness has no effect"),
        (["model=smollm2_135m", "model.gain=one", "model.softness=0.2"], "softness has no effect"),
        (["model=smollm2_135m", "model.norm=none", "model.softness=0.2"], "softness has no effect with model.norm=none"),
        (["model.norm=none", "model.gain=one"], "gain has no effect with model.norm=none"),
        (["model.shape.num_attention_heads=256"], "rotary positions need an even number"),
        (["training.seed=9223372036854775808"], r"below 2\*\*63"),
        (["sample_prompt="], "sample_prompt is empty"),
        (["~model"], "model is missing"),
        (["model=null"], "must be a string or a list"),
        (["training=null"], "must be a string or a list"),
        (["data=null"], "must be a string or a list"),
        (["model.pretrained=x/y"], "exactly one of"),
        (["training.max_steps"], "max_steps"),
        (["outputdir=x"], r"unknown key outputdir: did you mean output_dir\?"),
        (["data=demo", "data.sources.0.weight=0"], "weight must be a number above 0"),
        (["data=text", "data.sources.0.path="], "path must be"),
    ],
)
def test_a_mistake_ends_in_one_sentence_and_exit_code_2(overrides, message, capsys):
    with pytest.raises(UserError, match=message):
        load_run_config(overrides)
    assert main(overrides) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_help_and_cfg_show_what_can_be_set(capsys):
    assert main(["--help"]) == 0
    assert "smollm2_135m" in capsys.readouterr().out
    assert main(["--cfg", "training.max_steps=7"]) == 0
    assert "max_steps: 7" in capsys.readouterr().out
    assert main(["--max-steps", "7"]) == 2


def test_a_process_that_ends_with_the_command_leaves_out_its_last_collection_and_a_call_does_not(monkeypatch):
    at_exit = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    monkeypatch.setattr(sys, "argv", ["train_lightning.py", "--help"])
    assert main(["--help"]) == 0
    assert at_exit == []
    assert main() == 0
    assert at_exit == [gc.freeze]


def test_shares_of_the_run_become_steps():
    training = from_mapping(TrainingConfig, {"max_steps": 40, "rows_per_step": 2, "learning_rate": 1e-3, "warmup_share": 0.25})
    assert (training.warmup_steps, training.lambda_warmup_steps) == (10, 0)


@pytest.mark.parametrize("preset", group_choices()["training"])
def test_a_run_of_a_few_steps_is_not_mostly_evaluation(preset):
    """Every preset names the bound; a whole run of any but `smoke` stays below it, and looks at everything."""
    chosen = [f"training={preset}"]
    whole, short = load_run_config(chosen), load_run_config([*chosen, "training.max_steps=3"])
    assert (whole.heldout_data == whole.data) == (preset != "smoke")
    assert short.heldout_data.heldout_tokens == short.tokens == 3 * short.training.rows_per_step * 128
    assert load_run_config([*chosen, "training.max_steps=3", "training.eval_share=null"]).heldout_data == short.data
    half = load_run_config([*chosen, "training.max_steps=3", "training.eval_share=0.5"])
    assert half.heldout_data.heldout_tokens == short.tokens // 2


def test_a_model_needs_weights_or_a_shape():
    with pytest.raises(UserError, match="exactly one of"):
        ModelConfig(name="x")


PAPER = {"layer": -6, "heads": 32, "normalisation": "paper"}
OFFICIAL = {"layer": -6, "heads": 32, "normalisation": "official", "causal": False, "per_head": True}
CE = {"ce": {"weight": 1.0}}
CONSTANTS = {
    "base": CE,
    "smoke": CE,
    "stage1_subln": CE,
    "stage1_9_layerwise": CE
    | {
        "forced": {"kind": "layerwise", "distance": "nmse", "mode": "teacher_forced"},
        "free": {"kind": "layerwise", "distance": "nmse"},
        "logits": {"weight": 1.0},
    },
    "stage2_pretrain": CE,
    "stage3_distill": CE
    | {
        "logits": {"weight": 1.0, "temperature": 2.0, "tau_squared": True},
        "relations": {"weight": "auto", "layer": -6, "heads": 32},
    },
    "bitdistill_full": CE | {"logits": {"weight": 10.0, "temperature": 5.0}, "relations": {"weight": 1e5} | PAPER},
    "bitdistill_official": CE
    | {
        "logits": {"weight": 10.0, "temperature": 5.0, "tau_squared": True, "scope": "attended"},
        "relations": {"weight": 1e5} | OFFICIAL,
    },
    "lrc_calibration": {"logits": {"weight": 1.0}},
    "sft": CE,
    "dlm": {"dlm": {"method": "fast_dllm_v2"}},
    "tcs_distill": {"tcs": {"estimator": "topk", "top_k": 4, "window": 4, "hard": 0.5}},
}


def test_every_preset_has_its_constants():
    """Those of BitDistill are published ones (arXiv 2510.13998, and its official code)."""
    assert set(group_choices()["training"]) == set(CONSTANTS)
    for preset, constants in CONSTANTS.items():
        assert load_run_config([f"training={preset}"]).objectives == constants
    full, official = (load_run_config([f"training=bitdistill_{name}"]).objective_settings() for name in ("full", "official"))
    assert (full["relations"].objective.causal, full["relations"].objective.per_head) == (True, False)
    assert (full["logits"].objective.tau_squared, full["logits"].objective.scope) == (False, "scored")
    assert official["logits"].objective.direction == full["logits"].objective.direction == "forward"
    published = ["training.lambda_schedule=constant", "training.lambda_warmup_share=0", "model.norm=allnorm", "model.gain=one"]
    for model, more, rises in (("smollm2_135m", [], True), ("tiny", [], False), ("smollm2_135m", published, False)):
        config = load_run_config([f"model={model}", "training=bitdistill_official", *more])
        assert (config.training.lambda_warmup_steps > 0) == rises
    phases = load_run_config(["training=stage1_9_layerwise"]).curriculum.phases
    assert [(phase.until, phase.interpolation) for phase in phases] == [(0.3, "step"), (0.4, "linear"), (1.0, "linear")]
