"""The decoder runtime against the torch forward of the same file, family by family, and what must not change its results."""

import itertools
import os
import random
import threading

import bitnet_kernels
import gguf
import numpy as np
import pytest
import torch
from bitnet_arch import ConversionConfig, UserError, convert_model, save_master, save_packed
from bitnet_arch.attention import attention_argument
from bitnet_arch.diffusion import add_mask_token
from bitnet_arch.gguf import export_gguf, from_gguf, read_gguf
from bitnet_arch.gguf.fuzz import mutate
from bitnet_arch.lrc.model import start_lrc
from bitnet_arch.testing import (
    FORMS,
    ODD_SHAPE,
    assert_equal_up_to_edges,
    convert_calibrated,
    softened,
    tiny_bitnet,
    tiny_decoder,
    tiny_llama,
    tiny_tokenizer,
)
from bitnet_kernels import Engine, _native
from hypothesis import given, settings
from hypothesis import strategies as st

WIDE = ODD_SHAPE | {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}  # rows that every type can have
ARCHITECTURES = {
    "bitnet-none": "bitnet",
    "llama-none": "llama",
    "qwen2-none": "qwen2",
    "qwen3-none": "qwen3",
    "gemma3-none": "gemma3",
}
CASES = [
    ("bitnet", "none"),
    ("bitnet-2b4t", "none"),
    *itertools.product(["llama"], FORMS),
    ("llama-untied", "subln-groups-rotated"),
    ("qwen2", "none"),
    ("qwen2-sliding", "bitlinear"),
    ("qwen3", "none"),
    ("qwen3", "subln-rows"),
    ("qwen3-linear", "allnorm"),
    ("gemma3", "none"),
    ("gemma3-capped", "bitlinear"),
    ("gemma3-capped", "subln-groups-rotated"),
]
TEXTS = torch.randint(
    0, 511, (6, 12), generator=torch.Generator().manual_seed(5)
)  # several: a rounding edge in one spoils no other


@pytest.fixture(autouse=True)
def _as_before():
    isa, threads = bitnet_kernels.isa(), bitnet_kernels.threads()
    bitnet_kernels.set_threads(1)
    yield
    bitnet_kernels.use_isa(isa)
    bitnet_kernels.set_threads(threads)


def write(model, folder, kind="auto", **options):
    """Write a ternary model and its file; return the file."""
    save_master(model, folder / "m", tiny_tokenizer(512))
    export_gguf(folder / "m", folder / "model.gguf", kind, **options)
    return folder / "model.gguf"


def form(model, name):
    return convert_calibrated(model, softened(**FORMS[name]), [TEXTS])


@torch.no_grad()
def reference(path, texts=TEXTS):
    return from_gguf(path)(input_ids=texts).logits


def engine_logits(path, texts=TEXTS, **options):
    engine = Engine(path, **options)
    return torch.stack([torch.from_numpy(engine.logits(text.tolist())) for text in texts])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a small file."""
    return write(form(tiny_decoder("qwen3", ODD_SHAPE), "subln"), tmp_path_factory.mktemp("plain"))


# ----------------------------------------------------------------------------------------------------- equal to training


@pytest.mark.parametrize(("variant", "name"), CASES, ids=lambda value: value)
def test_every_family_and_form_gives_the_logits_of_training(variant, name, tmp_path):
    path = write(form(tiny_decoder(variant, ODD_SHAPE), name), tmp_path)
    expected = ARCHITECTURES.get(f"{variant}-{name}", "wrinklefree")
    assert Engine(path).architecture == expected
    assert_equal_up_to_edges(engine_logits(path), reference(path))


def correcting(model):
    """Let the low-rank corrections of a model's layers say something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lrc_u"):
                parameter.normal_(std=0.3)
    return model


def test_a_low_rank_correction_is_added(tmp_path):
    model = start_lrc(form(tiny_decoder("llama", ODD_SHAPE), "subln"), 5)
    without = write(model, tmp_path)
    before = engine_logits(without)
    (tmp_path / "with").mkdir()
    path = write(correcting(model), tmp_path / "with")
    after = engine_logits(path)
    assert_equal_up_to_edges(after, reference(path))
    assert (after - before).abs().max() > 0.1 * before.abs().max()


@pytest.fixture(scope="module")
def corrected(tmp_path_factory):
    """Return a file with a low-rank correction."""
    model = start_lrc(form(tiny_decoder("llama", ODD_SHAPE), "subln"), 5)
    return write(correcting(model), tmp_path_factory.mktemp("corrected"))


