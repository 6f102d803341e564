"""The losses beside their textbook forms: values, gradients, masks, and what is never held."""

import pytest
import torch
from bitnet_arch import BitLinear
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from wrinklefree.losses.divergence import cross_entropy, kl_divergence, top_k_divergence, top_log_probabilities
from wrinklefree.losses.head import head_losses
from wrinklefree.losses.layerwise import cosine_distance, layer_weights, masked_sum, normalised_mse
from wrinklefree.losses.pieces import piece_rows, sum_of_pieces
from wrinklefree.losses.relations import relation_divergence

ROWS, WIDTH, VOCABULARY = 23, 8, 41


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation makes, views left out."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def heads():
    embedding = nn.Embedding(VOCABULARY, WIDTH)
    tied = nn.Linear(WIDTH, VOCABULARY, bias=False)
    tied.weight = embedding.weight
    return {"plain": nn.Linear(WIDTH, VOCABULARY), "tied": tied, "bitlinear": BitLinear(WIDTH, VOCABULARY, bias=False)}


def naive(hidden, head, targets, teacher, weights, tau):
    logits = head(hidden)
    log_t, log_s = (x.div(tau).log_softmax(-1) for x in (teacher, logits))
    return weights[0] * F.cross_entropy(logits, targets, reduction="sum") + weights[1] * (log_t.exp() * (log_t - log_s)).sum()


@pytest.mark.parametrize("kind", ["plain", "tied", "bitlinear"])
def test_a_batch_without_rows_gives_every_parameter_a_gradient_of_zeros(kind):
    """Otherwise DDP waits for the head's in vain, on a process without labels."""
    head = heads()[kind]
    source = torch.randn(ROWS, WIDTH, requires_grad=True)
    losses = [lambda logits, part: logits.sum(1)]
    total, values = head_losses(source[:0], head, list(head.parameters()), losses, torch.ones(1), vocabulary=VOCABULARY)
    total.backward()
    assert (float(total.detach()), values.shape) == (0.0, (1, 0))
    assert all(not tensor.grad.any() for tensor in (source, *head.parameters()))


