"""LRC for a whole model: solved block by block on streamed covariances, or started at random to be trained."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitnet_arch.bitlinear import BitLinear, BitLinearLRC, get_lambda
from bitnet_arch.errors import UserError
from bitnet_arch.families import quantized_names
from bitnet_arch.lrc.adapters import AdapterDtype, check_rank, check_ranks, layer_rank
from bitnet_arch.lrc.covariance import Block, Covariances, run_blocks
from bitnet_arch.lrc.solve import Decomposition, Solution, Start, alternate, fit_adapters, relative_error
from bitnet_arch.modeling import change_form
from bitnet_arch.packed import PackedBitLinear, PackedBitLinearLRC
from bitnet_arch.ptq.model import as_converted, check_epsilon, check_not_ternary, ternary_layers
from bitnet_arch.ptq.quantizers import Method, dequantize, master_weight, quantizer
from bitnet_arch.quant import quantize_weight


@dataclass(frozen=True, kw_only=True, slots=True)
class LRCConfig:
    """How a correction is solved.

    Attributes:
        rank: a whole number, at most the smallest corrected matrix's smaller side, or a share of each layer's smaller side as a
            number below 1.
        dtype: what adapters are stored in: "float16" or "int8".
        quantizer: what rounds weights in the metric of their inputs, see `bitnet_arch.ptq.quantizers`; "keep" leaves the ternary
            weights as they are and fits adapters to them.
        steps: how often weights are rounded and adapters fitted to them, in turn.
        start: what the first rounding starts from: "relaxed" from the weights less the best adapters for a weight that may be any
            real matrix (the paper), "ternary" from the weights.
        epsilon: regularisation, see `bitnet_arch.lrc.covariance.Covariances.regularized`; the paper's 0.01.
        decomposition: "exact", or "randomized" for wide layers and small ranks.

    Raises:
        UserError: for an unknown choice, or one without effect.
    """

    rank: int | float
    dtype: AdapterDtype = "float16"
    quantizer: Method | Literal["keep"] = "gptq"
    steps: int = 1
    start: Start = "relaxed"
    epsilon: float = 0.01
    decomposition: Decomposition = "exact"

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_epsilon(self.epsilon)
        for name, kind in (("dtype", AdapterDtype), ("start", Start), ("decomposition", Decomposition)):
            if getattr(self, name) not in get_args(kind):
                raise UserError(f"unknown {name} {getattr(self, name)!r}: choose {', '.join(get_args(kind))}")
        if type(self.steps) is not int or self.steps < 1:
            raise UserError(f"steps must be a whole number of at least 1, not {self.steps!r}")
        if self.quantizer != "keep":
            quantizer(self.quantizer)
        elif self.steps != 1 or self.start != "relaxed":
            raise UserError("steps and start have no effect with quantizer='keep', which never rounds: leave them out")


@torch.no_grad()
def add_lrc(
    model: PreTrainedModel,
    calibration: Iterable[Tensor],
    config: LRCConfig,
    *,
    weights: Mapping[str, Tensor] | None = None,
    on_layer: Callable[[str, Solution], None] | None = None,
) -> PreTrainedModel:
    """Give every ternary layer of a model a low-rank correction that is solved for on calibration tokens.

    One block's covariances are in memory at a time. They are those of its inputs as the corrected blocks before it produce them;
    inside the block, layers are float while they are measured (with "keep", as they are).

    Args:
        model: a float decoder, which is converted without norms and with one scale a matrix, or a ternary one; its modules move to
            the result, and it must not be used afterwards. A master's float weights are what is approximated: of a model that has
            been trained as ternary they mean nothing, and its adapters can only be trained, see `start_lrc`.
        calibration: token ids, each int64 `[batch, time]`.
        config: what to solve for.
        weights: layer name to the float weight `[out, in]` to approximate, as the layer's own, rotated if the layer rotates; needed
            for a packed model, which has none.
        on_layer: called with each layer's name and solution.

    Returns:
        A model in our own form (`TernaryForm.lrc_rank`) with λ = 1, saved and loaded as any other. Its masters quantise to the
        solution's weights and are frozen, see `BitLinearLRC`.

    Raises:
        UserError: if the rank is above a matrix's, the model has a correction already, is packed and `weights` or "keep" is
            missing, was saved at another λ, or for calibration that cannot be used.
    """
    check_model_rank(model, config.rank)
    model = as_converted(model)
    layers = ternary_layers(model)
    for name, layer in layers.items():
        if isinstance(layer, PackedBitLinear) and (config.quantizer != "keep" or weights is None):
            raise UserError(
                f"{name} is packed: pass its float weights as weights=... and quantizer='keep', or add LRC to the master"
            )
        if weights is not None and (name not in weights or weights[name].shape != (layer.out_features, layer.in_features)):
            raise UserError(
                f"weights has no {name} of {layer.out_features} x {layer.in_features}: pass one for every ternary layer"
            )
    model = _with_form(model, config.rank, config.dtype)

    run_blocks(model, calibration, partial(correct_block, model, config, weights=weights, on_layer=on_layer))
    return model


def correct_block(
    model: PreTrainedModel,
    config: LRCConfig,
    block: Block,
    weights: Mapping[str, Tensor] | None = None,
    on_layer: Callable[[str, Solution], None] | None = None,
) -> None:
    """Solve the corrections of a block's layers: what `run_blocks` is to call for each. Arguments as of `add_lrc`."""
    names = [name for name in quantized_names(model) if name.startswith(block.prefix)]
    layers: dict[str, BitLinear | PackedBitLinear] = {name: model.get_submodule(name) for name in names}  # type: ignore[misc]
    if config.quantizer != "keep":
        for name, layer in layers.items():
            check_not_ternary(name, layer)  # type: ignore[arg-type]
            layer.set_strength(0.0)  # type: ignore[operator]
    covariances = block.covariances(names)
    for name in names:
        layer, found = layers.pop(name), covariances.pop(name).regularized(config.epsilon)  # held no longer than needed
        solution = _solve(layer, layer.weight if weights is None else weights[name], found, config)
        del found
        model.set_submodule(name, _corrected(layer, solution, config))
        if on_layer is not None:
            on_layer(name, solution)


