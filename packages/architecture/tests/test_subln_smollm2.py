"""SubLN insertion on a real pretrained model (docs/experiments.md)."""

import pydoc_data.topics

import pytest
import torch
from bitnet_arch import (
    ConversionConfig,
    convert_model,
    load_float_model,
    load_tokenizer,
    resolve_pretrained,
    set_lambda,
)
from torch.nn import functional as F

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_default_insertion_keeps_smollm2_and_gain_one_destroys_it():
    source = resolve_pretrained(SMOLLM2)
    topics = pydoc_data.topics.topics
    ids = torch.tensor(load_tokenizer(source.path)("\n".join(topics[key] for key in sorted(topics))).input_ids)
    calibration, heldout = ids[:2048].view(4, 512), ids[40_000:42_048].view(4, 512)

    @torch.no_grad()
    def nll(model):
        logits = model(input_ids=heldout, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), heldout[:, 1:].flatten()).item()

    def converted(config):
        model = convert_model(load_float_model(source), config, [calibration] if config.calibrates else None)
        set_lambda(model, 0.0)
        return nll(model)

    original = nll(load_float_model(source))
    assert original < 2.9
    assert converted(ConversionConfig(gain="one")) > 10
    assert 3.4 < converted(ConversionConfig(softness=0.0)) < 3.9
    assert converted(ConversionConfig()) < 3.0
    assert converted(ConversionConfig(softness=1.0)) < original + 0.05
