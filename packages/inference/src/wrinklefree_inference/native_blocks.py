"""Block-diffusion decoding of a GGUF file in the native engine: `bitnet_arch.generation`'s decoding over the engine's blocks."""

from collections.abc import Collection

import torch
from bitnet_arch import UserError
from bitnet_arch.diffusion import DiffusionForm
from bitnet_arch.generation import Cost, Decoded, DecodeOptions, EmitTokens, decode_blocks
from bitnet_kernels import Engine
from torch import Tensor

LARGEST_BLOCK = 256
"""Tokens that see each other in the engine."""


class EngineForwards:
    """One text's forwards in a slot: finished blocks stay, as with the cache "prefix"; the block at work is computed and forgotten.

    Attributes:
        tokens: int64 `[1, T]`, the caller's: read anew each time, masks and all.
        block_size: tokens that see each other.
        cost: so far.
    """

    def __init__(self, engine: Engine, form: DiffusionForm, tokens: Tensor, block_size: int, slot: int) -> None:
        """Begin a text in a slot, which is emptied.

        Raises:
            UserError: if a block is larger than the engine computes.
        """
        if block_size > LARGEST_BLOCK:
            raise UserError(
                f"the native engine lets at most {LARGEST_BLOCK} tokens see each other, and this text's blocks have {block_size}: "
                "shorten it, or decode the model's directory"
            )
        self.engine, self.form, self.tokens, self.block_size, self._slot = engine, form, tokens, block_size, slot
        self.cost = Cost()
        self._last: Tensor | None = None
        engine.truncate(slot, 0)

    def finish(self, end: int) -> None:
        """Take the tokens before `end` as final."""
        for start in range(self.engine.length(self._slot), end, self.block_size):
            self._last = self._step(start, min(start + self.block_size, end))[-1:]

    @property
    def next_logits(self) -> Tensor | None:
        """Logits `[1, V]` of the first token that is not final, if they are known without another forward: with token shift."""
        return self._last if self.form.token_shift else None

    def logits(self, end: int, sub_start: int, sub_end: int) -> Tensor:
        """Return float32 logits `[sub_end - sub_start, V]` of a sub-block of the block that ends at `end`."""
        final = self.engine.length(self._slot)
        block = self._step(final, end)
        self.engine.truncate(self._slot, final)
        at = torch.arange(sub_start, sub_end) - int(self.form.token_shift) - final
        logits = block[at.clamp(min=0)]
        if at[0] < 0 and self._last is not None:
            logits[0] = self._last[0]
        return logits

    def _step(self, start: int, end: int) -> Tensor:
        self.cost.forwards += 1
        self.cost.positions += end - start
        given: list[int] = self.tokens[0, start:end].tolist()
        return torch.from_numpy(self.engine.step({self._slot: given}, rows="all", bidirectional=True))


def decode_native(
    engine: Engine,
    prompt: Tensor,
    options: DecodeOptions,
    *,
    ends: Collection[int] = (),
    emit: EmitTokens | None = None,
    slot: int = 0,
) -> Decoded:
    """Continue a prompt with a diffusion model that the engine has open, as `bitnet_arch.generation.decode` does in PyTorch.

    Args:
        engine: the model.
        prompt: as in `decode`.
        options: as in `decode`, with the cache "prefix", the only one that the engine has.
        ends: as in `decode`.
        emit: as in `decode`.
        slot: where.

    Raises:
        UserError: for a model that does not diffuse, another cache, blocks that are too large, or as `decode`.
    """
    if engine.mask_token is None:
        raise UserError("the file holds no diffusion model: generate its text from left to right")
    if options.cache != "prefix":
        raise UserError(f"the native engine keeps finished blocks (cache prefix) and has no cache {options.cache!r}")
    form = DiffusionForm(mask_token_id=engine.mask_token, block_size=engine.block_size, token_shift=engine.token_shift)

    def forwards(tokens: Tensor, block_size: int) -> EngineForwards:
        return EngineForwards(engine, form, tokens, block_size, slot)

    return decode_blocks(forwards, form, engine.context, prompt, options, ends=ends, emit=emit)
