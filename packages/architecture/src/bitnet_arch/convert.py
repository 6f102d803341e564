"""Turn a Hugging Face decoder into a 1.58-bit one.

A family is described by what its configuration says, never by a model's name. A Llama without biases becomes the stock
`model_type: bitnet`, which is exactly a Llama with SubLN, so that any `transformers` can load the result.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.configs import check_shape
from bitnet_arch.errors import UserError
from bitnet_arch.subln import NormInsertion, NormSite, measure_sites, plan_insertions

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionConfig:
    """What a conversion does.

    Attributes:
        norm: "subln" inserts an RMSNorm before `o_proj` and `down_proj` (placement B of BitNet b1.58 2B4T); "none" keeps the
            architecture and only makes its linear layers ternary.
        gain: initial gain of an inserted norm: "calibrated" measures it on calibration tokens (for pretrained weights), "one"
            starts at 1 (for random weights).
        softness: with calibrated gains, the norms' effective epsilon as a multiple of the largest mean square seen in
            calibration; 0 inserts a plain norm, large values approach the identity. See `bitnet_arch.subln`.

    With norm "none" neither gain nor softness has an effect, nor has softness with gain "one". Both always have a value here;
    what a user sets in vain is refused where it can be told from a default, on the command line.
    """

    norm: Literal["subln", "none"] = "subln"
    gain: Literal["calibrated", "one"] = "calibrated"
    softness: float = 0.1

    def __post_init__(self) -> None:
        if self.norm not in ("subln", "none"):
            raise UserError(f"unknown norm placement {self.norm!r}: choose subln or none")
        if self.gain not in ("calibrated", "one"):
            raise UserError(f"unknown gain {self.gain!r}: choose calibrated or one")
        if not 0.0 <= self.softness < float("inf"):
            raise UserError(f"softness must be a finite number of at least 0, not {self.softness}")


def convert_model(
    model: PreTrainedModel,
    config: ConversionConfig | None = None,
    calibration: Iterable[Tensor] | None = None,
) -> PreTrainedModel:
    """Convert a float decoder to one with `BitLinear` layers.

    The result shares the parameter tensors of `model`, which must not be used afterwards. Embeddings and head stay float.

    Args:
        model: a `LlamaForCausalLM` without biases, tied or untied; with norm "none" also one with biases, a Qwen2 or a Qwen3.
        config: what to do; the default inserts calibrated SubLN.
        calibration: token ids, each int64 `[batch, time]`; needed when norms are inserted with calibrated gains.

    Returns:
        A `BitNetForCausalLM` (norm "subln") or the same class as `model` (norm "none"), λ = 1, in `model`'s train/eval mode.

    Raises:
        UserError: for a family that cannot be expressed, a model that is ternary already, or missing calibration tokens.
    """
    config = config or ConversionConfig()
    if any(isinstance(module, BitLinear) for module in model.modules()):
        raise UserError("the model is converted already: its linear layers are BitLinear")
    check_family(model.config, config.norm)
    if config.norm == "none":
        return replace_linears(model)
    target = FAMILIES.get(model.config.model_type, _refuse_family)(model.config)
    sites = norm_sites(target.num_hidden_layers)
    insertions: dict[str, NormInsertion] = {}
    residual_scale = 1.0
    if config.gain == "calibrated":
        if calibration is None:
            raise UserError("calibrated SubLN gains need calibration token ids: pass calibration=... or gain='one'")
        was_training = model.training
        statistics = measure_sites(model.eval(), sites, calibration)
        model.train(was_training)
        insertions, residual_scale = plan_insertions(statistics, target.rms_norm_eps, config.softness)
    return replace_linears(_with_subln(model, target, sites, insertions, residual_scale))


def norm_sites(num_layers: int) -> list[NormSite]:
    """Return where SubLN goes in a decoder of `num_layers` layers with the stock module names."""
    sites = []
    for i in range(num_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        sites.append(NormSite(f"{attention}.v_proj", f"{attention}.attn_sub_norm", f"{attention}.o_proj"))
        sites.append(NormSite(f"{mlp}.up_proj", f"{mlp}.ffn_sub_norm", f"{mlp}.down_proj"))
    return sites


def is_quantized_linear(name: str) -> bool:
    """Tell from a module's dotted name whether it is one of the decoder's seven quantised matrices."""
    return name.rsplit(".", 1)[-1] in (*ATTENTION_LINEARS, *MLP_LINEARS)


def replace_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the seven linear layers of every block by `BitLinear`, in place, sharing parameters; return the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantized_linear(name):
            model.set_submodule(name, BitLinear.from_linear(module).train(module.training))
    return model


def check_family(config: PreTrainedConfig, norm: Literal["subln", "none"] = "subln") -> None:
    """Raise `UserError` unless the configuration's family and sizes can be converted with this norm placement."""
    check_shape(config)
    if norm == "none" and config.model_type in PLAIN_FAMILIES:
        return
    if norm == "subln" and config.model_type in PLAIN_FAMILIES and config.model_type not in FAMILIES:
        raise UserError(f"no stock architecture holds SubLN in model_type {config.model_type!r}: use norm='none'")
    FAMILIES.get(config.model_type, _refuse_family)(config)


