import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from data_handler import UserError
from data_handler.influence import (
    AdamMoments,
    Gradients,
    Layer,
    PerSampleGradients,
    adam_warmup,
    best_subtask,
    datainf_scores,
    exact_scores,
    group_means,
    hessian_scores,
    kernel_ridge,
    landmark_rows,
    landmark_scores,
    less_scores,
    tracin_scores,
)
from data_handler.influence.exact import conjugate_gradient
from torch import nn
from torch.nn import functional as F

COUNT, TARGETS = 60, 3


def spearman(a, b):
    ranks = [np.argsort(np.argsort(np.asarray(x))) for x in (a, b)]
    return float(np.corrcoef(ranks)[0, 1])


def gaussian(count=COUNT, sizes=(25, 15), seed=0, spread=0.0):
    """Gradients of two layers; `spread` > 0 gives them a curvature with large and small eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(sizes)
    scale = torch.exp(-spread * torch.arange(size) / size)
    values = torch.randn(count, size, generator=generator) * scale
    edges = np.cumsum([0, *sizes])
    layers = tuple(Layer(f"l{i}", int(a), int(b), int(b - a)) for i, (a, b) in enumerate(pairwise(edges)))
    return Gradients(values, layers), torch.randn(TARGETS, size, generator=generator) * scale


def test_tracin_is_the_rate_times_explicit_inner_products():
    train, targets = gaussian()
    found = tracin_scores(train, targets, 0.3)
    for i in range(COUNT):
        for t in range(TARGETS):
            assert float(found[i, t]) == pytest.approx(
                0.3 * sum(float(a) * float(b) for a, b in zip(train.values[i], targets[t], strict=True)), rel=1e-4, abs=1e-4
            )


def test_datainf_is_the_formula_as_it_is_coded_with_the_sign_turned():
    """Per layer, one example at a time, λ a tenth of the mean element of g²."""
    train, targets = gaussian()
    expected = torch.zeros(COUNT, TARGETS, dtype=torch.float64)
    for layer in train.layers:
        g = train.values[:, layer.start : layer.stop].double()
        for t in range(TARGETS):
            v = targets[t, layer.start : layer.stop].double()
            damped = 0.1 * float(torch.stack([(row**2).mean() for row in g]).mean())
            h = torch.zeros_like(v)
            for row in g:
                h += (v - (v @ row) / (damped + row @ row) * row) / (COUNT * damped)
            influence = torch.stack([-(h @ row) for row in g])  # the paper's sign
            expected[:, t] -= influence
    torch.testing.assert_close(datainf_scores(train, targets, "reference").double(), expected, rtol=1e-3, atol=1e-2)


def test_damping_is_a_multiple_of_the_gradients_mean_square():
    train, targets = gaussian()
    joint = train.joint()
    assert torch.equal(datainf_scores(train, targets, "spectral"), datainf_scores(train, targets, 0.1))
    torch.testing.assert_close(datainf_scores(joint, targets, "reference"), datainf_scores(joint, targets, 0.1 / 40))
    for wrong in ("huge", 0.0, -1.0, math.inf):
        with pytest.raises(UserError, match="damping must be reference, spectral or a number above 0"):
            datainf_scores(train, targets, wrong)


@pytest.mark.parametrize("shape", [(60, (25, 15)), (20, (25, 15))], ids=["more examples", "more parameters"])
def test_the_oracle_is_the_dense_inverse(shape):
    count, sizes = shape
    train, targets = gaussian(count, sizes)
    expected = torch.zeros(count, TARGETS, dtype=torch.float64)
    for layer in train.layers:
        g, v = train.values[:, layer.start : layer.stop].double(), targets[:, layer.start : layer.stop].double()
        damped = 0.2 * float((g**2).sum(1).mean())
        inverse = torch.linalg.inv(g.T @ g / count + damped * torch.eye(g.shape[1], dtype=torch.float64))
        expected += g @ inverse @ v.T
    torch.testing.assert_close(exact_scores(train, targets, 0.2).double(), expected, rtol=1e-4, atol=1e-4)


def test_datainf_ranks_as_the_exact_inverse_at_its_best_damping_and_not_at_the_references():
    """Also where damping matters: the scores at the best one are not TracIn's."""
    train, targets = gaussian(spread=3.0)
    train, agreement = train.joint(), {}
    for damping in ("reference", 0.02, "spectral", 0.3, 1.0):
        exact, closed = exact_scores(train, targets, damping), datainf_scores(train, targets, damping)
        agreement[damping] = min(spearman(exact[:, t], closed[:, t]) for t in range(TARGETS))
    assert max(agreement.values()) >= 0.95
    assert agreement["spectral"] >= 0.95
    assert agreement["reference"] < 0.9
    exact, plain = exact_scores(train, targets, "spectral"), tracin_scores(train, targets)
    assert min(spearman(exact[:, t], plain[:, t]) for t in range(TARGETS)) < 0.97