@pytest.mark.parametrize("isa", bitnet_kernels.available_isas())
def test_a_low_rank_correction_depends_on_no_batch_or_cut_and_not_on_how_it_is_stored(isa, corrected, tmp_path):
    bitnet_kernels.use_isa(isa)
    text, other = TEXTS[0].tolist(), TEXTS[1].tolist()
    engine = Engine(corrected, slots=3)
    whole = engine.logits(text)
    engine.truncate(0, 0)
    pieces = [engine.step({0: text[i : i + 5], 1: other[i : i + 5]}, rows="all") for i in range(0, len(text), 5)]
    assert np.array_equal(np.concatenate([piece[: len(piece) // 2] for piece in pieces]), whole)
    file = read_gguf(corrected)
    names = [name for name in file.tensors if name.endswith(("lrc_u", "lrc_v"))]
    assert {file.tensors[name].ggml_id for name in names} == {1}
    wide = rewrite(corrected, tmp_path / "wide.gguf", drop=names, add=[(name, file.dequantize(name)) for name in names])
    assert read_gguf(wide).tensors[names[0]].ggml_id == 0
    assert np.array_equal(Engine(wide).logits(text), whole)


@pytest.mark.parametrize("name", ["blk.0.attn_q.lrc_u", "blk.1.ffn_down.lrc_v"])
def test_a_low_rank_correction_that_is_no_number_is_refused_by_name(name, corrected, tmp_path):
    data, info = bytearray(corrected.read_bytes()), read_gguf(corrected).tensors[name]
    data[info.offset + info.nbytes - 2 : info.offset + info.nbytes] = np.float16("inf").tobytes()
    (tmp_path / "inf.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=f"its tensor {name} holds values that are no numbers"):
        Engine(tmp_path / "inf.gguf")


@pytest.mark.parametrize("kind", ["f16", "bf16", "tq1_0", "tq2_0", "q2_0", "i2_s"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group128"])
def test_every_type_of_matrix_with_every_scale(kind, granularity, tmp_path):
    model = tiny_decoder("llama-plain", WIDE, tie_word_embeddings=True)
    path = write(convert_model(model, ConversionConfig(norm="none", granularity=granularity)), tmp_path, kind)
    assert_equal_up_to_edges(engine_logits(path), reference(path))


@pytest.mark.parametrize(("granularity", "kind"), [("tensor", "tq2_0"), ("row", "tq2_0"), ("row", "f16")])  # the ways to repack
def test_matrices_of_several_pieces_are_repacked_alike_by_any_number_of_threads(granularity, kind, tmp_path):
    """More than 2^20 weights of a matrix and 4 MiB of a head, of which threads pack pieces (repack.cpp, blocks_product.cpp)."""
    model = tiny_llama(ffn=79 * 256, layers=1, vocab=20_001, tied=False)
    config = ConversionConfig(norm="none", granularity=granularity)
    path = write(convert_model(model, config), tmp_path, kind, embedding="q8_0")
    assert path.stat().st_size > 2 * 20_001 * 272 + 3 * 79 * 256 * 66
    texts, found = TEXTS[:3], {}
    for threads in (1, 3):
        bitnet_kernels.set_threads(threads)
        found[threads] = engine_logits(path, texts)
    assert torch.equal(found[1], found[3])
    assert_equal_up_to_edges(found[1], reference(path, texts))


@pytest.mark.parametrize("embedding", ["f16", "bf16", "q8_0", "q6_k", "q4_1"])
def test_every_type_of_embedding(embedding, tmp_path):
    model = tiny_decoder("llama-plain", WIDE)
    path = write(convert_model(model, ConversionConfig(norm="none")), tmp_path, embedding=embedding)
    assert_equal_up_to_edges(engine_logits(path), reference(path))


def rewrite(source, path, architecture=None, change=lambda key, value: value, drop=(), add=()):
    """Write a file anew with gguf-py: under another architecture, with other values, without some tensors or with more."""
    old = read_gguf(source)
    before = old.metadata["general.architecture"]
    architecture = architecture or before
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in old.metadata.items():
        if key == "general.architecture" or key.startswith("tokenizer."):
            continue
        value = change(key.removeprefix(f"{before}."), value)
        name = key.replace(f"{before}.", f"{architecture}.", 1) if key.startswith(before) else key
        kinds = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            np.float64: writer.add_float64,
            str: writer.add_string,
            list: writer.add_array,
        }
        kinds[type(value)](name, value)
    for name, info in old.tensors.items():
        if name in drop:
            continue
        if info.ggml_id == 0:
            writer.add_tensor(name, old.dequantize(name))
        else:
            writer.add_tensor(name, old.raw(name).reshape(*info.shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType(info.ggml_id))
    for name, values in add:
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["bitnet-25", "bitnet-b1.58"])
def test_microsofts_architectures_compute_relu2(architecture, tmp_path):
    path = write(tiny_bitnet(vocab=512), tmp_path, "tq2_0")
    renamed = rewrite(path, tmp_path / "renamed.gguf", architecture)
    assert_equal_up_to_edges(engine_logits(renamed), reference(renamed))
    assert (engine_logits(renamed) - engine_logits(path)).abs().max() > 0.1 * engine_logits(path).abs().max()


@pytest.mark.parametrize(
    "key", ["rope.freq_base", "attention.layer_norm_rms_epsilon", "attention.sliding_window", "embedding_scale"]
)
def test_what_a_file_says_is_what_is_computed(key, tmp_path):
    changes = {"head_dim": 64, "query_pre_attn_scalar": 256, "final_logit_softcapping": None}
    model = tiny_decoder("gemma3-capped", WIDE, **changes)
    path = write(form(model, "none"), tmp_path, "tq2_0")
    changed = tmp_path / "changed.gguf"
    changes = {
        "rope.freq_base": 2.0,
        "attention.layer_norm_rms_epsilon": 0.5,
        "attention.sliding_window": 2,
        "embedding_scale": 1.0,
    }
    rewrite(path, changed, change=lambda name, value: changes[key] if name == key else value)
    if key == "embedding_scale":  # which no model of the family has
        with pytest.raises(ValueError, match="scales its embeddings"):
            Engine(changed)
        return
    assert_equal_up_to_edges(engine_logits(changed), reference(changed))
    assert (engine_logits(changed) - engine_logits(path)).abs().max() > 1e-3


def test_a_position_far_into_the_context_is_turned_as_in_training(tmp_path):
    model = tiny_decoder("llama-plain", ODD_SHAPE, max_position_embeddings=600)
    path = write(form(model, "subln"), tmp_path)
    texts = torch.randint(0, 511, (1, 600), generator=torch.Generator().manual_seed(2))
    found, expected = engine_logits(path, texts)[0], reference(path, texts)[0]
    errors = (found - expected).abs().amax(-1) / expected.abs().max()
    assert errors.median() <= 1e-5
    assert errors[-100:].median() <= 1e-5


# --------------------------------------------------------------------------------------------- what must change nothing


@pytest.mark.parametrize("cut", [1, 5, 256])
def test_a_prompt_can_be_cut_anywhere(plain, cut):
    engine, text = Engine(plain), TEXTS.flatten().tolist()
    whole = engine.logits(text)
    engine.truncate(0, 0)
    pieces = [engine.step({0: text[i : i + cut]}, rows="all") for i in range(0, len(text), cut)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert engine.length() == len(text)


@pytest.mark.parametrize("name", ["subln", "subln-groups-rotated"])
def test_a_sequence_does_not_depend_on_the_others_in_its_batch(name, tmp_path):
    path = write(form(tiny_decoder("gemma3-capped", ODD_SHAPE), name), tmp_path)
    alone = Engine(path)
    engine = Engine(path, slots=6)
    lengths = [3, 12, 1, 7, 5, 9]
    texts = {slot: TEXTS[slot, :length].tolist() for slot, length in enumerate(lengths)}
    last = engine.step(texts)
    following = engine.step({slot: [slot + 1] for slot in reversed(range(6))})
    for slot, text in texts.items():
        assert np.array_equal(alone.logits(text)[-1], last[slot])
        assert np.array_equal(alone.step({0: [slot + 1]})[0], following[5 - slot])


def test_more_rows_than_pass_together(plain):
    engine = Engine(plain, slots=6, context=100)
    texts = {slot: torch.randint(0, 511, (90,), generator=torch.Generator().manual_seed(slot)).tolist() for slot in range(6)}
    together = engine.step(texts, rows="all")  # 540 rows
    alone = Engine(plain)
    assert np.array_equal(together, np.concatenate([alone.logits(text) for text in texts.values()]))


@pytest.mark.parametrize("rank", [0, 20])
def test_the_number_of_threads_changes_nothing(rank, tmp_path):
    model = tiny_llama(hidden=512, ffn=1536, vocab=512)  # matrices that are cut into chunks, and their corrections
    model = convert_model(model, ConversionConfig(norm="subln", gain="one"))
    path = write(correcting(start_lrc(model, rank)) if rank else model, tmp_path)
    texts = torch.randint(0, 511, (2, 120), generator=torch.Generator().manual_seed(3))  # and so is attention
    expected = engine_logits(path, texts)
    for count in (2, 3):
        bitnet_kernels.set_threads(count)
        assert torch.equal(engine_logits(path, texts), expected)


@pytest.mark.parametrize("variant", ["bitnet-2b4t", "qwen3", "gemma3"])  # the three activations
def test_every_instruction_set(variant, tmp_path):
    path = write(form(tiny_decoder(variant, ODD_SHAPE), "none"), tmp_path)
    expected = reference(path)
    for isa in bitnet_kernels.available_isas():
        bitnet_kernels.use_isa(isa)
        assert_equal_up_to_edges(engine_logits(path), expected)


def test_a_shared_prefix_need_not_be_computed_again(plain):
    engine, text = Engine(plain, slots=2), TEXTS[0].tolist()
    engine.step({0: text})
    engine.copy(0, 1, 7)
    assert engine.length(1) == 7
    again = engine.step({1: text[7:]}, rows="all")
    engine.truncate(0, 7)
    assert np.array_equal(engine.step({0: text[7:]}, rows="all"), again)
    assert np.array_equal(again, Engine(plain).logits(text)[7:])


@pytest.mark.parametrize(("cache", "bound"), [("f16", 5e-3), ("int8", 3e-2)])
@pytest.mark.parametrize("isa", bitnet_kernels.available_isas())
def test_a_smaller_cache_rounds_and_little_more(cache, bound, isa, tmp_path):
    path = write(form(tiny_decoder("qwen2-sliding", ODD_SHAPE), "subln"), tmp_path)
    bitnet_kernels.use_isa(isa)
    exact, rounded = engine_logits(path), engine_logits(path, cache=cache)
    assert 0 < (exact - rounded).abs().mean() < bound * exact.abs().max()


@pytest.mark.parametrize("cache", ["f16", "int8"])
def test_a_smaller_cache_changes_nothing_else(cache, plain):
    text = TEXTS.flatten().tolist()
    engine = Engine(plain, slots=3, cache=cache)
    whole = engine.logits(text)
    batch = engine.step({1: text[:30], 2: text[:50]})
    assert np.array_equal(batch, whole[[29, 49]])
    engine.copy(0, 1, 40)
    assert np.array_equal(engine.step({1: text[40:]}, rows="all"), whole[40:])
    engine.truncate(2, 20)
    assert np.array_equal(engine.step({2: text[20:25]}, rows="all"), whole[20:25])


def test_hidden_states_are_what_the_head_reads(plain):
    model = from_gguf(plain)
    with torch.no_grad():
        expected = model.base_model(input_ids=TEXTS).last_hidden_state
    engine, found = Engine(plain), []
    for text in TEXTS:
        engine.truncate(0, 0)
        found.append(torch.from_numpy(engine.hidden_states({0: text.tolist()}, rows="all")))
    assert_equal_up_to_edges(torch.stack(found), expected)


@pytest.mark.parametrize("variant", ["llama", "qwen2-sliding"])
def test_a_block_sees_itself_in_both_directions(variant, tmp_path):
    model = form(tiny_decoder(variant, ODD_SHAPE), "subln")
    tokenizer = tiny_tokenizer(511)
    model.resize_token_embeddings(511)
    add_mask_token(model, tokenizer, block_size=4, token_shift=False)
    save_packed(model, tmp_path / "m", tokenizer)
    export_gguf(tmp_path / "m", tmp_path / "model.gguf")
    restored, engine = from_gguf(tmp_path / "model.gguf"), Engine(tmp_path / "model.gguf")
    assert (engine.mask_token, engine.block_size, engine.token_shift) == (511, 4, False)
    positions = torch.arange(12)[None]
    allowed = positions[:, :, None] // 4 >= positions[:, None, :] // 4
    with torch.no_grad():
        mask = attention_argument(restored, allowed, positions, positions)
        expected = restored(input_ids=TEXTS, attention_mask=mask).logits
    found = []
    for text in TEXTS.tolist():
        engine.truncate(0, 0)
        found.append(np.concatenate([engine.step({0: text[i : i + 4]}, rows="all", bidirectional=True) for i in (0, 4, 8)]))
    assert_equal_up_to_edges(torch.from_numpy(np.stack(found)), expected)
    with pytest.raises(ValueError, match="diffusion model"):
        engine.generate([1], 3)


# ------------------------------------------------------------------------------------------------------------- texts


def test_greedy_text_is_that_of_torch(plain):
    model, prompt = from_gguf(plain), TEXTS[0].tolist()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    engine = Engine(plain)
    text = list(engine.generate(prompt, 10))
    assert text == ids[len(prompt) :]
    stop = text[4]
    assert list(engine.generate(prompt, 10, stop=[stop])) == text[: text.index(stop)]
    assert engine.statistics().tokens == 12 + 9 + 1 + text.index(stop)  # of the prompt, the slot held all but the last token


def test_a_sampled_text_follows_its_seed(plain):
    engine, prompt = Engine(plain), TEXTS[0].tolist()
    text = list(engine.generate(prompt, 20, temperature=1.0, seed=3))
    assert list(engine.generate(prompt, 20, temperature=1.0, seed=3)) == text
    assert list(engine.generate(prompt, 20, temperature=1.0, seed=4)) != text
    assert list(engine.generate(prompt, 20, temperature=1.0, top_k=1, seed=4)) == list(engine.generate(prompt, 20))


def test_a_text_whose_slot_was_used_says_so(plain):
    prompt = TEXTS[0].tolist()
    expected = list(Engine(plain).generate(prompt, 5))
    engine = Engine(plain, slots=2)
    first, second = engine.generate(prompt, 5), engine.generate(prompt, 5, slot=1)
    assert [(next(first), next(second)) for _ in range(5)] == [(token, token) for token in expected]
    for use in (
        lambda: next(engine.generate(prompt, 5)),
        lambda: engine.step({0: [1]}),
        lambda: engine.truncate(0, 3),
        lambda: engine.copy(1, 0, 5),
    ):
        text = engine.generate(prompt, 5)
        assert next(text) == expected[0]
        use()
        with pytest.raises(ValueError, match="slot 0 was used while a text was generated in it"):
            next(text)
    engine.truncate(0, 0)
    engine.generate(prompt, 5)  # nobody asks for its tokens
    assert engine.length(0) == 0


def shares(logits, temperature=1.0, top_k=0, top_p=1.0, draws=4000):
    drawn = [_native.sample(np.array(logits, np.float32), temperature, top_k, top_p, 7, i) for i in range(draws)]
    return np.bincount(drawn, minlength=len(logits)) / draws


def test_draws_have_the_probabilities_of_the_logits():
    logits = np.array([1.0, 3.0, 2.0, -2.0, 0.5])

    def softmax(values):
        return np.exp(values) / np.exp(values).sum()

    assert np.abs(shares(logits) - softmax(logits)).max() < 0.03
    assert np.abs(shares(logits, temperature=2.0) - softmax(logits / 2)).max() < 0.03
    assert np.abs(shares(logits, top_k=2) - [0, *softmax(np.array([3.0, 2.0])), 0, 0]).max() < 0.03
    assert np.abs(shares(logits, top_p=0.8) - [0, *softmax(np.array([3.0, 2.0])), 0, 0]).max() < 0.03
    assert shares(logits, top_p=0.3, draws=50)[1] == 1
    assert shares([2.0, 5.0, 5.0], temperature=0.0, draws=3)[1] == 1  # of equal ones the first


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e: e.step({0: []}), "a sequence has no tokens"),
        (lambda e: e.step({0: [512]}), "a token is 512: the model knows 0 to 511"),
        (lambda e: e.step({0: [-1]}), "a token is -1"),
        (lambda e: e.step({0: [2**40]}), "a token is"),
        (lambda e: e.step({2: [1]}), "slot is 2: the engine has 0 to 1"),
        (lambda e: e.step({0: [1] * 27}), "31 tokens do not fit the context of 30"),
        (lambda e: e.step({0: [1], 1: [1] * 31}), "31 tokens do not fit"),
        (lambda e: e.step({0: [1] * 10**6}, rows="all"), "1000004 tokens do not fit"),
        (lambda e: e.step({0: [1]}, rows="first"), "rows must be none, last or all"),
        (lambda e: e.step({0: [1]}, rows=np.eye(9)), "rows must be none, last or all, not array"),
        (lambda e: e.generate([1], 1, top_p=10**400), "top_p must be"),
        (lambda e: e.truncate(0, 5), "the slot holds 4 tokens"),
        (lambda e: e.truncate(0, -1), "the slot holds 4 tokens"),
        (lambda e: e.copy(0, 1, 5), "the slot holds 4 tokens"),
        (lambda e: e.copy(0, 3, 1), "slot is 3: there is no such slot"),
        (lambda e: e.length(-1), "there is no such slot"),
        (lambda e: e.generate([1] * 20, 12), "do not fit the context of 30"),
        (lambda e: e.generate([], 12), "a prompt and max_tokens of at least 1"),
        (lambda e: e.generate([512], 1), "a token is 512: the model knows 0 to 511"),
        (lambda e: e.generate([1], 1, slot=2), "slot is 2: the engine has 0 to 1"),
        (lambda e: e.generate([1], 0), "a prompt and max_tokens of at least 1"),
        (lambda e: e.generate([1], 1, temperature=-1.0), "the temperature must be"),
        (lambda e: e.generate([1], 1, top_k=-1), "top_k must be"),
        (lambda e: e.generate([1], 1, top_p=0.0), "top_p must be"),
        (lambda e: e.generate([1], 1, seed=-1), "seed is -1"),
        (lambda e: Engine("missing.gguf"), "missing.gguf cannot be read"),
        (lambda e: Engine("."), "it is no file"),
        (lambda e: Engine("x\0y"), "a path holds no NUL"),
        (lambda e: Engine("caf\udce9.gguf"), "caf\udce9.gguf cannot be read"),
        (lambda e: Engine("x", cache="int4"), "cache must be f32, f16 or int8"),
        (lambda e: Engine("x", slots=0), "slots and context must be at least 1"),
        (lambda e: e.logits([1] * 31), "31 tokens do not fit the context of 30"),
        (lambda e: e.logits([]), "a sequence has no tokens"),
        (lambda e: e.logits([1, 512]), "a token is 512"),
        (lambda e: e.prefill([1, 2] + [3] * 29), "31 tokens do not fit the context of 30"),
        (lambda e: e.prefill([1, 2, 512]), "a token is 512"),
        (lambda e: e.generate([1], 1, top_k=2**63), "top_k is 9223372036854775808: it must be below 2.63"),
        (lambda e: e.truncate(2**63, 0), "slot is 9223372036854775808: it must be below 2.63"),
    ],
)
def test_a_mistake_is_one_sentence_and_changes_nothing(plain, call, says):
    engine = Engine(plain, slots=2, context=30)
    engine.step({0: [1, 2, 3, 4]})
    with pytest.raises(ValueError, match=says) as raised:
        call(engine)
    assert "\n" not in str(raised.value)
    assert (engine.length(0), engine.length(1)) == (4, 0)
    assert np.array_equal(engine.step({0: [5]}), Engine(plain).logits([1, 2, 3, 4, 5])[4:])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda e: e.step([[1]]), "sequences: a mapping of slots to tokens is wanted, not list"),
        (lambda e: e.step({0: 1}), "tokens: a sequence is wanted, not int"),
        (lambda e: e.step({0: memoryview(np.ones(1, np.float16))}), "tokens: a sequence is wanted, not memoryview"),
        (lambda e: e.step({0: [np.eye(9)]}), "a token: a whole number is wanted, not array"),
        (lambda e: e.step({0: [1]}, bidirectional="no"), "bidirectional: True or False is wanted, not 'no'"),
        (lambda e: e.generate(None, 1), "prompt: a sequence is wanted"),
        (lambda e: e.generate([1], 1, stop=3), "stop: a sequence is wanted"),
        (lambda e: e.generate([1], 1, temperature="1"), "temperature: a number is wanted, not '1'"),
        (lambda e: e.generate_many(3, 1), "prompts: a sequence is wanted"),
    ],
)
def test_what_is_of_another_type_is_named_and_changes_nothing(plain, call, says):
    engine = Engine(plain, slots=2, context=30)
    engine.step({0: [1, 2]})
    with pytest.raises(TypeError) as caught:
        call(engine)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)
    assert (engine.length(0), engine.length(1)) == (2, 0)


