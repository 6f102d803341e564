import pytest
import torch
from bitnet_arch import bitlinear_layers
from bitnet_arch.testing import tiny_bitnet, tiny_llama
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from wrinklefree import likelihood
from wrinklefree.config import TrainingConfig
from wrinklefree.evaluation import mean_gradient, mean_loss
from wrinklefree.module import model_logits
from wrinklefree.objective import token_loss_sum
from wrinklefree.optim import parameter_groups, relative_rates
from wrinklefree.schedules import LEARNING_RATE_SCHEDULES, learning_rate_share
from wrinklefree.teachers import made


def training(**changes):
    return TrainingConfig(**({"max_steps": 10, "rows_per_step": 2, "learning_rate": 1e-3} | changes))


def test_the_loss_is_the_textbooks_and_sums_over_parts():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[0, 3:] = -100
    loss, count = token_loss_sum(logits, labels)
    by_hand = [-logits[b, t].log_softmax(-1)[labels[b, t + 1]] for b in range(3) for t in range(6) if labels[b, t + 1] != -100]
    torch.testing.assert_close(loss, torch.stack(by_hand).sum())
    assert int(count) == len(by_hand)
    parts = [token_loss_sum(logits[i : i + 1], labels[i : i + 1])[0] for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(), loss)


def test_a_row_without_labels_adds_nothing():
    loss, count = token_loss_sum(torch.randn(1, 4, 5), torch.full((1, 4), -100))
    assert float(loss) == 0.0
    assert int(count) == 0


class Rows(TorchDispatchMode):
    """Remembers of how many tokens any operation makes something as wide as the vocabulary."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.vocabulary:
                self.most = max(self.most, tensor.numel() // self.vocabulary)
        return out


VOCABULARY, TIME, PIECE = 512, 24, 40


def texts():
    """Eight rows of two documents and padding."""
    ids = torch.randint(1, VOCABULARY, (8, TIME), generator=torch.Generator().manual_seed(0))
    document_ids = torch.tensor([1] * 12 + [2] * 8 + [0] * 4).expand_as(ids)
    position_ids = torch.tensor([*range(12), *range(8), *[0] * 4]).expand_as(ids)
    labels = torch.where((document_ids == 0) | (position_ids == 0), -100, ids)
    return {"input_ids": ids, "labels": labels, "position_ids": position_ids, "document_ids": document_ids}


def split(batch):
    return [{name: value[row] for name, value in batch.items()} for row in range(8)]


LOOKS = {
    "loss": lambda model, batch: mean_loss(model, split(batch)),
    "gradient": lambda model, batch: mean_gradient(model, split(batch)),
    "teacher": lambda model, batch: made.train_float(model, batch, steps=1, rows_per_step=8),
}


@pytest.mark.parametrize("look", LOOKS)
def test_evaluations_and_the_teachers_training_never_hold_logits_of_all_tokens(look, monkeypatch):
    monkeypatch.setattr(likelihood, "PIECE_ELEMENTS", PIECE * VOCABULARY)
    monkeypatch.setattr(made, "BatchLoader", lambda stream, rows_per_step: [stream])
    model, batch = tiny_llama(hidden=32, ffn=64, vocab=VOCABULARY), texts()
    expected, count = token_loss_sum(model_logits(model, batch), batch["labels"])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(expected / count, model.parameters())])
    with Rows(VOCABULARY) as seen:
        found = LOOKS[look](model, batch)
    assert seen.most == PIECE
    if look == "gradient":
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    else:
        assert found == pytest.approx(float((expected / count).detach()), rel=1e-5)
    with Rows(VOCABULARY) as seen:  # the control
        model_logits(model, batch)
    assert seen.most == 8 * TIME


@torch.no_grad()
def test_changing_one_document_changes_no_logit_of_another():
    model = tiny_bitnet(hidden=64, ffn=128)
    ids = torch.arange(1, 17)[None]
    batch = {
        "input_ids": ids,
        "document_ids": torch.tensor([[1] * 9 + [2] * 7]),
        "position_ids": torch.tensor([[*range(9), *range(7)]]),
    }
    changed = batch | {"input_ids": torch.where(batch["document_ids"] == 1, ids + 20, ids)}
    a, b = model_logits(model, batch), model_logits(model, changed)
    assert torch.equal(a[:, 9:], b[:, 9:])
    assert not torch.equal(a[:, :9], b[:, :9])
    # Control: as one document the change is felt.
    joined = {"document_ids": torch.ones_like(ids), "position_ids": torch.arange(16)[None]}
    assert not torch.equal(model_logits(model, batch | joined)[:, 9:], model_logits(model, changed | joined)[:, 9:])
    # The second document sees what it would see alone.
    alone = {k: v[:, 9:] for k, v in batch.items()}
    torch.testing.assert_close(model_logits(model, alone), a[:, 9:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LEARNING_RATE_SCHEDULES)
def test_schedules_warm_up_peak_and_never_stop_the_run(kind):
    shares = [learning_rate_share(kind, step, 50, 5) for step in range(50)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(shares) == 1.0
    assert min(shares) > 0.0
    assert (shares[-1] < 0.15) == (kind != "constant")


def test_wsd_is_constant_and_then_falls():
    shares = [learning_rate_share("wsd", step, 100, 0) for step in range(100)]
    assert set(shares[:80]) == {1.0}
    assert shares[90] == pytest.approx(0.5)


def test_norms_and_embeddings_do_not_decay():
    model = tiny_bitnet(hidden=64, ffn=128)
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in parameter_groups(model, training())}
    assert set(groups) == {0.0, 0.1}
    assert {id(layer.weight) for _, layer in bitlinear_layers(model)} == groups[0.1]
    assert id(model.model.embed_tokens.weight) in groups[0.0]
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_a_small_matrix_gets_a_small_rate_and_turns_as_slowly_as_the_others():
    def flipped(relative):
        model = tiny_bitnet(hidden=64, ffn=128, seed=1)
        small = model.model.layers[0].mlp.up_proj
        with torch.no_grad():
            small.weight.mul_(0.01)
        before = {name: layer.weight.sign() for name, layer in bitlinear_layers(model)}
        optimizer = torch.optim.AdamW(parameter_groups(model, training(relative_learning_rate=relative)), lr=1e-3)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * group["rate_share"]
        ids = torch.arange(1, 33)[None]
        for _ in range(3):
            F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad()
        share = {name: (layer.weight.sign() != before[name]).float().mean().item() for name, layer in bitlinear_layers(model)}
        return share["model.layers.0.mlp.up_proj"], share["model.layers.1.mlp.up_proj"]

    small, ordinary = flipped(relative=False)
    assert small > 5 * ordinary
    small, ordinary = flipped(relative=True)
    assert small < 2 * ordinary


def test_relative_rates_are_one_where_all_matrices_are_alike():
    rates = relative_rates(tiny_bitnet(hidden=64, ffn=128))
    assert all(0.9 < rate <= 1.0 for rate in rates.values())
