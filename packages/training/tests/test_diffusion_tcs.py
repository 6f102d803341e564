"""Targets for a diffusion student: the estimators against the exact conditionals, and what training towards them does."""

from itertools import product

import pytest
import torch
from bitnet_arch import ConversionConfig, UserError, convert_model
from bitnet_arch.testing import SMALL_SHAPE, random_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from wrinklefree.diffusion import METHODS, DiffusionSettings, TCSSettings, diffusion_step, tcs_step
from wrinklefree.diffusion.mask import block_ends, block_numbers
from wrinklefree.diffusion.tcs import Teacher, causal_target, exact_target, gradient_target, topk_target
from wrinklefree.diffusion.tcs_step import check_teacher, make_target
from wrinklefree.diffusion.views import make_views
from wrinklefree.objectives.diffusion import TargetScores
from wrinklefree.teachers.base import Lesson, Shape

VOCABULARY = 10
SHAPE = SMALL_SHAPE | {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
MAKERS = {
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**SHAPE | more)),
    "qwen3": lambda **more: Qwen3ForCausalLM(Qwen3Config(**SHAPE | more, head_dim=16)),
    "gemma3": lambda **more: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE | more, head_dim=16, **SLIDING)),
}


def teacher_of(family="llama", spread=4.0, **more):
    """A random model whose next token depends on all tokens before it."""
    model = random_model(lambda: MAKERS[family](**more))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(spread)
    return model.requires_grad_(False)


def packed(rows=2, vocabulary=VOCABULARY, seed=0):
    """Rows of two documents of 7 and 4 tokens and one of padding."""
    ids = torch.randint(0, vocabulary, (rows, 12), generator=torch.Generator().manual_seed(seed))
    documents = torch.tensor([[1] * 7 + [2] * 4 + [0]]).repeat(rows, 1)
    labels = ids.clone()
    labels[:, [0, 7, 11]] = -100
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.tensor([[*range(7), *range(4), 0]]).repeat(rows, 1),
        "document_ids": documents,
        "sample_index": torch.arange(rows),
    }


def looking(model, batch, block_size=None):
    ends = block_ends(block_numbers(batch["position_ids"], batch["document_ids"], block_size))
    return Teacher(model, batch, batch["labels"] != -100, ends)


@torch.no_grad()
def log_likelihood(model, ids):
    log_p = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return sum(log_p[t - 1, ids[t]] for t in range(1, len(ids)))


def divergence(target, other, vocabulary=VOCABULARY):
    p, q = target.dense(vocabulary), other.dense(vocabulary)
    return float((p * (p.clamp(min=1e-30).log() - q.clamp(min=1e-30).log())).sum(1).mean())


