"""A GGUF reader that trusts nothing in the file: every count, length and offset is checked before it is used."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_arch.errors import UserError
from bitnet_arch.gguf.floats import decode_float, tensor_bytes
from bitnet_arch.gguf.types import BY_ID, I2_S, Codes, decode_i2_s
from bitnet_arch.shards import PIECE

MAX_ITEMS = 1 << 24
MAX_DIMENSIONS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its row-major shape, ggml type and place in the file."""

    shape: tuple[int, ...]
    ggml_id: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufFile:
    """A parsed file; tensors are read on demand, by position: pages of a memory map would count as the process's own.

    Attributes:
        path: the file.
        metadata: keys and values.
        tensors: by name.
        data: the file's bytes, memory-mapped.
        keys_end: offset behind the last key and value, where the list of tensors begins.
        infos_end: offset behind the list of tensors.
        tensors_start: offset of the first tensor's place, `infos_end` rounded up to the file's alignment.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: NDArray[np.uint8]
    keys_end: int
    infos_end: int
    tensors_start: int

    def raw(self, name: str, rows: slice | None = None) -> NDArray[np.uint8]:
        """Return a tensor's bytes, `[rows, row_bytes]`, or `[1, bytes]` for I2_S, whose scale belongs to no row.

        Args:
            name: the tensor.
            rows: some of the rows.

        Raises:
            UserError: if the file has become shorter since it was parsed.
        """
        info, count = self.tensors[name], self._row_count(name)
        start, stop, _ = (rows or slice(None)).indices(count)
        width = info.nbytes // count
        size = max(stop - start, 0) * width
        with self.path.open("rb") as file:
            file.seek(info.offset + start * width)
            found = np.fromfile(file, np.uint8, size)
        if len(found) != size:
            raise UserError(f"{self.path} became shorter while it was read: export or download it again")
        return found.reshape(-1, width)

    def pieces(self, name: str, size: int = PIECE) -> Iterator[NDArray[np.uint8]]:
        """Yield a tensor's bytes as `raw` returns them, in order, some rows of about `size` bytes at a time.

        Raises:
            UserError: if the file has become shorter since it was parsed.
        """
        count = self._row_count(name)
        step = max(1, size // (self.tensors[name].nbytes // count))
        for start in range(0, count, step):
            yield self.raw(name, slice(start, start + step))

    def _row_count(self, name: str) -> int:
        info = self.tensors[name]
        return 1 if info.ggml_id == I2_S else int(np.prod(info.shape[:-1]))

    def ternary(self, name: str) -> tuple[Codes, NDArray[np.float32]]:
        """Return a matrix of a ternary type as int8 codes in its shape and float32 scales `[rows, blocks]`, of I2_S `[1, 1]`.

        A damaged file can hold the code 2 and scales that are no numbers.
        """
        info = self.tensors[name]
        if info.ggml_id == I2_S:
            codes, scale = decode_i2_s(self.raw(name)[0], info.shape)
            return codes, np.full((1, 1), scale, np.float32)
        codes, scales = BY_ID[info.ggml_id].decode(self.raw(name))
        return codes.reshape(info.shape), scales.astype(np.float32)

    def dequantize(self, name: str) -> NDArray[np.float32]:
        """Return a tensor as float32 in its shape.

        Raises:
            UserError: for a type that gguf-py cannot dequantise.
        """
        info = self.tensors[name]
        if info.ggml_id not in (*BY_ID, I2_S):
            return decode_float(self.raw(name), info.ggml_id, info.shape)
        codes, scales = self.ternary(name)
        block = 1 if info.ggml_id == I2_S else BY_ID[info.ggml_id].block
        rows = codes.reshape(-1, info.shape[-1]).astype(np.float32)
        with np.errstate(all="ignore"):
            return (rows * np.repeat(scales, block, axis=1)).reshape(info.shape)


class _Cursor:
    def __init__(self, data: NDArray[np.uint8], path: Path) -> None:
        # Vocabularies are read item by item, which costs an array several times what it costs a view.
        self.data, self.path, self.at = data.data, path, 0

    def fail(self, why: str) -> UserError:
        return UserError(f"{self.path} is not a usable GGUF file ({why}): export or download it again")

    def take(self, count: int) -> bytes:
        if count < 0 or count > len(self.data) - self.at:
            raise self.fail("it ends too early")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self) -> int:
        value: int = self.scalar("Q")
        if value > MAX_ITEMS:
            raise self.fail(f"it claims {value} items")
        return value

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item = self.scalar("I")
            if item == _ARRAY:
                raise self.fail("it nests arrays")
            return [self.value(item) for _ in range(self.count())]
        if kind not in _SCALARS:
            raise self.fail(f"unknown value type {kind}")
        return self.scalar(_SCALARS[kind])


def read_gguf(path: Path | str) -> GgufFile:
    """Parse a GGUF file of the types that this library writes or gguf-py knows.

    Raises:
        UserError: if the file is missing, damaged, or holds other types.
    """
    path = Path(path)
    try:
        data = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None
    cursor = _Cursor(data, path)
    if cursor.take(4) != b"GGUF" or cursor.scalar("I") != 3:
        raise cursor.fail("it is no GGUF version 3")
    tensor_count, key_count = cursor.count(), cursor.count()
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key, value = cursor.string(), cursor.value(cursor.scalar("I"))
        if key in metadata:  # readers differ in which one they believe
            raise cursor.fail(f"it has the key {key!r} twice")
        metadata[key] = value
    keys_end = cursor.at
    listed = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 4096 or alignment % 8:  # GGUF's specification: a multiple of 8
        raise cursor.fail(f"its alignment is {alignment!r:.40}, no multiple of 8 from 8 to 4096")
    start = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, info in listed:
        if info.offset % alignment:
            raise cursor.fail(f"tensor {name!r}'s offset is no multiple of its alignment")
        if name in tensors or start + info.offset + info.nbytes > len(data):
            raise cursor.fail(f"tensor {name!r} is repeated or lies outside the file")
        tensors[name] = TensorInfo(info.shape, info.ggml_id, start + info.offset, info.nbytes)
    placed = sorted(tensors.values(), key=lambda info: info.offset)
    if any(before.offset + before.nbytes > info.offset for before, info in pairwise(placed)):
        raise cursor.fail("two tensors share bytes")  # a small file could describe a model of any size
    return GgufFile(path, metadata, tensors, data, keys_end, cursor.at, start)


def _tensor_info(cursor: _Cursor) -> tuple[str, TensorInfo]:
    name, dimensions = cursor.string(), cursor.scalar("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name!r} has {dimensions} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(dimensions))[::-1]
    ggml_id, offset = cursor.scalar("I"), cursor.scalar("Q")
    nbytes = tensor_bytes(ggml_id, shape)
    if nbytes is None:
        raise cursor.fail(f"tensor {name!r} has type {ggml_id} and rows of {shape[-1]}")
    if 0 in shape or nbytes > len(cursor.data):
        raise cursor.fail(f"tensor {name!r} is empty or larger than the file")
    return name, TensorInfo(shape, ggml_id, offset, nbytes)