def test_spectral_damping_leaves_a_layer_without_gradient_out():
    train, targets = gaussian()
    train.values[:, 25:] = 0
    alone = Gradients(train.values[:, :25], train.layers[:1])
    torch.testing.assert_close(datainf_scores(train, targets), datainf_scores(alone, targets[:, :25]))
    torch.testing.assert_close(exact_scores(train, targets), exact_scores(alone, targets[:, :25]))


def test_adams_direction_is_torchs_step():
    """Γ and the preconditioned gradient against one step of `torch.optim.Adam` from the same moments."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(9, generator=generator))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.999), eps=1e-12)
    for _ in range(5):
        parameter.grad = torch.randn(9, generator=generator)
        optimizer.step()
    state = optimizer.state[parameter]
    moments = AdamMoments(state["exp_avg"].clone(), state["exp_avg_sq"].clone(), eps=1e-12, step=5)
    g, before = torch.randn(9, generator=generator), parameter.detach().clone()
    parameter.grad = g.clone()
    optimizer.step()
    moved = before - parameter.detach()
    correction = (1 - 0.9**6) / (1 - 0.999**6) ** 0.5
    torch.testing.assert_close(moments.direction(g[None])[0] / correction, moved, rtol=1e-4, atol=1e-6)
    scale = (1 - 0.9) / (1 - 0.9**6) / ((moments.second / (1 - 0.999**5)).sqrt() + 1e-12)
    torch.testing.assert_close(moments.precondition(g[None])[0], g * scale)


def test_epsilon_is_inside_the_root():
    moments = AdamMoments(torch.zeros(1), torch.zeros(1), eps=1.0)
    expected = 0.1 * 2.0 / (0.001 * 4.0 + 1.0) ** 0.5
    assert float(moments.direction(torch.tensor([[2.0]]))) == pytest.approx(expected, rel=1e-5)


def test_less_is_the_mean_cosine_and_the_best_subtask_counts():
    train, _ = gaussian()
    probes, _ = gaussian(count=8, seed=3)
    groups = torch.tensor([0, 1, 1, 0, 0, 1, 0, 0])
    found = less_scores(train, probes, groups, 2, rate=0.5)
    for i in (0, 17):
        for t in range(2):
            cosines = [F.cosine_similarity(train.values[i], probes.values[m], dim=0) for m in range(8) if groups[m] == t]
            assert float(found[i, t]) == pytest.approx(0.5 * float(torch.stack(cosines).mean()), rel=1e-4, abs=1e-6)
    assert torch.equal(best_subtask(found), torch.maximum(found[:, 0], found[:, 1]))


def test_less_does_not_see_a_gradients_length_and_tracin_does():
    """The control of normalisation: short texts have long gradients."""
    train, targets = gaussian()
    longer = Gradients(train.values.clone(), train.layers)
    longer.values[0] *= 50
    groups = torch.arange(TARGETS)
    pair = [less_scores(g, Gradients(targets, train.layers), groups, TARGETS) for g in (train, longer)]
    torch.testing.assert_close(*pair)
    assert not torch.allclose(tracin_scores(train, targets)[0], tracin_scores(longer, targets)[0])
    pair = [landmark_scores(g, targets) for g in (train, longer)]
    torch.testing.assert_close(*pair)


def test_landmarks_get_their_own_scores_and_neighbours_take_part():
    """Two clusters of embeddings: an example without a gradient is scored like its cluster."""
    generator = torch.Generator().manual_seed(0)
    side = torch.arange(80) % 2
    embeddings = torch.randn(80, 5, generator=generator) * 0.3 + 3.0 * (2 * side[:, None] - 1)
    truth = (2.0 * side - 1)[:, None].expand(-1, 2) + 0.05 * torch.randn(80, 2, generator=generator)
    landmarks = landmark_rows(80, 20, seed=4)
    spread = kernel_ridge(embeddings, landmarks, truth[landmarks])
    assert spread.shape == (80, 2)
    assert torch.equal(spread.sign(), truth.sign())
    close = kernel_ridge(embeddings, landmarks, truth[landmarks], ridge=1e-6)
    assert (close[landmarks] - truth[landmarks]).abs().max() < (spread[landmarks] - truth[landmarks]).abs().max()
    shuffled = embeddings[torch.randperm(80, generator=generator)]  # the control: embeddings that know nothing
    unknown = torch.ones(80, dtype=torch.bool)
    unknown[landmarks] = False
    lost = kernel_ridge(shuffled, landmarks, truth[landmarks])[unknown, 0]
    assert abs(spearman(lost, truth[unknown, 0])) < 0.5 < spearman(spread[unknown, 0], truth[unknown, 0])


def test_kernel_ridge_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    embeddings, values = torch.randn(12, 4, generator=generator, dtype=torch.float64), torch.randn(5, 1, generator=generator)
    landmarks = torch.tensor([0, 3, 4, 8, 11])
    distances = torch.cdist(embeddings, embeddings[landmarks]) ** 2
    width = distances[landmarks][~torch.eye(5, dtype=torch.bool)].median()
    kernel = torch.exp(-distances / (2 * width))
    centred = values.double() - values.double().mean()
    expected = kernel @ torch.linalg.inv(kernel[landmarks] + 1e-2 * torch.eye(5)) @ centred + values.mean()
    torch.testing.assert_close(kernel_ridge(embeddings, landmarks, values), expected.float())


def test_landmarks_are_distinct_and_a_function_of_the_seed():
    rows = landmark_rows(50, 20, 1)
    assert len(set(rows.tolist())) == 20
    assert torch.equal(rows, landmark_rows(50, 20, 1))
    assert not torch.equal(rows, landmark_rows(50, 20, 2))
    with pytest.raises(UserError, match="from 1 to the 5 examples, not 6"):
        landmark_rows(5, 6)


def test_group_means_cross_blocks():
    values, groups = torch.randn(600, 3), torch.arange(600) % 7
    means = group_means(values, groups, 8)
    torch.testing.assert_close(means[2], values[groups == 2].mean(0))
    assert means[7].abs().sum() == 0


class Logistic(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(x)


def class_loss(forward, example):
    return F.cross_entropy(forward(example["x"]), example["y"])


DECAY = 0.05


def fit(examples, weights=None):
    """In double precision, so that small differences of the minimum can be seen."""
    examples = {"x": examples["x"].double(), "y": examples["y"]}
    model = Logistic().double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        losses = F.cross_entropy(model(examples["x"]), examples["y"], reduction="none")
        loss = losses.mean() if weights is None else (losses * weights).mean()
        loss = loss + DECAY / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model


@pytest.fixture(scope="module")
def classes():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(80, 6, generator=generator)
    y = (x[:, :3] + 0.5 * torch.randn(80, 3, generator=generator)).argmax(1)
    train, probe = {"x": x[:50], "y": y[:50]}, {"x": x[50:], "y": y[50:]}
    return train, probe, fit(train)


def test_every_method_has_the_sign_of_real_retraining(classes):
    """Take a tenth of an example's weight in a convex model: the Hessian's influence is the change, and positive helps in all."""
    train, probe, model = classes

    def probe_loss(model):
        with torch.no_grad():
            return float(F.cross_entropy(model(probe["x"].double()), probe["y"]))

    base = probe_loss(model)
    source = PerSampleGradients(copy.deepcopy(model).float(), class_loss)
    g = source.collect(train)
    target = source.collect(probe).values.mean(0, keepdim=True)
    truth = []
    for i in range(50):
        weights = torch.ones(50, dtype=torch.float64)
        weights[i] = 0.9
        truth.append((probe_loss(fit(train, weights)) - base) / 0.1 * 50)
    hessian = hessian_scores(source, train, g, target, damping=1e-6, decay=DECAY)[:, 0]
    assert spearman(hessian, truth) > 0.99
    assert np.allclose(hessian, truth, rtol=0.1, atol=0.05 * np.abs(truth).max())
    moments = AdamMoments(torch.zeros_like(g.values[0]), g.values.square().mean(0), step=100)
    directions = source.collect(train, transform=moments.direction)
    everything = torch.zeros(30, dtype=torch.int64)
    scores = {
        "tracin": tracin_scores(g, target),
        "datainf": datainf_scores(g, target),
        "exact": exact_scores(g, target),
        "less": less_scores(directions, source.collect(probe), everything, 1),
        "landmarks": landmark_scores(g, target),
    }
    for name, found in scores.items():
        assert 0.5 < spearman(found[:, 0], truth) < spearman(hessian, truth), name
    assert abs(spearman(torch.randn(50, generator=torch.Generator().manual_seed(1)), truth)) < 0.4  # a control


def test_conjugate_gradients_say_when_they_fail(classes):
    with pytest.raises(UserError, match="not positive definite"):
        conjugate_gradient(lambda x: -x, torch.ones(3), 1e-6, 5)
    with pytest.raises(UserError, match="not solved after 1 iterations"):
        conjugate_gradient(lambda x: torch.tensor([1.0, 10.0, 100.0]) * x, torch.ones(3), 1e-9, 1)


def test_a_warm_up_is_adam_on_the_selected_layers(classes):
    train, _, model = classes
    model = copy.deepcopy(model).float()
    source = PerSampleGradients(model, class_loss, ["linear.weight"])
    options = {"steps": 6, "learning_rate": 0.01, "batch": 10, "seed": 3}
    states = list(adam_warmup(source, train, checkpoints=3, **options))
    assert [state.moments.step for state in states] == [2, 4, 6]
    assert [round(state.rate, 6) for state in states] == [0.008333, 0.005, 0.001667]
    cut = list(adam_warmup(source, train, micro_batch=3, **options))[-1]
    torch.testing.assert_close(cut.parameters, states[-1].parameters)
    torch.testing.assert_close(cut.moments.second, states[-1].moments.second)
    moved = states[-1].parameters["linear.weight"]
    assert not torch.equal(moved, model.linear.weight)
    twin = nn.Parameter(model.linear.weight.detach().clone())
    optimizer = torch.optim.Adam([twin])
    from data_handler.influence.warmup import _row

    for step in range(6):
        rows = [_row(50, step * 10 + i, 3) for i in range(10)]
        assert len(set(rows)) == 10
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 6)
        optimizer.zero_grad()
        F.cross_entropy(train["x"][rows] @ twin.T + model.linear.bias.detach(), train["y"][rows]).backward()
        optimizer.step()
    torch.testing.assert_close(moved, twin.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(states[-1].moments.first, optimizer.state[twin]["exp_avg"].flatten(), rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="from 1 to its 2 steps, not 3"):
        list(adam_warmup(source, train, steps=2, checkpoints=3))
