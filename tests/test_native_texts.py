"""Texts of the native engine: log-probabilities, shared beginnings, several at once, tokenizers, blocks of diffusion models."""

import itertools

import bitnet_kernels
import numpy as np
import pytest
import torch
from bitnet_arch import ConversionConfig, UserError, convert_model, save_packed
from bitnet_arch.diffusion import add_mask_token
from bitnet_arch.generation import DecodeOptions, decode
from bitnet_arch.gguf import export_gguf, from_gguf, tokenizer_from_gguf
from bitnet_arch.testing import SMALL_SHAPE, tiny_decoder, tiny_llama, tiny_tokenizer
from bitnet_kernels import Engine
from wrinklefree_inference.native_blocks import decode_native

SUBLN = ConversionConfig(norm="subln", gain="one")
PROMPTS = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 40], [5, 6, 7, 8, 9, 11, 12], [300], [5, 6, 7, 8, 9, 10, 99, 4]]


@pytest.fixture(autouse=True)
def _threads():
    before = bitnet_kernels.threads()
    bitnet_kernels.set_threads(1)
    yield
    bitnet_kernels.set_threads(before)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    save_packed(convert_model(tiny_llama(hidden=512, ffn=1536), SUBLN), folder / "m", tiny_tokenizer(512))
    export_gguf(folder / "m", folder / "model.gguf")
    return folder / "model.gguf"


