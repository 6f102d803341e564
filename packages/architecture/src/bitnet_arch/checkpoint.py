"""Model directories: master and packed, safetensors only, in the forms that stock `transformers` reads.

`bitnet_arch.weights` reads their tensors, `bitnet_arch.directories` puts a written directory in its place as a whole.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
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
from bitnet_arch.configs import LinearClass, check_converted, load_config, quantization_block, read_json_object, short_reason
from bitnet_arch.convert import replace_linears
from bitnet_arch.directories import write_directory
from bitnet_arch.errors import UserError
from bitnet_arch.families import family_of, quantized_names
from bitnet_arch.modeling import form_of
from bitnet_arch.norm import SubLN, check_epsilon
from bitnet_arch.packed import PackedBitLinear, PackedBitLinearLRC
from bitnet_arch.packing import pack_codes
from bitnet_arch.quant import quantize_weight
from bitnet_arch.shards import MAX_SHARD_SIZE, ShardWriter, TensorSpec, check_finite
from bitnet_arch.weights import WeightReader, open_weights, stored_scale

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROVENANCE_FILE = "provenance.json"
"""Says where a directory's weights come from, so that a label such as "4-bit copy" outlives conversion and training."""


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
        compute_buffers(model)
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
        UserError: for a head that should be ternary, a layer that should not, types of tensors that the configuration denies or
            that are no weights (float8 needs a scale that is not read), a tensor that nothing asks for, an epsilon that no norm can
            have, or a tied head that is not the embedding.
    """
    where, family = f"{reader.directory}/config.json", family_of(model.config)
    names = quantized_names(model)
    check_head(reader, family.head, names)
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
    _check_tensors(model, reader, names)
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if model.config.tie_word_embeddings and head in reader:
        same = reader.spec(head).shape == reader.spec(embedding).shape and all(
            torch.equal(a, b) for a, b in zip(reader.pieces(head), reader.pieces(embedding), strict=True)
        )
        if not same:
            raise UserError(f"{where} ties the head to the embedding, and {head} is another tensor: correct tie_word_embeddings")


def check_head(reader: WeightReader, head: str, names: Iterable[str] = ()) -> None:
    """Refuse a directory whose words or tensors make the head ternary, or whose words leave a ternary layer float.

    Args:
        reader: the directory.
        head: the output layer's name.
        names: the layers that are ternary.

    Raises:
        UserError: naming the layer.
    """
    check_converted(reader.config, names, head, f"{reader.directory}/config.json")
    weight = f"{head}.weight"
    if f"{head}.weight_scale" in reader or (weight in reader and not reader.spec(weight).dtype.is_floating_point):
        raise UserError(f"{reader.directory} has a ternary {head}, and heads stay float: save the model with a float head")


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""What a float tensor of a directory can be: of narrower types, values are meant to be multiplied by a scale."""


def _check_tensors(model: PreTrainedModel, reader: WeightReader, names: list[str]) -> None:
    """Refuse stored tensors that the skeleton has not, floats that are none, and epsilons that no norm has."""
    asked = set(model.state_dict())
    if model.config.tie_word_embeddings:
        asked.add(f"{family_of(model.config).head}.weight")
    codes = {f"{name}.weight" for name in names} if reader.form == "packed" else set()
    scales = {f"{name}.weight_scale" for name in names}  # who may have them has been checked
    strengths = {f"{name}.{LAMBDA_KEY}" for name in names} if reader.form == "master" else set()
    ignored = ignored_tensors(model)
    stored = reader.keys()
    for name in stored:
        if name in codes or name in scales:
            continue
        if name not in asked and name not in strengths:
            if ignored is not None and ignored.search(name):
                continue
            raise UserError(
                f"{reader.directory} holds the tensor {name!r:.120}, which its config.json does not ask for: correct config.json, "
                "or take the tensor out"
            )
        spec = reader.spec(name)
        if spec.dtype not in FLOATS:
            found, known = _short(spec.dtype), ", ".join(map(_short, FLOATS))
            raise UserError(
                f"{reader.directory}: tensor {name!r} is {found}, and floats are read as {known}: dequantise the model, "
                "or save it in one of them"
            )
        if name.endswith(".in_norm.eps") and spec.shape == ():
            check_epsilon(f"{reader.directory}: {name}", float(reader.get(name)))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ignored_tensors(model: PreTrainedModel) -> re.Pattern[str] | None:
    """Return what stock `transformers` skips in a checkpoint without a word: what older versions stored and models compute.

    Source: `PreTrainedModel._adjust_missing_and_unexpected_keys`.
    """
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    computed = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in computed):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in computed):
        patterns.add(r"(^|\.)position_ids$")
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns))) if patterns else None


@torch.no_grad()
def compute_buffers(model: PreTrainedModel) -> None:
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
        head = family_of(model.config).head
        model.config.quantization_config = quantization_block("autobitlinear", "offline", head)  # what the layers hold multiplies
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
    for name, tensor in state.items():
        check_finite(name, tensor)
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
    block = quantization_block("autobitlinear", "online", family_of(model.config).head) if quantized else None
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
    block = None if own else quantization_block(linear_class, "offline", family_of(model.config).head)
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
