"""The parity gate: what you trained is what you serve, measured for your checkpoint."""

from bitnet_arch.parity.emulate import emulated_model
from bitnet_arch.parity.forwards import FORWARDS, Forward
from bitnet_arch.parity.gate import Engine, EngineInfo, run_gate, tensor_types
from bitnet_arch.parity.layerwise import LayerDifference, compare_linear
from bitnet_arch.parity.measure import Comparison, compare, summarize
from bitnet_arch.parity.report import Check, ParityBounds, ParityError, ParityReport

__all__ = [
    "FORWARDS",
    "Check",
    "Comparison",
    "Engine",
    "EngineInfo",
    "Forward",
    "LayerDifference",
    "ParityBounds",
    "ParityError",
    "ParityReport",
    "compare",
    "compare_linear",
    "emulated_model",
    "run_gate",
    "summarize",
    "tensor_types",
]
