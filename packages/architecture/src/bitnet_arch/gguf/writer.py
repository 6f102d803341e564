"""Write a model directory as GGUF, tensor by tensor, and check every byte that was written."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from bitnet_arch.errors import UserError
from bitnet_arch.gguf.architectures import choose_architecture
from bitnet_arch.gguf.floats import PLAIN, SIZES, TYPE_NAMES
from bitnet_arch.gguf.pieces import encoded_pieces
from bitnet_arch.gguf.plan import TensorPlan, expected_metadata, plan_tensors, stored_bytes
from bitnet_arch.gguf.types import I2_S, I2_S_BLOCK, TYPES
from bitnet_arch.gguf.verify import file_differences
from bitnet_arch.weights import WeightReader, open_weights

# gguf-py does not know these yet; with sizes registered it writes the bytes it is given. I2_S has its tail by `stored_bytes`.
_Q2_0, _I2_S_SIZE = TYPES["q2_0"], (I2_S_BLOCK, I2_S_BLOCK // 4)
gguf.GGML_QUANT_SIZES.setdefault(_Q2_0.ggml_id, (_Q2_0.block, _Q2_0.block_bytes))  # type: ignore[arg-type]
gguf.GGML_QUANT_SIZES.setdefault(I2_S, _I2_S_SIZE)  # type: ignore[arg-type]


@dataclass(frozen=True)
class GgufReport:
    """What was written.

    Attributes:
        path: the file.
        architecture: its `general.architecture`.
        tensors: GGUF name to type name.
        bytes: the file's size.
    """

    path: str
    architecture: str
    tensors: dict[str, str]
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


def export_gguf(
    directory: Path | str,
    out: Path | str,
    kind: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    *,
    architecture: str = "auto",
    embedding: str = "f16",
) -> GgufReport:
    """Export a ternary model directory (master or packed), in the memory of its largest ternary matrix.

    Weights become ternary by absmean before packing, with the scales rounded to f16, so every ternary type holds the same numbers.
    Two types round otherwise: BF16 to bf16, which moves a scale by up to 0.2%, and I2_S and scales in tensors of their own not at
    all. The file is read back and compared byte for byte before it takes its name. This proves the file, not an engine: no engine
    has run it.

    Args:
        directory: the model directory.
        out: the file to write.
        kind: type of the quantised matrices: "auto" (TQ2_0 where a row divides by 256, else Q2_0; with a scale for every 128
            weights Q2_0; where nothing fits F16), "f16", "bf16", "tq1_0", "tq2_0", "q2_0", or "i2_s" (only for bitnet.cpp, in which
            nobody has run our files).
        progress: called with (tensors done, tensors in all).
        architecture: "auto" takes the stock name (bitnet, llama, qwen2, qwen3, gemma3) if llama.cpp computes exactly this model
            under it, else "wrinklefree", which only our runtime loads; or one of these names.
        embedding: type of embeddings and head: "f16", "bf16", "q8_0", "q6_k" or "q4_1"; what each costs is in
            `bitnet_arch.gguf.floats`.

    Raises:
        UserError: if the architecture cannot hold the model, a width cannot have the type, or writing fails.
    """
    out = Path(out)
    with open_weights(directory) as reader:
        architecture = choose_architecture(reader, architecture)
        plans = list(plan_tensors(reader, kind, architecture, embedding))
        metadata = expected_metadata(reader, architecture)
        temporary: Path | None = None
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
            os.close(handle)
            temporary = Path(name)
            _write(reader, plans, metadata, temporary, progress)
            if differences := file_differences(reader, temporary, plans, architecture):
                raise RuntimeError(f"{differences[0]} reads back differently from what was written")
            temporary.chmod(0o644)
            os.replace(temporary, out)
        except OSError as error:
            raise UserError(f"writing {out} failed ({error.strerror or error}): free some space or choose another output") from None
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
    return GgufReport(str(out), architecture, {plan.name: TYPE_NAMES[plan.ggml_id] for plan in plans}, out.stat().st_size)


def _write(
    reader: WeightReader,
    plans: list[TensorPlan],
    metadata: dict[str, Any],
    path: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    try:
        _write_metadata(writer, metadata)
        for plan in plans:
            if plan.ggml_id in PLAIN:
                writer.add_tensor_info(plan.name, plan.shape, np.dtype(PLAIN[plan.ggml_id]), stored_bytes(plan))
            else:
                block, block_bytes = SIZES.get(plan.ggml_id, _I2_S_SIZE)
                byte_shape = (*plan.shape[:-1], plan.shape[-1] // block * block_bytes)
                writer.add_tensor_info(plan.name, byte_shape, np.dtype(np.uint8), stored_bytes(plan), raw_dtype=plan.ggml_id)  # type: ignore[arg-type]
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, plan in enumerate(plans, 1):
            writer.write_tensor_data(_Pieces(reader, plan))  # type: ignore[arg-type]
            if progress:
                progress(done, len(plans))
    finally:
        writer.close()


class _Pieces:
    """What `GGUFWriter` needs of an array, of a tensor that is encoded while it is written."""

    def __init__(self, reader: WeightReader, plan: TensorPlan) -> None:
        self.reader, self.plan, self.nbytes = reader, plan, stored_bytes(plan)

    def tofile(self, file: BinaryIO) -> None:
        for _, data in encoded_pieces(self.reader, self.plan):
            file.write(np.ascontiguousarray(data).data)  # `tofile` tells nothing of a disk that fills up while it buffers


def _write_metadata(writer: gguf.GGUFWriter, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key == "general.architecture":  # the writer's constructor has added it
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