@pytest.mark.parametrize("wrong", [1.9, 1.0, "1", None, np.float32(1), [1]], ids=repr)
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda e, wrong: e.step({wrong if wrong != [1] else (1,): [5]}), "slot"),
        (lambda e, wrong: e.step({0: [5, wrong]}), "a token"),
        (lambda e, wrong: e.log_probabilities({0: [wrong]}), "a token"),
        (lambda e, wrong: e.logits([wrong]), "a token"),
        (lambda e, wrong: e.logits([5], slot=wrong), "slot"),
        (lambda e, wrong: e.prefill([1, 2, wrong]), "a token"),
        (lambda e, wrong: e.prefill([1, 2], slot=wrong), "slot"),
        (lambda e, wrong: e.generate([1, wrong], 2), "a token"),
        (lambda e, wrong: e.generate([1], wrong), "max_tokens"),
        (lambda e, wrong: e.generate([1], 2, top_k=wrong), "top_k"),
        (lambda e, wrong: e.generate([1], 2, seed=wrong), "seed"),
        (lambda e, wrong: e.generate([1], 2, slot=wrong), "slot"),
        (lambda e, wrong: e.generate([1], 2, stop=[wrong if wrong != [1] else (1,)]), "stop"),
        (lambda e, wrong: e.generate_many([[1]], wrong), "max_tokens"),
        (lambda e, wrong: e.generate_many([[1]], 2, seed=wrong), "seed"),
        (lambda e, wrong: e.length(wrong), "slot"),
        (lambda e, wrong: e.truncate(wrong, 1), "slot"),
        (lambda e, wrong: e.truncate(0, wrong), "length"),
        (lambda e, wrong: e.copy(0, wrong, 1), "to"),
        (lambda e, wrong: Engine("x", slots=wrong), "slots"),
        (lambda e, wrong: Engine("x", context=wrong if wrong is not None else 1.5), "context"),
    ],
)
def test_what_is_no_whole_number_is_named_and_changes_nothing(plain, call, name, wrong):
    engine = Engine(plain, slots=2, context=30)
    engine.step({0: [1, 2, 3, 4]})
    with pytest.raises(TypeError, match=f"^{name}: a whole number is wanted, not ") as raised:
        call(engine, wrong)
    assert "\n" not in str(raised.value)
    assert (engine.length(0), engine.length(1)) == (4, 0)


