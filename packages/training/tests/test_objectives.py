"""Objectives on tiny models: what each changes, its control, and that they share their forward passes."""

import contextlib
import copy

import pytest
import torch
from bitnet_arch import ConversionConfig, UserError, convert_model
from bitnet_arch.diffusion import add_mask_token
from bitnet_arch.testing import tiny_llama, tiny_tokenizer
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen3Config, Qwen3ForCausalLM
from wrinklefree.module import model_logits
from wrinklefree.objectives import Objectives, parse_objectives
from wrinklefree.objectives.layerwise import Layerwise
from wrinklefree.objectives.norms import gradient_norm
from wrinklefree.teachers.base import Shape
from wrinklefree.teachers.local import LocalTeacher
from wrinklefree.views import Needs, forward_views

VOCABULARY, TIME = 64, 12
EVERYTHING = {
    "ce": {},
    "logits": {"temperature": 5.0},
    "relations": {"layer": -2, "heads": 4},
    "layers": {"kind": "layerwise"},
    "forced": {"kind": "layerwise", "mode": "teacher_forced"},
}


def llama(seed=0, **sizes):
    return tiny_llama(**({"hidden": 32, "ffn": 64, "layers": 3, "vocab": VOCABULARY, "seed": seed} | sizes))


def student(seed=0, **sizes):
    return convert_model(llama(seed, **sizes), ConversionConfig(gain="one"))


def batch(seed=0, rows=3):
    """Two documents and padding in every row, of lengths that differ from row to row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, TIME), generator=generator)
    documents, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    for row in range(rows):
        documents[row, : 5 + row], documents[row, 5 + row : TIME - row] = 1, 2
        positions[row, : 5 + row] = torch.arange(5 + row)
        positions[row, 5 + row : TIME - row] = torch.arange(TIME - 5 - 2 * row)
    labels = torch.where((documents == 0) | (positions == 0), -100, ids)
    return {"input_ids": ids, "labels": labels, "document_ids": documents, "position_ids": positions}


def build(values, model, teacher=None):
    settings = parse_objectives(values)
    return Objectives({name: item.objective for name, item in settings.items()}, Shape.of(model), teacher)


def local(model, **options):
    return LocalTeacher(copy.deepcopy(model), "a teacher", **options)


def means(objectives, model, data):
    counts = objectives.counts(data, objectives.objectives)
    losses = objectives(model, data, {name: 1.0 / count for name, count in counts.items()})
    return losses, {name: losses.sums[name] / counts[name] for name in counts}


def trained(values, model, teacher, steps=60, rate=3e-3, weights=None):
    """Train on two batches in turn; return the objectives' means on them, before and after."""
    objectives, data = build(values, model, teacher), [batch(seed) for seed in (0, 1)]
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    before = [{n: float(v) for n, v in means(objectives, model, part)[1].items()} for part in data]
    for step in range(steps):
        part = data[step % 2]
        counts = objectives.counts(part, objectives.objectives)
        coefficients = {name: (weights or {}).get(name, 1.0) / count for name, count in counts.items()}
        optimizer.zero_grad()
        objectives(model, part, {name: c for name, c in coefficients.items() if float(c)}).total.backward()
        optimizer.step()
    after = [{n: float(v) for n, v in means(objectives, model, part)[1].items()} for part in data]
    return tuple({name: sum(part[name] for part in side) / 2 for name in side[0]} for side in (before, after))


