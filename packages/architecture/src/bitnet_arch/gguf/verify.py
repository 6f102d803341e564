"""Compare a GGUF file with the model directory it was made from: every tensor's type, shape and bytes, and the metadata.

This catches what no comparison of logits can: a scale off by 1%, one sign in a thousand flipped, another epsilon, anything in a
matrix whose scale a following norm cancels.
"""

from pathlib import Path
from typing import Any

import numpy as np

from bitnet_arch.checkpoint import WeightReader
from bitnet_arch.convert import is_quantized_linear
from bitnet_arch.gguf.plan import TensorPlan, encode, expected_metadata, plan_tensors
from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.gguf.types import BY_ID, F16, f16_scale


def file_differences(reader: WeightReader, path: Path | str, plans: list[TensorPlan] | None = None) -> list[str]:
    """Return the tensors and keys in which a file differs from its source, none if it is right.

    Args:
        reader: the opened model directory.
        path: the GGUF file.
        plans: what the file must hold; by default the directory's tensors, the quantised matrices in any exact type.

    Returns:
        Tensor names, and keys as `key NAME`; keys that the exporter does not write are ignored.

    Raises:
        UserError: if the file cannot be parsed.
    """
    written = read_gguf(path)
    plans = _plans_as_written(reader, written) if plans is None else plans
    differences = sorted(set(written.tensors) ^ {plan.name for plan in plans})
    differences += [plan.name for plan in plans if plan.name in written.tensors and not _same_tensor(reader, plan, written)]
    for key, value in expected_metadata(reader).items():
        if not _same_value(written.metadata.get(key), value):
            differences.append(f"key {key}")
    return differences


def _plans_as_written(reader: WeightReader, written: GgufFile) -> list[TensorPlan]:
    plans = []
    for plan in plan_tensors(reader, "f16"):
        info = written.tensors.get(plan.name)
        exact = info is not None and (info.ggml_id in BY_ID or info.ggml_id == F16)
        ggml_id = info.ggml_id if info and exact and is_quantized_linear(plan.source.removesuffix(".weight")) else plan.ggml_id
        plans.append(TensorPlan(plan.source, plan.name, plan.shape, ggml_id))
    return plans


def _same_tensor(reader: WeightReader, plan: TensorPlan, written: GgufFile) -> bool:
    info = written.tensors[plan.name]
    if info.ggml_id != plan.ggml_id or info.shape != plan.shape:
        return False
    if written.raw(plan.name).tobytes() != encode(reader, plan).tobytes():
        return False
    if plan.ggml_id not in BY_ID:
        return True
    codes, scale = reader.ternary(plan.source)
    exact = codes.numpy().astype(np.float32) * np.float32(f16_scale(float(scale), plan.name))
    return bool(np.array_equal(written.dequantize(plan.name), exact))


def _same_value(found: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        return isinstance(found, float) and np.float32(found) == np.float32(expected)
    return bool(type(found) is type(expected) and found == expected)
