import numpy as np
import pytest
import torch
from bitnet_arch.testing import tiny_llama
from data_handler import PackedStream, collate, document_attention_mask
from data_handler.packing import Piece, Row, Store, row_tensors

DOCUMENTS = [np.arange(10, 19), np.arange(40, 52), np.arange(100, 107)]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(hidden=64, ffn=128, layers=3)


@pytest.fixture(scope="module")
def batch():
    pieces = [Piece(Store(document), 0, len(document)) for document in DOCUMENTS]
    return collate([row_tensors(Row(28, order), 32, 0, 0) for order in (pieces, pieces[::-1])])


def logits(model, batch, exact=True):
    mask = document_attention_mask(batch["document_ids"]) if exact else None
    positions = batch["position_ids"] if exact else torch.arange(batch["input_ids"].shape[1])[None]
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions).logits


@pytest.mark.parametrize("document", [1, 2, 3])
def test_a_changed_token_reaches_its_own_document_only(document, model, batch):
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    at = int((batch["document_ids"][0] == document).nonzero()[1])
    changed["input_ids"][0, at] = 400
    before, after = logits(model, batch), logits(model, changed)
    other = batch["document_ids"] != document
    other[1] = True
    assert torch.equal(before[other], after[other])
    own = (batch["document_ids"][0] == document) & (torch.arange(32) >= at)
    assert ((before[0, own] - after[0, own]).abs().amax(-1) > 1e-4).all()


def test_plain_causal_attention_does_cross_documents(model, batch):
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 1] = 400
    before, after = logits(model, batch, exact=False), logits(model, changed, exact=False)
    later = batch["document_ids"][0] == 2
    assert ((before[0, later] - after[0, later]).abs().amax(-1) > 1e-5).all()


def test_each_document_has_the_logits_it_has_alone(model, batch):
    together = logits(model, batch)
    assert torch.isfinite(together).all()
    for number, document in enumerate(DOCUMENTS, 1):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor(document)[None]).logits[0]
        torch.testing.assert_close(together[0][batch["document_ids"][0] == number], alone, atol=2e-5, rtol=0)
    # Control: positions that do not restart give other logits for the second document, even under the exact mask.
    running = {**batch, "position_ids": torch.arange(32)[None].expand(2, -1) ** 2}
    second = batch["document_ids"][0] == 2
    assert (logits(model, running)[0, second] - together[0, second]).abs().max() > 1e-4


def test_the_mask_equals_its_definition():
    ids = torch.tensor([[1, 1, 2, 0, 0], [1, 2, 2, 2, 0]])
    mask = document_attention_mask(ids)
    assert mask.shape == (2, 1, 5, 5)
    assert mask.dtype == torch.bool
    for b in range(2):
        for q in range(5):
            for k in range(5):
                same = ids[b, q] == ids[b, k] != 0
                assert mask[b, 0, q, k] == (q == k or (k <= q and bool(same)))


def test_the_loss_of_a_real_row_counts_labelled_positions_only(model, config, byte_tokenizer):
    rows = [row for row, _ in zip(PackedStream(config, byte_tokenizer).rows(), range(4), strict=False)]
    real = collate(rows)
    shuffled = {**real, "input_ids": real["input_ids"].where(real["document_ids"] > 0, 333)}
    losses = []
    for b in (real, shuffled):
        out = logits(model, b)[:, :-1].flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(out, b["labels"][:, 1:].flatten()))
    assert torch.equal(losses[0], losses[1])
