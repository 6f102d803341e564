"""Turn a Hugging Face decoder into a 1.58-bit one.

A conversion is first planned (`plan_conversion`: the configuration of the result and what happens to which tensor) and then carried
out: on a model in memory by `convert_model`, from directory to directory by `bitnet_arch.stream`.

What a family looks like is said in `bitnet_arch.families`, never by a model's name. The result is a stock model wherever stock
`transformers` can express it: a Llama without biases with SubLN becomes `model_type: bitnet`, which is exactly that, and a model
without added norms stays what it is. Everything else becomes a model in our own form, see `bitnet_arch.modeling`.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitNetConfig, LlamaConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from bitnet_arch.bitlinear import BitLinear
from bitnet_arch.calibration import check_calibration, max_positions
from bitnet_arch.configs import check_shape, quantization_block
from bitnet_arch.diffusion import DIFFUSION_KEY, diffusion_of
from bitnet_arch.errors import UserError
from bitnet_arch.families import checked_names, family_of, linear_layer, norm_epsilon, quantized_names
from bitnet_arch.hadamard import block_size, rotate
from bitnet_arch.modeling import Placement, TernaryForm, form_of, normed_layers, ternary_config
from bitnet_arch.quant import Granularity, absmean_scale, expand_scale
from bitnet_arch.shards import check_finite
from bitnet_arch.subln import (
    InputStatistics,
    NormInsertion,
    NormSite,
    NormStatistics,
    measure_inputs,
    plan_insertions,
    soften,
)

SOFTNESS = 0.1
"""Softness unless another is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionConfig:
    """What a conversion does.

    Attributes:
        norm: where RMSNorms are inserted. "subln": before `o_proj` and `down_proj` (placement B of BitNet b1.58 2B4T).
            "allnorm": in every ternary layer (placement C of the released BitDistill code). "bitlinear": the same, in place of the
            block's pre-norms, whose gains move into the layers (placement A of the b1.58 paper). "none" only makes linear layers
            ternary.
        gain: initial gain of an inserted norm: "calibrated" measures it on calibration tokens (for pretrained weights), "one"
            starts at 1 (for random weights). Refused where no norm is inserted.
        softness: with calibrated gains, the norms' effective epsilon as a multiple of the largest mean square seen in
            calibration; 0 inserts a plain norm, large values approach the identity. See `bitnet_arch.subln`. Refused where nothing
            is calibrated.
        granularity: how many weights share a scale: "tensor", "row" or "group128".
        rotation: rotate the inputs of `o_proj` and `down_proj` (BitNet v2), see `bitnet_arch.hadamard`.

    Raises:
        UserError: for an unknown choice, or one without effect: a gain or softness other than the default.
    """

    norm: Placement = "subln"
    gain: Literal["calibrated", "one"] = "calibrated"
    softness: float = SOFTNESS
    granularity: Granularity = "tensor"
    rotation: bool = False

    def __post_init__(self) -> None:
        if self.norm not in get_args(Placement):
            raise UserError(f"unknown norm placement {self.norm!r}: choose {', '.join(get_args(Placement))}")
        if self.gain not in ("calibrated", "one"):
            raise UserError(f"unknown gain {self.gain!r}: choose calibrated or one")
        if not 0.0 <= self.softness < float("inf"):
            raise UserError(f"softness must be a finite number of at least 0, not {self.softness}")
        given = [name for name, value in (("gain", "calibrated"), ("softness", SOFTNESS)) if getattr(self, name) != value]
        if self.norm == "none" and given:
            raise UserError(f"{given[0]}={getattr(self, given[0])!r} has no effect with norm='none': leave one of them out")
        if self.gain == "one" and "softness" in given:
            raise UserError(f"softness={self.softness!r} has no effect with gain='one': leave one of them out")
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
        UserError: for a family that is not known or described wrongly, a model that is ternary already, a weight that is NaN or
            infinite, or calibration that is missing, has no effect, or that `check_calibration` refuses.
    """
    config = config or ConversionConfig()
    if any(isinstance(module, BitLinear) for module in model.modules()):
        raise UserError("the model is converted already: its linear layers are BitLinear")
    check_family(model.config, config)
    check_needs(config, calibration)
    names = checked_names(model)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach())
    if config.form() == TernaryForm():
        for name in names:
            weight = model.get_parameter(f"{name}.weight")
            weight.data = keep_ternary(weight.detach(), "tensor")
        return replace_linears(model)
    rows = []
    if calibration is not None:
        embedding: Any = model.get_submodule(family_of(model.config).embedding)
        rows = check_calibration(calibration, embedding.num_embeddings, max_positions(model.config))
    was_training = model.training
    model.eval()
    plan = plan_conversion(model.config, config, _State(model.state_dict()), partial(measure_inputs, model, calibration=rows))
    converted = carry_out(plan, model)
    converted.train(was_training)
    return converted


def check_needs(conversion: ConversionConfig, calibration: object | None) -> None:
    """Raise `UserError` where calibration is missing, or given and without effect."""
    if conversion.calibrates and calibration is None:
        raise UserError("calibrated gains need calibration token ids: pass calibration=... or gain='one'")
    if not conversion.calibrates and calibration is not None:
        what = "norm='none' inserts no norms" if conversion.norm == "none" else f"gain={conversion.gain!r} measures nothing"
        raise UserError(f"{what}, so that calibration has no effect: leave it out")


def check_family(config: PreTrainedConfig, conversion: ConversionConfig | None = None) -> None:
    """Raise `UserError` unless a model of this configuration can be converted in this way, and its sizes are possible."""
    conversion = conversion or ConversionConfig()
    family_of(config)
    check_shape(config)
    if config.model_type == "bitnet" and conversion.form() != TernaryForm():
        raise UserError("a bitnet model has its norms already: convert it with norm='none', granularity='tensor' and no rotation")
    if conversion.rotation:
        widths = (getattr(config, "intermediate_size", None), _attention_width(config))  # GPT-2's has another name
        if odd := [width for width in widths if width is not None and block_size(width) == 1]:
            raise UserError(f"a width of {odd[0]} is odd and cannot be rotated: convert without rotation")


def _attention_width(config: PreTrainedConfig) -> int:
    heads = config.num_attention_heads
    return int(heads * (getattr(config, "head_dim", None) or config.hidden_size // heads))


# ------------------------------------------------------------------------------------------------------------ planning


class Source(Protocol):
    """Where a conversion looks at the tensors of the float model."""

    def get(self, name: str) -> Tensor:
        """Return a tensor."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        ...


