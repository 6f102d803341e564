"""Turn a Hugging Face decoder into a 1.58-bit one.

What a family looks like is said in `bitnet_arch.families`, never by a model's name. The result is a stock model wherever stock
`transformers` can express it: a Llama without biases with SubLN becomes `model_type: bitnet`, which is exactly that, and a model
without added norms stays what it is. Everything else becomes a model in our own form, see `bitnet_arch.modeling`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.configs import check_shape
from bitnet_arch.errors import UserError
from bitnet_arch.families import family_of, quantized_names
from bitnet_arch.hadamard import block_size, rotate
from bitnet_arch.modeling import Placement, TernaryForm, normed_layers, ternary_config
from bitnet_arch.quant import Granularity
from bitnet_arch.subln import InputStatistics, NormInsertion, NormSite, measure_inputs, measure_sites, plan_insertions, soften

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionConfig:
    """What a conversion does.

    Attributes:
        norm: where RMSNorms are inserted. "subln": before `o_proj` and `down_proj` (placement B of BitNet b1.58 2B4T).
            "allnorm": in every ternary layer (placement C of the released BitDistill code). "bitlinear": the same, in place of the
            block's pre-norms, whose gains move into the layers (placement A of the b1.58 paper). "none" only makes linear layers
            ternary.
        gain: initial gain of an inserted norm: "calibrated" measures it on calibration tokens (for pretrained weights), "one"
            starts at 1 (for random weights). Without effect where no norm is inserted.
        softness: with calibrated gains, the norms' effective epsilon as a multiple of the largest mean square seen in
            calibration; 0 inserts a plain norm, large values approach the identity. See `bitnet_arch.subln`. Without effect where
            nothing is calibrated.
        granularity: how many weights share a scale: "tensor", "row" or "group128".
        rotation: rotate the inputs of `o_proj` and `down_proj` (BitNet v2), see `bitnet_arch.hadamard`.

    Raises:
        UserError: for an unknown choice.
    """

    norm: Placement = "subln"
    gain: Literal["calibrated", "one"] = "calibrated"
    softness: float = 0.1
    granularity: Granularity = "tensor"
    rotation: bool = False

    def __post_init__(self) -> None:
        if self.norm not in get_args(Placement):
            raise UserError(f"unknown norm placement {self.norm!r}: choose {', '.join(get_args(Placement))}")
        if self.gain not in ("calibrated", "one"):
            raise UserError(f"unknown gain {self.gain!r}: choose calibrated or one")
        if not 0.0 <= self.softness < float("inf"):
            raise UserError(f"softness must be a finite number of at least 0, not {self.softness}")
        self.form()

    def form(self) -> TernaryForm:
        """Return the form of the converted model's layers."""
        return TernaryForm(norm=self.norm, granularity=self.granularity, rotation=self.rotation)

    @property
    def calibrates(self) -> bool:
        """Whether calibration tokens are needed."""
        return self.norm != "none" and self.gain == "calibrated"


def convert_model(
    model: PreTrainedModel,
    config: ConversionConfig | None = None,
    calibration: Iterable[Tensor] | None = None,
) -> PreTrainedModel:
    """Convert a float decoder to one with `BitLinear` layers.

    The result shares the parameter tensors of `model`, which must not be used afterwards. Embeddings and head stay float.

    Args:
        model: a decoder of a family in `bitnet_arch.families`, tied or untied.
        config: what to do; the default inserts calibrated SubLN.
        calibration: token ids, each int64 `[batch, time]`; needed when norms are inserted with calibrated gains.

    Returns:
        λ = 1, in `model`'s train/eval mode. A `BitNetForCausalLM` for a plain SubLN'd Llama, the same class as `model` where only
        the layers become ternary, else a `Ternary...ForCausalLM`.

    Raises:
        UserError: for a family that is not known, a model that is ternary already, or missing calibration tokens.
    """
    config = config or ConversionConfig()
    if any(isinstance(module, BitLinear) for module in model.modules()):
        raise UserError("the model is converted already: its linear layers are BitLinear")
    check_family(model.config, config)
    if config.calibrates and calibration is None:
        raise UserError("calibrated gains need calibration token ids: pass calibration=... or gain='one'")
    if config.form() == TernaryForm():
        return replace_linears(model)
    rows = list(calibration or ()) if config.calibrates else []
    was_training = model.training
    build = _to_bitnet if _is_stock_bitnet(model.config, config) else _to_form
    model.eval()
    converted = build(model, config, rows)
    converted.generation_config = model.generation_config
    converted.train(was_training)
    return converted


def check_family(config: PreTrainedConfig, conversion: ConversionConfig | None = None) -> None:
    """Raise `UserError` unless a model of this configuration can be converted in this way, and its sizes are possible."""
    conversion = conversion or ConversionConfig()
    family_of(config)
    check_shape(config)
    if config.model_type == "bitnet" and conversion.form() != TernaryForm():
        raise UserError("a bitnet model has its norms already: convert it with norm='none', granularity='tensor' and no rotation")
    if conversion.rotation:
        widths = (config.intermediate_size, _attention_width(config))
        if odd := [width for width in widths if block_size(width) == 1]:
            raise UserError(f"a width of {odd[0]} is odd and cannot be rotated: convert without rotation")