@pytest.mark.parametrize("family", MAKERS)
def test_the_exact_target_is_the_ratio_of_likelihoods(family):
    model, batch = teacher_of(family), packed(1)
    target, row = exact_target(looking(model, batch)), batch["input_ids"][0]
    assert target.ids.shape == (9, VOCABULARY)
    places = [*range(1, 7), *range(8, 11)]
    for n, i in enumerate(places):
        document = row[:7] if i < 7 else row[7:11]
        scores = []
        for v in range(VOCABULARY):
            changed = document.clone()
            changed[i if i < 7 else i - 7] = v
            scores.append(log_likelihood(model, changed))
        torch.testing.assert_close(target.log_q[n], torch.stack(scores).log_softmax(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [None, 3, 1], ids=["whole", "blocks", "one"])
@pytest.mark.parametrize("family", MAKERS)
def test_rescoring_every_token_over_everything_that_follows_is_exact(family, block_size):
    look = looking(teacher_of(family), packed(), block_size)
    exact, rescored = exact_target(look), topk_target(look, VOCABULARY)
    torch.testing.assert_close(rescored.dense(VOCABULARY), exact.dense(VOCABULARY), rtol=1e-3, atol=1e-5)
    assert (rescored.log_tail == -torch.inf).all()
    causal = causal_target(look, VOCABULARY)
    if block_size == 1:  # nothing follows in a block of one: the causal distribution is no approximation
        torch.testing.assert_close(causal.dense(VOCABULARY), exact.dense(VOCABULARY), rtol=1e-3, atol=1e-5)
    else:
        assert divergence(exact, causal) > 0.005


def test_blocks_cut_what_counts_as_the_others():
    model, batch = teacher_of(), packed(1)
    whole, blocks = (exact_target(looking(model, batch, size)) for size in (None, 3))
    assert (whole.log_q[5] - blocks.log_q[5]).abs().max() < 1e-4  # position 6 ends its document
    assert (whole.log_q[0] - blocks.log_q[0]).abs().max() > 1e-2


@torch.no_grad()
def test_the_exact_targets_mean_is_the_posterior_and_the_causal_ones_is_not():
    """The tower property, summed over all 256 texts of four tokens of four kinds; tokens 1 and 2 masked, 3 seen."""
    model = teacher_of(spread=8.0, vocab_size=4)
    texts = torch.tensor(list(product(range(4), repeat=4)))
    log_p = model(input_ids=texts).logits.log_softmax(-1)
    likelihood = log_p[:, :-1].gather(2, texts[:, 1:, None])[..., 0].sum(1).double().exp()  # of tokens 1 to 3 after token 0
    batch = {
        "input_ids": texts,
        "document_ids": torch.ones_like(texts),
        "position_ids": torch.arange(4).expand(256, 4),
    }
    wanted = torch.zeros_like(texts, dtype=torch.bool)
    wanted[:, 1] = True
    look = Teacher(model, batch, wanted, torch.full_like(texts, 4))
    worst = {"exact": 0.0, "causal": 0.0}
    for first, last in product(range(4), repeat=2):
        seen = (texts[:, 0] == first) & (texts[:, 3] == last)
        weights = likelihood[seen] / likelihood[seen].sum()
        posterior = torch.stack([weights[texts[seen, 1] == v].sum() for v in range(4)])
        for name, target in (("exact", exact_target(look)), ("causal", causal_target(look, 4))):
            mean = (weights[:, None] * target.dense(4)[seen].double()).sum(0)
            worst[name] = max(worst[name], float((mean - posterior).abs().max()))
    assert worst["exact"] < 1e-5
    assert worst["causal"] > 0.02


@pytest.mark.parametrize("family", MAKERS)
def test_the_gradient_is_that_of_what_follows(family):
    model, batch = teacher_of(family, 2.0).double(), packed(1)
    target = gradient_target(looking(model, batch), VOCABULARY).dense(VOCABULARY).double().log()
    table, row = model.get_input_embeddings(), batch["input_ids"][0]
    with torch.no_grad():
        vectors = table(torch.arange(VOCABULARY))
        for n, i in ((0, 1), (3, 4), (6, 8)):
            start, end = (0, 7) if i < 7 else (7, 11)
            document, at = row[start:end], i - start
            own = model(input_ids=document[None]).logits[0, at - 1].log_softmax(-1)
            later = []
            for v in range(VOCABULARY):  # by central differences along e(v) - e(x_i)
                values = []
                for step in (1e-3, -1e-3):
                    inputs = vectors[document].clone()
                    inputs[at] += step * (vectors[v] - inputs[at])
                    log_p = model(inputs_embeds=inputs[None]).logits[0].log_softmax(-1)
                    values.append(sum(log_p[t - 1, document[t]] for t in range(at + 1, len(document))))
                later.append((values[0] - values[1]) / 2e-3)
            expected = (own + torch.stack([torch.as_tensor(x) for x in later])).log_softmax(0)
            torch.testing.assert_close(target[n], expected, rtol=1e-3, atol=1e-3)  # norms compute in float32


def test_where_nothing_follows_all_estimators_are_exact():
    look = looking(teacher_of(), packed(), 1)
    exact = exact_target(look).dense(VOCABULARY)
    for target in (topk_target(look, VOCABULARY), gradient_target(look, VOCABULARY), causal_target(look, VOCABULARY)):
        torch.testing.assert_close(target.dense(VOCABULARY), exact, rtol=1e-3, atol=1e-5)


def test_more_candidates_and_a_longer_window_come_nearer():
    look = looking(teacher_of(spread=8.0), packed(8))
    exact = exact_target(look)
    errors = [divergence(exact, topk_target(look, k)) for k in (2, 5, VOCABULARY)]
    assert errors[0] > errors[1] > errors[2]
    windows = [divergence(exact, topk_target(look, VOCABULARY, w)) for w in (1, 3, 6)]
    assert windows[0] > windows[1] > windows[2]
    assert windows[2] < 1e-4
    assert divergence(exact, causal_target(look, VOCABULARY)) > windows[0]


def test_targets_are_distributions_with_the_token_among_them():
    batch = packed()
    look = looking(teacher_of(), batch)
    own = batch["input_ids"][look.rows, look.columns]
    for target in (topk_target(look, 3), gradient_target(look, 3), causal_target(look, 3)):
        mass = torch.cat([target.log_q, target.log_tail[:, None]], dim=1).logsumexp(1)
        torch.testing.assert_close(mass, torch.zeros_like(mass), rtol=0, atol=1e-4)
        assert (target.ids == own[:, None]).any(1).all()
        assert all(len(set(row)) == 3 for row in target.ids.tolist())


# ------------------------------------------------------------------------------------------------------ the step


def how(**changes):
    diffusion = DiffusionSettings(mask_token_id=VOCABULARY, **METHODS["fast_dllm_v2"] | {"block_size": 4})
    top = {} if changes.get("estimator") == "exact" else {"top_k": 4}
    return TCSSettings(diffusion=diffusion, **top | changes)


def student_of(seed=1):
    torch.manual_seed(seed)
    return convert_model(
        LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": VOCABULARY + 1})).float(), ConversionConfig(gain="one")
    )


def test_the_steps_targets_lie_where_its_masks_do():
    teacher, batch, settings = teacher_of(), packed(3), how(estimator="exact")
    views = make_views(batch, settings.diffusion)
    target = make_target(teacher, batch, views, settings)
    ends = block_ends(views.blocks)
    for view in range(2):
        masked = views.masked.chunk(2)[view]
        alone = exact_target(Teacher(teacher, batch, masked, ends, VOCABULARY))
        start = 0 if view == 0 else int(views.masked.chunk(2)[0].sum())
        torch.testing.assert_close(target.log_q[start : start + len(alone.log_q)], alone.log_q)


@pytest.mark.parametrize("estimator", ["exact", "topk", "gradient", "causal"])
def test_the_steps_losses_add_up_and_reach_the_student_alone(estimator):
    teacher, batch, settings = teacher_of(), packed(3), how(estimator=estimator)
    student = student_of()
    losses = tcs_step(student, teacher, batch, settings)
    assert set(losses) == {"dlm", "tcs"}
    torch.testing.assert_close(losses["dlm"], diffusion_step(student, batch, settings.diffusion)["dlm"])
    parts = [tcs_step(student, teacher, {k: v[rows] for k, v in batch.items()}, settings) for rows in ([0], [1, 2])]
    torch.testing.assert_close(sum(part["tcs"] for part in parts), losses["tcs"], rtol=1e-4, atol=1e-4)
    losses["tcs"].backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
    assert student.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in teacher.parameters())


