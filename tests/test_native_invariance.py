"""What must not change a bit of the native engine's results: batch, cuts, threads, for every head, cache and instruction set."""

import bitnet_kernels
import numpy as np
import pytest
import torch
from bitnet_arch import ConversionConfig, convert_model, save_packed
from bitnet_arch.diffusion import add_mask_token
from bitnet_arch.gguf import export_gguf, from_gguf
from bitnet_arch.gguf.fuzz import assemble
from bitnet_arch.gguf.reader import read_gguf
from bitnet_arch.testing import ODD_SHAPE, assert_equal_up_to_edges, tiny_decoder, tiny_llama, tiny_tokenizer
from bitnet_kernels import Engine

HEADS = ("f16", "bf16", "q8_0", "q6_k", "q4_1")
TEXTS = torch.randint(0, 511, (6, 12), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _as_before():
    isa, threads = bitnet_kernels.isa(), bitnet_kernels.threads()
    bitnet_kernels.set_threads(1)
    yield
    bitnet_kernels.use_isa(isa)
    bitnet_kernels.set_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a file with each type of head, wide enough for products to be cut into chunks."""
    folder = tmp_path_factory.mktemp("heads")
    save_packed(
        convert_model(tiny_llama(hidden=512, ffn=1024, tied=False), ConversionConfig(norm="none")),
        folder / "m",
        tiny_tokenizer(512),
    )
    for head in HEADS:
        export_gguf(folder / "m", folder / f"{head}.gguf", embedding=head)
    return {head: folder / f"{head}.gguf" for head in HEADS}


@pytest.fixture(scope="module")
def expected(files):
    """Return torch's logits of every file."""
    with torch.no_grad():
        return {head: from_gguf(path)(input_ids=TEXTS).logits for head, path in files.items()}


@pytest.mark.parametrize(("head", "cache"), [*((head, "f32") for head in HEADS), ("q6_k", "f16"), ("q8_0", "int8")])
@pytest.mark.parametrize("isa", bitnet_kernels.available_isas())
def test_batch_cuts_and_threads_change_nothing(head, isa, cache, files):
    bitnet_kernels.use_isa(isa)
    text = TEXTS.flatten().tolist()[:24]
    whole = Engine(files[head], cache=cache).logits(text)
    other = Engine(files[head], cache=cache).logits(text[::-1])
    assert not np.array_equal(whole, other)
    for threads in (1, 3):
        bitnet_kernels.set_threads(threads)
        engine = Engine(files[head], slots=5, cache=cache)
        assert np.array_equal(engine.logits(text), whole)
        for slot, cut in ((1, 1), (2, 7)):
            pieces = [engine.step({slot: text[i : i + cut]}, rows="all") for i in range(0, len(text), cut)]
            assert np.array_equal(np.concatenate(pieces), whole)
        assert np.array_equal(engine.step({3: text[::-1], 4: text}, rows="all"), np.concatenate([other, whole]))
        engine.truncate(3, 0)
        engine.truncate(4, 20)
        assert np.array_equal(engine.step({4: text[20:22], 3: text[:1]}), whole[[21, 0]])


@pytest.mark.parametrize("isa", bitnet_kernels.available_isas())
def test_every_instruction_set_gives_the_logits_of_training(isa, files, expected):
    bitnet_kernels.use_isa(isa)
    for head in HEADS:
        found = torch.stack([torch.from_numpy(Engine(files[head]).logits(text)) for text in TEXTS.tolist()])
        assert_equal_up_to_edges(found, expected[head])


def test_a_window_or_a_block_that_is_wrong_by_one_is_no_rounding(tmp_path):
    """The control of the comparison with training: what it must not let through."""
    decoder = tiny_decoder("qwen2-sliding", ODD_SHAPE | {"vocab_size": 511}, sliding_window=6)
    model, tokenizer = convert_model(decoder, ConversionConfig(norm="none")), tiny_tokenizer(511)
    add_mask_token(model, tokenizer, block_size=4, token_shift=False)
    save_packed(model, tmp_path / "m", tokenizer)
    export_gguf(tmp_path / "m", tmp_path / "model.gguf")
    file = read_gguf(tmp_path / "model.gguf")
    tensors = [(n, i.shape, i.ggml_id, bytes(file.data[i.offset : i.offset + i.nbytes])) for n, i in file.tensors.items()]

    def logits(window, *blocks):
        path = tmp_path / "changed.gguf"
        path.write_bytes(assemble(file.metadata | {"wrinklefree.attention.sliding_window": window}, tensors))
        engine, found = Engine(path), []
        for text in TEXTS.tolist():
            engine.truncate(0, 0)
            pieces, at = [], 0
            for size in blocks:
                pieces.append(engine.step({0: text[at : at + size]}, rows="all", bidirectional=True))
                at += size
            found.append(np.concatenate(pieces))
        return torch.from_numpy(np.stack(found))

    right = logits(6, 4, 4, 4)
    assert_equal_up_to_edges(logits(6, 4, 4, 4), right)
    for window, blocks in ((5, (4, 4, 4)), (7, (4, 4, 4)), (6, (4, 4, 3, 1)), (6, (4, 4, 1, 3)), (6, (12,))):
        with pytest.raises(AssertionError, match="texts differ"):
            assert_equal_up_to_edges(logits(window, *blocks), right)
