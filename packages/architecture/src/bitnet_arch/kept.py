"""The ternary form of a weight, kept for as long as the weight is provably the same."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitnet_arch.quant import Granularity, ternary_weight


@dataclass(eq=False)
class KeptWeight:
    """What a layer's weight was when it was last quantised, and what came out.

    A weight counts as the same while its memory, version, type and layout are. The version moves with every in-place operation
    that torch counts, the memory with an assignment to `.data`; `alias` keeps the old memory from being handed out again meanwhile.
    Writes *through* `.data` (`p.data.mul_(2)`, also `p.data += d`), numpy or a pointer leave no trace: `stale` finds them later.

    Attributes:
        alias: the weight's memory, without a gradient.
        version: `Tensor._version` at that time.
        forms: dtype to the ternary weight in it.
    """

    alias: Tensor | None = None
    version: int = -1
    forms: dict[torch.dtype, Tensor] = field(default_factory=dict)

    def get(self, weight: Tensor, granularity: Granularity, dtype: torch.dtype) -> Tensor:
        """Return `codes * scale` in the weight's dtype, rounded to another one where asked; no gradient.

        Args:
            weight: a plain parameter, see `keepable`.
            granularity: how many weights share a scale.
            dtype: of the result.
        """
        if not self._holds(weight):
            # A tensor made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                self.alias, self.version = weight.detach(), weight._version
                self.forms = {weight.dtype: ternary_weight(weight, granularity)}
        if dtype not in self.forms:
            with torch.inference_mode(False), torch.no_grad():
                self.forms[dtype] = self.forms[weight.dtype].to(dtype)
        return self.forms[dtype]

    def stale(self, weight: Tensor, granularity: Granularity) -> bool:
        """Whether a weight that seems the same is not. Reads the weight, and synchronises a GPU."""
        return self._holds(weight) and not torch.equal(ternary_weight(weight, granularity), self.forms[weight.dtype])

    def _holds(self, weight: Tensor) -> bool:
        alias = self.alias
        return (
            alias is not None
            and weight._version == self.version
            and weight.data_ptr() == alias.data_ptr()
            and weight.dtype == alias.dtype
            and weight.device == alias.device
            and weight.shape == alias.shape
            and weight.stride() == alias.stride()
        )


def keepable(weight: Tensor) -> bool:
    """Whether a weight's changes can be followed: not if it is sharded, swapped by a transform, or made in inference mode.

    A weight on the meta device has nothing to keep.
    """
    return type(weight) is nn.Parameter and not weight.is_inference() and not weight.is_meta