def start_lrc(model: PreTrainedModel, rank: int | float, dtype: AdapterDtype = "float16") -> PreTrainedModel:
    """Give every ternary layer a correction that is zero and can be trained: U = 0, V ~ N(0, 1 / in).

    Train `adapter_parameters` of the result; the base is frozen, see `BitLinearLRC`.

    Args:
        model: float, converted or packed, as for `add_lrc`, trained or not.
        rank: as in `LRCConfig`.
        dtype: as in `LRCConfig`.

    Raises:
        UserError: if the rank is above a matrix's, or the model has a correction already.
    """
    check_model_rank(model, rank)
    model = _with_form(as_converted(model), rank, dtype)
    for name, layer in ternary_layers(model).items():
        k = layer_rank(rank, layer.in_features, layer.out_features, name)
        if isinstance(layer, BitLinear):
            corrected: nn.Module = BitLinearLRC.random(layer, k, dtype)
            layer.weight.requires_grad_(False)
        else:
            corrected = PackedBitLinearLRC.random(layer, k, dtype)
        model.set_submodule(name, corrected)
    return model


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the adapters of a model's layers, which are what is trained."""
    for module in model.modules():
        if isinstance(module, BitLinearLRC | PackedBitLinearLRC):
            yield module.lrc_u
            yield module.lrc_v


def check_model_rank(model: PreTrainedModel, rank: int | float) -> None:
    """Refuse a rank above the smallest matrix that a correction of the model would correct; nothing of the model is read but sizes.

    Raises:
        UserError: naming the layer, its size and the rank.
    """
    layers: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in quantized_names(model)}  # type: ignore[misc]
    check_ranks(rank, {name: (layer.out_features, layer.in_features) for name, layer in layers.items()})


def _with_form(model: PreTrainedModel, rank: int | float, dtype: AdapterDtype) -> PreTrainedModel:
    if any(True for _ in adapter_parameters(model)):
        raise UserError("the model has a low-rank correction already: start from the model without it")
    if get_lambda(model) != 1.0:
        raise UserError(f"the model's lambda is {get_lambda(model):g}: call set_lambda(model, 1.0) before adding a correction")
    packed = any(isinstance(module, PackedBitLinear) for module in model.modules())
    return change_form(model, packed=packed, lrc_rank=rank, lrc_dtype=dtype)


def _solve(layer: BitLinear | PackedBitLinear, target: Tensor, found: Covariances, config: LRCConfig) -> Solution:
    how = config.decomposition
    rank = layer_rank(config.rank, layer.in_features, layer.out_features)
    if config.quantizer == "keep":
        codes, scale = _kept(layer)
        ternary = dequantize(codes, scale)
        u, v = fit_adapters(target, ternary, found, rank, how)
        return Solution(codes=codes, scale=scale, u=u, v=v, errors=(relative_error(target, ternary, found, u, v),))
    assert isinstance(layer, BitLinear)
    return alternate(
        target, found, rank, quantizer(config.quantizer), layer.granularity, steps=config.steps, start=config.start, how=how
    )


def _kept(layer: BitLinear | PackedBitLinear) -> tuple[Tensor, Tensor]:
    if isinstance(layer, PackedBitLinear):
        return layer.codes(), layer.weight_scale if layer.weight_scale.ndim == 2 else layer.weight_scale.reshape(())
    return quantize_weight(layer.weight, layer.granularity)


def _corrected(layer: BitLinear | PackedBitLinear, solution: Solution, config: LRCConfig) -> BitLinearLRC | PackedBitLinearLRC:
    if isinstance(layer, PackedBitLinear):
        return PackedBitLinearLRC(layer, solution.u.float(), solution.v.float(), config.dtype)
    if config.quantizer != "keep":
        layer.weight.copy_(master_weight(solution.codes, solution.scale, layer.granularity))
    layer.set_strength(1.0)
    layer.weight.requires_grad_(False)
    dtype = layer.weight.dtype
    return BitLinearLRC(layer, solution.u.to(dtype), solution.v.to(dtype), config.dtype)
