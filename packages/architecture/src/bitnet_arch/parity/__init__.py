"""The parity gate: what you trained is what you serve, measured for your checkpoint."""

from bitnet_arch.parity.emulate import emulated_model
from bitnet_arch.parity.engines import Engine, EngineInfo, has_native_engine, native_engine, no_engine
from bitnet_arch.parity.forwards import FORWARDS, Forward
from bitnet_arch.parity.gate import run_gate, tensor_types
from bitnet_arch.parity.layerwise import LayerDifference, compare_linear
from bitnet_arch.parity.measure import Comparison, compare, summarize
from bitnet_arch.parity.report import Check, ParityBounds, ParityError, ParityReport
from bitnet_arch.parity.tokens import Tokenize, differing_lines, tokenizer_check

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
    "Tokenize",
    "compare",
    "compare_linear",
    "differing_lines",
    "emulated_model",
    "has_native_engine",
    "native_engine",
    "no_engine",
    "run_gate",
    "summarize",
    "tensor_types",
    "tokenizer_check",
]
