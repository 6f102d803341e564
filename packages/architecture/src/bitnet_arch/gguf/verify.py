"""Compare a GGUF file with the model directory it was made from: every tensor's type, shape and bytes, and the metadata.

This catches what no comparison of logits can: a scale off by 1%, one sign in a thousand flipped, another epsilon, anything in a
matrix whose scale a following norm cancels.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_arch.checkpoint import WeightReader
from bitnet_arch.gguf.architectures import BITNET
from bitnet_arch.gguf.plan import TensorPlan, encode, expected_metadata, plan_tensors, stored_matrix
from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.gguf.types import BY_ID, F16, f16_scale


def file_differences(
    reader: WeightReader, path: Path | str, plans: list[TensorPlan] | None = None, architecture: str = BITNET
) -> list[str]:
    """Return the tensors and keys in which a file differs from its source, none if it is right.

    Args:
        reader: the opened model directory.
        path: the GGUF file.
        plans: what the file must hold; by default the directory's tensors as llama.cpp's `bitnet` has them, the quantised matrices
            in F16 or any of its ternary types.
        architecture: what it must be.

    Returns:
        Tensor names, and keys as `key NAME`; keys that the exporter does not write are ignored.

    Raises:
        UserError: if the file cannot be parsed.
    """
    written = read_gguf(path)
    plans = _plans_as_written(reader, written) if plans is None else plans
    differences = sorted(set(written.tensors) ^ {plan.name for plan in plans})
    differences += [plan.name for plan in plans if plan.name in written.tensors and not _same_tensor(reader, plan, written)]
    for key, value in expected_metadata(reader, architecture).items():
        if not _same_value(written.metadata.get(key), value):
            differences.append(f"key {key}")
    return differences


def _plans_as_written(reader: WeightReader, written: GgufFile) -> list[TensorPlan]:
    plans = []
    for plan in plan_tensors(reader, "f16"):
        info = written.tensors.get(plan.name)
        exact = plan.part == "ternary" and info is not None and (info.ggml_id in BY_ID or info.ggml_id == F16)
        plans.append(replace(plan, ggml_id=info.ggml_id) if info and exact else plan)
    return plans


def _same_tensor(reader: WeightReader, plan: TensorPlan, written: GgufFile) -> bool:
    info = written.tensors[plan.name]
    if info.ggml_id != plan.ggml_id or info.shape != plan.shape:
        return False
    if written.raw(plan.name).tobytes() != encode(reader, plan).tobytes():
        return False
    if plan.part != "ternary" or plan.ggml_id not in BY_ID or reader.granularity != "tensor":
        return True
    codes, scales = stored_matrix(reader, plan)
    exact = codes.astype(np.float32) * np.float32(f16_scale(float(scales[0, 0]), plan.name))
    return bool(np.array_equal(written.dequantize(plan.name), exact))


def _same_value(found: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return isinstance(found, float) and np.float32(found) == np.float32(expected)
    if isinstance(expected, list) and expected and isinstance(expected[0], float):
        return bool(isinstance(found, list) and np.array_equal(np.array(found, np.float32), np.array(expected, np.float32)))
    return bool(type(found) is type(expected) and found == expected)