def bitnet_config_from_llama(config: PreTrainedConfig) -> BitNetConfig:
    """Return the stock BitNet configuration of a SubLN'd Llama.

    Raises:
        UserError: if the Llama has what `bitnet` cannot express (biases, heads that do not fill the width).
    """
    assert isinstance(config, LlamaConfig)
    heads = config.num_attention_heads
    head_dim = config.head_dim or config.hidden_size // heads
    if config.attention_bias or config.mlp_bias:
        raise UserError("this Llama has biases, which the stock bitnet architecture cannot hold: use norm='none'")
    if heads * head_dim != config.hidden_size:
        raise UserError(
            f"{heads} heads of {head_dim} do not fill the width {config.hidden_size}, as the stock bitnet architecture "
            "needs: use norm='none'"
        )
    return BitNetConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=config.num_key_value_heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        initializer_range=config.initializer_range,
        rms_norm_eps=config.rms_norm_eps,
        use_cache=config.use_cache,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        tie_word_embeddings=config.tie_word_embeddings,
        attention_dropout=config.attention_dropout,
        rope_parameters=dict(config.rope_parameters or {}),
        dtype=config.dtype,
    )


FAMILIES: dict[str, Callable[[PreTrainedConfig], BitNetConfig]] = {"llama": bitnet_config_from_llama}
"""Maps a `model_type` to the function that describes its SubLN'd form."""

PLAIN_FAMILIES = frozenset({"llama", "qwen2", "qwen3"})
"""Families whose blocks consist of the seven linear layers, which norm "none" makes ternary without touching the architecture."""


def _refuse_family(config: PreTrainedConfig) -> BitNetConfig:
    raise UserError(
        f"model_type {config.model_type!r} cannot be converted: the known families are {', '.join(sorted(PLAIN_FAMILIES))}"
    )


def _with_subln(
    model: PreTrainedModel,
    target: BitNetConfig,
    sites: list[NormSite],
    insertions: dict[str, NormInsertion],
    residual_scale: float,
) -> PreTrainedModel:
    assert isinstance(model, LlamaForCausalLM)
    target.rms_norm_eps *= residual_scale**2
    with torch.device("meta"):
        converted = BitNetForCausalLM(target)
    state = model.state_dict()
    reference = model.model.norm.weight
    for site in sites:
        width = converted.get_submodule(site.norm).weight.shape
        insertion = insertions.get(site.norm, NormInsertion())
        state[f"{site.norm}.weight"] = reference.new_full(width, insertion.gain)
        if insertion.input_scale != 1.0:
            state[f"{site.producer}.weight"] = state[f"{site.producer}.weight"] * insertion.input_scale
    if residual_scale != 1.0:
        state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] * residual_scale
        if target.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
            state["model.norm.weight"] = state["model.norm.weight"] / residual_scale
    converted.load_state_dict(state, assign=True)
    for parameter in converted.parameters():
        parameter.requires_grad_(True)
    converted.tie_weights()
    # Rotary frequencies are not in the state dict; both classes compute them by the same formula.
    converted.model.rotary_emb = model.model.rotary_emb
    converted.generation_config = model.generation_config
    converted.train(model.training)
    return converted
