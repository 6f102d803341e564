"""The decoder runtime: logits and texts of GGUF files, without torch.

An engine computes the forward pass that the file's model was trained with (8-bit activations, one scale a token), for the stock
architectures `bitnet`, `bitnet-25`, `bitnet-b1.58`, `llama`, `qwen2`, `qwen3` and `gemma3` with ternary matrices, and for
`wrinklefree`.
"""

import math
import numbers
import operator
import os
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from bitnet_kernels import _native

Rows = Literal["none", "last", "all"]
Cache = Literal["f32", "f16", "int8"]
_CACHES: tuple[Cache, ...] = ("f32", "f16", "int8")
_ROWS: tuple[Rows, ...] = ("none", "last", "all")
PREFILL = 256
"""Tokens of a prompt that `prefill` gives to a step: between steps it can be interrupted."""
_LOGITS, _HIDDEN, _LOG_PROBABILITIES = range(3)
_BLOCK = -1  # stands for a token that saw later ones, after which nothing can be shared


def _whole(name: str, value: object, most: int = 2**63 - 1) -> int:
    """Return a whole number as an int, which the runtime can take."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: a whole number is wanted, not {_shown(value)}") from None
    if number > most or number < -(2**63):
        raise ValueError(f"{name} is {number}: it must be below 2^{most.bit_length()} and not below -2^63")
    return number


def _shown(value: object) -> str:
    """Return what a message shows of a value: the beginning, in one line."""
    return " ".join(repr(value).split())[:60]


def _list(name: str, values: Any) -> list[Any]:
    try:
        return list(values)
    except (TypeError, NotImplementedError):  # the latter of a memoryview's rarer formats
        raise TypeError(f"{name}: a sequence is wanted, not {type(values).__name__}") from None


def _real(name: str, value: object) -> float:
    """Return a number as a float; an infinity, which nothing takes, where it is beyond."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: a number is wanted, not {_shown(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _one_of(name: str, value: object, words: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, not {_shown(value)}")


class Tokenizer(Protocol):
    """What an engine needs of a tokenizer; those of transformers have it (`bitnet_arch.gguf.tokenizer_from_gguf`)."""

    def encode(self, text: str, /) -> Sequence[int]:
        """Return a text's tokens."""

    def decode(self, tokens: list[int], /) -> str:
        """Return the text of tokens."""


@dataclass(frozen=True)
class Statistics:
    """What an engine has done since it was opened.

    Attributes:
        steps: steps.
        tokens: tokens that passed the layers.
        seconds: time that the steps took.
    """

    steps: int
    tokens: int
    seconds: float


