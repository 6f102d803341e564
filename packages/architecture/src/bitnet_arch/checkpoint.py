"""Model directories: master and packed, safetensors only, in the forms that stock `transformers` reads.

Stock packed checkpoints store a layer's scale in two opposite conventions under one name, `weight_scale`:
`linear_class: bitlinear` divides by it (it holds 1/β), `linear_class: autobitlinear` multiplies by it (it holds β).
Everything in this library multiplies; the inverse exists only in this file, as `stored_scale` and `dequantizing_scale`.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.bitlinear import LAMBDA_KEY, BitLinear, BitLinearLRC, get_lambda, set_lambda
from bitnet_arch.configs import (
    LinearClass,
    check_converted,
    load_config,
    quantization_block,
    read_config,
    read_json_object,
    read_quantization_block,
    short_reason,
)
from bitnet_arch.convert import replace_linears
from bitnet_arch.errors import UserError
from bitnet_arch.families import PREFIX, family_of, quantized_names
from bitnet_arch.modeling import form_of
from bitnet_arch.norm import SubLN
from bitnet_arch.packed import PackedBitLinear, PackedBitLinearLRC
from bitnet_arch.packing import pack_codes, unpack_codes
from bitnet_arch.quant import GROUP, Granularity, quantize_weight
from bitnet_arch.shards import (
    INDEX_FILE,
    MAX_SHARD_SIZE,
    PIECE,
    WEIGHTS_FILE,
    ShardFile,
    ShardWriter,
    TensorSpec,
    check_finite,
    row_pieces,
)

MODEL_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model"})
"""What a model directory is made of; one that holds anything else is never replaced."""

CARD_FILE = "README.md"
CARD_MARK = "<!-- generated from the files beside it: edits are lost when it is written again -->"
"""By which a card that `bitnet_arch.hub` wrote is told from one that people wrote."""

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROVENANCE_FILE = "provenance.json"
"""Says where a directory's weights come from, so that a label such as "4-bit copy" outlives conversion and training."""


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


def load_model(directory: Path | str, dtype: torch.dtype = torch.float32, quantized: bool = True) -> PreTrainedModel:
    """Load a model directory in evaluation mode, with this library's layers.

    Args:
        directory: master, packed or float model directory.
        dtype: of float parameters.
        quantized: False gives the float weights (master and float directories): plain `nn.Linear` layers, or in our own form, whose
            layers have norms, λ = 0.

    Returns:
        The model with `BitLinear` layers (master), `PackedBitLinear` layers (packed) or plain ones (float).

    Raises:
        UserError: for a missing, damaged, incomplete or unknown checkpoint.
    """
    with open_weights(directory) as reader:
        model = skeleton(reader, dtype)
        check_layers(model, reader)
        if reader.form == "packed" and not quantized:
            raise UserError(f"{directory} is packed and has no float weights: load the master form instead")
        own = form_of(model.config) is not None
        if reader.form == "master" and quantized and not own:
            replace_linears(model)
        _fill(model, reader, dtype)
        if own and not quantized:
            set_lambda(model, 0.0)
    generation = read_generation_config(Path(directory))
    if generation is not None:
        model.generation_config = generation
    model.eval()
    return model