@pytest.mark.parametrize("kind", ["plain", "tied", "bitlinear"])
def test_pieces_of_the_head_give_the_textbooks_loss_and_gradients(kind):
    torch.manual_seed(0)
    head = heads()[kind]
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    targets, teacher = torch.randint(0, VOCABULARY, (ROWS,)), torch.randn(ROWS, VOCABULARY)
    weights = torch.tensor([0.3, 2.0])
    losses = [
        lambda logits, part: cross_entropy(logits, targets[part]),
        lambda logits, part: kl_divergence(logits, teacher[part], temperature=3.0),
    ]
    parameters = list(head.parameters())
    total, values = head_losses(hidden, head, parameters, losses, weights, vocabulary=VOCABULARY, elements=5 * VOCABULARY)
    expected = naive(hidden, head, targets, teacher, weights, 3.0)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(weights @ values.sum(1), expected.detach())
    # Twice the outer gradient, to see that it is passed on.
    ours = torch.autograd.grad(2 * total, [hidden, *parameters])
    textbook = torch.autograd.grad(2 * expected, [hidden, *parameters])
    for a, b in zip(ours, textbook, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_logits_of_all_tokens_are_never_held_and_the_textbook_holds_them():
    torch.manual_seed(0)
    rows, vocabulary = 64, 512
    head, hidden = nn.Linear(WIDTH, vocabulary, bias=False), torch.randn(rows, WIDTH, requires_grad=True)
    targets = torch.randint(0, vocabulary, (rows,))
    with Largest() as seen:
        losses = [lambda logits, part: cross_entropy(logits, targets[part])]
        head_losses(hidden, head, list(head.parameters()), losses, torch.ones(1), vocabulary=vocabulary, elements=4 * vocabulary)[
            0
        ].backward()
    assert seen.elements == vocabulary * WIDTH  # the weight, and its gradient
    with Largest() as seen:
        F.cross_entropy(head(hidden), targets).backward()
    assert seen.elements == rows * vocabulary


def test_a_sum_of_pieces_needs_no_gradient_where_none_is_asked_for_and_is_used_once():
    x = torch.randn(6, 2)
    total, values = sum_of_pieces(lambda part, t: t[part].sum(1)[None], piece_rows(6, 2, 4), torch.ones(1), x)
    assert not total.requires_grad
    assert values.shape == (1, 6)
    total, _ = sum_of_pieces(lambda part, t: t[part].square().sum(1)[None], piece_rows(6, 2, 4), torch.ones(1), x.requires_grad_())
    total.backward(retain_graph=True)
    torch.testing.assert_close(x.grad, 2 * x.detach())
    with pytest.raises(RuntimeError, match="used up"):
        total.backward()


def test_the_direction_and_the_temperature_act():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 9), 3 * torch.randn(5, 9)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(kl_divergence(student, teacher), (p * (p / q).log()).sum(-1))
    torch.testing.assert_close(kl_divergence(student, teacher, direction="reverse"), (q * (q / p).log()).sum(-1))
    torch.testing.assert_close(kl_divergence(student, teacher, 5.0), kl_divergence(student / 5, teacher / 5))
    assert (kl_divergence(student, teacher, 5.0) < kl_divergence(student, teacher)).all()
    assert kl_divergence(student, student + 7).abs().max() < 1e-6


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_top_k_with_its_bucket_bounds_the_divergence_and_reaches_it(direction):
    torch.manual_seed(0)
    student, teacher, tau = torch.randn(7, 30, requires_grad=True), 2 * torch.randn(7, 30), 2.0
    whole = kl_divergence(student, teacher, tau, direction)
    values = [top_k_divergence(student, *top_log_probabilities(teacher, k, tau), tau, direction) for k in (1, 5, 15, 29)]
    for less, more in zip(values, [*values[1:], whole], strict=True):
        assert (less <= more + 1e-5).all()
    torch.testing.assert_close(values[-1], whole, rtol=1e-4, atol=1e-5)
    assert (values[0] < whole - 0.01).any()
    # Without the bucket, mass outside the k tokens would cost nothing: with it, the gradient takes it away.
    log_p, tokens, rest = top_log_probabilities(teacher, 5, tau)
    gradient = torch.autograd.grad(top_k_divergence(student, log_p, tokens, rest, tau, direction).sum(), student)[0]
    assert gradient.isfinite().all()
    outside = torch.ones(7, 30, dtype=torch.bool).scatter_(1, tokens, False)
    assert gradient[outside].abs().min() > 0


def test_a_sure_teacher_has_the_divergence_of_its_tail():
    student, teacher = torch.zeros(1, 50), torch.zeros(1, 50)
    teacher[0, 7] = 22.0  # leaves 1.4e-8 for all others, of which 1 minus its probability knows nothing in float32
    whole = kl_divergence(student, teacher, direction="reverse")
    log_p, tokens, rest = top_log_probabilities(teacher, 4)
    # The tail is even in both, so that the bucket loses nothing.
    torch.testing.assert_close(top_k_divergence(student, log_p, tokens, rest, direction="reverse"), whole)
    # What is left of 1 is known down to the type's epsilon and counted as at least that.
    unsummed = top_k_divergence(student, log_p, tokens, direction="reverse")
    assert whole - 46 / 50 * (22 - 15.9) - 1e-3 < unsummed < whole
    # Control: a teacher that leaves more needs no sum over the tail.
    teacher[0, 7] = 3.0
    log_p, tokens, rest = top_log_probabilities(teacher, 4)
    expected = kl_divergence(student, teacher, direction="reverse")
    for known in (rest, None):
        torch.testing.assert_close(top_k_divergence(student, log_p, tokens, known, direction="reverse"), expected)


def test_absent_tokens_of_a_short_row_count_nothing():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 12), torch.randn(3, 12)
    log_p, tokens, _ = top_log_probabilities(teacher, 4)
    padded = torch.cat([log_p, torch.full((3, 2), -torch.inf)], 1), torch.cat([tokens, tokens[:, :1].expand(3, 2)], 1)
    torch.testing.assert_close(top_k_divergence(student, *padded), top_k_divergence(student, log_p, tokens))


