"""Logits of a block of tokens after everything before it, with three ways to pay for it.

Blocks are counted from position 0. A finished block never changes, so its keys and values may be kept: "prefix" does that, and
gives what "none" gives, which computes the whole text in every forward. "dual" also keeps those of the block's own tokens outside
the sub-block that is being filled, which do change as their neighbours are filled in: it is an approximation.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitnet_arch.attention import attention_argument, head_logits, hidden_states
from bitnet_arch.diffusion import DiffusionForm
from bitnet_arch.generation.cache import SlotCache

CACHES = ("none", "prefix", "dual")


@dataclass
class Cost:
    """What was computed.

    Attributes:
        forwards: calls of the model.
        positions: positions in them.
    """

    forwards: int = 0
    positions: int = 0


class BlockForwards(Protocol):
    """What decoding asks of a model: `Forwards`, or an engine's."""

    tokens: Tensor
    block_size: int
    cost: Cost

    def finish(self, end: int) -> None:
        """Take the tokens before `end` as final."""

    @property
    def next_logits(self) -> Tensor | None:
        """Logits `[1, V]` of the first token that is not final, if they are known."""

    def logits(self, end: int, sub_start: int, sub_end: int) -> Tensor:
        """Return logits `[sub_end - sub_start, V]` of a sub-block of the block that ends at `end`."""


class Forwards:
    """One text's forwards. `tokens`, int64 `[1, T]`, is the caller's: it is read anew each time, masks and all.

    Attributes:
        cost: so far.
    """

    def __init__(self, model: PreTrainedModel, form: DiffusionForm, tokens: Tensor, block_size: int, cache: str) -> None:
        """Begin a text.

        Args:
            model: in evaluation mode.
            form: how it diffuses.
            tokens: as above.
            block_size: D, or T where the form has none.
            cache: one of `CACHES`.
        """
        self.model, self.form, self.tokens, self.block_size, self.kind = model, form, tokens, block_size, cache
        self.cost = Cost()
        self._cache = None if cache == "none" else SlotCache(model.config.num_hidden_layers, tokens.shape[1])
        self._final = 0  # everything before is final
        self._fresh = False  # whether the block after it has been computed as a whole
        self._last: Tensor | None = None  # logits at the last final position

    def finish(self, end: int) -> None:
        """Take the tokens before `end` as final; `end` is a multiple of D, or where the text ends."""
        hidden = self._forward(0 if self._cache is None else self._final, end, end)
        self._final, self._fresh, self._last = end, False, head_logits(self.model, hidden[:, -1])

    @property
    def next_logits(self) -> Tensor | None:
        """Logits `[1, V]` of the first token that is not final, if they are known without another forward: with token shift."""
        return self._last if self.form.token_shift else None

    def logits(self, end: int, sub_start: int, sub_end: int) -> Tensor:
        """Return logits for the tokens of a sub-block, `[sub_end - sub_start, V]`.

        Args:
            end: where the block ends that begins where the final tokens end.
            sub_start: where the sub-block begins, inside it.
            sub_end: where that ends.
        """
        first, last = (0 if self._cache is None else self._final), end
        unknown = int(self.tokens[0, sub_start]) == self.form.mask_token_id
        if self.kind == "dual" and self._fresh and not unknown:
            # Fast-dLLM v2: the whole block only while the sub-block's first token is unknown, which may be read from before it.
            first, last = sub_start, sub_end
        hidden = self._forward(first, last, end)
        self._fresh = True
        at = torch.arange(sub_start, sub_end, device=hidden.device) - int(self.form.token_shift) - first
        logits = head_logits(self.model, hidden[0, at.clamp(min=0)])
        if at[0] < 0 and sub_start == self._final and self._last is not None:
            logits[0] = self._last[0]
        return logits

    def _forward(self, first: int, last: int, end: int) -> Tensor:
        """Compute positions `first` to `last` with all keys before `end`; return hidden states `[1, last - first, hidden]`."""
        device = self.tokens.device
        queries, keys = (torch.arange(a, b, device=device)[None] for a, b in ((first, last), (0, end)))
        allowed = queries[:, :, None] // self.block_size >= keys[:, None, :] // self.block_size
        if self._cache is not None:
            self._cache.place(first, end)
        self.cost.forwards += 1
        self.cost.positions += last - first
        return hidden_states(
            self.model,
            input_ids=self.tokens[:, first:last],
            attention_mask=attention_argument(self.model, allowed, queries, keys),
            position_ids=queries,
            past_key_values=self._cache,
            use_cache=self._cache is not None,
        )
