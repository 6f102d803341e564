"""Decoders that stock `transformers` cannot express: any family with norms on its ternary layers, finer scales or a rotation.

For each family of `bitnet_arch.families` there is a configuration and a model class, subclasses of the stock ones, registered
with `AutoConfig` and `AutoModelForCausalLM` under the `model_type` `wrinklefree-FAMILY` when `bitnet_arch` is imported. The
configuration holds one more key, `ternary`: the fields of `TernaryForm`. Tensors keep the family's names; new ones are
`LAYER.in_norm.weight`, `LAYER.in_norm.eps`, `LAYER.lrc_u` `[out, rank]`, `LAYER.lrc_v` `[in, rank]` and, packed,
`LAYER.weight_scale` (beta, which multiplies).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bitnet_arch.bitlinear import LAMBDA_KEY, BitLinear, BitLinearLRC, bitlinear_layers
from bitnet_arch.errors import UserError
from bitnet_arch.families import FAMILIES, PREFIX, Family, base_type, family_of, linear_layer, norm_epsilon, quantized_names
from bitnet_arch.lrc.adapters import AdapterDtype, check_rank, layer_rank
from bitnet_arch.norm import SubLN, check_epsilon
from bitnet_arch.packed import PackedBitLinear, PackedBitLinearLRC
from bitnet_arch.packing import check_packed
from bitnet_arch.quant import Granularity

Placement = Literal["none", "subln", "bitlinear", "allnorm"]
"""Where RMSNorms sit on ternary layers: nowhere; before the layers that mix (placement B: BitNet b1.58 2B4T); in every layer, in
place of the block's own pre-norms (placement A: the b1.58 paper); in every layer beside them (placement C: the released BitDistill
code)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TernaryForm:
    """What is special about a model's ternary layers.

    Attributes:
        norm: where norms sit.
        granularity: how many weights share a scale.
        rotation: whether the inputs of the mixing layers are rotated (BitNet v2).
        packed: whether weights are 2-bit codes instead of float masters.
        lrc_rank: rank of the low-rank correction of each layer: a whole number, at most the smallest layer's smaller side, or a
            share of each layer's smaller side as a number below 1; 0 for none. See `bitnet_arch.lrc`.
        lrc_dtype: what the correction's adapters are stored in.

    Raises:
        UserError: for an unknown choice.
    """

    norm: Placement = "none"
    granularity: Granularity = "tensor"
    rotation: bool = False
    packed: bool = False
    lrc_rank: int | float = 0
    lrc_dtype: AdapterDtype = "float16"

    def __post_init__(self) -> None:
        named = {"norm": Placement, "granularity": Granularity, "lrc_dtype": AdapterDtype}
        for name, choices in ((name, get_args(kind)) for name, kind in named.items()):
            if getattr(self, name) not in choices:
                raise UserError(f"unknown {name} {getattr(self, name)!r}: choose {', '.join(choices)}")
        for name in ("rotation", "packed"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} must be true or false, not {getattr(self, name)!r}")
        if type(self.lrc_rank) is not int or self.lrc_rank != 0:
            check_rank(self.lrc_rank)


def form_of(config: PreTrainedConfig) -> TernaryForm | None:
    """Return the form of a model of ours, None for a stock one.

    Raises:
        UserError: if the configuration's `ternary` is damaged.
    """
    if not config.model_type.startswith(PREFIX):
        return None
    fields = getattr(config, "ternary", None)
    if not isinstance(fields, dict) or set(fields) - set(TernaryForm.__dataclass_fields__):
        raise UserError(f"the configuration's key 'ternary' is damaged or of a newer version: {fields!r:.80}")
    return TernaryForm(**fields)


def normed_layers(family: Family, norm: Placement) -> tuple[str, ...]:
    """Return which of a block's linear layers have a norm on their input."""
    return {"none": (), "subln": family.mixing, "bitlinear": family.linears, "allnorm": family.linears}[norm]


def build_layers(model: PreTrainedModel, form: TernaryForm) -> None:
    """Replace a stock decoder's linear layers by ternary ones of a form, in place; placement A also takes out the pre-norms.

    Parameters are shared with the layers that are replaced; norms start with gain 1.
    """
    family = family_of(model.config)
    normed = {name.rsplit(".", 1)[-1] for name in normed_layers(family, form.norm)}
    mixing = {name.rsplit(".", 1)[-1] for name in family.mixing}
    for name in quantized_names(model):
        linear = linear_layer(model, name)
        short, device = name.rsplit(".", 1)[-1], linear.weight.device
        layer: nn.Module = BitLinear.from_linear(
            linear,
            granularity=form.granularity,
            in_norm=SubLN(linear.in_features, norm_epsilon(model.config), device) if short in normed else None,
            rotation=form.rotation and short in mixing,
        ).train(linear.training)
        if form.lrc_rank:
            assert isinstance(layer, BitLinear)
            rank = layer_rank(form.lrc_rank, linear.in_features, linear.out_features, name)
            layer = BitLinearLRC.random(layer, rank, form.lrc_dtype)
        if form.packed:
            layer = PackedBitLinear.like(layer)  # type: ignore[arg-type]
        model.set_submodule(name, layer)
    if form.norm == "bitlinear":
        for block in model.get_submodule(family.blocks):  # type: ignore[attr-defined]
            for name in family.pre_norms:
                block.set_submodule(name, nn.Identity())


