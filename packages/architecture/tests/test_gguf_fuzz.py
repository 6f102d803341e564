"""Nothing that a file holds ends in anything but success or one sentence."""

import random
from collections import Counter

import pytest
from bitnet_arch import UserError
from bitnet_arch.gguf import read_gguf
from bitnet_arch.gguf.fuzz import STAGES, fuzz_random, mutate, rewritten, try_bytes, try_file, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return [read_gguf(path) for path in write_corpus(tmp_path_factory.mktemp("corpus"))]


def test_the_corpus_is_read_in_every_way(corpus):
    assert [try_file(file.path) for file in corpus] == [""] * len(corpus)
    assert {info.ggml_id for file in corpus for info in file.tensors.values()} == {0, 1, 3, 8, 14, 30, 34, 36, 42}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 5), st.integers(0, 10**6))
def test_bytes_changed_at_random(corpus, which, seed):
    file = corpus[which]
    assert STAGES.issuperset(try_bytes(mutate(file.data.tobytes(), file.infos_end, random.Random(seed))).split())


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 5), st.integers(0, 10**6))
def test_keys_and_tensors_that_do_not_belong_together(corpus, which, seed):
    assert STAGES.issuperset(try_bytes(rewritten(corpus[which], random.Random(seed))).split())


def test_a_file_written_anew_is_the_file(corpus, tmp_path):
    class Never(random.Random):
        def randrange(self, *_):
            return 0

        def choice(self, items):
            return "general.nothing" if isinstance(items, list) and isinstance(items[0], str) else items[0]

    # Its first change is to delete a key; of one that nothing reads, the file stays what it was.
    file = corpus[0]
    file.metadata["general.nothing"] = 0
    (tmp_path / "same.gguf").write_bytes(rewritten(file, Never()))
    del file.metadata["general.nothing"]
    again = read_gguf(tmp_path / "same.gguf")
    assert again.metadata == file.metadata
    assert all((again.raw(name) == file.raw(name)).all() for name in file.tensors)


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        (lambda file, pick: mutate(file.data.tobytes(), file.infos_end, pick), ("read", "import", "nothing")),
        (rewritten, ("read", "import", "tokenizer", "nothing")),
    ],
    ids=["bytes", "keys and tensors"],
)
def test_mutations_reach_every_stage(change, stages, corpus):
    refused = Counter()
    for seed in range(300):
        refused.update(try_bytes(change(corpus[seed % 6], random.Random(seed))).split() or ["nothing"])
    assert min(refused[stage] for stage in stages) > 5


def test_a_bug_would_be_found_and_its_input_kept(corpus, monkeypatch):
    folder = corpus[0].path.parent
    monkeypatch.setattr("bitnet_arch.gguf.reader.tensor_bytes", lambda ggml_id, shape: 8)
    with pytest.raises(ValueError, match=r"reshape|size"):
        fuzz_random(folder, 20)
    monkeypatch.undo()
    kept = folder / "crash.bin"
    assert kept.is_file()
    try:
        try_file(kept)
    except UserError as error:
        pytest.fail(str(error))
    kept.unlink()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_minute_of_mutations(corpus):
    """Longer runs, guided by coverage: scripts/fuzz_gguf.py."""
    assert sum(fuzz_random(corpus[0].path.parent, 50, seed=3).values()) > 1000
