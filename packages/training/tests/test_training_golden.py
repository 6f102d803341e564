"""The first 50 losses of a fixed run on synthetic tokens, against recorded ones.

The tolerance covers other processors and thread counts: float32 sums in another order, and the codes they flip. To record anew
after a change that is meant to move the numbers: `uv run python packages/training/tests/test_training_golden.py`.
"""

import json
from pathlib import Path

import pytest
import torch
from bitnet_arch.testing import tiny_bitnet
from wrinklefree.config import TrainingConfig
from wrinklefree.module import model_logits
from wrinklefree.objective import token_loss_sum
from wrinklefree.optim import build_optimizer, parameter_groups
from wrinklefree.schedules import learning_rate_share

GOLDEN = Path(__file__).parent / "golden" / "loss_curve.json"
TOLERANCE = 0.05
CONFIG = TrainingConfig(max_steps=50, rows_per_step=8, learning_rate=3e-3, warmup_share=0.1, grad_clip=1.0)


def batches(generator):
    """Counting modulo 61 in steps of 1 to 5: learnable, and the same everywhere."""
    while True:
        start = torch.randint(0, 61, (8, 1), generator=generator)
        stride = torch.randint(1, 6, (8, 1), generator=generator)
        ids = (start + stride * torch.arange(32)) % 61
        yield {"input_ids": ids, "document_ids": torch.ones_like(ids), "position_ids": torch.arange(32).expand(8, 32)}


def curve():
    model = tiny_bitnet(hidden=64, ffn=128, vocab=64, heads=4, kv_heads=2).train()
    optimizer = build_optimizer(parameter_groups(model, CONFIG), CONFIG)
    losses = []
    for step, batch in zip(range(CONFIG.max_steps), batches(torch.Generator().manual_seed(0)), strict=False):
        share = learning_rate_share(CONFIG.schedule, step, CONFIG.max_steps, CONFIG.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.learning_rate * share
        loss, count = token_loss_sum(model_logits(model, batch), batch["input_ids"])
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss.detach() / count), 4))
    return losses


def test_the_curve_is_the_recorded_one():
    recorded = json.loads(GOLDEN.read_text())
    losses = curve()
    assert losses[0] == pytest.approx(recorded[0], abs=1e-3)
    assert losses == pytest.approx(recorded, abs=TOLERANCE)
    assert losses[-1] < losses[0] - 1


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(curve()) + "\n")
