"""Whose proof is it? Digests that bind a report to the tensors that were run and to the weights that they were made of."""

import hashlib
from pathlib import Path

import torch

from bitnet_arch.gguf.reader import GgufFile, read_gguf
from bitnet_arch.weights import WeightReader

PREFIX = "wrinklefree.parity."


def tensors_digest(file: GgufFile) -> str:
    """Return the SHA-256 of a GGUF file's tensors: names, types, shapes and bytes, in the file's order; metadata is not in it."""
    digest = hashlib.sha256()
    for name, info in file.tensors.items():
        digest.update(f"{name} {info.ggml_id} {info.shape}\n".encode())
        for piece in file.pieces(name):
            digest.update(piece.tobytes())
    return digest.hexdigest()


def source_digest(reader: WeightReader) -> str:
    """Return the SHA-256 of a model directory's weights: every tensor's name, dtype and bytes, however they are sharded."""
    digest = hashlib.sha256()
    for name in sorted(reader.keys()):
        digest.update(f"{name} {reader.spec(name)}\n".encode())
        for piece in reader.pieces(name):
            digest.update(piece.contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def proof_status(path: Path | str) -> tuple[str, str] | None:
    """Return (status, reason) of a GGUF file's proof as its metadata has it; None if it says nothing.

    A file whose tensors are not those that were run is unproven, whatever its metadata says.

    Raises:
        UserError: if the file cannot be parsed.
    """
    file = read_gguf(path)
    status = file.metadata.get(f"{PREFIX}status")
    if not isinstance(status, str):
        return None
    if status == "proven" and file.metadata.get(f"{PREFIX}tensors_sha256") != tensors_digest(file):
        return "unproven", "the tensors are not those that were proven"
    return status, str(file.metadata.get(f"{PREFIX}reason", ""))
