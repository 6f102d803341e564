"""Nothing that a model directory's weights hold ends in anything but success or one sentence."""

import json
import random
from collections import Counter

import pytest
import torch
from bitnet_arch import UserError, load_model, open_weights
from bitnet_arch.fuzz_weights import (
    fuzz_directories,
    header_size,
    rewritten_weights,
    try_directory,
    try_weights,
    write_directories,
)
from bitnet_arch.gguf.fuzz import mutate
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    return write_directories(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def contents(directories):
    return [(path / "model.safetensors").read_bytes() for path in directories]


@pytest.fixture
def restored(directories, contents):
    yield
    for path, data in zip(directories, contents, strict=True):
        (path / "model.safetensors").write_bytes(data)


def test_whole_directories_are_read_in_every_way(directories):
    # What is ternary already is not converted.
    assert [try_directory(path) for path in directories] == ["", "convert", "convert", "convert"]


@pytest.mark.usefixtures("restored")
def test_mutations_reach_every_stage(directories, contents):
    refused = Counter()
    for seed in range(400):
        pick, which = random.Random(seed), seed % 4
        data = contents[which]
        changed = rewritten_weights(data, pick) if seed % 2 else mutate(data, header_size(data), pick)
        refused.update(try_weights(directories[which], changed).split() or ["nothing"])
    assert refused["open"] > 100
    assert refused["nothing"] > 2
    assert refused["load"] > 2


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_fuzzing_leaves_its_corpus_alone(tmp_path):
    write_directories(tmp_path)
    before = files(tmp_path)
    assert sum(fuzz_directories(tmp_path, 1).values()) > 1
    assert files(tmp_path) == before


def test_a_bug_would_be_found_and_the_directory_kept(tmp_path, monkeypatch):
    write_directories(tmp_path)
    before = files(tmp_path)
    monkeypatch.setattr("bitnet_arch.weights.WeightReader._matrix_shape", lambda self, name: self.missing)
    with pytest.raises(AttributeError):
        fuzz_directories(tmp_path, 20)
    with pytest.raises(AttributeError):  # an earlier finding is no part of the corpus
        fuzz_directories(tmp_path, 20, seed=1)
    monkeypatch.undo()
    try_directory(tmp_path / "crash")
    assert {name: data for name, data in files(tmp_path).items() if not name.startswith("crash/")} == before


def changed(directory, tmp_path, **tensors):
    """Return a copy of a directory with other tensors."""
    out = tmp_path / "m"
    out.mkdir()
    (out / "config.json").write_text((directory / "config.json").read_text())
    state = load_file(directory / "model.safetensors")
    state |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


LAYER = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("key", "tensor", "words"),
    [
        ("weight_scale", torch.ones(32), "is not a positive number"),
        ("weight_scale", torch.ones(1, 32), "is not a positive number"),
        ("in_norm.eps", torch.ones(2), r"in_norm\.eps' is \[2\], but config\.json asks for \[\]"),
        ("weight", torch.zeros(8, 16, dtype=torch.uint8), r"weight' is \[8, 16\], but config\.json asks for \[8, 32\]"),
        ("weight", torch.zeros(32, 32, dtype=torch.float8_e4m3fn), "is no packed bytes"),
        ("weight", torch.full((8, 32), 3, dtype=torch.uint8), "holds a code outside"),
        ("weight", torch.zeros(256, dtype=torch.uint8), "and no matrix"),
    ],
    ids=["scale-vector", "scale-row", "eps", "shape", "float8", "code", "vector"],
)
def test_a_wrong_tensor_of_our_own_form_is_named(key, tensor, words, directories, tmp_path):
    directory = changed(directories[3], tmp_path, **{f"{LAYER}.{key}": tensor})
    with pytest.raises(UserError, match=words):
        load_model(directory)


def test_codes_of_any_type_are_read_or_refused(directories, tmp_path):
    codes = torch.ones(32, 32, dtype=torch.bool)
    with open_weights(changed(directories[2], tmp_path, **{f"{LAYER}.weight": codes})) as reader:
        assert torch.equal(reader.ternary(f"{LAYER}.weight")[0], codes.to(torch.int8))


def test_a_header_of_our_making_is_a_header(contents):
    for seed in range(50):
        data = rewritten_weights(contents[0], random.Random(seed))
        assert isinstance(json.loads(data[8 : header_size(data)]), dict)
