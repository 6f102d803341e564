"""What several files' tests start from and takes seconds to make."""

import pydoc_data.topics

import pytest
import torch
from bitnet_arch.testing import tiny_llama, tiny_tokenizer, train_tiny


@pytest.fixture(scope="session")
def trained():
    """Return the tensors of a trained `tiny_llama(hidden=64, ffn=192)`, and tokens: to calibrate on, to judge by, and the rest."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[key] for key in sorted(topics))
    ids = torch.tensor(tiny_tokenizer()(text[:60_000]).input_ids)
    state = train_tiny(tiny_llama(hidden=64, ffn=192), steps=300).state_dict()
    return state, ids[:1024].view(8, 128), ids[4096:6144].view(16, 128), ids[6144:]
