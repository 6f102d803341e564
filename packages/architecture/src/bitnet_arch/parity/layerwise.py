"""Layer by layer, on identical inputs: the packed integer path against the fake-quantised one."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitnet_arch.quant import EPS, fake_quant_activation, quantize_activation


@dataclass(frozen=True)
class LayerDifference:
    """What a comparison of one or more linear layers found.

    Attributes:
        wrong_codes: activation codes that differ from the textbook's although they are not near a rounding edge.
        output_error: largest |candidate - reference| as a fraction of the largest |reference|, over the worst layer.
        worst: that layer's name.
        layers: how many were compared.
    """

    wrong_codes: int = 0
    output_error: float = 0.0
    worst: str = ""
    layers: int = 0

    def merge(self, other: "LayerDifference") -> "LayerDifference":
        """Return the worse of both."""
        worse = max(self, other, key=lambda found: math.inf if math.isnan(found.output_error) else found.output_error)
        return LayerDifference(
            self.wrong_codes + other.wrong_codes, worse.output_error, worse.worst or other.worst, self.layers + other.layers
        )


@torch.no_grad()
def compare_linear(name: str, x: Tensor, reference: nn.Module, candidate: nn.Module, code_edge: float) -> LayerDifference:
    """Compare two linear layers on the same input.

    Args:
        name: the layer's name.
        x: `[..., in]` float32.
        reference: the fake-quantised layer.
        candidate: the integer layer.
        code_edge: distance from a rounding edge within which a code may fall on either side.
    """
    expected, found = reference(x), candidate(x)
    error = float((found - expected).abs().max()) / max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    return LayerDifference(wrong_codes(x, code_edge), error, name, 1)


def wrong_codes(x: Tensor, code_edge: float) -> int:
    """Count codes of the integer and of the fake-quantised path that differ from the textbook's in float64, away from an edge."""
    wide = x.double()
    exact = wide * (127.0 / wide.abs().amax(dim=-1, keepdim=True).clamp(min=EPS))
    from_edge = ((exact - exact.floor()) - 0.5).abs()
    codes, scale = quantize_activation(x)
    fake = (fake_quant_activation(x).double() / scale.double()).round()
    wrong = ((codes.double() != exact.round()) | (fake != exact.round())) & (from_edge > code_edge)
    return int(wrong.sum())