def diffusion_file(folder, **form):
    """Write a diffusion model whose distributions differ from position to position."""
    shape = {"vocab_size": 511, "hidden_size": 128, "intermediate_size": 256, "max_position_embeddings": 512}
    model = tiny_decoder("llama-plain", SMALL_SHAPE | shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "lm_head" in name:
                parameter *= 6
    model = convert_model(model, SUBLN)
    tokenizer = tiny_tokenizer(511)
    add_mask_token(model, tokenizer, **form)
    save_packed(model, folder / "m", tokenizer)
    export_gguf(folder / "m", folder / "model.gguf")
    return folder / "model.gguf"


def test_log_probabilities_are_those_of_the_logits(file):
    engine = Engine(file, slots=2)
    logits = engine.step({0: PROMPTS[0]}, rows="all")
    found = engine.log_probabilities({1: PROMPTS[0]}, rows="all")
    exact = torch.from_numpy(logits).double().log_softmax(-1)
    assert found.dtype == np.float32
    assert np.array_equal(found, exact.float().numpy()) or (torch.from_numpy(found).double() - exact).abs().max() < 5e-7
    assert np.allclose(np.exp(found.astype(np.float64)).sum(-1), 1, atol=1e-6)
    assert not np.allclose(found, logits, atol=1)
    assert np.array_equal(engine.step({0: [1]}), engine.step({1: [1]}))  # both appended the tokens


def test_what_a_slot_holds_is_not_computed_again(file):
    fresh, engine = Engine(file), Engine(file, slots=3)
    computed = []
    for slot, prompt in zip((0, 1, 0, 2, 0), PROMPTS, strict=True):
        before = engine.statistics().tokens
        computed.append(engine.prefill(prompt, slot=slot))
        assert engine.statistics().tokens - before == computed[-1]
        assert engine.length(slot) == len(prompt)
        assert np.array_equal(engine.step({slot: [3]})[0], fresh.logits([*prompt, 3])[-1])
        engine.truncate(slot, len(prompt))
    # All; [40] after the four of slot 0; the last two after its own five; all; of the last [10, 99, 4] after five.
    assert computed == [6, 1, 2, 1, 3]
    engine.truncate(0, 2)
    assert engine.prefill(PROMPTS[0], slot=0) == 2  # slot 1 holds four
    engine.copy(2, 0, 1)
    assert engine.prefill([300, 1], slot=0) == 1


def test_what_saw_later_tokens_is_computed_again(file):
    engine = Engine(file)
    engine.step({0: [5, 6]})
    engine.step({0: [7, 8]}, bidirectional=True)
    assert engine.prefill([5, 6, 7, 8, 9]) == 3
    assert np.array_equal(engine.step({0: [3]})[0], Engine(file).logits([5, 6, 7, 8, 9, 3])[-1])


def test_a_step_that_fails_leaves_what_is_shared(file):
    engine = Engine(file)
    engine.step({0: [5, 6]})
    engine.cancel()
    with pytest.raises(InterruptedError):
        engine.step({0: [7]})
    assert engine.prefill([5, 6, 8]) == 1
    assert np.array_equal(engine.step({0: [3]})[0], Engine(file).logits([5, 6, 8, 3])[-1])


class Interrupting:
    """A runtime whose call of a name is made and then ended by Ctrl-C, which Python raises where the call returns."""

    def __init__(self, engine, name):
        self.engine, self.name = engine, name

    def __getattr__(self, name):
        call = getattr(self.engine, name)

        def interrupted(*arguments):
            call(*arguments)
            raise KeyboardInterrupt

        return interrupted if name == self.name else call


def interrupt(engine, name, call):
    runtime = engine._engine
    engine._engine = Interrupting(runtime, name)
    with pytest.raises(KeyboardInterrupt):
        call(engine)
    engine._engine = runtime


@pytest.mark.parametrize(
    ("name", "call", "length"),
    [
        ("step", lambda e: e.step({0: [7, 8, 9]}), 5),
        ("step", lambda e: e.step({0: [7], 1: [8]}), 3),
        ("copy", lambda e: e.copy(1, 0, 2), 2),
        ("copy", lambda e: e.copy(1, 0, 0), 0),
        ("truncate", lambda e: e.truncate(0, 1), 1),
    ],
    ids=["step", "two", "copy", "nothing", "truncate"],
)
def test_what_ctrl_c_left_unnoted_is_not_shared(name, call, length, file):
    for text in ([5, 6, 9, 10, 11], [5, 9, 10, 11], [9, 10, 11], [5, 6, 7, 9, 10, 11], [30, 31, 9, 10, 11]):
        engine = Engine(file, slots=3)
        engine.step({0: [5, 6], 1: [30, 31, 32]})
        interrupt(engine, name, call)
        assert engine.length(0) == length
        engine.step({0: [9, 10]})
        for slot in (2, 0):
            engine.prefill(text[:-1], slot=slot)
            assert engine.length(slot) == len(text) - 1
            assert np.array_equal(engine.step({slot: text[-1:]})[0], Engine(file).logits(text)[-1])


@pytest.mark.parametrize(("name", "call"), [("step", lambda e: e.step({0: [9]})), ("copy", lambda e: e.copy(1, 0, 0))])
def test_a_text_does_not_go_on_after_a_call_that_ctrl_c_ended(name, call, file):
    engine = Engine(file, slots=2)
    text = engine.generate([5, 6, 7], 5)
    next(text)
    interrupt(engine, name, call)
    with pytest.raises(ValueError, match="slot 0 was used"):
        next(text)


def test_a_copy_that_fails_leaves_what_is_shared(file):
    engine = Engine(file, slots=2)
    engine.step({0: [5, 6]})
    with pytest.raises(ValueError, match="holds 0 tokens"):
        engine.copy(1, 0, 1)
    assert engine.prefill([5, 6, 8]) == 1


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 50, "seed": 7}], ids=["greedy", "sampled"])
def test_texts_written_together_are_those_written_alone(slots, options, file):
    def written(engine, **more):
        found = [[] for _ in PROMPTS]
        for text, token in engine.generate_many(PROMPTS, 12, **options, **more):
            found[text].append(token)
        return found

    single, seed = Engine(file), options.get("seed", 0)
    expected = [list(single.generate(p, 12, **options | {"seed": seed + i})) for i, p in enumerate(PROMPTS)]
    assert written(Engine(file, slots=slots)) == expected
    if options:
        assert len({tuple(text) for text in expected}) == len(PROMPTS)
    stop = expected[0][4]
    cut = [text[: text.index(stop)] if stop in text else text for text in expected]
    assert written(Engine(file, slots=slots), stop=[stop]) == cut
    bitnet_kernels.set_threads(3)
    assert written(Engine(file, slots=slots)) == expected


