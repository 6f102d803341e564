"""The safetensors format, read and written piece by piece: no more than what is asked for is ever in memory.

A file is eight bytes with the header's length (little endian), a JSON header `{name: {dtype, shape, data_offsets}}` padded with
spaces to a multiple of eight, and the data without gaps. A model too large for one file is several, and an index.

Memory-mapped files would count every page that was ever read as the process's own: here bytes are read and written by position.
"""

import json
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from bitnet_arch.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_SIZE = 4 * 2**30
"""Default size of a file, in bytes of tensors."""

PIECE = 32 * 2**20
"""Bytes that are read or written at once where a tensor need not be whole."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is before it exists."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        """Describe a tensor."""
        return cls(tensor.dtype, tuple(tensor.shape))


# ---------------------------------------------------------------------------------------------------------- reading


class ShardFile:
    """One safetensors file, open for reading by position.

    Attributes:
        specs: what it holds, by name.

    Raises:
        SafetensorError, OSError: if the file is no safetensors file, truncated, or cannot be opened.
        UserError: if it holds a type of number that is not known.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt"):  # its reader checks header, offsets and length
            pass
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        length = int.from_bytes(os.pread(self._file, 8, 0), "little")
        header = json.loads(_read(self._file, length, 8).numpy().tobytes())
        header.pop("__metadata__", None)
        self.specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise UserError(f"{path}: tensor {name!r} has the unknown type {entry['dtype']!r:.20}: save it in another type")
            self.specs[name] = TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            self._offsets[name] = 8 + length + entry["data_offsets"][0]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, as memory of its own.

        Args:
            name: the tensor.
            rows: a slice without step of the first dimension.
        """
        spec, offset = self.specs[name], self._offsets[name]
        shape = spec.shape
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            offset += start * TensorSpec(spec.dtype, shape[1:]).nbytes
            shape = (max(stop - start, 0), *shape[1:])
        size = TensorSpec(spec.dtype, shape).nbytes
        return _read(self._file, size, offset).view(spec.dtype).reshape(shape)


def _read(file: int, size: int, offset: int) -> Tensor:
    buffer = torch.empty(size, dtype=torch.uint8)
    view = _bytes(buffer)
    done = 0
    while done < size:
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise UserError("a file of the model became shorter while it was read: download or save the model again")
        done += count
    return buffer


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a uint8 tensor `[n]`."""
    return memoryview(tensor.numpy())  # type: ignore[arg-type]  # numpy's stubs lack the buffer protocol before Python 3.12


def row_pieces(spec: TensorSpec, piece: int = PIECE) -> Iterator[slice]:
    """Yield slices of a tensor's rows of at most about `piece` bytes each (one row at least)."""
    row = TensorSpec(spec.dtype, spec.shape[1:]).nbytes
    step = max(1, piece // max(row, 1))
    for start in range(0, spec.shape[0], step):
        yield slice(start, min(start + step, spec.shape[0]))


# ---------------------------------------------------------------------------------------------------------- writing


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a tensor with a value that is no number.

    Raises:
        UserError: naming the tensor.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if not all(map(torch.isfinite, torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor))):
        count = int((~torch.isfinite(tensor.float())).sum())
        raise UserError(
            f"{name} has {count} values that are NaN or infinite: such weights cannot be used, take an earlier checkpoint"
        )


def assign_shards(specs: Mapping[str, TensorSpec], max_shard_size: int) -> list[list[str]]:
    """Distribute tensors over files in the order given; one that is larger than a file's size gets a file of its own.

    Raises:
        UserError: for a size below one byte.
    """
    if max_shard_size < 1:
        raise UserError(f"max_shard_size must be at least 1 byte, not {max_shard_size}")
    shards: list[list[str]] = []
    size = 0
    for name, spec in specs.items():
        if not shards or size + spec.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += spec.nbytes
    return shards or [[]]


class ShardWriter:
    """Writes one safetensors file or several, and their index, whose tensors come in any order and in pieces.

    Use as a context manager: leaving it without an exception checks that every byte was written.

    Attributes:
        specs: what is to be written, in the order in which it is distributed over files.

    Raises:
        UserError: for a value that is NaN or infinite, naming its tensor.
    """

    def __init__(self, folder: Path, specs: Mapping[str, TensorSpec], max_shard_size: int = MAX_SHARD_SIZE) -> None:
        self.folder, self.specs = folder, dict(specs)
        shards = assign_shards(self.specs, max_shard_size)
        self._files: list[BinaryIO] = []
        self._place: dict[str, tuple[int, int]] = {}
        self._done = dict.fromkeys(self.specs, 0)
        self._weight_map: dict[str, str] = {}
        for number, names in enumerate(shards):
            file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
            self._start(number, folder / file, names)
            self._weight_map |= dict.fromkeys(names, file)

    def _start(self, number: int, path: Path, names: list[str]) -> None:
        # Wide types first, as other writers have it: every tensor lies at a multiple of its numbers' width.
        names = sorted(names, key=lambda name: -self.specs[name].dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            spec = self.specs[name]
            offsets = [end, end + spec.nbytes]
            header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
            self._place[name] = (number, end)
            end += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        for name in names:
            self._place[name] = (number, self._place[name][1] + 8 + len(text))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, or its next rows."""
        spec = self.specs[name]
        assert tensor.dtype == spec.dtype, f"{name} was announced as {spec.dtype}, not {tensor.dtype}"
        check_finite(name, tensor)
        data = _bytes(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
        number, offset = self._place[name]
        offset += self._done[name]
        self._done[name] += len(data)
        assert self._done[name] <= spec.nbytes, f"{name} is larger than announced"
        while data:
            count = os.pwrite(self._files[number].fileno(), data[: 2**30], offset)
            data, offset = data[count:], offset + count

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            file.close()
        if error is not None:
            return
        short = [name for name, done in self._done.items() if done != self.specs[name].nbytes]
        assert not short, f"{short[0]} was not written"
        if len(self._files) > 1:
            total = sum(spec.nbytes for spec in self.specs.values())
            index = {"metadata": {"total_size": total}, "weight_map": self._weight_map}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