def _attention_width(config: PreTrainedConfig) -> int:
    heads = config.num_attention_heads
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))


# ------------------------------------------------------------------------------------------------------- our own form


def _to_form(model: PreTrainedModel, config: ConversionConfig, calibration: list[Tensor]) -> PreTrainedModel:
    family, form = family_of(model.config), config.form()
    count = len(model.get_submodule(family.blocks))  # type: ignore[arg-type]
    moved = {reader: norm for norm, readers in family.pre_norms.items() for reader in readers} if form.norm == "bitlinear" else {}
    inserted = [name for name in normed_layers(family, form.norm) if name not in moved]
    sites = [f"{family.blocks}.{i}.{name}" for i in range(count) for name in inserted]
    statistics = measure_inputs(model, sites, calibration) if config.calibrates else {}
    state = model.state_dict()
    eps = model.config.rms_norm_eps
    for i in range(count):
        block = f"{family.blocks}.{i}"
        for name in inserted:
            width = state[f"{block}.{name}.weight"].shape[1]
            gain, own_eps = _gain(statistics.get(f"{block}.{name}"), eps, config.softness)
            state |= _norm_state(f"{block}.{name}", torch.full((width,), gain), own_eps)
        for name, norm in moved.items():
            # In the norm's own arithmetic: Gemma multiplies by 1 + weight.
            state |= _norm_state(f"{block}.{name}", state[f"{block}.{norm}.weight"].float() + family.norm_offset, eps)
        for norm in set(moved.values()):
            del state[f"{block}.{norm}.weight"]
        for name in family.mixing if form.rotation else ():
            state[f"{block}.{name}.weight"] = rotate(state[f"{block}.{name}.weight"])
    with torch.device("meta"):
        converted: PreTrainedModel = AutoModelForCausalLM.from_config(ternary_config(model.config, form))
    return _assemble(converted, state, model)


def _gain(statistics: InputStatistics | None, eps: float, softness: float) -> tuple[float, float]:
    return (1.0, eps) if statistics is None else soften(statistics, eps, softness)


def _norm_state(layer: str, weight: Tensor, eps: float) -> dict[str, Tensor]:
    return {f"{layer}.in_norm.weight": weight, f"{layer}.in_norm.eps": torch.tensor(eps)}


def _assemble(converted: PreTrainedModel, state: dict[str, Tensor], source: PreTrainedModel) -> PreTrainedModel:
    """Fill a model on the meta device; what no state dict holds (rotary frequencies, scales of embeddings) comes from `source`."""
    for name, module in converted.named_modules():
        if isinstance(module, BitLinear):
            state[f"{name}.quant_lambda"] = torch.ones(())
    converted.load_state_dict(state, assign=True)
    for name, buffer in source.named_buffers():
        if name not in state:
            owner, _, short = name.rpartition(".")
            setattr(converted.get_submodule(owner), short, buffer)
    for parameter in converted.parameters():
        parameter.requires_grad_(True)
    converted.tie_weights()
    return converted


# -------------------------------------------------------------------------------------------------- the stock bitnet


def _is_stock_bitnet(config: PreTrainedConfig, conversion: ConversionConfig) -> bool:
    if not isinstance(config, LlamaConfig) or conversion.form() != TernaryForm(norm="subln"):
        return False
    return not (config.attention_bias or config.mlp_bias) and _attention_width(config) == config.hidden_size


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
    for name in quantized_names(model):
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        model.set_submodule(name, BitLinear.from_linear(module).train(module.training))
    return model


def bitnet_config_from_llama(config: LlamaConfig) -> BitNetConfig:
    """Return the stock BitNet configuration of a SubLN'd Llama without biases whose heads fill its width."""
    heads = config.num_attention_heads
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


def _to_bitnet(model: PreTrainedModel, config: ConversionConfig, calibration: list[Tensor]) -> PreTrainedModel:
    assert isinstance(model, LlamaForCausalLM)
    target = bitnet_config_from_llama(model.config)
    sites = norm_sites(target.num_hidden_layers)
    insertions: dict[str, NormInsertion] = {}
    residual_scale = 1.0
    if config.calibrates:
        statistics = measure_sites(model, sites, calibration)
        insertions, residual_scale = plan_insertions(statistics, target.rms_norm_eps, config.softness)
    return replace_linears(_with_subln(model, target, sites, insertions, residual_scale))


def _with_subln(
    model: PreTrainedModel,
    target: BitNetConfig,
    sites: list[NormSite],
    insertions: dict[str, NormInsertion],
    residual_scale: float,
) -> PreTrainedModel:
    target.rms_norm_eps *= residual_scale**2
    with torch.device("meta"):
        converted = BitNetForCausalLM(target)
    state = model.state_dict()
    reference = state["model.norm.weight"]
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
    return _assemble(converted, state, model)
