"""Which linear layers, norms and embeddings a family of Hugging Face decoders has: all that conversion needs to know of it.

A family is found by its configuration's `model_type`. To add one, describe it and `register_family` it: see docs/families.md.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.configs import EPSILONS
from bitnet_arch.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Where a decoder keeps its parts. Names inside a block are relative to it.

    Attributes:
        linears: the linear layers of a block that become ternary, in the order of the forward pass.
        mixing: those of them that get SubLN (norm placement B): the ones that mix heads and the ones that end the MLP.
        pre_norms: norm name to the linear layers that read its output; placement A moves its gain into them.
        norm_offset: what the family's norms add to their weight (1.0 in Gemma).
        blocks: the list of blocks.
        embedding: the token embedding.
        final_norm: the norm after the last block.
        head: the output layer, which stays float.
    """

    linears: tuple[str, ...]
    mixing: tuple[str, ...]
    pre_norms: dict[str, tuple[str, ...]]
    norm_offset: float = 0.0
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def __post_init__(self) -> None:
        for name in (*self.mixing, *(reader for readers in self.pre_norms.values() for reader in readers)):
            if name not in self.linears:
                raise UserError(f"the family's {name!r} is none of its linears: name it there, too")


QKV, GATE_UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
SEVEN = (*QKV, "self_attn.o_proj", *GATE_UP, "mlp.down_proj")
MIXING = ("self_attn.o_proj", "mlp.down_proj")

LLAMA_LIKE = Family(linears=SEVEN, mixing=MIXING, pre_norms={"input_layernorm": QKV, "post_attention_layernorm": GATE_UP})
GEMMA = Family(
    linears=SEVEN,
    mixing=MIXING,
    pre_norms={"input_layernorm": QKV, "pre_feedforward_layernorm": GATE_UP},
    norm_offset=1.0,
)

FAMILIES: dict[str, Family] = {
    "bitnet": LLAMA_LIKE,
    "gemma3_text": GEMMA,
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
}
"""Maps a `model_type` of transformers to its description."""

PREFIX = "wrinklefree-"
"""Begins the `model_type` of a model that stock transformers cannot express; the rest is the family's own."""


def base_type(config: PreTrainedConfig) -> str:
    """Return the family's own `model_type`, also for a model in our form."""
    return config.model_type.removeprefix(PREFIX)


def family_of(config: PreTrainedConfig) -> Family:
    """Return a configuration's family.

    Raises:
        UserError: if it is none of `FAMILIES`.
    """
    family = FAMILIES.get(base_type(config))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(
            f"model_type {config.model_type!r} cannot be converted: the known families are {known} (docs/families.md shows how to "
            "add one)"
        )
    return family


def norm_epsilon(config: PreTrainedConfig) -> float:
    """Return the epsilon of a model's own norms, for those that are inserted; 1e-5 where its configuration names none."""
    for name in EPSILONS:
        if (value := getattr(config, name, None)) is not None:
            return float(value)
    return 1e-5


def quantized_names(model: PreTrainedModel) -> list[str]:
    """Return the dotted names of a decoder's layers that are or become ternary, block by block.

    Raises:
        UserError: for a family that is not known, or one whose description names what the model has not.
    """
    family = family_of(model.config)
    for name in (family.blocks, family.embedding, family.final_norm, family.head):
        _check_part(model, name)
    blocks = [f"{family.blocks}.{i}" for i in range(len(model.get_submodule(family.blocks)))]  # type: ignore[arg-type]
    for block in blocks:
        for name in (*family.linears, *family.pre_norms):
            _check_part(model, f"{block}.{name}")
    return [f"{block}.{name}" for block in blocks for name in family.linears]


def _check_part(model: PreTrainedModel, name: str) -> None:
    try:
        model.get_submodule(name)
    except AttributeError:
        raise UserError(
            f"a {type(model).__name__} has no {name!r}: the family {base_type(model.config)!r} is described wrongly, correct what "
            "was registered (docs/families.md)"
        ) from None


def checked_names(model: PreTrainedModel) -> list[str]:
    """Return `quantized_names` of a float model, having seen that each of them is a linear layer.

    Raises:
        UserError: as `quantized_names` and `linear_layer`.
    """
    names = quantized_names(model)
    for name in names:
        linear_layer(model, name)
    return names


def linear_layer(model: PreTrainedModel, name: str) -> nn.Linear:
    """Return a layer that is to become ternary.

    Raises:
        UserError: if it is no `nn.Linear`, such as GPT-2's `Conv1D`, whose weight is the transpose.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise UserError(
            f"{name} is a {type(layer).__name__}, not a linear layer: the family is described wrongly, or is one that cannot be "
            "made ternary"
        )
    return layer