@dataclass(frozen=True)
class _State:
    tensors: dict[str, Tensor]

    def get(self, name: str) -> Tensor:
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)


Measure = Callable[[list[str]], dict[str, InputStatistics]]
"""Maps names of layers to what calibration measured at their inputs."""


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What a conversion does to a model's tensors.

    Attributes:
        target: the configuration of the result.
        added: tensors that the source lacks.
        dropped: tensors of the source that the result lacks.
        edits: what happens to tensors, row by row: the first dimension may be cut into pieces.
        granularity: how many weights of a ternary layer share a scale.
    """

    target: PreTrainedConfig
    added: dict[str, Tensor] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    edits: dict[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    granularity: Granularity = "tensor"

    def master(self, name: str, tensor: Tensor) -> Tensor:
        """Return the master weight that a ternary layer of the result has."""
        return keep_ternary(self.edit(name, tensor), self.granularity)

    def edit(self, name: str, tensor: Tensor) -> Tensor:
        """Return what the result has in place of a tensor, or of some of its rows."""
        return self.edits[name](tensor) if name in self.edits else tensor


def plan_conversion(config: PreTrainedConfig, conversion: ConversionConfig, source: Source, measure: Measure) -> ConversionPlan:
    """Plan a conversion.

    Args:
        config: of the float model; see `check_family`.
        conversion: what to do.
        source: the model's tensors.
        measure: called at most once, and only if the conversion calibrates.

    Raises:
        UserError: if calibration meets activations that are not finite.
    """
    if conversion.form() == TernaryForm():
        return ConversionPlan(target=config)
    plan = _plan_bitnet if _is_stock_bitnet(config, conversion) else _plan_form
    return plan(config, conversion, source, partial(_finite_statistics, measure))


def _finite_statistics(measure: Measure, names: list[str]) -> dict[str, InputStatistics]:
    statistics = measure(names)
    for name, found in statistics.items():
        if not found.maximum < float("inf"):  # NaN is not below it, either
            raise UserError(f"the input of {name} is not finite on the calibration tokens: this model cannot be calibrated")
    return statistics


def keep_ternary(weight: Tensor, granularity: Granularity) -> Tensor:
    """Return a master weight whose quantisation is the weight itself, if that is ternary already; else the weight.

    A ternary model that was stored dequantised holds only -s, 0 and s. Its absmean is not s but s times the share of nonzero
    weights, so that quantising it again would shrink every layer's output by that share. Scaled up, it comes out as it was.

    Args:
        weight: `[out, in]`, floating point.
        granularity: of the layer.
    """
    if not _is_ternary(weight[:1]) or not _is_ternary(weight) or not weight.any():  # a row tells nearly every float matrix
        return weight
    largest = weight.abs().max()
    factor = largest.float() / absmean_scale(weight, granularity)
    return (weight.float() * expand_scale(factor, weight.shape[1])).to(weight.dtype)


def _is_ternary(weight: Tensor) -> bool:
    magnitude = weight.abs()
    return bool(((magnitude == magnitude.max()) | (magnitude == 0)).all())


def _plan_form(config: PreTrainedConfig, conversion: ConversionConfig, source: Source, measure: Measure) -> ConversionPlan:
    family, form, eps = family_of(config), conversion.form(), norm_epsilon(config)
    moved = {reader: norm for norm, readers in family.pre_norms.items() for reader in readers} if form.norm == "bitlinear" else {}
    inserted = [name for name in normed_layers(family, form.norm) if name not in moved]
    blocks = [f"{family.blocks}.{i}" for i in range(config.num_hidden_layers)]
    sites = [f"{block}.{name}" for block in blocks for name in inserted]
    statistics = measure(sites) if conversion.calibrates else {}
    added: dict[str, Tensor] = {}
    for site in sites:
        gain, own_eps = _gain(statistics.get(site), eps, conversion.softness)
        added |= _norm_state(site, torch.full((source.shape(f"{site}.weight")[1],), gain), own_eps)
    for block in blocks:
        for name, norm in moved.items():
            # In the norm's own arithmetic: Gemma multiplies by 1 + weight.
            added |= _norm_state(f"{block}.{name}", source.get(f"{block}.{norm}.weight").float() + family.norm_offset, eps)
    return ConversionPlan(
        target=ternary_config(config, form),
        added=added,
        dropped=frozenset(f"{block}.{norm}.weight" for block in blocks for norm in moved.values()),
        edits={f"{block}.{name}.weight": rotate for block in blocks for name in family.mixing} if form.rotation else {},
        granularity=form.granularity,
    )


def _gain(statistics: InputStatistics | None, eps: float, softness: float) -> tuple[float, float]:
    return (1.0, eps) if statistics is None else soften(statistics, eps, softness)


def _norm_state(layer: str, weight: Tensor, eps: float) -> dict[str, Tensor]:
    return {f"{layer}.in_norm.weight": weight, f"{layer}.in_norm.eps": torch.tensor(eps)}


# -------------------------------------------------------------------------------------------------------- carrying out


@torch.no_grad()
def carry_out(plan: ConversionPlan, model: PreTrainedModel) -> PreTrainedModel:
    """Convert a model in memory; the result shares what the plan leaves as it is."""
    state = {name: plan.edit(name, tensor) for name, tensor in model.state_dict().items() if name not in plan.dropped}
    for layer in quantized_names(model):
        state[f"{layer}.weight"] = keep_ternary(state[f"{layer}.weight"], plan.granularity)
    if model.config.tie_word_embeddings:
        family = family_of(model.config)
        state[f"{family.head}.weight"] = state[f"{family.embedding}.weight"]
    state |= plan.added
    with torch.device("meta"):
        converted: PreTrainedModel = AutoModelForCausalLM.from_config(plan.target)
    return _assemble(with_layers(converted), state, model)


def with_layers(converted: PreTrainedModel) -> PreTrainedModel:
    """Make a model on the meta device ternary that is not by its class."""
    return converted if form_of(converted.config) is not None else replace_linears(converted)


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
    converted.generation_config = source.generation_config
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


def replace_linears(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the seven linear layers of every block by `BitLinear`, in place, sharing parameters; return the model.

    The configuration says so from then on, so that `save_pretrained`, which other trainers call, loses nothing.

    Raises:
        UserError: if one of them is no `nn.Linear`.
    """
    for name in quantized_names(model):
        module = linear_layer(model, name)
        model.set_submodule(name, BitLinear.from_linear(module).train(module.training))
    model.config.quantization_config = quantization_block("autobitlinear", "online", family_of(model.config).head)
    return model


