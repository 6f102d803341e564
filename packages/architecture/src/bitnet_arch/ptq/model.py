"""Post-training ternary for a whole model: block by block, each on what the quantised blocks before it hand over."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitnet_arch.bitlinear import BitLinear, BitLinearLRC, bitlinear_layers, set_lambda
from bitnet_arch.convert import ConversionConfig, convert_model
from bitnet_arch.errors import UserError
from bitnet_arch.families import quantized_names
from bitnet_arch.lrc.covariance import Block, run_blocks
from bitnet_arch.packed import PackedBitLinear, PackedBitLinearLRC
from bitnet_arch.ptq.quantizers import Method, master_weight, quantizer
from bitnet_arch.quant import GROUP

CORRECTED = (
    "has a low-rank correction, which holds for its own weights alone: quantise the model without it, or correct that anew (lrc)"
)
"""What is said of a model that is asked to be quantised under its adapters."""


@torch.no_grad()
def quantize_model(
    model: PreTrainedModel, method: Method, calibration: Iterable[Tensor] | None = None, *, epsilon: float = 0.01
) -> PreTrainedModel:
    """Make a model ternary without gradients.

    A `BitLinear` quantises its master weight by absmean: what another method chose is kept in a master whose absmean quantisation
    it is (`bitnet_arch.ptq.quantizers.master_weight`), exact in the codes and up to float32 rounding in the scales, and the float
    weights are lost; "absmean" itself leaves masters as they are. `pack_model` and `save_packed` make 2-bit layers of it.

    Covariances are those of a block's inputs as the quantised blocks before it produce them; inside the block, layers are still
    float while they are measured.

    Args:
        model: a float decoder, which is converted without norms and with one scale a matrix, or a converted one that has not been
            trained since (`convert_model` chooses norms, scales and rotation); changed in place and not to be used afterwards.
        method: "absmean", "least_squares", "gptq" or "gptq_act_order", see `bitnet_arch.ptq.quantizers`.
        calibration: token ids, each int64 `[batch, time]`; needed by GPTQ, and by least squares to fit scales to the layers' inputs
            instead of to the weights.
        epsilon: damping: what is added to a covariance's diagonal, as a share of its mean.

    Returns:
        λ = 1, with `BitLinear` layers.

    Raises:
        UserError: for an unknown method, missing or useless calibration, a model that is packed or has a low-rank correction, or
            one of no known family.
    """
    check_method(method, calibration, epsilon)
    if any(isinstance(module, BitLinearLRC | PackedBitLinearLRC) for module in model.modules()):
        raise UserError(f"the model {CORRECTED}")
    model = as_converted(model)
    if any(isinstance(module, PackedBitLinear) for module in model.modules()):
        raise UserError("the model is packed and has no float weights to quantise: start from its master or float form")
    if calibration is not None:
        run_blocks(model, calibration, partial(quantize_block, model, method, epsilon))
    else:
        quantize_layers(model, method)
    return model


def check_method(method: str, calibration: Iterable[Tensor] | None, epsilon: float) -> None:
    """Refuse what `quantize_model` cannot do.

    Raises:
        UserError: for an unknown method, missing calibration or some without effect, or an impossible damping.
    """
    quantizer(method)
    if method.startswith("gptq") and calibration is None:
        raise UserError(f"{method} needs calibration token ids: pass calibration=... or choose least_squares")
    if method == "absmean" and calibration is not None:
        raise UserError("absmean looks at weights alone and calibration has no effect on it: leave calibration out")
    check_epsilon(epsilon)


def quantize_block(model: PreTrainedModel, method: Method, epsilon: float, block: Block) -> None:
    """Quantise a block's layers on the covariances of their inputs: what `run_blocks` is to call for each."""
    set_lambda(block.module, 0.0)
    names = [name for name in quantized_names(model) if name.startswith(block.prefix)]
    hessians = block.hessians(names, epsilon)
    for name in names:  # a large one is not held longer than it is needed
        check_not_ternary(name, model.get_submodule(name))  # type: ignore[arg-type]
        _replace(model.get_submodule(name), method, hessians.pop(name).syy)  # type: ignore[arg-type]


@torch.no_grad()
def quantize_layers(module: nn.Module, method: Method) -> None:
    """Quantise layers by their weights alone."""
    if method == "absmean":
        set_lambda(module, 1.0)
        return
    for name, layer in bitlinear_layers(module):
        check_not_ternary(name, layer)
        _replace(layer, method, None)


def check_not_ternary(name: str, layer: BitLinear) -> None:
    """Refuse a layer whose weights have lost what they were rounded from: solving again would move the scale and nothing else.

    Raises:
        UserError: naming the layer, if each of its weights is 0 or, in size, the largest that shares its scale.
    """
    size = layer.weight.detach().abs()
    if layer.granularity == "tensor":
        largest = size.amax().expand_as(size)
    else:
        parts = size.split(GROUP if layer.granularity == "group128" else size.shape[1], dim=1)
        largest = torch.cat([part.amax(dim=1, keepdim=True).expand_as(part) for part in parts], dim=1)
    if bool(((size <= 1e-6 * largest) | (size >= 0.999 * largest)).all()):
        raise UserError(f"{name} is ternary already: start from float weights, or from a master that was trained since")


def _replace(layer: BitLinear, method: Method, hessian: Tensor | None) -> None:
    codes, scale = quantizer(method)(layer.weight, hessian, layer.granularity)
    layer.weight.copy_(master_weight(codes, scale, layer.granularity))
    layer.set_strength(1.0)


def as_converted(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model itself if it has ternary layers, else its conversion without norms."""
    return model if ternary_layers(model) else convert_model(model, ConversionConfig(norm="none"))


def check_epsilon(epsilon: float) -> None:
    """Refuse a damping that is no number of at least 0.

    Raises:
        UserError: for such a value.
    """
    if not 0.0 <= epsilon < float("inf"):
        raise UserError(f"epsilon must be a finite number of at least 0, not {epsilon}")


def ternary_layers(model: nn.Module) -> dict[str, BitLinear | PackedBitLinear]:
    """Return a model's ternary layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, BitLinear | PackedBitLinear)}
