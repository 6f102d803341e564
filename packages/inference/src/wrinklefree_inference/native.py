"""The native engine: GGUF files in the decoder of `bitnet_kernels`, which computes what training computed."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bitnet_arch import UserError
from bitnet_arch.generation import DecodeOptions
from bitnet_arch.gguf import GgufFile, read_gguf, tokenizer_from_gguf
from bitnet_kernels import Engine

from wrinklefree_inference.generate import (
    Emit,
    Generated,
    Options,
    TextStream,
    blocks_of_text,
    check_length,
    check_no_effect,
    end_token_ids,
)
from wrinklefree_inference.native_blocks import decode_native


def open_native(file: Path, slots: int = 1, context: int | None = None) -> Engine:
    """Open a file in the native engine.

    Args:
        file: the GGUF file.
        slots: sequences that are held at once.
        context: tokens that each can have; None for as many as the model has.

    Raises:
        UserError: if the engine cannot run it, or there is not enough memory.
    """
    try:
        return Engine(file, slots=slots, context=context)
    except (ValueError, MemoryError) as error:
        raise _refusal(file, error) from None


def _refusal(file: Path, error: Exception) -> UserError:
    return UserError(f"the native engine cannot run {file}: {str(error).removeprefix(f'{file}: ') or 'there is not enough memory'}")


def _number(file: GgufFile, key: str) -> int | None:
    """Return a number of the architecture's keys; None where there is none, or the engine has to say what is wrong with it."""
    metadata = file.metadata
    found = metadata.get(f"{metadata.get('general.architecture')}.{key}")
    return found if isinstance(found, int) and found > 0 else None


def generate_native(file: Path, prompt: str, options: Options, emit: Emit, diffusion: Mapping[str, Any] | None = None) -> Generated:
    """Generate with the native engine: from left to right, or block by block with a diffusion model.

    Args:
        file: the GGUF file.
        prompt: the text to continue.
        options: how.
        emit: called with each piece of text.
        diffusion: what `bitnet_arch.generation.DecodeOptions` has beyond `options`, where it is not the default.

    Raises:
        UserError: if the engine cannot run the file, or the prompt has no token or leaves no room for one, or options of diffusion
            models are given for another one.
    """
    read = read_gguf(file)
    tokenizer, most = tokenizer_from_gguf(read), _number(read, "context_length")
    ids: list[int] = tokenizer(prompt).input_ids
    if most is not None:
        check_length(len(ids), most)
    # No more than this text needs, in whole blocks: of a long context, keys and values alone can be more than there is memory.
    block = _number(read, "diffusion.block_size") or 1
    engine = open_native(file, context=most and min(-(-(len(ids) + options.max_tokens) // block) * block, most))
    ends = end_token_ids(tokenizer)
    try:
        if engine.mask_token is not None:
            how = DecodeOptions(**asdict(options), **(diffusion or {}))
            prompt_ids = torch.tensor(ids, dtype=torch.int64)
            return blocks_of_text(
                tokenizer, len(ids), ends, emit, lambda push: decode_native(engine, prompt_ids, how, ends=ends, emit=push)
            )
        check_no_effect(diffusion or {}, "a model that is no diffusion model")
        budget = min(options.max_tokens, engine.context - len(ids))
        stream, count, stop = TextStream(tokenizer, emit), 0, "length"
        for token in engine.generate(ids, budget, temperature=options.temperature, seed=options.seed):
            if token in ends:
                stop = "eos"
                break
            stream.push(token)
            count += 1
    except (ValueError, MemoryError) as error:
        raise _refusal(file, error) from None
    stream.close()
    return Generated(text=stream.text, stop=stop, prompt_tokens=len(ids), tokens=count)
