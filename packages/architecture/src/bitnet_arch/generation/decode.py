"""Block-diffusion decoding: blocks from left to right, inside a block several tokens at once, the surest first.

Fast-dLLM v2 (arXiv 2509.26328) with the thresholds of Fast-dLLM (arXiv 2505.22618). A block begins as masks; sub-block by
sub-block, the model is asked for all of its tokens, and those it is sure of are filled in, until no mask is left. With token shift
the first token of a block comes from the forward that finishes the block before it.

Deviations: a block that reaches beyond the tokens asked for keeps its full length, and its end stays masked; the last block is not
computed again when it is complete.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitnet_arch.bitlinear import constant_weights
from bitnet_arch.diffusion import DiffusionForm, diffusion_of
from bitnet_arch.errors import UserError
from bitnet_arch.generation.forwards import CACHES, BlockForwards, Forwards
from bitnet_arch.generation.sampling import accept, check_temperature, propose

EmitTokens = Callable[[list[int]], None]
"""Called with the tokens of every sub-block when it is complete, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOptions:
    """How to decode.

    Attributes:
        max_tokens: at most so many tokens.
        threshold: fill in every token that is likelier than this; 1 fills in one a forward.
        sub_block_size: tokens of a block that are filled in before the next ones are begun.
        cache: "prefix", "dual" or "none", see `bitnet_arch.generation.forwards`.
        temperature: 0 takes the likeliest tokens; from 1e-5 to 1e5, draws.
        seed: of the draws.

    Raises:
        UserError: on construction, for a value out of range.
    """

    max_tokens: int = 128
    threshold: float = 0.9
    sub_block_size: int = 8
    cache: str = "prefix"
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"max tokens is {self.max_tokens}: give at least 1")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"the threshold is {self.threshold}: give a probability from 0 (all at once) to 1 (one a forward)")
        if self.sub_block_size < 1:
            raise UserError(f"the sub-block size is {self.sub_block_size}: give at least 1")
        if self.cache not in CACHES:
            raise UserError(f"unknown cache {self.cache!r}: choose {', '.join(CACHES)}")
        check_temperature(self.temperature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What a text cost.

    Attributes:
        tokens: tokens returned.
        forwards: calls of the model, that of the prompt and those that finish blocks included.
        positions: positions computed in them.
    """

    tokens: int
    forwards: int
    positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """A finished text.

    Attributes:
        tokens: without the prompt, a token that ends the text included.
        stop: "eos" or "length".
        statistics: what it cost.
    """

    tokens: list[int]
    stop: str
    statistics: Statistics


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompt: Tensor,
    options: DecodeOptions,
    *,
    ends: Collection[int] = (),
    emit: EmitTokens | None = None,
) -> Decoded:
    """Continue a prompt.

    Args:
        model: a diffusion model (`bitnet_arch.diffusion`), in evaluation mode.
        prompt: int64 `[T]`, at least one token, on the model's device.
        options: how.
        ends: tokens that end a text.
        emit: is told the tokens as they come.

    Raises:
        UserError: for a model that does not diffuse, a prompt that is empty or too long, or one that contains the mask token.
    """
    form = diffusion_of(model.config)
    if form is None:
        raise UserError("the model is no diffusion model (its configuration has no 'diffusion'): train it with training=dlm")

    def forwards(tokens: Tensor, block_size: int) -> BlockForwards:
        return Forwards(model, form, tokens, block_size, options.cache)

    with constant_weights(model):
        return decode_blocks(forwards, form, model.config.max_position_embeddings, prompt, options, ends=ends, emit=emit)


def decode_blocks(
    forwards: Callable[[Tensor, int], BlockForwards],
    form: DiffusionForm,
    context: int,
    prompt: Tensor,
    options: DecodeOptions,
    *,
    ends: Collection[int] = (),
    emit: EmitTokens | None = None,
) -> Decoded:
    """Continue a prompt as `decode` does, with whatever computes a block's logits.

    Args:
        forwards: makes that of a text's tokens `[1, T]` and block size; `options.cache` is its business.
        form: how the model diffuses.
        context: positions that it has.
        prompt: as in `decode`.
        options: as in `decode`.
        ends: as in `decode`.
        emit: as in `decode`.

    Raises:
        UserError: as `decode`.
    """
    length = len(prompt)
    if length == 0:
        raise UserError("the prompt is empty: give some text to continue")
    if length >= context:
        raise UserError(f"the prompt has {length} tokens, but the model reads at most {context - 1}: shorten it")
    if bool((prompt == form.mask_token_id).any()):
        raise UserError("the prompt contains the mask token, which stands for what is to be found: take it out")
    limit = min(length + options.max_tokens, context)
    block_size = limit if form.block_size is None else form.block_size
    total = min(-(-limit // block_size) * block_size, context)
    tokens = torch.full((1, total), form.mask_token_id, dtype=torch.int64, device=prompt.device)
    tokens[0, :length] = prompt
    return _decode(forwards(tokens, block_size), form, length, limit, options, ends, emit)


def _decode(
    forwards: BlockForwards,
    form: DiffusionForm,
    length: int,
    limit: int,
    options: DecodeOptions,
    ends: Collection[int],
    emit: EmitTokens | None,
) -> Decoded:
    """Fill in what comes after the first `length` tokens, up to `limit`."""
    tokens, size = forwards.tokens, forwards.block_size
    generator = torch.Generator().manual_seed(options.seed)
    found: list[int] = []
    stop = "length"
    start = length // size * size
    if start:
        forwards.finish(start)
    while True:
        if start >= length and (known := forwards.next_logits) is not None:
            tokens[0, start] = propose(known, form.mask_token_id, options.temperature, generator)[0].to(tokens.device)
        end = min(start + size, tokens.shape[1])
        # Whole texts are one block: there, sub-blocks are counted from the prompt's end.
        first = start if form.block_size is not None else length
        for sub_start in range(first, min(end, limit), options.sub_block_size):
            sub_end = min(sub_start + options.sub_block_size, end, limit)
            while bool((masked := tokens[0, sub_start:sub_end] == form.mask_token_id).any()):
                logits = forwards.logits(end, sub_start, sub_end)
                proposed, confidence = propose(logits, form.mask_token_id, options.temperature, generator)
                chosen = accept(confidence, masked.cpu(), options.threshold).to(tokens.device)
                tokens[0, sub_start:sub_end] = torch.where(chosen, proposed.to(tokens.device), tokens[0, sub_start:sub_end])
            piece = tokens[0, max(sub_start, length) : sub_end].tolist()
            over = next((i for i, token in enumerate(piece) if token in ends), None)
            piece = piece if over is None else piece[: over + 1]
            found += piece
            if emit is not None and piece:
                emit(piece)
            if over is not None:
                stop = "eos"
                break
        if stop == "eos" or end >= limit:
            break
        forwards.finish(end)
        start = end
    cost = forwards.cost
    return Decoded(
        tokens=found, stop=stop, statistics=Statistics(tokens=len(found), forwards=cost.forwards, positions=cost.positions)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How far the dual cache's text is the prefix cache's.

    Attributes:
        share: of positions with the same token, of the longer text.
        first_difference: how many tokens are the same before the first that is not; None if there is none.
        prefix: the text of the prefix cache, which is exact.
        dual: that of the dual cache.
    """

    share: float
    first_difference: int | None
    prefix: Decoded
    dual: Decoded


def cache_agreement(model: PreTrainedModel, prompt: Tensor, options: DecodeOptions, *, ends: Collection[int] = ()) -> Agreement:
    """Decode a prompt with the prefix cache and with the dual cache, whatever `options.cache` says, and compare.

    Args:
        model: as in `decode`.
        prompt: as in `decode`.
        options: as in `decode`.
        ends: as in `decode`.
    """
    prefix, dual = (decode(model, prompt, replace(options, cache=kind), ends=ends) for kind in ("prefix", "dual"))
    same = [a == b for a, b in zip(prefix.tokens, dual.tokens, strict=False)]
    longer = max(len(prefix.tokens), len(dual.tokens))
    first = next((i for i, equal in enumerate(same) if not equal), None if len(same) == longer else len(same))
    return Agreement(share=sum(same) / longer, first_difference=first, prefix=prefix, dual=dual)
