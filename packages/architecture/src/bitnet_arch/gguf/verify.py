"""Compare a GGUF file with the model directory it was made from: every tensor's type, shape and bytes, and the metadata.

This catches what no comparison of logits can: a scale off by 1%, one sign in a thousand flipped, another epsilon, anything in a
matrix whose scale a following norm cancels.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_arch.gguf.architectures import written_architecture
from bitnet_arch.gguf.floats import EMBEDDING_TYPES, TYPE_NAMES
from bitnet_arch.gguf.pieces import encoded_pieces
from bitnet_arch.gguf.plan import TensorPlan, expected_metadata, plan_tensors, stored_matrix
from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.gguf.types import BY_ID, MATRIX_TYPES, f16_scale
from bitnet_arch.weights import WeightReader


def file_differences(
    reader: WeightReader, path: Path | str, plans: list[TensorPlan] | None = None, architecture: str | None = None
) -> list[str]:
    """Return the tensors and keys in which a file differs from its source, none if it is right.

    Args:
        reader: the opened model directory.
        path: the GGUF file.
        plans: what the file must hold; by default the directory's tensors, the quantised matrices and embeddings in whatever type
            that `export_gguf` offers the file has them.
        architecture: what it must be; by default what it is, if that can hold the model.

    Returns:
        Tensor names, and keys as `key NAME`: also keys that the exporter does not write, save those of a proof.

    Raises:
        UserError: if the file cannot be parsed, or no file can hold the directory's model.
    """
    written = read_gguf(path)
    if architecture is None:
        architecture = written_architecture(reader, written.metadata.get("general.architecture"))
    plans = plans_as_written(reader, written, architecture) if plans is None else plans
    differences = sorted(set(written.tensors) ^ {plan.name for plan in plans})
    differences += [plan.name for plan in plans if plan.name in written.tensors and not _same_tensor(reader, plan, written)]
    expected = expected_metadata(reader, architecture)
    differences += [f"key {key}" for key, value in expected.items() if not _same_value(written.metadata.get(key), value)]
    # An engine obeys keys that nobody expects, too: another chat template, a rope scaling.
    more = sorted(key for key in written.metadata if key not in expected and not key.startswith("wrinklefree.parity."))
    return differences + [f"key {key}" for key in more]


def plans_as_written(reader: WeightReader, written: GgufFile, architecture: str) -> list[TensorPlan]:
    """Return what a file of this directory must hold, with the types that a file has where they are types that we write.

    Raises:
        UserError: if the directory contradicts itself.
    """

    def found(name: str, known: Collection[str]) -> str:
        # A type that the reader has parsed fits the width that the file claims, and another model's may have another.
        info = written.tensors.get(name)
        kind = "f16" if info is None else TYPE_NAMES[info.ggml_id]
        return kind if info is not None and kind in known and info.shape == shapes[name] else "f16"

    shapes = {plan.name: plan.shape for plan in plan_tensors(reader, "f16", architecture)}
    return list(
        plan_tensors(reader, lambda name: found(name, MATRIX_TYPES), architecture, lambda name: found(name, EMBEDDING_TYPES))
    )


def _same_tensor(reader: WeightReader, plan: TensorPlan, written: GgufFile) -> bool:
    info = written.tensors[plan.name]
    if info.ggml_id != plan.ggml_id or info.shape != plan.shape:
        return False
    if any(written.raw(plan.name, rows).tobytes() != data.tobytes() for rows, data in encoded_pieces(reader, plan)):
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
