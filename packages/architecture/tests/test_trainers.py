"""Converted models train under other people's trainers: transformers' `Trainer`, TRL's `SFTTrainer`, PEFT, an adapter by hand."""

import copy

import peft
import pytest
import torch
from bitnet_arch import (
    BitLinear,
    ConversionConfig,
    PackedBitLinear,
    UserError,
    bitlinear_layers,
    convert_model,
    get_lambda,
    lambda_schedule,
    load_model,
    open_weights,
    quantize_weight,
    save_master,
    save_packed,
    set_lambda,
)
from bitnet_arch.testing import TEXT, tiny_llama, tiny_tokenizer
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
IDS = torch.tensor(tiny_tokenizer(300)(TEXT).input_ids)
ROWS = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in IDS.unfold(0, 24, 3)]


def make(kind):
    torch.manual_seed(0)
    makers = {"stock": lambda: tiny_llama(hidden=64, ffn=128, vocab=300), "own": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE))}
    return convert_model(makers[kind]().eval(), ConversionConfig(gain="one"))


@torch.no_grad()
def logits(model):
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        return model(input_ids=IDS[None, :24]).logits


class RaiseLambda(TrainerCallback):
    def __init__(self, warmup):
        self.warmup, self.seen = warmup, []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        set_lambda(model, lambda_schedule("linear", state.global_step, self.warmup))
        self.seen.append(get_lambda(model))


def arguments(folder, steps, **more):
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    } | more


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(params=["stock", "own"])
def kind(request):
    return request.param


def test_transformers_trainer_trains_and_saves_what_everyone_loads(kind, tmp_path):
    raise_lambda = RaiseLambda(4)
    model = make(kind)
    before = {name: quantize_weight(layer.weight.detach())[0] for name, layer in bitlinear_layers(model)}
    trainer = Trainer(model, TrainingArguments(**arguments(tmp_path / "run", 14)), train_dataset=ROWS, callbacks=[raise_lambda])
    trainer.train()
    found = losses(trainer)
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    assert raise_lambda.seen == [0.0, 0.25, 0.5, 0.75, *[1.0] * 10]
    assert any((quantize_weight(layer.weight.detach())[0] != before[name]).any() for name, layer in bitlinear_layers(model))
    expected = logits(model)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_model(tmp_path / "saved")
    assert sum(isinstance(layer, BitLinear) for layer in loaded.modules()) == 14
    assert torch.equal(logits(loaded), expected)
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.allclose(logits(auto), expected, atol=1e-5)
    # What is loaded is ternary, not the float weights: those would give other logits.
    set_lambda(loaded, 0.0)
    assert (logits(loaded) - expected).abs().max() > 1e-2
    set_lambda(loaded, 1.0)
    save_packed(loaded, tmp_path / "packed")
    assert (logits(load_model(tmp_path / "packed")) - expected).abs().max() < 2e-2 * expected.abs().max()


def test_lambda_is_kept_by_a_trainer_that_stops_on_the_way(kind, tmp_path):
    settings = TrainingArguments(**arguments(tmp_path / "run", 3))
    trainer = Trainer(make(kind), settings, train_dataset=ROWS, callbacks=[RaiseLambda(4)])
    trainer.train()
    assert get_lambda(trainer.model) == 0.5
    expected = logits(trainer.model)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = load_model(tmp_path / "saved")
    assert get_lambda(loaded) == 0.5
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(UserError, match=r"lambda is 0\.5"):
        save_packed(loaded, tmp_path / "packed")
    with open_weights(tmp_path / "saved") as reader, pytest.raises(UserError, match=r"saved at lambda 0\.5"):
        reader.ternary("model.layers.0.mlp.up_proj.weight")