def skeleton(reader: WeightReader, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build a directory's model on the meta device, having checked that the directory holds every tensor in its shape.

    Its rotary frequencies, which are computed and not stored, have their values.

    Raises:
        UserError: if `config.json` describes no decoder that this library can load, or other tensors than the directory's.
    """
    config, where = load_config(reader.directory), f"{reader.directory}/config.json"
    config.dtype = dtype
    layers, tensors = getattr(config, "num_hidden_layers", 0), len(reader.keys())
    if layers > tensors:  # before an absurd number is built
        raise UserError(f"{where} asks for {layers} layers, but the directory has {tensors} tensors: mend num_hidden_layers")
    family_of(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        _compute_buffers(model)
    except Exception as error:  # every class of transformers has exceptions of its own for what it cannot build
        raise UserError(f"no model can be built from {where} ({short_reason(error)}): mend it or use another model") from None
    for name, parameter in model.named_parameters():
        if reader.form == "packed" and name not in reader and name.endswith(".bias"):
            continue
        if reader.shape(name) != parameter.shape:
            raise UserError(
                f"{reader.directory}: tensor {name!r} is {list(reader.shape(name))}, but config.json asks for "
                f"{list(parameter.shape)}: restore the file that was changed"
            )
    return model


def check_layers(model: PreTrainedModel, reader: WeightReader) -> None:
    """Refuse a directory whose words and tensors contradict each other on what is ternary.

    Args:
        model: its `skeleton`.
        reader: the directory.

    Raises:
        UserError: for a head that should be ternary, a layer that should not, types of tensors that the configuration denies, or a
            tied head that is not the embedding.
    """
    where, family = f"{reader.directory}/config.json", family_of(model.config)
    names = quantized_names(model)
    check_converted(reader.config, names, family.head, where)
    for name in names:
        bytes_found = reader.spec(f"{name}.weight").dtype == torch.uint8
        scaled = f"{name}.weight_scale" in reader
        if reader.form != "packed" and (bytes_found or scaled):
            found = "packed bytes" if bytes_found else "a weight_scale"
            raise UserError(f"{where} says that weights are float, and {name} has {found}: restore the file that was changed")
        if reader.form == "packed" and not scaled:
            raise UserError(
                f"{where} says that weights are packed, and {name} has no weight_scale: restore the file that was changed"
            )
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if f"{family.head}.weight_scale" in reader or (head in reader and not reader.spec(head).dtype.is_floating_point):
        raise UserError(f"{reader.directory} has a ternary {family.head}, and heads stay float: save the model with a float head")
    if model.config.tie_word_embeddings and head in reader:
        same = reader.spec(head).shape == reader.spec(embedding).shape and all(
            torch.equal(a, b) for a, b in zip(reader.pieces(head), reader.pieces(embedding), strict=True)
        )
        if not same:
            raise UserError(f"{where} ties the head to the embedding, and {head} is another tensor: correct tie_word_embeddings")


@torch.no_grad()
def _compute_buffers(model: PreTrainedModel) -> None:
    """Give values to what a model computes and does not store, such as rotary frequencies and scales of embeddings."""
    for module in model.modules():
        missing = [name for name in module._non_persistent_buffers_set if (b := module._buffers[name]) is not None and b.is_meta]
        if missing:
            for name in missing:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")  # type: ignore[arg-type]
            model._init_weights(module)


def _fill(model: PreTrainedModel, reader: WeightReader, dtype: torch.dtype) -> None:
    """Replace the meta tensors of `model` by the directory's, strictly."""
    stock_packed = reader.form == "packed" and form_of(model.config) is None
    packed = set(quantized_names(model)) if stock_packed else set()
    state: dict[str, Tensor] = {}
    for name in packed:
        bias = f"{name}.bias"
        layer = PackedBitLinear(*reader.ternary(f"{name}.weight"), reader.get(bias).to(dtype) if bias in reader else None)
        model.set_submodule(name, layer)
    if packed:
        model.config.quantization_config = quantization_block("autobitlinear", "offline")  # what the layers hold multiplies
    for name, _ in model.named_parameters():
        state[name] = reader.get(name).to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            # Only other libraries' `save_pretrained` writes it, in the middle of a training.
            key = f"{name}.{LAMBDA_KEY}"
            state[key] = reader.get(key).float() if key in reader else torch.ones(())
        if isinstance(module, SubLN):
            state[f"{name}.eps"] = reader.get(f"{name}.eps").float()
        if isinstance(module, PackedBitLinear) and name not in packed:
            state |= {
                f"{name}.weight": reader.get(f"{name}.weight"),
                f"{name}.weight_scale": reader.stored_scale(f"{name}.weight").float(),
            }
            if state[f"{name}.weight"].dtype != torch.uint8:
                raise UserError(f"{reader.directory}: {name}.weight is no packed bytes: restore the file that was changed")
            if module.bias is not None:
                state[f"{name}.bias"] = reader.get(f"{name}.bias").to(dtype)
    for name, buffer in model.named_buffers():  # parameters have been checked
        if name in state and state[name].shape != buffer.shape:
            raise UserError(
                f"{reader.directory}: tensor {name!r} is {list(state[name].shape)}, but config.json asks for {list(buffer.shape)}: "
                "restore the file that was changed"
            )
    missing = model.load_state_dict(state, strict=False, assign=True)
    assert not missing.unexpected_keys
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise UserError(f"{reader.directory} leaves {len(left)} tensors without values, first {left[0]!r}: save the model again")


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """Return a directory's settings for generating text, None if it has none.

    Raises:
        UserError: if they are damaged.
    """
    path = directory / GENERATION_FILE
    if not path.is_file():
        return None
    read_json_object(path)
    try:
        return GenerationConfig.from_pretrained(str(directory))
    except Exception as error:  # whatever its validation and its nested configurations raise
        raise UserError(f"{path} is not valid ({short_reason(error)}): mend it or delete it") from None


def read_provenance(directory: Path | str) -> str | None:
    """Return the line that a directory keeps on where its weights come from, or None if it keeps none.

    Raises:
        UserError: if the file that should say so is damaged: what is made of the weights must not lose their label.
    """
    path = Path(directory) / PROVENANCE_FILE
    if not path.is_file():
        return None
    try:
        source = read_json_object(path).get("source")
    except UserError:
        source = None
    if not isinstance(source, str):
        raise UserError(f"{path} is damaged or names no source, and results must say where a model is from: restore it")
    return source


def load_tokenizer(directory: Path | str) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model directory.

    Raises:
        UserError: if there is none, or its files are damaged.
    """
    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} has no tokenizer.json: save the tokenizer beside the model")
    try:
        # By class and not by AutoTokenizer: a directory's own words must not choose code.
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(directory))
    except Exception as error:  # the tokenizers library raises bare exceptions
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                read_json_object(directory / name)
        raise UserError(
            f"{directory}/tokenizer.json or a file beside it describes no tokenizer ({short_reason(error)}): "
            "download or save the tokenizer again"
        ) from None
    return tokenizer


# ---------------------------------------------------------------------------------------------------------- writing


def save_master(
    model: PreTrainedModel,
    directory: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    provenance: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write float master weights with a configuration that makes stock `transformers` quantise them on the fly.

    A model without `BitLinear` layers is written as the plain float model it is.

    Args:
        model: the model.
        directory: where to write.
        tokenizer: written beside the model if given.
        provenance: one line on where the weights come from, kept in `provenance.json`.
        max_shard_size: bytes of tensors in a file, from which on there are several and an index.

    Raises:
        UserError: if λ is not 1, which no stock format can express, a weight is NaN or infinite, or the disk is full.
    """
    state = {name: t for name, t in _own_tensors(model) if not name.endswith(f".{LAMBDA_KEY}")}
    quantized = any(isinstance(m, BitLinear) for m in model.modules()) and form_of(model.config) is None
    block = quantization_block("autobitlinear", "online") if quantized else None
    _write(model, directory, state, block, Companions.of(model, tokenizer, provenance), max_shard_size)


def save_packed(
    model: PreTrainedModel,
    directory: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    linear_class: LinearClass = "bitlinear",
    provenance: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write 2-bit weights.

    Args:
        model: with `BitLinear` or `PackedBitLinear` layers.
        directory: where to write.
        tokenizer: written beside the model if given.
        linear_class: the scale convention: "bitlinear" stores 1/β (what stock `BitLinear` divides by), "autobitlinear"
            stores β (what stock `AutoBitLinear` multiplies by). A model in our own form always stores β.
        provenance: one line on where the weights come from, kept in `provenance.json`.
        max_shard_size: bytes of tensors in a file, from which on there are several and an index.

    Raises:
        UserError: if λ is not 1, a layer has rows not divisible by 4, nothing is quantised, a weight is NaN or infinite, or the
            disk is full.
    """
    if linear_class not in get_args(LinearClass):
        raise UserError(f"unknown scale convention {linear_class!r}: choose {' or '.join(get_args(LinearClass))}")
    state = dict(_own_tensors(model))
    found, own = False, form_of(model.config) is not None
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            check_finite(f"{name}.weight", module.weight.detach())
            codes, scale = quantize_weight(module.weight.detach(), module.granularity)
            del state[f"{name}.{LAMBDA_KEY}"]
            try:
                state[f"{name}.weight"] = pack_codes(codes)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
        elif isinstance(module, PackedBitLinear):
            scale = module.weight_scale
        else:
            continue
        found = True
        if isinstance(module, BitLinearLRC | PackedBitLinearLRC) and module.lrc_dtype == "float16":
            # The forward rounds to it anyway.
            state |= {f"{name}.{key}": state[f"{name}.{key}"].half() for key in ("lrc_u", "lrc_v")}
        state[f"{name}.weight_scale"] = stored_scale(scale, "autobitlinear" if own else linear_class)
    if not found:
        raise UserError("the model has no ternary layers to pack: convert it first")
    block = None if own else quantization_block(linear_class, "offline")
    _write(model, directory, state, block, Companions.of(model, tokenizer, provenance), max_shard_size, packed=True)


def own_names(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors without the head that is its embedding."""
    tied = {f"{family_of(model.config).head}.weight"} if model.config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name not in tied:
            yield name, tensor


def _own_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in own_names(model):
        yield name, tensor.detach().cpu().contiguous()


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What lies beside a model's weights and configuration.

    Attributes:
        generation: how text is generated, if the model says so.
        tokenizer: the tokenizer, if there is one.
        provenance: one line on where the weights come from.
    """

    generation: GenerationConfig | None
    tokenizer: PreTrainedTokenizerBase | None
    provenance: str | None

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, provenance: str | None) -> "Companions":
        """Return what goes beside a model."""
        return cls(generation=model.generation_config, tokenizer=tokenizer, provenance=provenance)

    def write(self, target: Path) -> None:
        """Write what there is into a folder."""
        if self.generation is not None:
            # Not `save_pretrained`: it refuses what `from_pretrained` only warns of, and a trained model would be lost for a
            # temperature that its producer set without do_sample.
            self.generation.to_json_file(target / GENERATION_FILE, keys_to_pop=["compile_config"])
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(str(target))
        if self.provenance is not None:
            (target / PROVENANCE_FILE).write_text(json.dumps({"source": self.provenance}) + "\n")


def config_text(config: PreTrainedConfig, architecture: str, quantization: dict[str, Any] | None, packed: bool) -> str:
    """Return a directory's `config.json`.

    Args:
        config: the model's.
        architecture: its class.
        quantization: the block for stock `transformers`.
        packed: whether the weights are 2-bit codes, for a model in our own form.
    """
    values = config.to_dict()
    values.pop("quantization_config", None)
    values["architectures"] = [architecture]
    if quantization:
        values["quantization_config"] = quantization
    if (own := form_of(config)) is not None:
        values["ternary"] = asdict(replace(own, packed=packed))
    return json.dumps(values, indent=2, default=str) + "\n"


def _write(
    model: PreTrainedModel,
    directory: Path | str,
    state: dict[str, Tensor],
    quantization: dict[str, Any] | None,
    companions: Companions,
    max_shard_size: int,
    packed: bool = False,
) -> None:
    strength = get_lambda(model)
    if strength != 1.0:
        raise UserError(
            f"the model's quantisation strength lambda is {strength:g}, and no model directory can express that: "
            "train until lambda is 1 or call set_lambda(model, 1.0)"
        )

    def fill(target: Path) -> None:
        (target / "config.json").write_text(config_text(model.config, type(model).__name__, quantization, packed))
        with ShardWriter(target, {name: TensorSpec.of(tensor) for name, tensor in state.items()}, max_shard_size) as writer:
            for name, tensor in state.items():
                writer.write(name, tensor)
        companions.write(target)

    write_directory(directory, fill)


def write_directory(directory: Path | str, fill: Callable[[Path], None]) -> None:
    """Create or replace `directory` as a whole: `fill` writes into a sibling that takes the name when complete.

    Raises:
        UserError: if writing fails, for example on a full disk; what was there before is still there.
    """
    directory = Path(directory)
    check_replaceable(directory)
    directory = directory.resolve() if directory.is_symlink() else directory  # what a link points to is replaced, not the link
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise UserError(f"cannot write beside {directory}: {error.strerror}") from None
    try:
        fill(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)
        temporary.chmod(0o755)
        if directory.exists():
            previous = temporary.with_name(temporary.name + ".previous")
            os.replace(directory, previous)
            try:
                os.replace(temporary, directory)
            except BaseException:
                os.replace(previous, directory)
                raise
            shutil.rmtree(previous)
        else:
            os.replace(temporary, directory)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"writing {directory} failed ({reason}): free some space or choose another output") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(directory: Path) -> None:
    """Refuse a path that `write_directory` would not replace.

    Raises:
        UserError: if it holds anything but a model.
    """
    if directory.exists() and (not directory.is_dir() or _is_foreign(directory)):
        raise UserError(f"{directory} exists and is not a model directory: move it away or choose another output")


def _is_foreign(directory: Path) -> bool:
    """Whether a directory holds something that is not a model: it must not be replaced."""
    if not any(directory.iterdir()):
        return False
    try:
        read_config(directory)
    except UserError:
        return True
    return any(entry.is_dir() or not _is_ours(entry) for entry in directory.iterdir())


def _is_ours(file: Path) -> bool:
    if file.name == CARD_FILE:
        return CARD_MARK in file.read_text(encoding="utf-8", errors="replace")
    return file.suffix in MODEL_SUFFIXES