def test_cross_entropy_is_that_of_whole_logits():
    model, data = student(), batch()
    losses, found = means(build({"ce": {}}, model), model, data)
    expected = F.cross_entropy(model_logits(model, data)[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten())
    torch.testing.assert_close(found["ce"], expected.detach())
    a = torch.autograd.grad(losses.total, model.parameters())
    b = torch.autograd.grad(expected, model.parameters())
    for ours, textbook in zip(a, b, strict=True):
        torch.testing.assert_close(ours, textbook, rtol=1e-4, atol=1e-6)
    assert losses.token_losses.shape == data["labels"].shape
    torch.testing.assert_close(losses.token_losses.sum(), losses.sums["ce"])


def test_a_prompt_that_is_not_to_be_learnt_changes_no_fine_tuning_loss():
    """SFT: only answers have labels."""
    model, data = student(), batch()
    answers = data | {"labels": data["labels"].clone()}
    answers["labels"][:, :3] = -100
    objectives = build({"ce": {}}, model)
    _, whole = means(objectives, model, data)
    losses, only = means(objectives, model, answers)
    assert abs(float(whole["ce"] - only["ce"])) > 1e-3
    assert float(losses.token_losses[:, :2].abs().max()) == 0.0
    assert int(objectives.counts(answers, ["ce"])["ce"]) == int((answers["labels"] != -100).sum())


def test_everything_together_takes_one_forward_of_each_model_and_the_teachers_none_without_need(monkeypatch):
    from wrinklefree.objectives import manager
    from wrinklefree.teachers import local as module

    calls = []
    monkeypatch.setattr(manager, "forward_views", lambda model, *args: calls.append("student") or forward_views(model, *args))
    monkeypatch.setattr(module, "forward_views", lambda model, *args: calls.append("teacher") or forward_views(model, *args))
    model, data = student(), batch()
    shared = {name: value for name, value in EVERYTHING.items() if name != "forced"}  # which runs the student its own way
    objectives = build(shared, model, local(llama(1)))
    means(objectives, model, data)
    assert sorted(calls) == ["student", "teacher"]
    calls.clear()
    objectives(model, data, {"ce": torch.tensor(1.0)})
    assert calls == ["student"]


def test_the_sum_of_all_is_the_sum_of_each():
    model, data = student(), batch()
    objectives = build(EVERYTHING, model, local(llama(1)))
    coefficients = {name: torch.tensor(0.1 * (i + 1)) for i, name in enumerate(EVERYTHING)}
    together = objectives(model, data, coefficients)
    apart = {name: objectives(model, data, {name: value}).total for name, value in coefficients.items()}
    whole = torch.autograd.grad(together.total, model.parameters())
    parts = [torch.autograd.grad(t, model.parameters(), materialize_grads=True, allow_unused=True) for t in apart.values()]
    for i, gradient in enumerate(whole):
        torch.testing.assert_close(gradient, sum(part[i] for part in parts), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(together.sums["relations"], sum(together.sums[f"relations/{x}"] for x in "qkv"))


@pytest.mark.parametrize("name", EVERYTHING)
def test_the_mean_of_a_step_does_not_depend_on_how_it_is_cut(name):
    model, data = student(), batch()
    objectives = build({name: EVERYTHING[name]}, model, local(llama(1)))
    count = objectives.counts(data, [name])[name]
    whole = objectives(model, data, {name: 1.0 / count}).total
    cut = [{key: value[i : i + 1] for key, value in data.items()} for i in range(3)]
    parts = [objectives(model, part, {name: 1.0 / count}).total for part in cut]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-4, atol=1e-6)
    a = torch.autograd.grad(whole, model.parameters(), allow_unused=True)
    b = torch.autograd.grad(torch.stack(parts).sum(), model.parameters(), allow_unused=True)
    for ours, theirs in zip(a, b, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_blocks_computed_once_more_give_the_same_gradients_and_hold_less():
    held = {}
    gradients = {}
    for checkpointing in (False, True):
        model, data = student().train(), batch()
        objectives = build(EVERYTHING, model, local(llama(1)))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            coefficients = {name: torch.tensor(0.1) for name in EVERYTHING if name != "forced"}
            losses = objectives(model, data, coefficients)
        held[checkpointing] = sum(saved)
        total = losses.total + objectives(model, data, {"forced": torch.tensor(0.1)}).total
        gradients[checkpointing] = torch.autograd.grad(total, model.parameters())
    for a, b in zip(*gradients.values(), strict=True):
        assert torch.equal(a, b)
    assert held[True] < 0.3 * held[False]


@pytest.mark.parametrize("name", [name for name in EVERYTHING if name != "ce"])
def test_an_objective_brings_the_student_to_its_teacher_and_not_to_another(name):
    """Its control is the distance from a teacher whose weights are others: it falls by less, if at all."""
    teacher, other = local(llama(1)), local(llama(2))
    model = convert_model(llama(0), ConversionConfig(norm="none"))
    away = build({name: EVERYTHING[name]}, model, other)
    start = sum(float(means(away, model, batch(seed))[1][name]) for seed in (0, 1)) / 2
    before, after = trained({name: EVERYTHING[name]}, model, teacher)
    end = sum(float(means(away, model, batch(seed))[1][name]) for seed in (0, 1)) / 2
    fell, fell_away = before[name] - after[name], start - end
    assert after[name] < 0.3 * before[name]
    assert fell_away < 0.2 * fell


class Total(nn.Module):
    """The objectives' total as a module's forward, as DDP wraps it."""

    def __init__(self, objectives, model):
        super().__init__()
        self.objectives, self.model = objectives, model

    def forward(self, data):
        return self.objectives(self.model, data, {"ce": torch.tensor(1.0)}).total


def test_ddp_goes_on_after_a_batch_without_labels():
    """It waits for the gradient of every parameter, an untied head's too, and raises in the next step where one never came."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, data = llama(tied=False), batch()
        silent = data | {"labels": torch.full_like(data["labels"], -100)}
        ddp = DistributedDataParallel(Total(build({"ce": {}}, model), model))
        for part in (silent, silent, data):
            model.zero_grad()
            ddp(part).backward()
            assert bool(model.lm_head.weight.grad.any()) == (part is data)
    finally:
        dist.destroy_process_group()


def test_a_gradients_norm_is_that_of_the_mean_and_every_parameter_takes_part_in_the_sum():
    """The norm is computed beside it from whole logits; parameters without a gradient are summed too, on every process alike."""
    model, data = student(), batch()
    objectives = build({"ce": {}, "layers": {"kind": "layerwise", "weights": "last", "last": 1}}, model, local(llama(1)))
    summed = []
    for name, count in objectives.counts(data, objectives.objectives).items():
        parts = [{key: value[i : i + 1] for key, value in data.items()} for i in range(3)]
        found = gradient_norm(objectives, model, parts, name, 1.0 / count, lambda g: summed.append(g.shape) or g)
        assert summed == [p.shape for p in model.parameters()]
        summed.clear()
        if name == "ce":
            loss = F.cross_entropy(model_logits(model, data)[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten())
        else:
            loss = means(objectives, model, data)[0].total - means(build({"ce": {}}, model), model, data)[0].total
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        expected = torch.cat([g.flatten() for g in gradients if g is not None]).norm()
        assert found == pytest.approx(float(expected), rel=1e-3)
        assert found > 1e-3


def test_a_weight_of_nothing_leaves_the_student_where_the_others_lead_it():
    one, two = student(), student()
    trained({"ce": {}}, one, None, steps=5)
    trained({"ce": {}, "logits": {}}, two, local(llama(1)), steps=5, weights={"logits": 0.0})
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    three = student()
    trained({"ce": {}, "logits": {}}, three, local(llama(1)), steps=5, weights={"logits": 1.0})
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("logits", {"tau_squared": True}),
        ("logits", {"direction": "reverse"}),
        ("logits", {"top_k": 4}),
        ("logits", {"scope": "attended"}),
        ("relations", {"normalisation": "official"}),
        ("relations", {"causal": False}),
        ("relations", {"per_head": True}),
        ("relations", {"layer": 0}),
        ("relations", {"teacher_layer": 0}),
        ("relations", {"heads": 2}),
        ("layers", {"distance": "cosine"}),
        ("layers", {"distance": "relation", "heads": 2}),
        ("layers", {"weights": "linear"}),
        ("layers", {"weights": "last", "last": 1}),
        ("layers", {"mode": "teacher_forced"}),
    ],
    ids=str,
)
def test_every_option_changes_the_loss(name, changes):
    model, data, teacher = student(), batch(), local(llama(1))
    plain = means(build({name: EVERYTHING[name]}, model, teacher), model, data)[1][name]
    changed = means(build({name: EVERYTHING[name] | changes}, model, teacher), model, data)[1][name]
    assert abs(float(changed / plain) - 1) > 1e-3
    if changes == {"tau_squared": True}:
        assert float(changed / plain) == pytest.approx(25.0, rel=1e-5)
    if changes == {"per_head": True}:
        assert float(changed / plain) == pytest.approx(0.25, rel=1e-5)


def documents(data):
    """Yield each document of a batch by itself: a row of its tokens, which needs no mask and has no padding."""
    for row, of in enumerate(data["document_ids"]):
        for document in range(1, int(of.max()) + 1):
            ids = data["input_ids"][row, of == document][None]
            yield {"input_ids": ids, "document_ids": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}


def logits_of(model, alone):
    return model(input_ids=alone["input_ids"]).logits[0]


def relation_of(states, heads):
    """Return the paper's softmax(A A' / sqrt(D_r)) among a document's positions, its logarithm; states are `[1, H, T, D]`."""
    a = states[0].transpose(0, 1).flatten(1).unflatten(1, (heads, -1)).transpose(0, 1)
    scores = a @ a.mT / a.shape[-1] ** 0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).log_softmax(-1)