def test_rows_without_labels_add_nothing():
    batch, student = packed(2), student_of()
    silent = batch | {"labels": torch.full_like(batch["labels"], -100)}
    losses = tcs_step(student, teacher_of(), silent, how()) | {"plain": diffusion_step(student, silent, how().diffusion)["dlm"]}
    assert all(float(loss.detach()) == 0.0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())
    assert student.lm_head.weight.grad is not None  # processes with such rows wait for it too


def taught(hard):
    student = student_of()
    student.config.diffusion = {"mask_token_id": VOCABULARY, "block_size": 4, "token_shift": True}
    objective = TargetScores(block_size=4, top_k=4, hard=hard)
    rows = []
    hook = student.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    found = objective.own_losses(student, Lesson(model=teacher_of()), packed(3), (Shape.of(student), None))
    hook.remove()
    return student, found, sum(rows)


def test_hard_is_the_share_of_the_cross_entropy():
    student, found, _ = taught(0.25)
    losses = tcs_step(student, teacher_of(), packed(3), how())
    assert losses["tcs"].item() < 0.9 * losses["dlm"].item()  # they can be told apart
    torch.testing.assert_close(found["scores"], 0.75 * losses["tcs"])
    torch.testing.assert_close(found["tokens"], 0.25 * losses["dlm"])
    weight = student.model.layers[0].mlp.up_proj.weight
    sums = (sum(found.values()), losses["tcs"], losses["dlm"])
    mixed, scores, tokens = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in sums)
    torch.testing.assert_close(mixed, 0.75 * scores + 0.25 * tokens, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed, 0.25 * scores + 0.75 * tokens, rtol=1e-2)