def test_prompts_that_begin_alike_cost_less(file):
    engine = Engine(file, slots=5)
    for _ in engine.generate_many([[*range(1, 101), last] for last in range(5)], 1):
        pass
    assert engine.statistics().tokens == 100 + 5


def test_texts_together_refuse_what_one_refuses(file):
    engine = Engine(file, slots=2)
    for prompts, options, says in (
        ([[1], []], {}, "a prompt and max_tokens of at least 1"),
        ([[1], [512]], {}, "a token is 512"),
        ([[1], [2]], {"seed": 2**64 - 1}, "with 2 prompts it must be at most"),
        ([[1]], {"top_p": 0.0}, "top_p must be"),
        ([[1], "text"], {}, "the engine has no tokenizer"),
    ):
        with pytest.raises(ValueError, match=says):
            engine.generate_many(prompts, 3, **options)
    texts = engine.generate_many([[1], [2]], 3)
    next(texts), next(texts)
    engine.step({1: [1]})
    with pytest.raises(ValueError, match="slot 1 was used"):
        list(texts)
    assert list(engine.generate_many([], 3)) == []


def test_a_tokenizer_makes_texts_of_tokens(file):
    tokenizer = tokenizer_from_gguf(file)
    engine = Engine(file, tokenizer=tokenizer)
    text = "low and slow"
    tokens = tokenizer.encode(text)
    assert len(tokens) > 1
    expected = list(engine.generate(tokens, 8))
    assert list(engine.generate(text, 8)) == expected
    assert engine.complete(text, 8) == tokenizer.decode(expected)
    with pytest.raises(ValueError, match="the engine has no tokenizer, which texts need"):
        Engine(file).complete(tokens, 8)


@pytest.mark.parametrize(
    "form",
    [{"block_size": 4, "token_shift": True}, {"block_size": 8, "token_shift": False}, {"block_size": None, "token_shift": False}],
    ids=["shift", "blocks", "whole"],
)
def test_blocks_are_decoded_as_in_torch(form, tmp_path):
    path = diffusion_file(tmp_path, **form)
    model, engine, causal = from_gguf(path), Engine(path), Engine(path)
    step = causal.step
    causal.step = lambda sequences, rows, bidirectional: step(sequences, rows=rows)
    same, same_without, texts = 0, 0, set()
    for seed, threshold in itertools.product(range(3), (0.9, 0.05, 1.0)):
        prompt = torch.randint(0, 500, (9,), generator=torch.Generator().manual_seed(seed))
        options = DecodeOptions(max_tokens=19, threshold=threshold, sub_block_size=4, seed=seed)
        pieces = []
        found = decode_native(engine, prompt, options, emit=pieces.append)
        expected = decode(model, prompt, options)
        assert [token for piece in pieces for token in piece] == found.tokens
        assert found.statistics.tokens == 19
        same += found.tokens == expected.tokens and found.statistics.forwards >= expected.statistics.forwards
        same_without += decode_native(causal, prompt, options).tokens == expected.tokens
        texts.add(tuple(found.tokens))
    assert len(texts) >= 3
    assert same >= 8  # one int8 code at a rounding edge may part a text
    assert same_without <= 1  # the control: where tokens see only what is before them


def test_what_the_engine_cannot_decode_in_blocks(file, tmp_path):
    prompt = torch.tensor([1, 2])
    with pytest.raises(UserError, match="holds no diffusion model"):
        decode_native(Engine(file), prompt, DecodeOptions())
    path = diffusion_file(tmp_path, block_size=None, token_shift=False)
    with pytest.raises(UserError, match="no cache 'dual'"):
        decode_native(Engine(path), prompt, DecodeOptions(cache="dual"))
    with pytest.raises(UserError, match="at most 256 tokens see each other"):
        decode_native(Engine(path), prompt, DecodeOptions(max_tokens=300))
