"""Add keys to a GGUF file without touching a byte of its tensors."""

import struct
from pathlib import Path

from bitnet_arch.errors import UserError
from bitnet_arch.gguf.reader import read_gguf

Value = str | int | float | bool
_BOOL, _STRING, _INT64, _FLOAT64 = 7, 8, 11, 12
_COUNT_OFFSET = 16
_CHUNK = 1 << 24


def annotate_gguf(source: Path | str, target: Path | str, values: dict[str, Value]) -> None:
    """Copy a file with more metadata; the tensors' bytes stay the same, which is checked.

    Args:
        source: an existing file of the types that this library writes.
        target: the file to write.
        values: keys to add; float is stored in 64 bits, int as a signed 64-bit number.

    Raises:
        UserError: if the source is damaged or has one of the keys already.
        OSError: if the target cannot be written.
    """
    original = read_gguf(source)
    if clash := sorted(set(values) & set(original.metadata)):
        raise UserError(f"{source} has the key {clash[0]!r} already")
    data = original.data
    alignment = original.metadata.get("general.alignment", 32)
    header = bytearray(data[: original.keys_end].tobytes())
    (count,) = struct.unpack_from("<Q", header, _COUNT_OFFSET)
    struct.pack_into("<Q", header, _COUNT_OFFSET, count + len(values))
    header += b"".join(_string(key) + _value(value) for key, value in values.items())
    header += data[original.keys_end : original.infos_end].tobytes()
    header += bytes(-len(header) % alignment)
    tensors_start = -(-original.infos_end // alignment) * alignment
    with Path(target).open("wb") as file:
        file.write(header)
        for start in range(tensors_start, len(data), _CHUNK):
            file.write(data[start : start + _CHUNK].tobytes())
    copied = read_gguf(target)
    if list(copied.tensors) != list(original.tensors) or any(
        copied.tensors[name].ggml_id != info.ggml_id or copied.raw(name).tobytes() != original.raw(name).tobytes()
        for name, info in original.tensors.items()
    ):
        raise RuntimeError(f"the copy {target} holds other tensors than {source}")


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<Iq", _INT64, value)
    if isinstance(value, float):
        return struct.pack("<Id", _FLOAT64, value)
    return struct.pack("<I", _STRING) + _string(value)