def test_the_cross_entropy_is_of_the_same_logits_and_without_hard_it_is_not_computed():
    student, alone, rows = taught(0.0)
    _, both, shared = taught(0.5)
    assert shared == rows > 0
    assert set(alone) == {""}
    plain = diffusion_step(student, packed(3), TargetScores(block_size=4, top_k=4).settings(VOCABULARY))["dlm"]
    torch.testing.assert_close(both["tokens"], 0.5 * plain)
    torch.testing.assert_close(alone[""], 2 * both["scores"])


def train_student(teacher, estimator, steps=60, shuffled=False):
    student, settings = student_of().train(), how(estimator=estimator, top_k=VOCABULARY)
    optimizer = torch.optim.AdamW(student.parameters(), 5e-3)
    if shuffled:  # a teacher of the same kind of distributions, of other tokens
        teacher = teacher_of(spread=8.0)
        permutation = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(3))
        teacher.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight[permutation], requires_grad=False)
    for step in range(steps):
        batch = packed(8, seed=step % 20) | {"sample_index": torch.arange(8) + 8 * step}
        loss = tcs_step(student, teacher, batch, settings)["tcs"] / 72
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    student.eval()
    total = 0.0
    with torch.no_grad():
        for seed in range(4):
            batch = packed(8, seed=seed) | {"sample_index": torch.arange(8) + 10**6}
            total += float(tcs_step(student, teacher_of(spread=8.0), batch, how(estimator="exact"))["tcs"]) / 72
    return total / 4


def test_training_towards_the_targets_brings_the_student_to_the_teacher_and_a_shuffled_teacher_does_not():
    teacher = teacher_of(spread=8.0)
    untrained = train_student(teacher, "topk", steps=0)
    trained, shuffled = train_student(teacher, "topk"), train_student(teacher, "topk", shuffled=True)
    assert trained < 0.85 * untrained
    assert shuffled > 1.05 * untrained


# ------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"estimator": "magic"}, "choose exact, topk, gradient, causal"),
        ({"top_k": 1}, "at least 2"),
        ({"estimator": "causal", "window": 3}, "no effect"),
        ({"estimator": "exact", "top_k": 4}, "top_k has no effect"),
        ({"window": 0}, "at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_mean_nothing_are_one_sentence(changes, says):
    with pytest.raises(UserError, match=says):
        how(**changes)


def test_a_teacher_of_another_vocabulary_is_one_sentence():
    student = student_of()
    check_teacher(student, teacher_of(), how())
    check_teacher(student, teacher_of(vocab_size=VOCABULARY + 1), how())
    for size in (VOCABULARY - 1, VOCABULARY + 2):
        with pytest.raises(UserError, match="need one tokenizer"):
            check_teacher(student, teacher_of(vocab_size=size), how())
    with pytest.raises(UserError, match="lower it"):
        check_teacher(student, teacher_of(), how(top_k=VOCABULARY + 1))
