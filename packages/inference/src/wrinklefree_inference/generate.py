"""`generate`: text from a model directory (PyTorch) or a GGUF file (the native engine, or llama.cpp), written as it comes.

A diffusion model decodes block by block (`bitnet_arch.generation`); options of that kind are refused elsewhere.
"""

import argparse
import json
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import UserError, load_model, load_tokenizer
from bitnet_arch.bitlinear import constant_weights
from bitnet_arch.diffusion import diffusion_of
from bitnet_arch.generation import CACHES, Decoded, DecodeOptions, EmitTokens, check_temperature, decode
from bitnet_arch.parity import has_native_engine, no_engine
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from wrinklefree_inference.models import EngineOptions, resolve_model, start_engine

Emit = Callable[[str], None]
"""Called with each piece of text as it comes."""

# llama.cpp ends a text at these by their spelling, whatever a file declares; both engines must stop at the same place.
END_OF_TEXT = frozenset({"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|end_of_text|>", "<end_of_turn>"})
ENGINES = ("native", "llama.cpp")
"""What runs a GGUF file, the default first."""
MAX_ENGINE_CONTEXT = 32768
MAX_SEED = 2**32 - 2
REPLACEMENT = "\ufffd"
"""What a tokenizer makes of bytes that are no whole character yet."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to generate.

    Attributes:
        max_tokens: at most so many new tokens.
        temperature: 0 takes the likeliest token; from 1e-5 to 1e5, samples from the whole distribution (no top-k, no top-p).
        seed: makes sampling reproducible within an engine (each engine draws differently).

    Raises:
        UserError: on construction, for a value out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max tokens is {self.max_tokens}: give at least 1")
        check_temperature(self.temperature)
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed is {self.seed}: give a number from 0 to {MAX_SEED}")


@dataclass(frozen=True, kw_only=True)
class Generated:
    """A finished text.

    Attributes:
        text: without the prompt.
        stop: "eos" (the model ended it) or "length".
        prompt_tokens: tokens read.
        tokens: tokens generated, an end-of-text token not counted.
        forwards: calls of a diffusion model, that of the prompt included; None for other models.
    """

    text: str
    stop: str
    prompt_tokens: int
    tokens: int
    forwards: int | None = None


class TextStream:
    """Turns token ids into text piece by piece, holding back what is not yet whole UTF-8."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, emit: Emit) -> None:
        self._tokenizer, self._emit = tokenizer, emit
        self._ids: list[int] = []
        self._from = 0  # first token of the window that is decoded again, so that the cost of a token stays constant
        self._shown = 0  # characters of the window already emitted
        self.text = ""

    def push(self, token: int) -> None:
        """Add one token and emit what it completes."""
        self._ids.append(token)
        window = self._decode()
        if window.endswith(REPLACEMENT):
            return
        self._send(window[self._shown :])
        self._from, self._shown = len(self._ids) - 1, len(self._text(self._ids[-1:]))

    def close(self) -> None:
        """Emit what was held back."""
        self._send(self._decode()[self._shown :])
        self._from, self._shown = len(self._ids), 0

    def _decode(self) -> str:
        return self._text(self._ids[self._from :])

    def _text(self, ids: list[int]) -> str:
        # "Cleaning up" would take spaces away that the model wrote.
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _send(self, piece: str) -> None:
        if piece:
            self.text += piece
            self._emit(piece)


def end_token_ids(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel | None = None) -> set[int]:
    """Return the ids that end a text: the tokenizer's, those that llama.cpp ends at, and a model's, which files do not have."""
    ids: set[int] = {i for token, i in tokenizer.get_added_vocab().items() if token in END_OF_TEXT}
    of_model = () if model is None else (model.config.eos_token_id, model.generation_config.eos_token_id)
    for value in (tokenizer.eos_token_id, *of_model):
        ids |= set(value) if isinstance(value, list) else {value} if isinstance(value, int) else set()
    return ids


@torch.inference_mode()
def token_ids(model: PreTrainedModel, prompt: Tensor, options: Options) -> Iterator[int]:
    """Yield new tokens one at a time, with a key-value cache, without end.

    Args:
        model: in evaluation mode.
        prompt: int64 `[1, T]`, T at least 1.
        options: its `max_tokens` is the caller's business.
    """
    generator = torch.Generator().manual_seed(options.seed)
    step, cache = prompt, None
    while True:
        output = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits, cache = output.logits[0, -1].double().cpu(), output.past_key_values
        if options.temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial((logits / options.temperature).softmax(-1), 1, generator=generator))
        yield token
        step = torch.tensor([[token]], device=prompt.device)