def textbook_relations(student, teacher, heads, cosine, mask):
    """BitDistill's relations as their paper writes them, whole matrices, one document a row."""

    def relation(x):
        batch, _, time, _ = x.shape
        a = x.transpose(1, 2).reshape(batch, time, heads, -1).transpose(1, 2)
        if cosine:
            a = a / a.norm(dim=-1, keepdim=True)
        scores = a @ a.mT / (1.0 if cosine else a.shape[-1] ** 0.5)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)

    t, s = relation(teacher), relation(student)
    return torch.where(mask, t * (t.clamp(min=1e-30).log() - s.clamp(min=1e-30).log()), 0.0).sum(-1).mean(1).sum()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("normalisation", ["paper", "official"])
def test_relations_are_the_textbooks(normalisation, causal):
    torch.manual_seed(0)
    student = torch.randn(2, 2, 11, 8, requires_grad=True)  # keys of 2 heads beside a teacher's 4
    teacher = torch.randn(2, 4, 11, 8)
    ids = torch.ones(2, 11, dtype=torch.int64)
    mask = torch.ones(11, 11, dtype=torch.bool)
    mask = mask.tril() if causal else mask
    args = {"heads": 4, "normalisation": normalisation, "causal": causal}
    ours = relation_divergence(student, teacher, ids, **args, elements=300)
    expected = textbook_relations(student, teacher, 4, normalisation == "official", mask)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    a, b = (torch.autograd.grad(x, student)[0] for x in (ours, expected))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert float(relation_divergence(teacher, teacher, ids, **args)) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_relations_stay_inside_documents_and_padding_counts_nothing(causal):
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 2, 10, 4), torch.randn(1, 2, 10, 4)
    ids = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 0, 0, 0]])
    args = {"heads": 2, "normalisation": "paper", "causal": causal}
    together = relation_divergence(student, teacher, ids, **args)
    apart = sum(
        relation_divergence(student[:, :, part], teacher[:, :, part], torch.ones_like(ids[:, part]), **args)
        for part in (slice(0, 4), slice(4, 7))
    )
    torch.testing.assert_close(together, apart)
    noise = student.clone()
    noise[:, :, 7:] = 1e3
    torch.testing.assert_close(relation_divergence(noise, teacher, ids, **args), together)
    # Control: as one document it is another figure.
    one = relation_divergence(student, teacher, (ids > 0).to(torch.int64), **args)
    assert abs(float(one - together)) > 1e-3


def test_relations_are_never_whole_in_memory():
    student, teacher = torch.randn(1, 2, 64, 4, requires_grad=True), torch.randn(1, 2, 64, 4)
    ids = torch.ones(1, 64, dtype=torch.int64)
    with Largest() as seen:
        relation_divergence(student, teacher, ids, heads=4, normalisation="paper", causal=True, elements=4 * 64 * 4).backward()
    assert seen.elements <= 4 * 64 * 4 < 4 * 64 * 64


def test_distances_of_layers_see_what_they_say():
    torch.manual_seed(0)
    teacher = torch.randn(6, 16)
    assert float(normalised_mse(teacher, teacher).abs().max()) == 0.0
    torch.testing.assert_close(normalised_mse(2 * teacher, teacher), torch.ones(6))
    torch.testing.assert_close(normalised_mse(20 * teacher, 10 * teacher), torch.ones(6))  # scale-free
    assert float(cosine_distance(2 * teacher, teacher).abs().max()) < 1e-6  # blind to norms
    torch.testing.assert_close(cosine_distance(-teacher, teacher), torch.full((6,), 2.0))
    rows = torch.tensor([1.0, float("nan"), 2.0])
    assert float(masked_sum(rows, torch.tensor([True, False, True]))) == 3.0


def test_weights_of_layers():
    assert layer_weights("uniform", 4) == [0.25] * 4
    assert layer_weights("linear", 4) == [0.1, 0.2, 0.3, 0.4]
    assert layer_weights("last", 4, 2) == [0.0, 0.0, 0.5, 0.5]