def ternary_config(base: PreTrainedConfig, form: TernaryForm) -> PreTrainedConfig:
    """Return the configuration of a family's model in a form.

    Args:
        base: the stock configuration.
        form: the form.
    """
    values = base.to_dict()
    kind = PREFIX + values.pop("model_type")
    values.pop("architectures", None)
    config: PreTrainedConfig = AutoConfig.for_model(kind, **values, ternary=asdict(form))
    return config


def change_form(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """Return a model whose class and configuration say another form; its layers are for the caller to bring in line.

    Args:
        model: stock or in our own form; its submodules move to the result, and it must not be used afterwards.
        changes: fields of `TernaryForm` that change; of a stock model, the others have their defaults.
    """
    old = model.config
    values = old.to_dict()
    for name in ("model_type", "ternary", "quantization_config"):
        values.pop(name, None)
    base = AutoConfig.for_model(base_type(old), **values)
    config = ternary_config(base, replace(form_of(old) or TernaryForm(), **changes))
    with torch.device("meta"):
        changed: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    for name, child in model.named_children():
        setattr(changed, name, child)
    for module in changed.modules():
        if getattr(module, "config", None) is old:
            module.config = config  # type: ignore[assignment]
    changed.generation_config = model.generation_config
    changed.tie_weights()
    changed.train(model.training)
    return changed


def register(model_type: str) -> None:
    """Register our classes of a family with transformers; twice is once.

    Raises:
        UserError: if transformers has no such decoder.
    """
    if PREFIX + model_type in CONFIG_MAPPING:
        return
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"transformers has no decoder with model_type {model_type!r}")
    stock_config = CONFIG_MAPPING[model_type]
    stock_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[stock_config]
    config_class = type(
        f"Ternary{stock_config.__name__}",
        (stock_config,),
        {"model_type": PREFIX + model_type, "__module__": __name__, "__doc__": f"{stock_config.__name__} with a `ternary` form."},
    )
    model_class = type(
        f"Ternary{stock_model.__name__}",
        (_Ternary, stock_model),
        {
            "config_class": config_class,
            "_keys_to_ignore_on_load_missing": [rf"{LAMBDA_KEY}$"],
            "__module__": __name__,
            "__doc__": f"{stock_model.__name__} with ternary layers.",
        },
    )
    AutoConfig.register(PREFIX + model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)


def register_family(model_type: str, family: Family) -> None:
    """Make a family known to conversion, checkpoints and `AutoModelForCausalLM`.

    Args:
        model_type: the `model_type` of its stock configuration.
        family: its description.

    Raises:
        UserError: if transformers has no such decoder, or another description is registered already.
    """
    if FAMILIES.get(model_type, family) != family:
        raise UserError(f"the family {model_type!r} is described already, in another way")
    register(model_type)
    FAMILIES[model_type] = family


class _Ternary(PreTrainedModel):
    """What our classes add to a family's: ternary layers, and values for what no checkpoint holds."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        build_layers(self, form_of(config) or TernaryForm())

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as stock transformers does; a lambda that was saved is the one that the layers compute with.

        Raises:
            UserError: if packed codes or a norm's epsilon are damaged, of which the layers' own loading is not told here.
        """
        result = super().from_pretrained(*args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        for _, layer in bitlinear_layers(model):
            layer.set_strength(float(layer.quant_lambda))
        for name, module in model.named_modules():
            if isinstance(module, PackedBitLinear) and not module.weight.is_meta:
                check_packed(module.weight)
            if isinstance(module, SubLN) and not module.eps.is_meta:
                check_epsilon(f"{name}.eps", float(module.eps))
        return result

    def _move_missing_keys_from_meta_to_device(self, missing_keys: list[str], *args: Any, **kwargs: Any) -> None:
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)
        for key in missing_keys:  # what `_init_weights` sees is decided by parameters alone
            if key.endswith(f".{LAMBDA_KEY}"):
                layer = self.get_submodule(key.removesuffix(f".{LAMBDA_KEY}"))
                assert isinstance(layer, BitLinear)
                layer.set_strength(1.0)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if isinstance(module, BitLinear):
            module.set_strength(1.0)
        if isinstance(module, BitLinearLRC | PackedBitLinearLRC) and not getattr(module.lrc_v, "_is_hf_initialized", False):
            module.lrc_u.zero_()
            module.lrc_v.normal_(std=module.in_features**-0.5)
        if isinstance(module, SubLN) and not getattr(module.weight, "_is_hf_initialized", False):
            module.weight.fill_(1.0)
            module.eps.fill_(norm_epsilon(self.config))


for _known in FAMILIES:
    register(_known)