def generate_torch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, options: Options, emit: Emit
) -> Generated:
    """Generate with PyTorch.

    Raises:
        UserError: if the prompt has no token or leaves no room for one.
    """
    ids = tokenizer(prompt).input_ids
    check_length(len(ids), model.config.max_position_embeddings)
    budget = min(options.max_tokens, model.config.max_position_embeddings - len(ids))
    ends, stream, count, stop = end_token_ids(tokenizer, model), TextStream(tokenizer, emit), 0, "length"
    with constant_weights(model):
        for token in token_ids(model, torch.tensor([ids]), options):
            if token in ends:
                stop = "eos"
                break
            stream.push(token)
            count += 1
            if count == budget:
                break
    stream.close()
    return Generated(text=stream.text, stop=stop, prompt_tokens=len(ids), tokens=count)


def generate_diffusion(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, options: DecodeOptions, emit: Emit
) -> Generated:
    """Generate with a diffusion model in PyTorch; text comes a sub-block at a time.

    Raises:
        UserError: if the prompt has no token or leaves no room for one.
    """
    ids = tokenizer(prompt).input_ids
    ends = end_token_ids(tokenizer, model)
    prompt_ids = torch.tensor(ids, dtype=torch.int64)
    return blocks_of_text(tokenizer, len(ids), ends, emit, lambda push: decode(model, prompt_ids, options, ends=ends, emit=push))


def blocks_of_text(
    tokenizer: PreTrainedTokenizerFast,
    prompt_tokens: int,
    ends: Collection[int],
    emit: Emit,
    decode: Callable[[EmitTokens], Decoded],
) -> Generated:
    """Make text of what a decoding in blocks emits.

    Args:
        tokenizer: the model's.
        prompt_tokens: tokens of the prompt.
        ends: tokens that end a text, and are no part of it.
        emit: called with each piece of text.
        decode: decodes, and emits the tokens through what it is given.
    """
    stream = TextStream(tokenizer, emit)

    def push(tokens: list[int]) -> None:
        for token in tokens:
            if token not in ends:
                stream.push(token)

    text = decode(push)
    stream.close()
    tokens = len(text.tokens) - (text.stop == "eos")
    return Generated(
        text=stream.text, stop=text.stop, prompt_tokens=prompt_tokens, tokens=tokens, forwards=text.statistics.forwards
    )


def generate_llamacpp(file: Path, prompt: str, options: Options, emit: Emit) -> Generated:
    """Generate with llama.cpp.

    Raises:
        UserError: if the engine cannot load the file, or the prompt has no token or does not fit.
    """
    # A token of a byte-level tokenizer is at least one byte, so this is always enough.
    context = min(len(prompt.encode()) + options.max_tokens + 16, MAX_ENGINE_CONTEXT)
    # The engine listens on loopback even when it is called in process; a random key keeps others out.
    server = start_engine(file, EngineOptions(context=context, keys=(secrets.token_hex(16),)))
    request = {
        "prompt": prompt,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "stream": True,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
    }
    text, last = "", {}
    with closing(_events(server, request)) as events:
        for event in events:
            if "error" in event:
                raise UserError(f"llama.cpp refused the prompt: {event['error'].get('message', event['error'])}")
            last = event
            if piece := event["choices"][0]["text"]:
                text += piece
                emit(piece)
    usage = last["usage"]
    check_length(usage["prompt_tokens"], context)
    stop = "eos" if last["choices"][0]["finish_reason"] == "stop" else "length"
    tokens = usage["completion_tokens"] - (stop == "eos")
    return Generated(text=text, stop=stop, prompt_tokens=usage["prompt_tokens"], tokens=tokens)