def bitnet_config_from_llama(config: LlamaConfig) -> BitNetConfig:
    """Return the stock BitNet configuration of a SubLN'd Llama without biases whose heads fill its width."""
    heads = config.num_attention_heads
    bitnet = BitNetConfig(
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
    if (diffusion := diffusion_of(config)) is not None:
        setattr(bitnet, DIFFUSION_KEY, asdict(diffusion))
    return bitnet


def _plan_bitnet(config: PreTrainedConfig, conversion: ConversionConfig, source: Source, measure: Measure) -> ConversionPlan:
    assert isinstance(config, LlamaConfig)
    target = bitnet_config_from_llama(config)
    sites = norm_sites(target.num_hidden_layers)
    insertions: dict[str, NormInsertion] = {}
    residual_scale = 1.0
    if conversion.calibrates:
        if not target.rms_norm_eps:
            raise UserError("the model's rms_norm_eps is 0, which no gain softens: convert it with gain='one', or set an epsilon")
        inputs = measure([site.consumer for site in sites])
        statistics = {}
        for site in sites:
            found, producer = inputs[site.consumer], source.get(f"{site.producer}.weight")
            statistics[site.norm] = NormStatistics(found.median, found.maximum, float(producer.detach().float().abs().mean()))
        insertions, residual_scale = plan_insertions(statistics, target.rms_norm_eps, conversion.softness)
    target.rms_norm_eps *= residual_scale**2
    reference = source.get("model.norm.weight")
    added: dict[str, Tensor] = {}
    edits: dict[str, Callable[[Tensor], Tensor]] = {}
    for site in sites:
        insertion = insertions.get(site.norm, NormInsertion())
        added[f"{site.norm}.weight"] = reference.new_full(source.shape(f"{site.consumer}.weight")[1:], insertion.gain)
        if insertion.input_scale != 1.0:
            edits[f"{site.producer}.weight"] = partial(torch.mul, other=insertion.input_scale)
    if residual_scale != 1.0:
        edits["model.embed_tokens.weight"] = partial(torch.mul, other=residual_scale)
        if target.tie_word_embeddings:
            edits["model.norm.weight"] = partial(torch.mul, other=1.0 / residual_scale)  # a power of two: exact
    return ConversionPlan(target=target, added=added, edits=edits)
