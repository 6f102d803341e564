"""A key-value cache of a fixed number of slots, one a position, in which a span can be written again."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotCache(Cache):
    """Keys and values of positions 0 to `capacity`, written where `place` says and read up to where it says.

    One array serves a prefix that is final, a block that is computed again and again, and single sub-blocks inside it: what is
    written replaces what was there, and nothing is ever cut off.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        """Make an empty cache; memory is taken with the first keys.

        Args:
            layers: the decoder's.
            capacity: positions.
        """
        self._slots = [_Slots(capacity) for _ in range(layers)]
        super().__init__(layers=list(self._slots))

    def place(self, start: int, end: int) -> None:
        """Say where the next forward's keys and values go (from `start` on), and up to where it reads (`end`)."""
        for layer in self._slots:
            layer.start, layer.end = start, end


class _Slots(CacheLayerMixin):
    """One decoder layer's share."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.start, self.end = capacity, 0, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take memory of the keys' and values' shapes `[B, heads, T, width]` and types."""
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, states in (("keys", key_states), ("values", value_states)):
            batch, heads, _, width = states.shape
            setattr(self, name, torch.zeros(batch, heads, self.capacity, width, dtype=states.dtype, device=states.device))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write a forward's keys and values and return all that it reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        span = slice(self.start, self.start + key_states.shape[-2])
        self.keys[:, :, span], self.values[:, :, span] = key_states, value_states
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def get_seq_length(self) -> int:
        """Return how many positions lie before the next forward's."""
        return self.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys the next forward reads, and from where."""
        return self.end, 0

    def get_max_cache_shape(self) -> int:
        """Return the capacity."""
        return self.capacity
