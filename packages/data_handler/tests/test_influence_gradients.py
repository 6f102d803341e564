import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bitnet_arch import set_lambda
from bitnet_arch.testing import tiny_bitnet, tiny_llama
from data_handler import UserError
from data_handler.influence import Collection, PerSampleGradients, jvp_embeddings, select_parameters
from data_handler.influence.gradients import math_attention
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

COUNT, LENGTH = 7, 12


@pytest.fixture(scope="module")
def models():
    small = {"hidden": 32, "ffn": 48, "vocab": 64, "layers": 3}
    found = {"llama": tiny_llama(**small), "bitnet": tiny_bitnet(**small), "half-way": tiny_bitnet(**small)}
    set_lambda(found["half-way"], 0.5)
    return found


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 64, (COUNT, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, 0] = -100
    for row in range(COUNT):
        labels[row, LENGTH - row :] = -100  # padded on the right, by another length each
        ids[row, LENGTH - row :] = 0
    return {"input_ids": ids, "labels": labels}


def textbook(model, ids, labels, names):
    """One backward pass an example, without padding: what autograd gives."""
    rows = []
    for row, target in zip(ids, labels, strict=True):
        used = int((target != -100).nonzero().max()) + 1
        model.zero_grad()
        logits = model(input_ids=row[None, :used]).logits[0]
        F.cross_entropy(logits[:-1], target[1:used]).backward()
        rows.append(torch.cat([model.get_parameter(name).grad.flatten() for name in names]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["llama", "bitnet", "half-way"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_are_those_of_one_backward_pass_an_example(models, examples, kind, attention):
    model = copy.deepcopy(models[kind])
    model.set_attn_implementation(attention)
    source = PerSampleGradients(model, layers=["*"])
    found = source.collect(examples)
    expected = textbook(model, examples["input_ids"], examples["labels"], source.names)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-6)
    assert [layer.name for layer in found.layers] == [name for name, _ in model.named_parameters()]
    assert found.layers[-1].stop == sum(p.numel() for p in model.parameters())


SMALL = {"vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
FAMILIES = {
    "qwen2": {**SMALL, "intermediate_size": 48},
    "qwen3": {**SMALL, "intermediate_size": 48, "head_dim": 8},
    "mistral": {**SMALL, "intermediate_size": 48, "sliding_window": None},
    "gemma3_text": {**SMALL, "intermediate_size": 48, "head_dim": 8},
    "gpt2": {"vocab_size": 64, "n_layer": 3, "n_head": 4, "n_embd": 32},
    "gpt_neox": {**SMALL, "intermediate_size": 48},
    "opt": {
        "vocab_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_size": 32,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_of_other_families_have_their_gradients_and_embeddings(family, examples):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **FAMILIES[family], pad_token_id=None, bos_token_id=None, eos_token_id=None)
        model = AutoModelForCausalLM.from_config(config).eval()
    source = PerSampleGradients(model, layers=["*"])
    found = source.collect(examples)
    expected = textbook(model, examples["input_ids"], examples["labels"], source.names)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-5)
    embeddings = jvp_embeddings(source, examples, blocks=2)
    assert embeddings.shape == (COUNT, 64)
    assert torch.isfinite(embeddings).all()
    assert torch.linalg.matrix_rank(embeddings) == COUNT


def test_a_straight_through_gradient_is_not_that_of_the_float_model(models, examples):
    ternary = models["bitnet"]
    smooth = copy.deepcopy(ternary)
    set_lambda(smooth, 0.0)
    pair = [PerSampleGradients(model, layers=["last:1"]).collect(examples).values for model in (ternary, smooth)]
    cosines = F.cosine_similarity(*pair)
    assert cosines.max() < 0.99
    assert all(found.abs().sum(1).min() > 0 for found in pair)


def test_what_attention_may_not_see_changes_nothing(models, examples):
    changed = {"input_ids": examples["input_ids"].clone(), "labels": examples["labels"]}
    changed["input_ids"][3, LENGTH - 3 :] = 9  # padding
    pair = [PerSampleGradients(models["llama"], layers=["last:1"]).collect(e).values for e in (examples, changed)]
    assert torch.equal(*pair)
    changed["input_ids"][3, 2] = 9
    third = PerSampleGradients(models["llama"], layers=["last:1"]).collect(changed).values
    moved = (third - pair[0]).abs().amax(1) > 0
    assert moved.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("projection", ["none", "hadamard", "rademacher"])
def test_chunks_and_spilling_change_nothing(models, examples, tmp_path, projection, monkeypatch):
    source = PerSampleGradients(models["bitnet"], layers=["last:2"])
    options = {"projection": projection, "projection_dimension": 101, "per_layer": projection == "rademacher"}
    whole = source.collect(examples, Collection(**options)).values
    sizes = []
    chunk = source._parts
    monkeypatch.setattr(source, "_parts", lambda e, step: (sizes.append(step), chunk(e, min(step, 2)))[1])
    file = tmp_path / "deep" / "g.npy"
    spilled = source.collect(examples, Collection(**options, spill=file))
    torch.testing.assert_close(spilled.values, whole, rtol=1e-4, atol=1e-6)
    assert sizes[0] > COUNT
    assert np.array_equal(np.load(file), spilled.values.numpy())
    assert [path.name for path in file.parent.iterdir()] == ["g.npy"]


def test_the_memory_bound_decides_how_many_examples_go_at_once(models, examples):
    source = PerSampleGradients(models["llama"])
    many, few = (source._chunk(examples, mib, 2 * sum(source.sizes)) for mib in (64, 2))
    assert many > 10 * few >= 10
    assert source._chunk(examples, 64, 20 * sum(source.sizes)) < many
    with pytest.raises(UserError, match=r"one example needs \d+ MiB and memory_mib is 2: raise it"):
        source._chunk(examples, 2, 10**6)


PEAK = """
import sys, torch
from pathlib import Path
from data_handler.influence import Collection, PerSampleGradients
model = torch.nn.Sequential(torch.nn.Linear(1000, 1000))
examples = {"x": torch.randn(200, 4, 1000)}
source = PerSampleGradients(model, lambda forward, example: forward(example["x"]).square().mean())
source.collect({"x": examples["x"][:1]}, Collection(projection=sys.argv[2], projection_dimension=64))
status = lambda key: next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before = status("VmRSS")
source.collect(examples, Collection(projection=sys.argv[2], projection_dimension=64, memory_mib=int(sys.argv[1])))
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
@pytest.mark.parametrize("projection", ["hadamard", "rademacher"])
def test_the_process_stays_under_the_memory_bound(projection):
    """Peak resident memory, measured: 200 gradients of a million numbers would be 763 MiB.

    A processor's libraries keep buffers of their own (0 to 20 MiB seen), which no option bounds: 40 MiB are left to them.
    """
    peaks = []
    for bound in (100, 400):
        done = subprocess.run([sys.executable, "-c", PEAK, str(bound), projection], capture_output=True, text=True, check=True)
        peaks.append(float(done.stdout))
    assert peaks[0] < 140
    assert 140 < peaks[1] < 440


def test_a_failure_leaves_no_file(models, examples, tmp_path):
    source = PerSampleGradients(models["llama"], layers=["last:1"])
    with pytest.raises(UserError, match="not finite"):
        source.collect(examples, Collection(spill=tmp_path / "g.npy"), transform=lambda g: g.mul_(torch.inf))
    broken = copy.deepcopy(models["llama"])
    broken.lm_head.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        PerSampleGradients(broken, layers=["last:1"]).collect(examples, Collection(spill=tmp_path / "g.npy"))
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_as_it_is(models, examples):
    model = models["bitnet"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = None
    PerSampleGradients(model, layers=["last:1"]).collect(examples)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_checkpoint_stands_in_for_the_weights(models, examples):
    model, other = models["llama"], tiny_llama(hidden=32, ffn=48, vocab=64, layers=3, seed=5)
    stands_in = PerSampleGradients(model, layers=["last:1"], parameters=dict(other.named_parameters())).collect(examples)
    itself = PerSampleGradients(other, layers=["last:1"]).collect(examples)
    torch.testing.assert_close(stands_in.values, itself.values)
    with pytest.raises(UserError, match="does not fit the model"):
        PerSampleGradients(model, parameters={"lm_head.weight": torch.zeros(2, 2)})


def test_losses_are_the_models(models, examples):
    found = PerSampleGradients(models["bitnet"]).losses(examples)
    with torch.no_grad():
        logits = models["bitnet"](input_ids=examples["input_ids"]).logits
    for row in range(COUNT):
        expected = F.cross_entropy(logits[row, :-1], examples["labels"][row, 1:])
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-5)


def test_layers_are_chosen_by_pattern(models):
    names = list(select_parameters(models["llama"], ["last:1", "model.norm.*"]))
    assert names[-1] == "model.norm.weight"
    assert all(name.startswith("model.layers.2.") for name in names[:-1])
    assert len(names) == 10
    assert list(select_parameters(models["llama"], ["*.down_proj.*"])) == [
        f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)
    ]
    for pattern, message in [("*.nothing", "no parameter is named like"), ("last:4", "from 1 to the model's 3 blocks")]:
        with pytest.raises(UserError, match=message):
            select_parameters(models["llama"], [pattern])
    with pytest.raises(UserError, match="no stack of blocks"):
        select_parameters(nn.Linear(2, 2), ["last:1"])


@pytest.mark.parametrize("kind", ["llama", "bitnet"])
def test_forward_mode_agrees_with_reverse_mode(models, examples, kind):
    """The derivative along a direction, by `jvp` and as an inner product with the gradient: the straight-through one, too."""
    source = PerSampleGradients(models[kind], layers=["last:2"])
    rows = source.collect(examples).values
    direction = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        for i, (name, p) in enumerate(source.selected.items())
    }
    flat = torch.cat([direction[name].flatten() for name in source.names])
    with math_attention(), torch.no_grad():
        for row in range(3):
            one = {name: value[row] for name, value in examples.items()}
            _, along = jvp(lambda p, one=one: source.loss(p, one), (source.selected,), (direction,))
            assert float(along) == pytest.approx(float(rows[row] @ flat), rel=1e-3, abs=1e-5)


def test_embeddings_are_the_derivative_of_the_hidden_state(models, examples):
    model = models["llama"]
    source = PerSampleGradients(model, layers=["last:1"])
    found = jvp_embeddings(source, examples, blocks=2, tangents=1, seed=3)
    assert found.shape == (COUNT, 32)
    prefixes = ("model.layers.0.", "model.layers.1.")
    moved = {name: p.detach().double() for name, p in model.named_parameters() if name.startswith(prefixes)}
    generator = torch.Generator().manual_seed(3)
    directions = {name: torch.randn(p.shape, generator=generator).double() for name, p in moved.items()}
    double = copy.deepcopy(model).double().requires_grad_(False)

    def hidden(step):
        shifted = {name: p + step * directions[name] for name, p in moved.items()}
        return functional_call(
            double, shifted, kwargs={"input_ids": examples["input_ids"], "output_hidden_states": True}
        ).hidden_states[2]

    slope = (hidden(1e-6) - hidden(-1e-6)) / 2e-6
    for row in range(COUNT):
        last = int((examples["labels"][row] != -100).nonzero().max()) - 1
        torch.testing.assert_close(found[row].double(), slope[row, last], rtol=2e-3, atol=2e-3 * float(slope.abs().max()))
    assert not model.model.layers[1]._forward_hooks
    one_by_one = torch.cat(
        [jvp_embeddings(source, {k: v[i : i + 1] for k, v in examples.items()}, blocks=2, tangents=1, seed=3) for i in range(3)]
    )
    torch.testing.assert_close(one_by_one, found[:3], rtol=1e-4, atol=1e-4)