def _events(server: Any, request: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Yield the engine's events.

    The engine runs in a thread: its call would hold Ctrl-C back until the whole text is there.
    """
    events: queue.Queue[dict[str, Any] | BaseException | None] = queue.Queue()
    stopped = threading.Event()

    def receive(event: dict[str, Any]) -> bool:
        events.put(event)
        return stopped.is_set()

    def work() -> None:
        try:
            server.handle_completions(request, receive)
            events.put(None)
        except BaseException as error:
            events.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        stopped.set()
        thread.join()


def check_length(tokens: int, context: int) -> None:
    """Refuse a prompt without a token, or without room for one behind it.

    Raises:
        UserError: for such a prompt.
    """
    if tokens == 0:
        raise UserError("the prompt is empty: give some text to continue")
    if tokens >= context:
        raise UserError(f"the prompt has {tokens} tokens, but the model reads at most {context - 1}: shorten it")


def add_parser(subparsers: Any) -> None:
    """Add `generate` to a command line; its `run` default takes the parsed namespace."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt: a model directory runs in PyTorch, a GGUF file in the native engine or in llama.cpp.",
    )
    parser.add_argument("model", help="a model directory or a .gguf file")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--engine", choices=ENGINES, help="what runs a GGUF file: native computes as training did (default)")
    parser.add_argument("--max-tokens", type=int, default=128, help="at most so many new tokens (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default); 1e-5 to 1e5 samples")
    parser.add_argument("--seed", type=int, default=0, help="makes sampling reproducible (0)")
    diffusion = parser.add_argument_group(
        "diffusion models",
        "how directories and, with the cache prefix, GGUF files of them are decoded",
    )
    diffusion.add_argument("--threshold", type=float, help="fill in every token that is likelier (0.9); 1: one token a forward")
    diffusion.add_argument("--sub-block", type=int, help="tokens of a block that are filled in before the next ones (8)")
    diffusion.add_argument("--cache", choices=CACHES, help="keys and values that are kept: prefix is exact, dual is not (prefix)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of streaming")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        UserError: for a mistake in the arguments or the model.
    """
    options = Options(max_tokens=arguments.max_tokens, temperature=arguments.temperature, seed=arguments.seed)
    model = resolve_model(arguments.model)
    prompt: str = arguments.prompt
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8 text: check the terminal's encoding") from None
    if not prompt:
        raise UserError("the prompt is empty: give some text to continue")
    names = {"threshold": arguments.threshold, "sub_block_size": arguments.sub_block, "cache": arguments.cache}
    given = {name: value for name, value in names.items() if value is not None}
    blocks = DecodeOptions(**asdict(options), **given)  # refuses values out of range, whatever the model
    emit: Emit = (lambda piece: None) if arguments.json else _print_piece
    try:
        start = time.perf_counter()
        if model.kind == "gguf":
            engine = arguments.engine or ENGINES[0]
            result = _from_file(model.path, engine, prompt, options, given, emit)
        elif arguments.engine is None:
            engine = "pytorch"
            result = _from_directory(model.path, prompt, options, given, emit)
        else:
            raise UserError(
                f"--engine has no effect on a model directory, which runs in PyTorch: leave it out or export {model.path}"
            )
        seconds = time.perf_counter() - start
        if arguments.json:
            used: Options | DecodeOptions = options if result.forwards is None else blocks
            answer = {"model": str(model.path), "engine": engine, "prompt": prompt, **asdict(result), **asdict(used)}
            if result.forwards is None:
                del answer["forwards"]
            _print_piece(json.dumps(answer | {"seconds": round(seconds, 3)}, ensure_ascii=False) + "\n")
        else:
            _print_piece("\n")
    except BrokenPipeError:  # the reader (such as `head`) has enough
        _close_output()
    return 0


def _from_file(file: Path, engine: str, prompt: str, options: Options, given: Mapping[str, Any], emit: Emit) -> Generated:
    """Generate from a GGUF file in one of `ENGINES`."""
    if engine == "native":
        if not has_native_engine():
            instead = "" if _needs_native(file) else " or give --engine llama.cpp"
            raise UserError(f"the native engine, which runs {file}, is not installed: install bitnet-kernels{instead}")
        from wrinklefree_inference.native import generate_native

        return generate_native(file, prompt, options, emit, given)
    check_no_effect(given, "llama.cpp")
    try:
        return generate_llamacpp(file, prompt, options, emit)
    except UserError:
        if why := _needs_native(file):
            raise UserError(f"llama.cpp cannot run {file} ({why}): leave --engine out") from None
        raise


def _from_directory(directory: Path, prompt: str, options: Options, given: Mapping[str, Any], emit: Emit) -> Generated:
    """Generate from a model directory in PyTorch."""
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    if diffusion_of(model.config) is None:
        check_no_effect(given, "a model that is no diffusion model")
        return generate_torch(model, tokenizer, prompt, options, emit)
    return generate_diffusion(model, tokenizer, prompt, DecodeOptions(**asdict(options), **given), emit)


def _needs_native(file: Path) -> str | None:
    """Return why llama.cpp does not run a file; None if it does, or the file is damaged."""
    try:
        return no_engine(file)
    except UserError:
        return None


def check_no_effect(given: Mapping[str, Any], model: str) -> None:
    """Refuse options of diffusion models where they would do nothing.

    Raises:
        UserError: if there are some.
    """
    if given:
        option = {"sub_block_size": "sub-block"}.get(name := next(iter(given)), name)
        raise UserError(f"--{option} has no effect on {model}: leave it out")


def _print_piece(piece: str) -> None:
    """Write to standard output at once.

    Raises:
        BrokenPipeError: when its reader has gone.
        UserError: where it cannot hold the text.
    """
    try:
        print(piece, end="", flush=True)
    except BrokenPipeError:
        raise
    except UnicodeEncodeError as error:
        shown = f"{error.object[error.start]!a} in its encoding, {error.encoding}"
        raise UserError(f"standard output cannot show {shown}: set PYTHONIOENCODING=utf-8") from None
    except OSError as error:
        _close_output()
        raise UserError(f"standard output cannot be written to: {error.strerror}") from None


def _close_output() -> None:
    """Send what is left for standard output nowhere: Python would complain again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