def test_a_run_goes_on_from_the_trainers_checkpoint(kind, tmp_path):
    whole = Trainer(make(kind), TrainingArguments(**arguments(tmp_path / "a", 6)), train_dataset=ROWS, callbacks=[RaiseLambda(5)])
    whole.train()
    saving = arguments(tmp_path / "b", 6, save_strategy="steps", save_steps=3)
    Trainer(make(kind), TrainingArguments(**saving), train_dataset=ROWS, callbacks=[RaiseLambda(5)]).train()
    again = Trainer(make(kind), TrainingArguments(**saving), train_dataset=ROWS, callbacks=[RaiseLambda(5)])
    again.train(resume_from_checkpoint=str(tmp_path / "b/checkpoint-3"))
    assert get_lambda(again.model) == 1.0
    assert torch.allclose(logits(again.model), logits(whole.model), atol=1e-5)


def test_what_save_master_wrote_trains_on_under_auto_classes(tmp_path):
    """The same run from the same directory: once with our layers, once after `AutoModelForCausalLM` (own form: also ours)."""
    save_master(make("own"), tmp_path / "m")
    found = []
    for model in (load_model(tmp_path / "m"), AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)):
        trainer = Trainer(model, TrainingArguments(**arguments(tmp_path / "run", 4)), train_dataset=ROWS)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_trl_trains_too(kind, tmp_path):
    config = SFTConfig(**arguments(tmp_path / "run", 16), max_length=24, bf16=False)
    data = Dataset.from_dict({"input_ids": [row["input_ids"] for row in ROWS]})
    trainer = SFTTrainer(make(kind), args=config, train_dataset=data, processing_class=tiny_tokenizer(300))
    trainer.train()
    found = losses(trainer)
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    # It is the same training: transformers' own trainer, with the same rows in the same order, has the same losses.
    stock = Trainer(make(kind), TrainingArguments(**arguments(tmp_path / "stock", 16)), train_dataset=ROWS)
    stock.train()
    assert found == pytest.approx(losses(stock), rel=1e-2)
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(trainer.model))


# ----------------------------------------------------------------------------------------------------------- adapters


def test_peft_adapts_ternary_layers_and_leaves_them_as_they_are(kind, tmp_path):
    model = make(kind)
    base = copy.deepcopy(model.state_dict())
    plain = logits(model)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    assert torch.equal(logits(adapted), plain)  # an adapter starts at zero
    trainer = Trainer(adapted, TrainingArguments(**arguments(tmp_path / "run", 25, learning_rate=2e-2)), train_dataset=ROWS)
    trainer.train()
    found = losses(trainer)
    assert sum(found[-3:]) < 0.97 * sum(found[:3])
    expected = logits(adapted)
    assert (expected - plain).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(make(kind), tmp_path / "adapter")
    assert torch.allclose(logits(again), expected, atol=1e-6)
    unloaded = adapted.unload()
    assert all(torch.equal(tensor, base[name]) for name, tensor in unloaded.state_dict().items())
    assert torch.equal(logits(unloaded), plain)
    # Merging is another thing: what an adapter adds to a master weight is rounded to a ternary one with it.
    merged = again.merge_and_unload()
    assert (logits(merged) - expected).abs().max() > 1e-2


class Adapter(nn.Module):
    """A low-rank correction beside a frozen layer, `y + B A x`."""

    def __init__(self, layer, rank):
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("form", ["master", "packed"])
def test_an_adapter_by_hand_trains_beside_frozen_layers(form, kind, tmp_path):
    (save_master if form == "master" else save_packed)(make(kind), tmp_path / "m")
    model = load_model(tmp_path / "m")
    plain = logits(model)
    model.requires_grad_(False)
    torch.manual_seed(1)
    names = [name for name, module in model.named_modules() if isinstance(module, BitLinear | PackedBitLinear)]
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name in names:
        model.set_submodule(name, Adapter(model.get_submodule(name), 8))
    assert torch.equal(logits(model), plain)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(names)
    optimizer = torch.optim.AdamW(trained, 2e-2)
    batch = torch.tensor([row["input_ids"] for row in ROWS])
    found = []
    for _ in range(15):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[-1] < 0.96 * found[0]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[name.replace(".layer.", ".")]), name
