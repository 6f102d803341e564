"""A model directory's `config.json` and its other JSON files, read so that damage ends in one sentence."""

import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

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
    return config


def check_shape(config: PreTrainedConfig, where: str = "the configuration") -> None:
    """Refuse sizes that no model can have, before anything is built from them.

    Args:
        config: of any family; what it does not name is not checked.
        where: what the sentence names.

    Raises:
        UserError: for a size that is no number of at least 1, heads that cannot share the width or the keys, or a width of heads
            or a base that rotary positions cannot have.
    """
    _check_sizes({name: getattr(config, name, None) for name in SIZES}, where)
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


def _check_sizes(values: Mapping[str, Any], where: str) -> None:
    for name in SIZES:
        value = values.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= LARGEST_SIZE):
            raise UserError(f"{where} gives {name} as {value!r:.40}: it must be a whole number from 1 to {LARGEST_SIZE}")
