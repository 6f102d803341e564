"""`generate`: both engines, the same text, the same mistakes."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from bitnet_arch import ConversionConfig, UserError, convert_model, load_model, load_tokenizer, pack_model, save_master, save_packed
from bitnet_arch.diffusion import add_mask_token
from bitnet_arch.generation import DecodeOptions, decode
from bitnet_arch.gguf import export_gguf, from_gguf
from bitnet_arch.testing import TEXT, tiny_bitnet, tiny_llama, tiny_tokenizer
from bitnet_kernels import Engine
from torch.nn import functional as F
from wrinklefree_inference import native
from wrinklefree_inference.cli import main
from wrinklefree_inference.generate import Options, TextStream, generate_diffusion, generate_llamacpp, generate_torch, token_ids
from wrinklefree_inference.native import generate_native

PROMPT = "A ternary weight"
NEAR_TIE = 0.2  # nats, as in the parity gate
ENGINES = ["pytorch", "llama.cpp", "native"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny ternary model that knows one text and that it ends, as a directory and as a GGUF file."""
    folder = tmp_path_factory.mktemp("generate")
    tokenizer, model = tiny_tokenizer(), tiny_bitnet(layers=1).train()
    ids = torch.tensor([*tokenizer(TEXT).input_ids, tokenizer.eos_token_id]).repeat(2)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(100):
        rows = torch.stack([ids[s : s + 41] for s in torch.randint(0, len(ids) - 40, (8,))])
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    save_master(model, folder / "master", tokenizer)
    save_packed(pack_model(model), folder / "packed", tokenizer)
    export_gguf(folder / "master", folder / "model.gguf")
    return folder


def generate(folder, engine, prompt=PROMPT, emit=lambda piece: None, **options):
    if engine == "llama.cpp":
        return generate_llamacpp(folder / "model.gguf", prompt, Options(**options), emit)
    if engine == "native":
        return generate_native(folder / "model.gguf", prompt, Options(**options), emit)
    directory = folder / "master"
    return generate_torch(load_model(directory), load_tokenizer(directory), prompt, Options(**options), emit)


@torch.no_grad()
def test_the_engines_agree_until_a_near_tie_and_the_cache_changes_nothing(trained):
    model, tokenizer = load_model(trained / "master"), load_tokenizer(trained / "master")
    ids, margins = list(tokenizer(PROMPT).input_ids), []
    start = len(ids)
    for _ in range(40):  # the whole sequence again for each token: no cache
        top = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1).topk(2)
        margins.append(float(top.values[0] - top.values[1]))
        ids.append(int(top.indices[0]))
    cached = token_ids(model, torch.tensor([ids[:start]]), Options())
    assert [next(cached) for _ in range(40)] == ids[start:]
    length = [*ids, tokenizer.eos_token_id].index(tokenizer.eos_token_id) - start
    sure = next((i for i, margin in enumerate(margins[:length]) if margin < NEAR_TIE), length)
    assert sure >= 15, "too few certain tokens to compare"
    expected = tokenizer.decode(ids[start : start + sure])
    for engine in ENGINES:
        assert generate(trained, engine, max_tokens=40).text.startswith(expected), engine


