"""Write a model directory as GGUF, tensor by tensor, and check every byte that was written."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bitnet_arch.checkpoint import WeightReader, open_weights
from bitnet_arch.errors import UserError
from bitnet_arch.gguf.plan import (
    ARCHITECTURE,
    TensorPlan,
    check_architecture,
    encode,
    expected_metadata,
    plan_tensors,
    stored_bytes,
)
from bitnet_arch.gguf.types import BY_ID, F16, F32, TYPES
from bitnet_arch.gguf.verify import file_differences

# gguf-py does not know Q2_0 yet; with its size registered it writes the bytes it is given.
gguf.GGML_QUANT_SIZES.setdefault(42, (64, 18))  # type: ignore[arg-type]


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
    directory: Path | str, out: Path | str, kind: str = "auto", progress: Callable[[int, int], None] | None = None
) -> GgufReport:
    """Export a SubLN'd model directory (master or packed) for llama.cpp's `bitnet` architecture.

    Weights become ternary by absmean before packing, with the scale rounded to f16, so every ternary type holds the same
    numbers. The file is read back and compared byte for byte before it takes its name. This proves the file, not an engine: no
    engine has run it.

    Args:
        directory: the model directory.
        out: the file to write.
        kind: type of the quantised matrices: "auto" (TQ2_0 where a row divides by 256, else Q2_0), "f16", "tq1_0", "tq2_0", "q2_0".
        progress: called with (tensors done, tensors in all).

    Raises:
        UserError: if the architecture cannot hold the model, a width cannot have the type, or writing fails.
    """
    out = Path(out)
    with open_weights(directory) as reader:
        check_architecture(reader)
        plans = list(plan_tensors(reader, kind))
        temporary: Path | None = None
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)
            os.close(handle)
            temporary = Path(name)
            _write(reader, plans, temporary, progress)
            if differences := file_differences(reader, temporary, plans):
                raise RuntimeError(f"{differences[0]} reads back differently from what was written")
            temporary.chmod(0o644)
            os.replace(temporary, out)
        except OSError as error:
            raise UserError(f"writing {out} failed ({error.strerror}): free some space or choose another output") from None
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
    names = {F32: "f32", F16: "f16"} | {kind.ggml_id: kind.name for kind in TYPES.values()}
    return GgufReport(str(out), ARCHITECTURE, {plan.name: names[plan.ggml_id] for plan in plans}, out.stat().st_size)


def _write(reader: WeightReader, plans: list[TensorPlan], path: Path, progress: Callable[[int, int], None] | None) -> None:
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        _write_metadata(writer, expected_metadata(reader))
        for plan in plans:
            if plan.ggml_id in BY_ID:
                kind = BY_ID[plan.ggml_id]
                byte_shape = (plan.shape[0], plan.shape[1] // kind.block * kind.block_bytes)
                writer.add_tensor_info(plan.name, byte_shape, np.dtype(np.uint8), stored_bytes(plan), raw_dtype=kind.ggml_id)  # type: ignore[arg-type]
            else:
                dtype = np.dtype(np.float16 if plan.ggml_id == F16 else np.float32)
                writer.add_tensor_info(plan.name, plan.shape, dtype, stored_bytes(plan))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, plan in enumerate(plans, 1):
            writer.write_tensor_data(encode(reader, plan))
            if progress:
                progress(done, len(plans))
    finally:
        writer.close()


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