def test_whole_numbers_of_numpy_are_whole_numbers(plain):
    engine, i = Engine(plain, slots=np.int64(2), context=np.int32(30)), np.int64
    assert np.array_equal(engine.step({i(1): np.array([1, 2])}), Engine(plain).logits([1, 2])[1:])
    same = {"temperature": 1.0, "top_k": 4, "seed": 3}
    assert list(engine.generate(np.array([1]), i(5), **same | {"top_k": i(4), "seed": i(3)}, stop=[i(600)])) == list(
        Engine(plain).generate([1], 5, **same)
    )


def test_options_that_the_model_cannot_have(plain):
    with pytest.raises(ValueError, match="the model has from 1 to 128 positions"):
        Engine(plain, context=129)
    with pytest.raises(ValueError, match="it must be from 1 to 4096"):
        Engine(plain, slots=5000)


def test_a_step_can_be_cancelled_and_the_engine_goes_on(plain):
    engine = Engine(plain)
    engine.step({0: [1, 2]})
    engine.cancel()
    with pytest.raises(InterruptedError, match="cancelled"):
        engine.step({0: [3]})
    assert engine.length() == 2
    assert np.array_equal(engine.step({0: [3]}), Engine(plain).logits([1, 2, 3])[2:])


def test_a_long_step_is_cancelled_by_another_thread(plain):
    engine = Engine(plain, slots=100)
    text = TEXTS.flatten().tolist()
    done = threading.Event()

    def cancel():
        while not done.wait(0.001):
            engine.cancel()

    other = threading.Thread(target=cancel)
    other.start()
    with pytest.raises(InterruptedError):
        engine.step(dict.fromkeys(range(100), text), rows="none")  # thousands of rows
    done.set()
    other.join()
    assert all(engine.length(slot) == 0 for slot in range(100))


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.step({0: [1]}),
        lambda e: e.length(0),
        lambda e: e.truncate(0, 0),
        lambda e: e.copy(0, 1, 1),
        lambda e: e.statistics(),
    ],
)
def test_while_a_step_runs_no_other_thread_touches_the_engine(plain, call):
    engine = Engine(plain, slots=100)
    engine.step({0: [1]})
    before, refused, done = engine.statistics(), [], threading.Event()

    def disturb():
        while not done.wait(0.001):
            try:
                engine._engine.length(1)  # only asks, so that the call is made in the middle of the step
            except ValueError:
                try:
                    call(engine)
                except ValueError as error:
                    refused.append(str(error))
                engine.cancel()
                return

    other = threading.Thread(target=disturb)
    other.start()
    with pytest.raises(InterruptedError):
        engine.step(dict.fromkeys(range(1, 100), TEXTS.flatten().tolist()), rows="none")  # thousands of rows
    done.set()
    other.join()
    assert refused == ["the engine runs a step in another thread: use one engine a thread"]
    assert (engine.length(0), engine.length(1), engine.statistics()) == (1, 0, before)
    call(engine)  # and afterwards it can


