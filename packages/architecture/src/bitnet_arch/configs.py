"""A model directory's `config.json` and its other JSON files, read so that damage ends in one sentence."""

import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from bitnet_arch.diffusion import diffusion_of
from bitnet_arch.errors import UserError

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
LARGEST_SIZE = 2**31 - 1
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
"""Under which names configurations have the epsilon of a model's norms."""

LinearClass = Literal["bitlinear", "autobitlinear"]
QuantizationMode = Literal["online", "offline"]


def short_reason(error: Exception) -> str:
    """Return an exception's message as one short line."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


def read_json_object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object.

    Raises:
        UserError: if the file cannot be read or holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({short_reason(error)}): download or save it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object): download or save it again")
    return value


def read_config(directory: Path | str) -> dict[str, Any]:
    """Return a directory's parsed `config.json`.

    Raises:
        UserError: if it is missing or not a JSON object with a `model_type`.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(f"{directory} is not a model directory: it has no config.json")
    config = read_json_object(path)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} names no model_type: download or save it again")
    return config


def load_config(directory: Path | str) -> PreTrainedConfig:
    """Return a directory's configuration object without its quantisation block, which our own layers stand for.

    Raises:
        UserError: if the family is unknown to `transformers`, or no model can have these sizes.
    """
    raw = read_config(directory)
    raw.pop("quantization_config", None)
    where = f"{directory}/config.json"
    _check_sizes(raw, where)
    try:
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    except Exception as error:  # transformers validates configurations with several exception types of its own
        raise UserError(
            f"{where} describes no model that transformers knows ({short_reason(error)}): mend it or use another model"
        ) from None
    check_shape(config, where)
    try:
        diffusion_of(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config


def check_shape(config: PreTrainedConfig, where: str = "the configuration") -> None:
    """Refuse sizes that no model can have, before anything is built from them.

    Args:
        config: of any family; what it does not name is not checked.
        where: what the sentence names.

    Raises:
        UserError: for a size that is no number of at least 1, an epsilon that no norm can have, heads that cannot share the width
            or the keys, or a width of heads or a base that rotary positions cannot have.
    """
    _check_sizes({name: getattr(config, name, None) for name in SIZES}, where)
    for name in EPSILONS:
        if (value := getattr(config, name, None)) is not None and not is_epsilon(value):
            raise UserError(f"{where} gives {name} as {value!r:.40}: it must be a number of at least 0")
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    heads, width = config.num_attention_heads, config.hidden_size
    shared = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and width % heads:
        raise UserError(f"{where} divides a width (hidden_size) of {width} among {heads} heads: choose a multiple of {heads}")
    head_dim = head_dim or width // heads
    if head_dim % 2:
        raise UserError(
            f"{where} makes heads {head_dim} wide (head_dim, or hidden_size / num_attention_heads), and rotary positions need an "
            "even width: change one of them"
        )
    if heads % shared:
        raise UserError(f"{where} has {shared} key and value heads for {heads} heads: num_key_value_heads must divide the heads")
    base = rope.get("rope_theta", 1.0)
    if isinstance(base, bool) or not isinstance(base, int | float) or not 0 < base < math.inf:
        raise UserError(f"{where} gives rope_theta as {base!r:.40}: it must be a number above 0")


def is_epsilon(value: Any) -> bool:
    """Whether a norm can have this epsilon: a finite number of at least 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _check_sizes(values: Mapping[str, Any], where: str) -> None:
    for name in SIZES:
        value = values.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= LARGEST_SIZE):
            raise UserError(f"{where} gives {name} as {value!r:.40}: it must be a whole number from 1 to {LARGEST_SIZE}")


def quantization_block(linear_class: LinearClass, mode: QuantizationMode, head: str) -> dict[str, Any]:
    """Return the `quantization_config` that stock `transformers` understands.

    Args:
        linear_class: the layers that stock `transformers` puts in.
        mode: whether weights are float ("online") or packed ("offline").
        head: the family's output layer, which stays float.
    """
    return {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": mode,
        "use_rms_norm": False,
        "rms_norm_eps": 1e-6,
        "modules_to_not_convert": [head],
    }


def read_quantization_block(config: Mapping[str, Any], where: str) -> tuple[LinearClass, QuantizationMode] | None:
    """Return how a stock `config.json` says its layers are quantised, None if they are float.

    What it leaves out has the default of `transformers`: onebitllms writes only `quant_method` and means packed weights with stored
    inverse scales ("bitlinear", "offline").

    Args:
        config: the parsed file.
        where: what the sentence names.

    Raises:
        UserError: for another method, for words that are unknown or contradict each other, and for layers that this library would
            compute in another way: with norms of the quantiser's, or not ternary.
    """
    block = config.get("quantization_config") or {}
    if not isinstance(block, dict):
        raise UserError(f"{where} has a quantization_config that is no object: save the model again")
    if not block:
        return None
    if block.get("quant_method") != "bitnet":
        raise UserError(f"{where} is quantised by {block.get('quant_method')!r:.40}: only bitnet and float models can be read")
    chosen = []
    for key, choices in (("linear_class", get_args(LinearClass)), ("quantization_mode", get_args(QuantizationMode))):
        value = block.get(key, {"linear_class": "bitlinear", "quantization_mode": "offline"}[key])
        if value not in choices:
            raise UserError(f"{where} names an unknown {key} {value!r:.40}: save the model again")
        chosen.append(value)
    if chosen == ["bitlinear", "online"]:
        raise UserError(
            f"{where} contradicts itself: linear_class bitlinear is packed, quantization_mode online is float; correct one of them"
        )
    if block.get("use_rms_norm"):
        raise UserError(f"{where} has use_rms_norm, norms inside the quantiser, which cannot be read: convert from the float model")
    return chosen[0], chosen[1]


def check_converted(config: Mapping[str, Any], names: Iterable[str], head: str, where: str) -> None:
    """Refuse a list of layers left float (`modules_to_not_convert`) that is not the head alone.

    Args:
        config: the parsed `config.json`.
        names: the layers that this library makes ternary.
        head: the output layer.
        where: what the sentence names.

    Raises:
        UserError: if the head is not in the list, or one of `names` is.
    """
    patterns = (config.get("quantization_config") or {}).get("modules_to_not_convert")
    if patterns is None:  # transformers leaves the head alone by default
        return
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise UserError(f"{where} has a modules_to_not_convert that is no list of names: save the model again")
    try:
        if should_convert_module(head, patterns):
            tied = ", which is the embedding, too," if config.get("tie_word_embeddings") else ""
            raise UserError(f"{where} asks for a ternary {head}{tied} and heads stay float: add it to modules_to_not_convert")
        for name in names:
            if not should_convert_module(name, patterns):
                raise UserError(
                    f"{where} leaves {name} float (modules_to_not_convert), and this library makes it ternary: convert anew"
                )
    except re.error as error:
        raise UserError(f"{where} has a modules_to_not_convert that cannot be read ({error}): save the model again") from None
