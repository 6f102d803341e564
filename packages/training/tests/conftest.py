import random

import pytest

WORDS = ["the", "a", "model", "weight", "is", "one", "zero", "minus", "and", "of", "train", "data", "loss", "small", "fast", "code"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of made-up documents in two domains: word salads of a fixed seed, and counting."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for i in range(60):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(20, 90)))
        (folder / f"salad-{i:02d}.txt").write_text(text)
        (folder / f"count-{i:02d}.txt").write_text(" ".join(str(n) for n in range(i, i + 30)))
    return folder


@pytest.fixture
def overrides(corpus, tmp_path):
    """Overrides of a run that takes a second: a 2-layer model of width 64 on the made-up corpus."""
    return [
        "data=text",
        "data.sources=["
        f"{{name: salad, kind: text, path: '{corpus}/salad-*.txt'}}, {{name: count, kind: text, path: '{corpus}/count-*.txt'}}]",
        "data.sequence_length=32",
        f"data.cache_dir={corpus.parent / 'cache'}",
        "data.heldout_share=0.1",
        "data.heldout_tokens=1024",
        "training=smoke",
        "training.threads=1",
        "model.shape.hidden_size=64",
        "model.shape.intermediate_size=128",
        "model.shape.num_hidden_layers=2",
        "model.shape.vocab_size=512",
        f"output_dir={tmp_path / 'run'}",
    ]