def test_a_tensor_that_lacks_or_is_too_many_is_named(tmp_path):
    path = write(form(tiny_decoder("llama-plain", WIDE), "subln"), tmp_path, "tq2_0")
    out = tmp_path / "changed.gguf"
    for name in read_gguf(path).tensors:
        if name in ("output.weight", "token_embd.weight"):
            continue
        rewrite(path, out, drop=[name])
        with pytest.raises(ValueError, match=f"no tensor {name}|has no matrix"):
            Engine(out)
    rewrite(path, out, add=[("blk.0.attn_q_norm.weight", np.ones(64, np.float32))])
    with pytest.raises(ValueError, match=r"holds the tensor blk.0.attn_q_norm.weight"):
        Engine(out)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("attention.head_count", 3, "do not divide|another shape"),
        ("attention.head_count_kv", 3, "do not divide"),
        ("attention.key_length", 2**31, "key_length is no whole number"),
        ("block_count", 3, "no tensor blk.2."),
        ("block_count", 10**6, "block_count is no whole number"),
        ("embedding_length", 255, "do not fill its width"),
        ("feed_forward_length", 0, "feed_forward_length is no whole number"),
        ("rope.freq_base", -1.0, "not above 0"),
        ("rope.freq_base", float("nan"), "is no finite number"),
        ("rope.freq_base", np.float64(1e300), "is too large or too small for float32"),
        ("attention.layer_norm_rms_epsilon", np.float64(1e300), "is too large or too small for float32"),
        ("attention.layer_norm_rms_epsilon", np.float64(1e-300), "is too large or too small for float32"),
        ("attention.layer_norm_rms_epsilon", -1.0, "epsilon of its norms is negative"),
        ("activation", "swish", "activation is 'swish'"),
        ("family", "gpt2", "family is 'gpt2'"),
        ("norm_placement", "post", "norm_placement is 'post'"),
        ("activation_bits", 4, "have not 8 bits"),
        ("attention.scale", 3.0, "scales attention otherwise"),
    ],
)
def test_a_key_that_cannot_be_is_named(key, value, says, tmp_path):
    path = write(form(tiny_decoder("llama-plain", WIDE), "subln"), tmp_path, "tq2_0")
    out = tmp_path / "changed.gguf"
    rewrite(path, out, change=lambda name, old: value if name == key else old)
    with pytest.raises(ValueError, match=says) as raised:
        Engine(out)
    assert str(out) in str(raised.value)