def divergences(log_t, log_s):
    return (log_t.exp() * torch.where(log_t == -torch.inf, 0.0, log_t - log_s)).sum(-1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["scored", "attended", "relations"])
def test_a_mean_is_over_the_positions_of_each_document_by_itself(name):
    """The first position counts where all attended do; the last has no next token of its document; padding never counts."""
    model, teacher, data, found = llama(0), llama(1), batch(), []
    for alone in documents(data):
        if name == "relations":
            mine, theirs = (forward_views(m, alone, Needs(qkv=frozenset([1]))).qkv[1] for m in (model, teacher))
            pairs = ((relation_of(t, 4), relation_of(s, 4)) for t, s in zip(theirs, mine, strict=True))
            found += sum(divergences(*pair).mean(0) for pair in pairs).tolist()
        else:
            values = divergences(*(logits_of(m, alone).log_softmax(-1) for m in (teacher, model)))
            found += values.tolist() if name == "attended" else values[:-1].tolist()
    values = {"relations": {"layer": 1, "heads": 4}} if name == "relations" else {"logits": {"scope": name}}
    objectives = build(values, model, local(teacher))
    kind = next(iter(values))
    assert int(objectives.counts(data, values)[kind]) == len(found)
    assert float(means(objectives, model, data)[1][kind]) == pytest.approx(sum(found) / len(found), rel=1e-4)
    assert int((data["document_ids"] == 0).sum()) > 0


