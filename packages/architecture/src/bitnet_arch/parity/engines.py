"""What the gate knows of an engine, and the project's own engine as one of them."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitnet_arch.gguf.architectures import OURS
from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.gguf.tokenizer import tokenizer_from_gguf
from bitnet_arch.gguf.types import I2_S
from bitnet_arch.kernel_ops import check_environment
from bitnet_arch.parity.tokens import Tokenize

Engine = Callable[[list[int]], NDArray[np.float64]]
"""Maps token ids to log-probabilities of the next token, float64 `[len(ids), vocabulary]`: row i has seen ids 0..i."""

Handling = Literal["llama.cpp", "training"]
"""How an engine rounds what its matrices are multiplied with: by blocks as each type of matrix asks for, with keys and values in
f16; or by tokens as training does, with everything else in float32."""

NATIVE = "native (bitnet_kernels)"


@dataclass(frozen=True)
class EngineInfo:
    """An engine and what it is called in reports.

    Attributes:
        run: computes distributions.
        name: the engine's name.
        version: its version.
        tokenize: how it cuts text, as the file tells it to; None if it has no tokenizer of its own and is given tokens, which
            `tokenizer_from_gguf` makes.
        handling: how it handles activations, which decides what it is compared with, and by which bounds.
        windows: of how many windows, from the first on, it is asked; None for all.
    """

    run: Engine
    name: str
    version: str
    tokenize: Tokenize | None
    handling: Handling = "llama.cpp"
    windows: int | None = None


def no_engine(gguf_path: Path | str | GgufFile) -> str | None:
    """Return in a clause why llama.cpp does not run a file, or what `read_gguf` found in it; None if it does."""
    file = gguf_path if isinstance(gguf_path, GgufFile) else read_gguf(gguf_path)
    if file.metadata.get("general.architecture") == OURS:
        return f"llama.cpp does not run the architecture {OURS!r}, which holds what its own cannot"
    if any(info.ggml_id == I2_S for info in file.tensors.values()):
        return "llama.cpp does not run I2_S, which bitnet.cpp and the native engine load"
    return None


def has_native_engine() -> bool:
    """Return whether `bitnet_kernels` is installed (the extra `bitnet-arch[kernels]`).

    Raises:
        UserError: for a variable of the environment that it refuses, `bitnet_arch.kernel_ops`.
    """
    check_environment()
    return importlib.util.find_spec("bitnet_kernels") is not None


def native_engine(gguf_path: Path | str, context: int) -> EngineInfo:
    """Open a file in the decoder of `bitnet_kernels`, which runs every file that this project writes.

    Args:
        gguf_path: the file, which must not change while the engine is in use.
        context: the longest window.

    Raises:
        ValueError: if the engine does not run the file; by `run`, if what it computes is not finite.
        MemoryError: if there is not enough memory; by `run`, likewise.
    """
    from bitnet_kernels import Engine as NativeEngine

    engine = NativeEngine(gguf_path, context=context)

    def run(ids: list[int]) -> NDArray[np.float64]:
        return log_softmax(engine.logits(ids))

    return EngineInfo(run, NATIVE, version("bitnet-kernels"), None, "training")


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log-probabilities, float64, of logits `[rows, vocabulary]`."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    normalized: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return normalized


def tokenizer_of(file: GgufFile) -> Tokenize:
    """Return what cuts text for an engine that has no tokenizer: the one that the file's metadata describes.

    Raises:
        UserError: if it cannot be rebuilt.
    """
    rebuilt = tokenizer_from_gguf(file)
    return lambda text: list(rebuilt(text).input_ids)