@pytest.mark.parametrize(("embedding", "place"), [("f16", 1), ("bf16", 1), ("q8_0", 1), ("q6_k", 209), ("q4_1", 3)])
def test_an_embedding_that_is_no_number_is_refused(embedding, place, tmp_path):
    path = write(form(tiny_decoder("llama-plain", WIDE), "none"), tmp_path, embedding=embedding)
    data, file = bytearray(path.read_bytes()), read_gguf(path)
    for name in ("token_embd.weight", "output.weight"):
        info = file.tensors[name]
        for at in (info.offset, info.offset + info.nbytes - file.raw(name).shape[1]):  # first and last row
            changed = data[:]
            changed[at + place - 1 : at + place + 1] = b"\x80\x7f"  # infinity in bfloat16, NaN in half precision
            (tmp_path / "changed.gguf").write_bytes(changed)
            with pytest.raises(ValueError, match=f"tensor {name} holds values that are no numbers"):
                Engine(tmp_path / "changed.gguf")


@pytest.mark.parametrize("embedding", ["f16", "q8_0"])
def test_logits_that_are_no_numbers_end_the_step(embedding, tmp_path):
    """Gains near the largest float make sums overflow, of finite numbers alone."""
    path = write(form(tiny_decoder("llama-plain", WIDE), "none"), tmp_path, embedding=embedding)
    data, info = bytearray(path.read_bytes()), read_gguf(path).tensors["output_norm.weight"]
    data[info.offset : info.offset + info.nbytes] = np.full(256, 3e38, np.float32).tobytes()
    (tmp_path / "large.gguf").write_bytes(data)
    engine = Engine(tmp_path / "large.gguf")
    for step in (engine.step, engine.hidden_states):
        with pytest.raises(ValueError, match="is not finite: the file's numbers are damaged or too large"):
            step({0: [1]})
        assert engine.length() == 0
    data[info.offset : info.offset + info.nbytes] = np.full(256, 1e30, np.float32).tobytes()
    (tmp_path / "smaller.gguf").write_bytes(data)
    assert np.isfinite(Engine(tmp_path / "smaller.gguf").step({0: [1]})).all()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ValueError, match="it is no file"):
        Engine(tmp_path / "pipe.gguf")


def test_matrices_that_are_not_ternary_are_refused(tmp_path):
    path = write(form(tiny_decoder("llama-plain", WIDE), "none"), tmp_path, "f16")
    data, file = bytearray(path.read_bytes()), read_gguf(path)
    at = file.tensors["blk.1.ffn_up.weight"].offset
    data[at : at + 2] = np.float16(0.777).tobytes()
    (tmp_path / "float.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"blk.1.ffn_up.weight is not ternary"):
        Engine(tmp_path / "float.gguf")


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64))
def test_a_damaged_file_is_refused_or_runs(plain, tmp_path_factory, seed):
    data = plain.read_bytes()
    damaged = tmp_path_factory.mktemp("damaged") / "file.gguf"
    damaged.write_bytes(mutate(data, read_gguf(plain).tensors_start, random.Random(seed)))
    try:
        engine = Engine(damaged)
        logits = engine.logits([1, 2, 3])
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
        assert logits.shape == (3, engine.vocabulary)
        try:  # what runs here, torch can run, too
            from_gguf(damaged)
        except UserError as error:
            refusal = str(error)
            assert "scaled in a way that cannot be told" in refusal or "tokenizer" in refusal, refusal
    assert "\n" not in refusal