def test_blocks_that_read_the_teachers_states_feel_no_error_of_the_blocks_before():
    """Teacher-forced, a student that differs in its first block alone is off in that block alone; free-running, in all."""
    teacher, model = llama(0), llama(0)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(1.0)
    found = {}
    for mode in ("free", "teacher_forced"):
        losses, _ = means(build({"x": {"kind": "layerwise", "mode": mode}}, model, local(teacher)), model, batch())
        found[mode] = [float(losses.sums[f"x/{block}"]) for block in range(3)]
    assert found["teacher_forced"][0] == pytest.approx(found["free"][0], rel=1e-4)
    assert found["teacher_forced"][0] > 1.0
    assert max(found["teacher_forced"][1:]) < 1e-6 < 1e-2 < min(found["free"])


@pytest.mark.parametrize("mode", ["free", "teacher_forced"])
def test_the_states_of_a_teacher_on_another_device_are_brought_to_the_student(mode, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # which has no meta device
    objective, model, data = Layerwise(mode=mode), llama(0), batch()
    shape = Shape.of(model)
    lesson = local(llama(1)).lesson(data, objective.teacher_needs(shape, shape))
    model, data = model.to("meta"), {key: tensor.to("meta") for key, tensor in data.items()}
    if mode == "free":
        losses = objective.view_losses(forward_views(model, data, objective.student_needs(shape)), lesson, data, (shape, shape))
    else:
        losses = objective.own_losses(model, lesson, data, (shape, shape))
    assert [loss.device.type for loss in losses.values()] == ["meta"] * 3


def test_relations_take_what_attention_takes_and_leave_it_as_it_is():
    """After q/k norms and rotary positions, before groups are repeated; the model's outputs are the same bits."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    model, data = Qwen3ForCausalLM(config).eval(), batch()
    plain = forward_views(model, data, Needs(logits=True))
    seen = forward_views(model, data, Needs(logits=True, qkv=frozenset([1])))
    assert torch.equal(plain.last, seen.last)
    assert model.config._attn_implementation == "sdpa"
    q, k, v = seen.qkv[1]
    assert (q.shape, k.shape, v.shape) == ((3, 4, TIME, 8), (3, 2, TIME, 8), (3, 2, TIME, 8))
    attention = model.model.layers[1].self_attn
    hidden = model.model.layers[1].input_layernorm(forward_views(model, data, Needs(hidden=frozenset([0]))).hidden[0])
    normed = attention.q_norm(attention.q_proj(hidden).view(3, TIME, 4, 8)).transpose(1, 2)
    # At position 0 rotary positions do nothing; elsewhere they keep lengths and change directions.
    torch.testing.assert_close(q[:, :, 0], normed[:, :, 0])
    torch.testing.assert_close(q.norm(dim=-1), normed.norm(dim=-1))
    assert not torch.allclose(q[:, :, 1], normed[:, :, 1])
    torch.testing.assert_close(v, attention.v_proj(hidden).view(3, TIME, 2, 8).transpose(1, 2))


def test_a_wider_and_deeper_teacher_serves_relations_and_logits():
    big = llama(1, hidden=64, layers=5, heads=8, kv_heads=2)
    model = student()
    objectives = build({"logits": {}, "relations": {"layer": -2, "heads": 4}}, model, local(big))
    assert objectives.objectives["relations"].layers(Shape.of(model), Shape.of(big)) == (1, 3)
    _, found = means(objectives, model, batch())
    assert all(value > 0 for value in found.values())


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_mask_token_that_the_student_alone_has_is_compared_with_nothing(direction):
    model, teacher, data = llama(0, vocab=512), llama(1, vocab=512), batch()
    values = {"logits": {"direction": direction}}
    before = means(build(values, model, local(teacher)), model, data)[1]["logits"]
    add_mask_token(model, tiny_tokenizer(512), block_size=4, token_shift=True)
    with torch.no_grad():
        model.get_output_embeddings().weight[-1].mul_(9.0)
    assert Shape.of(model).vocabulary == 513
    torch.testing.assert_close(means(build(values, model, local(teacher)), model, data)[1]["logits"], before)
    # The control: of a model that does not diffuse, a token more is another vocabulary.
    with pytest.raises(UserError, match="logits of 512 tokens and the model of 513"):
        build(values, llama(0, vocab=513), local(teacher))


@pytest.mark.parametrize(
    ("values", "sizes", "message"),
    [
        ({"logits": {}}, {"vocab": 80}, "logits of 80 tokens and the model of 64"),
        ({"relations": {"layer": 3, "heads": 4}}, {}, "^objectives.relations: layer=3 is out of range: the model has 3 layers"),
        ({"relations": {"layer": -4, "heads": 4}}, {}, "layer=-4 is out of range"),
        ({"relations": {"layer": 0, "teacher_layer": 9, "heads": 4}}, {}, "teacher_layer=9 is out of range"),
        ({"relations": {"layer": 0, "heads": 5}}, {}, "5 relation heads do not divide the model's queries of width 32"),
        ({"layerwise": {}}, {"layers": 4}, "depth is 4, the model's 3"),
        ({"layerwise": {}}, {"hidden": 64}, "width is 64, the model's 32"),
        ({"layerwise": {"weights": "last", "last": 4}}, {}, "out of range"),
        ({"logits": {"top_k": 64}}, {}, "leaves no token"),
        ({"tcs": {"estimator": "exact"}}, {"vocab": 1100}, "tokens in every place and holds 5 MiB of logits for each token"),
    ],
    ids=str,
)
def test_models_that_do_not_fit_are_refused_before_the_first_step(values, sizes, message):
    with pytest.raises(UserError, match=message):
        build(values, student(**({"vocab": sizes["vocab"]} if "tcs" in values else {})), local(llama(1, **sizes)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"klm": {}}, "objectives.klm: kind must be one of ce, logits, relations, layerwise"),
        ({"ce": {"weight": -1}}, "objectives.ce.weight must be a number of at least 0 or auto"),
        ({"ce": {"weight": 0}}, "none of a weight above 0"),
        ({"ce": {"temperature": 2}}, "unknown key objectives.ce.temperature"),
        ({"logits": {"temprature": 2}}, "did you mean temperature"),
        ({"logits": {"temperature": 0}}, "temperature must be positive"),
        ({"logits": {"tau_squared": True}}, "tau_squared has no effect at temperature 1"),
        ({"relations": {}}, "objectives.relations.layer is missing"),
        ({"relations": {"layer": 0, "weight": "auto"}}, "there is none with a weight: add ce"),
        ({"mine": {"kind": "logits", "temperature": -1}}, "^objectives.mine: temperature must be positive"),
        ({"tcs": {"hard": -0.1}}, "^objectives.tcs: hard must lie in"),
        ({"tcs": {"top_k": 1}}, "^objectives.tcs: top_k is 1"),
        ({"dlm": {"seed": -1}}, "^objectives.dlm: the seed is -1"),
        ({"logits": {"top_k": True}}, "^objectives.logits.top_k must be a number, not true"),
        ({"layerwise": {"last": 2}}, "belongs to weights=last"),
        ({"layerwise": {"heads": 2}}, "belongs to distance=relation"),
        ({"ce": 3}, "must be a mapping"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        parse_objectives(values)
