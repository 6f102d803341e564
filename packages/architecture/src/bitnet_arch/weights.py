"""The tensors of a model directory, read one by one, whatever form they are stored in.

Stock packed checkpoints store a layer's scale in two opposite conventions under one name, `weight_scale`:
`linear_class: bitlinear` divides by it (it holds 1/β), `linear_class: autobitlinear` multiplies by it (it holds β).
Everything in this library multiplies; the inverse exists only in this file, as `stored_scale` and `dequantizing_scale`.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.bitlinear import LAMBDA_KEY
from bitnet_arch.configs import LinearClass, load_config, read_config, read_json_object, read_quantization_block, short_reason
from bitnet_arch.errors import UserError
from bitnet_arch.families import PREFIX
from bitnet_arch.modeling import form_of
from bitnet_arch.packing import unpack_codes
from bitnet_arch.quant import GROUP, Granularity, quantize_weight
from bitnet_arch.shards import INDEX_FILE, PIECE, WEIGHTS_FILE, ShardFile, TensorSpec, row_pieces


def stored_scale(scale: Tensor, linear_class: LinearClass) -> Tensor:
    """Return what `weight_scale` must hold for a layer whose codes are multiplied by `scale` (float32, `[1]` or a matrix)."""
    value = (scale.reciprocal() if linear_class == "bitlinear" else scale).float()
    return value if value.ndim == 2 else value.reshape(1)


def dequantizing_scale(weight_scale: Tensor, linear_class: LinearClass) -> Tensor:
    """Return the float32 multiplier that a stored `weight_scale` stands for: 0-dim, or a matrix in our own form."""
    value = weight_scale.float()
    value = value if value.ndim == 2 else value.reshape(())
    return value.reciprocal() if linear_class == "bitlinear" else value


# ---------------------------------------------------------------------------------------------------------- reading


class WeightReader:
    """Reads a model directory tensor by tensor, whatever its form.

    Use as a context manager or let it be collected; files are opened once and read by position, see `bitnet_arch.shards`.

    Attributes:
        config: the parsed `config.json`.
        form: "master" (float, quantised on the fly), "packed" (2 bits) or "float" (no quantisation configured).
        linear_class: the scale convention of a packed directory.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        stock = read_quantization_block(self.config, f"{self.directory}/config.json")
        self.linear_class: LinearClass = stock[0] if stock else "bitlinear"
        self.form = "float" if stock is None else "master" if stock[1] == "online" else "packed"
        self.granularity: Granularity = "tensor"
        self._own = self.config["model_type"].startswith(PREFIX)
        if self._own:
            own = form_of(self.model_config)
            assert own is not None
            self.form = "packed" if own.packed else "master"
            self.linear_class, self.granularity = "autobitlinear", own.granularity  # ours multiplies
        self._open_files: dict[str, ShardFile] = {}
        self._file_of = self._locate()

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open_files.clear()

    @cached_property
    def model_config(self) -> PreTrainedConfig:
        """What `transformers` makes of `config.json`: with the family's defaults filled in, its sizes checked."""
        return load_config(self.directory)

    def keys(self) -> list[str]:
        """Return the names of all stored tensors."""
        return list(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str, rows: slice | None = None) -> Tensor:
        """Return one stored tensor as it is, or some of its rows, as memory of its own.

        Raises:
            UserError: if the directory has no such tensor.
        """
        return self._holder(name).read(name, rows)

    def pieces(self, name: str, size: int = PIECE) -> Iterator[Tensor]:
        """Yield a stored tensor in pieces of whole rows of at most about `size` bytes.

        Raises:
            UserError: if the directory has no such tensor.
        """
        spec = self.spec(name)
        if not spec.shape:
            yield self.get(name)
            return
        for rows in row_pieces(spec, size):
            yield self.get(name, rows)

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's type and shape as it is stored.

        Raises:
            UserError: if the directory has no such tensor.
        """
        return self._holder(name).specs[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it: of a packed weight that of its codes.

        Raises:
            UserError: if the directory has no such tensor.
        """
        spec = self.spec(name)
        packed = self.form == "packed" and spec.dtype == torch.uint8 and spec.shape
        return (spec.shape[0] * 4, *spec.shape[1:]) if packed else spec.shape

    def ternary(self, name: str) -> tuple[Tensor, Tensor]:
        """Return `(codes, scale)` of a quantised matrix, from packed bytes or by absmean from a float master.

        Args:
            name: a weight's name, such as `model.layers.0.self_attn.q_proj.weight`.

        Returns:
            int8 codes `[out, in]` and the float32 scale that multiplies them, in a shape of `bitnet_arch.quant.absmean_scale`.

        Raises:
            UserError: if the directory lacks the tensor, contradicts itself, or was saved before λ was 1.
        """
        self._matrix_shape(name)
        weight = self.get(name)
        if self.form == "packed":
            return self._stored_codes(name, weight), dequantizing_scale(self.stored_scale(name), self.linear_class)
        if not weight.is_floating_point():
            kind = str(weight.dtype).removeprefix("torch.")
            raise UserError(
                f"{self.directory} contradicts itself: config.json says float weights, and {name} is {kind}; correct it"
            )
        strength = f"{name.removesuffix('weight')}{LAMBDA_KEY}"
        if strength in self and (value := float(self.get(strength))) != 1.0:
            raise UserError(f"{self.directory} was saved at lambda {value:g}, and no codes can express that: train it to lambda 1")
        return quantize_weight(weight, self.granularity)

    def stored_scale(self, name: str) -> Tensor:
        """Return the `weight_scale` beside a packed weight as it is stored: of which convention, `linear_class` says.

        Raises:
            UserError: if it is missing, or no scale.
        """
        scale = self.get(name.removesuffix("weight") + "weight_scale")
        rows, columns = self._matrix_shape(name)
        if self._own and self.granularity != "tensor":
            fits = scale.shape == (rows, 1 if self.granularity == "row" else -(-columns // GROUP))
        else:
            fits = scale.numel() == 1
        values = scale.float()
        if not fits or not scale.is_floating_point() or not (torch.isfinite(values) & (values > 0)).all():
            raise UserError(f"{self.directory}: the scale of {name} is not a positive number: download or save the model again")
        return scale

    def _matrix_shape(self, name: str) -> tuple[int, int]:
        shape = self.shape(name)
        if len(shape) != 2:
            raise UserError(f"{self.directory}: {name} is {list(shape)} and no matrix: restore the file that was changed")
        return shape[0], shape[1]

    def _stored_codes(self, name: str, weight: Tensor) -> Tensor:
        """Unpack codes; stock `AutoBitLinear` also saves them unpacked, as numbers -1, 0 and 1 of any type."""
        if weight.dtype == torch.uint8:
            return unpack_codes(weight)
        values = weight.float()  # not every type can be compared
        if not ((values == 0) | (values.abs() == 1)).all():
            raise UserError(
                f"{self.directory} contradicts itself: config.json says packed weights, and {name} holds other values than -1, 0 "
                "and 1; correct quantization_mode"
            )
        return values.to(torch.int8)

    def _locate(self) -> dict[str, str]:
        index = self.directory / INDEX_FILE
        named: Any = {"": WEIGHTS_FILE}
        if index.is_file():
            named = read_json_object(index).get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
                raise UserError(f"{index} is damaged (its weight_map does not name files): download or save the model again")
        files = sorted(set(named.values()))
        # The files themselves say what they hold: an index can be stale.
        return {key: file for file in files for key in self._open(file).specs}

    def _holder(self, name: str) -> ShardFile:
        if name not in self._file_of:
            raise UserError(f"{self.directory} has no tensor {name!r}: the checkpoint is incomplete or of another family")
        return self._open(self._file_of[name])

    def _open(self, file: str) -> ShardFile:
        if file not in self._open_files:
            path = self.directory / file
            try:
                if Path(file).name != file or not path.is_file():
                    raise UserError(f"{path} is missing: download or save the model again")
                self._open_files[file] = ShardFile(path)
            except (SafetensorError, OSError) as error:
                reason = getattr(error, "strerror", None) or short_reason(error)
                raise UserError(f"{path} is truncated or damaged ({reason}): download or save the model again") from None
        return self._open_files[file]


def open_weights(directory: Path | str) -> WeightReader:
    """Open a model directory for reading tensor by tensor."""
    return WeightReader(directory)