class Engine:
    """A model in memory, with slots for sequences.

    A slot holds the tokens of one sequence, and what the model has computed of them: texts that begin alike share that (`prefill`).
    What a step returns of a token depends on its own sequence alone: not on the other slots, on how a prompt is cut into steps, or
    on the number of threads.

    Attributes:
        architecture: the file's `general.architecture`.
        layers: blocks.
        width: of the residual stream.
        vocabulary: tokens.
        slots: sequences that are held at once.
        context: tokens that a slot can hold.
        mask_token: of a diffusion model, else None.
        block_size: of a diffusion model that decodes in blocks, else None.
        token_shift: whether a diffusion model reads token i from position i - 1.
        tokenizer: what turns texts into tokens and back, None where texts are not needed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        slots: int = 1,
        context: int | None = None,
        cache: Cache = "f32",
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """Open a GGUF file, with the instruction set that `bitnet_kernels.isa()` names.

        Args:
            path: the file. It is mapped into memory and must not change while the engine is open.
            slots: sequences that are held at once.
            context: tokens that a slot can hold; None for as many as the model can.
            cache: what keys and values are kept in. With "f32" logits are those of training's forward; "f16" takes half of the
                memory and "int8" (a scale a vector) a quarter, and attention is faster.
            tokenizer: lets prompts be texts.

        Raises:
            TypeError: for slots or a context that are no whole number, as every method does.
            ValueError: if the file is missing, damaged or no model that the decoder runs, or an option cannot be.
            MemoryError: if there is not enough memory.
        """
        from bitnet_kernels import isa

        name = os.fsencode(path)
        if b"\0" in name:
            raise ValueError(f"{os.fspath(path)!r} cannot be read (a path holds no NUL)")
        _one_of("cache", cache, _CACHES)
        slots, context = _whole("slots", slots), None if context is None else _whole("context", context)
        if slots < 1 or (context is not None and context < 1):
            raise ValueError(f"slots and context must be at least 1, not {slots} and {context}")
        self._engine = _native.Engine(name, slots, context or 0, _CACHES.index(cache), isa())
        self._owners: dict[int, object] = {}  # slot to the iterator whose text it holds
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self.tokenizer = tokenizer
        about = self._engine.about()
        self.architecture: str = about["architecture"]
        self.layers: int = about["layers"]
        self.width: int = about["width"]
        self.vocabulary: int = about["vocabulary"]
        self.slots: int = about["slots"]
        self.context: int = about["context"]
        self.mask_token: int | None = about["mask_token"] if about["mask_token"] >= 0 else None
        self.block_size: int | None = about["block_size"] or None
        self.token_shift: bool = about["token_shift"]

    def step(
        self, sequences: Mapping[int, Sequence[int]], *, rows: Rows = "last", bidirectional: bool = False
    ) -> NDArray[np.float32]:
        """Append tokens to slots and return logits.

        Args:
            sequences: slot to tokens, at least one each.
            rows: of which tokens logits are returned: of each sequence's last one, of all, or of none.
            bidirectional: whether the tokens of one sequence of this step, at most 256, see each other in both directions, as the
                blocks of a diffusion model do.

        Returns:
            float32 `[rows, vocabulary]`, in the order of `sequences`.

        Raises:
            ValueError: for a slot or token that is none, a full context, or numbers that are not finite. Slots are as they were.
            InterruptedError: if `cancel` was called. Slots are as they were.
        """
        return self._step(sequences, rows, bidirectional, _LOGITS)

    def log_probabilities(
        self, sequences: Mapping[int, Sequence[int]], *, rows: Rows = "last", bidirectional: bool = False
    ) -> NDArray[np.float32]:
        """Append tokens as `step` does and return natural logarithms of probabilities, float32 `[rows, vocabulary]`.

        They are log-softmax of the logits, summed in double precision and rounded once.
        """
        return self._step(sequences, rows, bidirectional, _LOG_PROBABILITIES)

    def hidden_states(
        self, sequences: Mapping[int, Sequence[int]], *, rows: Rows = "last", bidirectional: bool = False
    ) -> NDArray[np.float32]:
        """Append tokens as `step` does and return what the head reads, float32 `[rows, width]`."""
        return self._step(sequences, rows, bidirectional, _HIDDEN)

    def _step(self, sequences: Mapping[int, Sequence[int]], rows: Rows, bidirectional: bool, output: int) -> NDArray[np.float32]:
        _one_of("rows", rows, _ROWS)
        if not isinstance(bidirectional, bool | np.bool_):
            raise TypeError(f"bidirectional: True or False is wanted, not {_shown(bidirectional)}")
        if not isinstance(sequences, Mapping):
            raise TypeError(f"sequences: a mapping of slots to tokens is wanted, not {type(sequences).__name__}")
        given = [self._checked(slot, tokens) for slot, tokens in sequences.items()]
        held = [self._known(slot) for slot, _ in given]
        for (_, tokens), before in zip(given, held, strict=True):
            self._check_room(len(before) + len(tokens))  # before there is memory for results, which may be more than there is
        results: NDArray[np.float32] = self._engine.step(given, _ROWS.index(rows), bool(bidirectional), output)
        for (slot, tokens), before in zip(given, held, strict=True):
            self._owners.pop(slot, None)
            before += [_BLOCK] * len(tokens) if bidirectional else tokens
        return results

    def _known(self, slot: int) -> list[int]:
        """Return the list of a slot's tokens, as long as the slot is.

        Ctrl-C may end a call between what the runtime did and what this class notes of it. Tokens that nobody noted can be shared
        with no text, and who was writing one in the slot does not go on.
        """
        length = self.length(slot)
        held = self._held[slot]
        if len(held) != length:
            self._owners.pop(slot, None)
            held[length:] = [_BLOCK] * (length - len(held))
        return held

    def _checked(self, slot: int, tokens: Sequence[int]) -> tuple[int, list[int]]:
        slot, tokens = _whole("slot", slot), [_whole("a token", token) for token in _list("tokens", tokens)]
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot is {slot}: the engine has 0 to {self.slots - 1}")
        for token in tokens:
            if not 0 <= token < self.vocabulary:
                raise ValueError(f"a token is {token}: the model knows 0 to {self.vocabulary - 1}")
        return slot, tokens

    def _text(self, slot: int, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """Return a slot and a text that it can hold."""
        slot, text = self._checked(slot, tokens)
        self._check_room(len(text))
        return slot, text

    def _check_room(self, tokens: int) -> None:
        if tokens > self.context:
            raise ValueError(
                f"{tokens} tokens do not fit the context of {self.context}: "
                "shorten the text or open the model with a larger context"
            )

    def logits(self, tokens: Sequence[int], *, slot: int = 0) -> NDArray[np.float32]:
        """Return the logits of every token of a text, float32 `[tokens, vocabulary]`, in a slot that is emptied first.

        Raises:
            ValueError: as `step`. Where numbers are not finite, or after `cancel`, the slot is empty.
        """
        slot, text = self._text(slot, tokens)
        if not text:
            raise ValueError("a sequence has no tokens")
        self.truncate(slot, 0)
        return self.step({slot: text}, rows="all")

    def prefill(self, tokens: Sequence[int], *, slot: int = 0) -> int:
        """Let a slot hold exactly these tokens, computing only those that no slot holds after the same beginning.

        Returns:
            How many tokens were computed.

        Raises:
            ValueError: as `step`. Where numbers are not finite, or after `cancel`, the slot holds a beginning of the text.
        """
        slot, text = self._text(slot, tokens)
        source = max(range(self.slots), key=lambda other: (self._shared(other, text), other == slot))
        kept = self._shared(source, text)
        if source == slot:
            self.truncate(slot, kept)
        else:
            self.copy(source, slot, kept)
        for start in range(kept, len(text), PREFILL):
            self.step({slot: text[start : start + PREFILL]}, rows="none")
        return len(text) - kept

    def _shared(self, slot: int, tokens: Sequence[int]) -> int:
        """Return how many tokens a slot holds that these begin with, too."""
        held = self._known(slot)
        pairs = enumerate(zip(held, tokens, strict=False))
        return next((at for at, (known, token) in pairs if known != token), min(len(held), len(tokens)))

    def generate(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Collection[int] = (),
        slot: int = 0,
    ) -> Iterator[int]:
        """Return an iterator over the tokens that continue a prompt, in a slot of which it keeps what begins alike.

        Args:
            prompt: at least one token, or with a tokenizer a text.
            max_tokens: how many tokens to generate at most.
            temperature: 0 takes the most probable token.
            top_k: draws from so many of the most probable tokens; 0 from all.
            top_p: draws from the most probable tokens that together have this probability.
            seed: decides all draws, together with their number in the text.
            stop: tokens that end the text; they are not returned.
            slot: the slot.

        Raises:
            ValueError: before anything is computed, for an option that cannot be, a text that does not fit the context, or a
                diffusion model, which does not write from left to right. The iterator raises it, too, if its slot was used by
                anything else in between.
        """
        slot, _ = self._checked(slot, ())
        max_tokens = _whole("max_tokens", max_tokens)
        tokens = self._prompt(prompt, max_tokens)
        options = _Options(temperature, top_k, top_p, seed, stop)
        return (token for _, token in self._continue([tokens], max_tokens, options, [slot]))

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> Iterator[tuple[int, int]]:
        """Return an iterator over the tokens that continue several prompts, each with the number of its prompt.

        As many texts as there are slots are decoded together, each in one; the next begins where one has ended. Prompt i gets the
        text that `generate` gives with the seed `seed + i`.

        Args:
            prompts: as in `generate`, as all that follow.
            max_tokens: of each text.
            temperature: see there.
            top_k: see there.
            top_p: see there.
            seed: of the first prompt.
            stop: see there.

        Raises:
            ValueError: as `generate`.
        """
        max_tokens, seed = _whole("max_tokens", max_tokens), _whole("seed", seed, 2**64 - 1)
        tokens = [self._prompt(prompt, max_tokens) for prompt in _list("prompts", prompts)]
        options = _Options(temperature, top_k, top_p, seed, stop)
        if seed + len(tokens) > 2**64:
            raise ValueError(f"seed is {seed}: with {len(tokens)} prompts it must be at most {2**64 - len(tokens)}")
        return self._continue(tokens, max_tokens, options, list(range(self.slots)))

    def complete(self, prompt: str | Sequence[int], max_tokens: int, **options: Any) -> str:
        """Return the text that continues a prompt; `options` are those of `generate`.

        Raises:
            ValueError: as `generate`, or without a tokenizer.
        """
        return self._tokenizer().decode(list(self.generate(prompt, max_tokens, **options)))

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("the engine has no tokenizer, which texts need: give it one, or give and take tokens")
        return self.tokenizer

    def _prompt(self, prompt: str | Sequence[int], max_tokens: int) -> list[int]:
        """Return a prompt's tokens, if so many can follow them."""
        if self.mask_token is not None:
            raise ValueError("the file holds a diffusion model, which does not write from left to right: decode it in blocks")
        tokens = _list("prompt", self._tokenizer().encode(prompt) if isinstance(prompt, str) else prompt)
        if not tokens or max_tokens < 1:
            raise ValueError(f"a prompt and max_tokens of at least 1 are needed, not {len(tokens)} and {max_tokens}")
        if len(tokens) + max_tokens - 1 > self.context:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and {max_tokens} more do not fit the context of {self.context}: "
                "shorten one of them"
            )
        return self._checked(0, tokens)[1]

    def _continue(self, prompts: list[list[int]], count: int, options: "_Options", free: list[int]) -> Iterator[tuple[int, int]]:
        """Yield pairs of a prompt's number and a token, of texts in slots that are free for them."""
        owner, waiting = object(), deque(range(len(prompts)))
        running: dict[int, tuple[int, int, int]] = {}  # slot to prompt, its text's last token, and how many that has
        while waiting or running:
            while waiting and free:
                text = waiting.popleft()
                slot = max(free, key=lambda slot: self._shared(slot, prompts[text]))
                free.remove(slot)
                self.prefill(prompts[text][:-1], slot=slot)
                self._owners[slot] = owner
                running[slot] = (text, prompts[text][-1], 0)
            for slot in running:
                self._known(slot)
                if self._owners.get(slot) is not owner:
                    raise ValueError(f"slot {slot} was used while a text was generated in it: give every text a slot of its own")
            logits = self.step({slot: [token] for slot, (_, token, _) in running.items()})
            self._owners |= dict.fromkeys(running, owner)
            for (slot, (text, _, index)), row in zip(list(running.items()), logits, strict=True):
                token = options.draw(row, text, index)
                running[slot] = (text, token, index + 1)
                if token in options.stop or index + 1 == count:
                    del running[slot]
                    free.append(slot)
                if token not in options.stop:
                    yield text, token

    def length(self, slot: int = 0) -> int:
        """Return how many tokens a slot holds."""
        return self._engine.length(_whole("slot", slot))

    def truncate(self, slot: int, length: int) -> None:
        """Forget a slot's tokens from `length` on.

        Raises:
            ValueError: if it holds fewer.
        """
        slot, length = _whole("slot", slot), _whole("length", length)
        self._engine.truncate(slot, length)
        self._owners.pop(slot, None)
        del self._held[slot][length:]

    def copy(self, source: int, to: int, length: int) -> None:
        """Let slot `to` begin with the first `length` tokens of slot `source`, instead of what it holds: a prefix that texts share.

        Raises:
            ValueError: if that holds fewer.
        """
        source, to, length = _whole("source", source), _whole("to", to), _whole("length", length)
        shared, before = self._known(source)[:length], self._known(to)
        self._owners.pop(to, None)
        self._held[to] = []  # where Ctrl-C ends the call after the copy, nothing is known of the slot
        try:
            self._engine.copy(source, to, length)
        except Exception:  # of which the slot is as it was
            self._held[to] = before
            raise
        self._held[to] = shared

    def cancel(self) -> None:
        """Make the step that runs in another thread, or else the next one, end with `InterruptedError`.

        It ends when the layer or the product with the head that it computes just then (of at most 256 tokens) is done.
        """
        self._engine.cancel()

    def statistics(self) -> Statistics:
        """Return what the engine has done."""
        steps, tokens, nanoseconds = self._engine.statistics()
        return Statistics(steps, tokens, nanoseconds / 1e9)


class _Options:
    """How tokens are drawn, checked."""

    def __init__(self, temperature: float, top_k: int, top_p: float, seed: int, stop: Collection[int]) -> None:
        top_k, seed = _whole("top_k", top_k), _whole("seed", seed, 2**64 - 1)
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: it must be from 0 to 2^64 - 1")
        self._sampler, self._seed = (_real("temperature", temperature), top_k, _real("top_p", top_p)), seed
        self.stop = frozenset(_whole("stop", token) for token in _list("stop", stop))
        self.draw(np.zeros(1, np.float32), 0, 0)

    def draw(self, logits: NDArray[np.float32], text: int, index: int) -> int:
        """Return the token of a text that is its `index`th draw."""
        return _native.sample(logits, *self._sampler, self._seed + text, index)