def test_a_packed_directory_says_what_its_master_says(trained, capsys):
    texts = []
    for form in ("master", "packed"):
        assert main(["generate", str(trained / form), PROMPT, "--max-tokens", "12"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith(" is minus one")


@pytest.mark.parametrize("engine", ENGINES)
def test_sampling_follows_the_seed_and_greedy_does_not(engine, trained):
    hot = [generate(trained, engine, max_tokens=16, temperature=3.0, seed=seed).text for seed in (1, 1, 2)]
    assert hot[0] == hot[1]
    assert hot[0] != hot[2]
    cold = [generate(trained, engine, max_tokens=16, seed=seed).text for seed in (1, 2)]
    assert cold[0] == cold[1] != hot[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_coldest_temperature_is_greedy_and_the_hottest_draws_anything(engine, trained):
    def text(**options):
        return generate(trained, engine, max_tokens=12, **options).text

    assert text(temperature=1e-5) == text()
    assert len({text(temperature=1e5, seed=seed) for seed in (1, 2, 3)}) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_text_ends_where_the_model_ends_it_or_at_the_limit(engine, trained):
    prompt = TEXT[TEXT.index("for i") : TEXT.index("print(i, add") + 8]
    ended = generate(trained, engine, prompt, max_tokens=60)
    assert (ended.text, ended.stop) == (TEXT.partition(prompt)[2], "eos")
    tokens = len(load_tokenizer(trained / "master")(prompt + ended.text).input_ids) - ended.prompt_tokens
    assert ended.tokens == tokens
    cut = generate(trained, engine, prompt, max_tokens=tokens - 1)
    assert (cut.stop, cut.tokens) == ("length", tokens - 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_context_is_never_exceeded(engine, trained):
    result = generate(trained, engine, "add " * 120, max_tokens=2000, temperature=5.0)
    assert result.prompt_tokens + result.tokens <= 512


@pytest.mark.parametrize("engine", ENGINES)
def test_pieces_come_one_by_one_and_make_the_text(engine, trained):
    pieces = []
    result = generate(trained, engine, emit=pieces.append, max_tokens=10)
    assert len(pieces) >= 8
    assert "".join(pieces) == result.text


def test_a_model_that_ends_at_once_says_nothing():
    model, tokenizer = tiny_llama(tied=False, layers=1), tiny_tokenizer()
    torch.nn.init.zeros_(model.lm_head.weight)  # all logits equal: the likeliest is the first, end of text
    result = generate_torch(model, tokenizer, PROMPT, Options(), lambda piece: None)
    assert (result.text, result.stop, result.tokens) == ("", "eos", 0)


@pytest.mark.parametrize("text", ["naïve ☃ 日本語 🙂!", "🙂🙂", "plain", "ends in ☃"])
def test_streamed_text_never_shows_half_a_character(text):
    tokenizer, pieces = tiny_tokenizer(), []
    stream = TextStream(tokenizer, pieces.append)
    for token in tokenizer(text).input_ids:
        stream.push(token)
    stream.close()
    assert "".join(pieces) == stream.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    alone = "".join(tokenizer.decode([token]) for token in tokenizer(text).input_ids)
    assert ("\ufffd" in alone) == (not text.isascii())


def test_streamed_text_keeps_bytes_that_are_no_character():
    tokenizer, pieces = tiny_tokenizer(), []
    stream = TextStream(tokenizer, pieces.append)
    for token in tokenizer("☃").input_ids[:2]:
        stream.push(token)
    assert pieces == []
    stream.close()
    assert "".join(pieces) == "\ufffd"


def test_the_native_engine_writes_what_torch_writes(trained):
    exported = from_gguf(trained / "model.gguf")
    tokenizer = load_tokenizer(trained / "master")
    for prompt in (PROMPT, "def add(", "The quick"):
        expected = generate_torch(exported, tokenizer, prompt, Options(max_tokens=30), lambda piece: None)
        assert generate(trained, "native", prompt, max_tokens=30) == expected


def test_the_native_engine_runs_files_that_llama_cpp_does_not(tmp_path, capsys):
    model = convert_model(tiny_llama(tied=False, layers=1), ConversionConfig(norm="allnorm", gain="one"))
    save_master(model, tmp_path / "m", tiny_tokenizer())
    assert export_gguf(tmp_path / "m", tmp_path / "own.gguf").architecture == "wrinklefree"
    arguments = ["generate", str(tmp_path / "own.gguf"), PROMPT, "--max-tokens", "6", "--json"]
    assert main([*arguments, "--engine", "llama.cpp"]) == 2
    assert "holds what its own cannot): leave --engine out" in capsys.readouterr().err.splitlines()[-1]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    expected = generate_torch(from_gguf(tmp_path / "own.gguf"), tiny_tokenizer(), PROMPT, Options(max_tokens=6), lambda piece: None)
    assert (answer["engine"], answer["text"], answer["tokens"]) == ("native", expected.text, expected.tokens)


def test_without_the_native_engine_a_file_says_what_to_install(trained, tmp_path, monkeypatch, capsys):
    model = convert_model(tiny_llama(tied=False, layers=1), ConversionConfig(norm="allnorm", gain="one"))
    save_master(model, tmp_path / "m", tiny_tokenizer())
    export_gguf(tmp_path / "m", tmp_path / "own.gguf")
    monkeypatch.setitem(sys.modules, "bitnet_kernels", None)
    for module in ("native", "native_blocks"):
        monkeypatch.delitem(sys.modules, f"wrinklefree_inference.{module}")
    for file, advice in ((trained / "model.gguf", " or give --engine llama.cpp"), (tmp_path / "own.gguf", "")):
        assert main(["generate", str(file), PROMPT]) == 2
        expected = f"error: the native engine, which runs {file}, is not installed: install bitnet-kernels{advice}\n"
        assert capsys.readouterr().err == expected
    arguments = [str(trained / "model.gguf"), PROMPT, "--max-tokens", "4", "--engine", "llama.cpp"]
    assert main(["generate", *arguments]) == 0


def test_the_native_engine_opens_with_the_context_that_a_text_needs(trained, monkeypatch):
    opened = []

    def open_small(file, slots=1, context=None):
        opened.append(context)
        return Engine(file, slots=slots, context=context)

    monkeypatch.setattr(native, "open_native", open_small)
    result = generate(trained, "native", PROMPT, max_tokens=5)
    generate_native(trained / "model.gguf", PROMPT, Options(max_tokens=10**6), lambda piece: None)
    assert opened == [result.prompt_tokens + 5, Engine(trained / "model.gguf").context]


def test_too_little_memory_is_one_sentence(trained, monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(Engine, "step", fail)
    with pytest.raises(UserError, match=r"the native engine cannot run .*model.gguf: there is not enough memory"):
        generate(trained, "native", PROMPT, max_tokens=5)


@pytest.mark.parametrize("name", ["master", "model.gguf", "native", "llama.cpp"])
def test_json_has_the_same_text_as_the_stream(name, trained, capsys):
    file, more = ("model.gguf", ["--engine", name]) if name in ("native", "llama.cpp") else (name, [])
    arguments = ["generate", str(trained / file), PROMPT, "--max-tokens", "8", *more]
    assert main(arguments) == 0
    streamed = capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] + "\n" == streamed
    assert (answer["tokens"], answer["max_tokens"], answer["stop"]) == (8, 8, "length")
    assert answer["engine"] == {"master": "pytorch", "model.gguf": "native"}.get(name, name)


def mistakes():
    long = "a " * 3000
    yield "missing", ["nowhere", PROMPT], "does not exist"
    yield "no path", ["", PROMPT], "path is empty"
    yield "a long path", ["x" * 5000, PROMPT], "x... cannot be read (File name too long)"
    yield "nobody's home", ["~nobody-of-this-name/m.gguf", PROMPT], "begins with no user's home"
    yield "no config", [".", PROMPT], "no config.json"
    yield "no GGUF", ["junk.gguf", PROMPT], "not a GGUF file"
    foreign = ["--engine", "llama.cpp"]
    yield "truncated", ["truncated.gguf", PROMPT], "truncated.gguf is not a usable GGUF file"
    yield "truncated, llama.cpp", ["truncated.gguf", PROMPT, *foreign], "could not load"
    yield "an engine for a directory", ["master", PROMPT, "--engine", "native"], "--engine has no effect on a model directory"
    yield "a model that is no text model", ["foreign.gguf", PROMPT], "foreign.gguf"
    yield "empty prompt, file", ["model.gguf", ""], "prompt is empty"
    yield "no tokens, file", ["model.gguf", PROMPT, "--max-tokens", "0"], "at least 1"
    yield "temperature, file", ["model.gguf", PROMPT, "--temperature", "-1"], "temperature is -1"
    yield "seed, file", ["model.gguf", PROMPT, "--seed", str(2**64)], f"seed is {2**64}"
    yield "empty prompt", ["master", ""], "prompt is empty"
    yield "bad UTF-8", ["master", "a\udcff"], "not valid UTF-8"
    yield "long prompt", ["master", long], "shorten it"
    yield "long prompt, file", ["model.gguf", long], "shorten it"
    yield "long prompt, llama.cpp", ["model.gguf", long, *foreign], "context"
    yield "no tokens", ["master", PROMPT, "--max-tokens", "0"], "at least 1"
    yield "temperature", ["master", PROMPT, "--temperature", "nan"], "temperature is nan"
    for name in ("master", "model.gguf"):
        for value in ("1e-320", "9e-6", "1.1e5", "1e300"):
            yield f"{value}, {name}", [name, PROMPT, "--temperature", value], "give 0 (greedy) or a number from 1e-05 to 100000"
    yield "seed", ["master", PROMPT, "--seed", "-1"], "seed is -1"


@pytest.mark.parametrize(("arguments", "words"), [m[1:] for m in mistakes()], ids=[m[0] for m in mistakes()])
def test_a_mistake_is_one_sentence(arguments, words, trained, capfd, monkeypatch):
    monkeypatch.chdir(trained)
    (trained / "junk.gguf").write_text("hello")
    whole = (trained / "model.gguf").read_bytes()
    (trained / "truncated.gguf").write_bytes(whole[: len(whole) // 2])
    (trained / "foreign.gguf").write_bytes(whole.replace(b"bitnet", b"mamba2", 1))
    assert main(["generate", *arguments]) == 2
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert captured.out == ""


def command(*arguments):
    return [sys.executable, "-m", "wrinklefree_inference", "generate", *map(str, arguments)]


def test_a_file_may_have_any_name(trained, tmp_path, capfd):
    name = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    name.write_bytes((trained / "model.gguf").read_bytes())
    assert main(["generate", str(name), PROMPT, "--max-tokens", "4"]) == 0
    assert capfd.readouterr().out == generate(trained, "native", max_tokens=4).text + "\n"
    name.write_bytes(b"GGUF")
    assert main(["generate", str(name), PROMPT]) == 2
    assert capfd.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("variable", "value", "says", "name"),
    [
        ("WF_THREADS", "abc", "WF_THREADS: from 1 to 64 threads are possible, not 'abc'", "model.gguf"),
        pytest.param("WF_THREADS", "0", "WF_THREADS: from 1 to 64 threads", "packed", marks=pytest.mark.slow),
        pytest.param("WF_ISA", "f\no", "WF_ISA: isa 'f o' is not available here", "model.gguf", marks=pytest.mark.slow),
        pytest.param("WF_KERNELS", "maybe", "WF_KERNELS is one of auto, on, off", "model.gguf", marks=pytest.mark.slow),
    ],
)
def test_a_variable_that_cannot_be_is_one_sentence(variable, value, says, name, trained):
    environment = {**os.environ, variable: value}
    done = subprocess.run(command(trained / name, PROMPT), env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {says}")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_reader_that_stops_reading_is_no_error(trained):
    arguments = (trained / "model.gguf", PROMPT, "--max-tokens", 400, "--temperature", 5)
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


def test_output_that_cannot_hold_the_text_is_one_sentence(trained):
    """Control: the same text is shown in UTF-8, and to a device that takes it."""
    arguments = command(str(trained / "model.gguf"), "caf\u00e9", "--max-tokens", "2", "--json")
    ends = {}
    for encoding, device in (("ascii", os.devnull), ("utf-8", os.devnull), ("utf-8", "/dev/full")):
        with Path(device).open("w") as output:
            environment = {**os.environ, "PYTHONIOENCODING": encoding}
            done = subprocess.run(arguments, env=environment, stdout=output, stderr=subprocess.PIPE, text=True, check=False)
        ends[encoding, device] = done.returncode, done.stderr
    assert ends["utf-8", os.devnull] == (0, "")
    for case, words in ((("ascii", os.devnull), "PYTHONIOENCODING=utf-8"), (("utf-8", "/dev/full"), "No space left on device")):
        code, said = ends[case]
        assert (code, said.count("\n")) == (2, 1), said
        assert words in said


def test_ctrl_c_ends_a_generation_without_a_traceback(trained):
    arguments = (trained / "master", PROMPT, "--max-tokens", 480, "--temperature", 5)
    # As a terminal starts it: a background job of a shell, which may be running these tests, ignores Ctrl-C.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heard)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert errors.decode().count("\n") == 1


@pytest.fixture(scope="module")
def diffusing(tmp_path_factory):
    model, tokenizer = tiny_bitnet(hidden=64, ffn=128, layers=1), tiny_tokenizer()
    add_mask_token(model, tokenizer, block_size=4, token_shift=True)
    directory = tmp_path_factory.mktemp("diffusion") / "model"
    save_master(model, directory, tokenizer)
    return directory


def test_a_diffusion_model_is_decoded_in_blocks_and_says_what_that_cost(diffusing, capsys):
    answers = {}
    for threshold in ("1", "0"):
        assert main(["generate", str(diffusing), PROMPT, "--max-tokens", "12", "--threshold", threshold, "--json"]) == 0
        answers[threshold] = json.loads(capsys.readouterr().out)
    model, tokenizer = load_model(diffusing), load_tokenizer(diffusing)
    ids = torch.tensor(tokenizer(PROMPT).input_ids)
    expected = decode(model, ids, DecodeOptions(max_tokens=12, threshold=1.0)).tokens
    assert answers["1"]["text"] == tokenizer.decode(expected)
    assert (answers["1"]["threshold"], answers["1"]["cache"]) == (1.0, "prefix")
    assert answers["0"]["forwards"] < answers["1"]["forwards"]
    assert "<|mask|>" not in answers["0"]["text"]


def test_a_file_of_a_diffusion_model_is_decoded_in_blocks_by_the_native_engine_alone(diffusing, tmp_path, capsys):
    file = tmp_path / "diffusion.gguf"
    export_gguf(diffusing, file)

    def answer(model, *more):
        assert main(["generate", str(model), PROMPT, "--max-tokens", "12", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    model, tokenizer = from_gguf(file), load_tokenizer(diffusing)  # the file's own numbers: its embeddings are rounded
    for threshold in ("1", "0"):
        found = answer(file, "--threshold", threshold)
        assert (found["engine"], found["cache"], found["threshold"]) == ("native", "prefix", float(threshold))
        how = DecodeOptions(max_tokens=12, threshold=float(threshold))
        expected = generate_diffusion(model, tokenizer, PROMPT, how, lambda piece: None)
        for key in ("text", "stop", "tokens", "prompt_tokens"):
            assert found[key] == getattr(expected, key), key
    assert answer(file, "--threshold", "1")["forwards"] > answer(file, "--threshold", "0")["forwards"]
    for more, said in [
        (["--cache", "dual"], "has no cache 'dual'"),
        (["--max-tokens", "0"], "max tokens is 0"),
        (["--engine", "llama.cpp"], "llama.cpp cannot run"),
        (["--engine", "llama.cpp", "--threshold", "0.5"], "--threshold has no effect on llama.cpp"),
    ]:
        assert main(["generate", str(file), PROMPT, *more]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("option", [["--threshold", "0.9"], ["--sub-block", "4"], ["--cache", "dual"]], ids=lambda x: x[0][2:])
def test_options_of_diffusion_models_are_refused_elsewhere(trained, option, capsys):
    for model in ("master", "model.gguf"):
        assert main(["generate", str(trained / model), PROMPT, *option]) == 2
        error = capsys.readouterr().err
        assert f"{option[0]} has no effect" in error
        assert error.count("\n") == 1


def test_a_diffusion_models_mistakes_are_one_sentence(diffusing, capsys):
    for arguments, says in (
        ([PROMPT, "--threshold", "2"], "probability"),
        ([PROMPT, "--sub-block", "0"], "at least 1"),
        (["A<|mask|>", "--max-tokens", "3"], "contains the mask token"),
    ):
        assert main(["generate", str(diffusing), *arguments]) == 2
        assert says in capsys.readouterr().err
